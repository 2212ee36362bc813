//! Linear maps of [`Panels`].

use std::ops::Range;

use bsbr_weights::{Arithmetic, Matrix};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    activation::{Activation, activated},
    panels::Panels,
    scratch::Scratch,
    weights,
};

/// Outputs computed together: their sums for a strip of tokens fill the registers.
const OUTPUTS: usize = 6;

/// Outputs to a task: their weights stay in the cache nearest to the core while the strips pass by.
const BLOCK: usize = 8 * OUTPUTS;

/// Tasks that a thread gets where tokens are few: enough that one that was held up does not keep the others waiting.
const TASKS_OF_A_THREAD: usize = 4;

/// Tokens that stand as rows for which weights are read once, at most.
const FEW_TOKENS: usize = 8;

/// `weight x + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// `[outputs, inputs]`, as it is stored.
    pub weight: Matrix<'a>,
    /// One to an output.
    pub bias: Option<&'a [f32]>,
    /// What few tokens are multiplied in.
    pub arithmetic: Arithmetic,
}

impl<'a> Linear<'a> {
    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// Some of the outputs.
    fn part(&self, outputs: Range<usize>) -> Self {
        Self { weight: self.weight.rows(outputs.clone()), bias: self.bias.map(|bias| &bias[outputs]), ..*self }
    }

    /// The weights in f32: as they are, or widened into `room`.
    fn widened<'b>(&self, arch: pulp::Arch, room: &'b mut Option<Scratch>) -> Wide<'b>
    where
        'a: 'b,
    {
        let inputs = self.weight.inputs();
        let numbers = match self.weight.as_f32() {
            Some(numbers) => numbers,
            None => {
                let room = room.insert(Scratch::new(self.weight.outputs() * inputs));
                weights::widen(arch, self.weight, room);
                room
            }
        };
        Wide { numbers, inputs, bias: self.bias }
    }

    /// Whether few tokens are multiplied as codes.
    fn takes_codes(&self) -> bool {
        self.arithmetic == Arithmetic::Int8 && self.weight.format().has_groups()
    }

    fn check(&self, inputs: usize) {
        assert_eq!(self.weight.inputs(), inputs, "a map of {} inputs got {inputs}", self.weight.inputs());
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), self.outputs(), "biases of {} outputs", self.outputs());
        }
    }
}

/// Weights in f32 and the bias.
#[derive(Clone, Copy)]
struct Wide<'a> {
    numbers: &'a [f32],
    inputs: usize,
    bias: Option<&'a [f32]>,
}

/// What becomes of the outputs.
#[derive(Debug, Clone, Copy)]
enum Finish<'a> {
    Plain,
    Activated(Activation),
    /// `activation(gate x) * (up x)`: the map of the gate.
    Gated(Activation, Linear<'a>),
}

/// What each of `maps` makes of the same input.
///
/// # Panics
///
/// If a map has other inputs than `x` is wide, or weights or biases of another number.
pub fn project(x: &Panels, maps: &[Linear<'_>]) -> Vec<Panels> {
    let mut outputs: Vec<Panels> = maps.iter().map(|map| output(x, map)).collect();
    let mut tasks = Vec::new();
    for (map, out) in maps.iter().zip(&mut outputs) {
        tasks.extend(split(x, *map, Finish::Plain, out));
    }
    run(tasks);
    outputs
}

/// The same of maps some of which pass inputs on, with an order of the inputs: output `i` of such a map is input `order[i]`
/// and what the map makes of the inputs `order[outputs..]`.
///
/// # Panics
///
/// As [`project`], and if an order is not as long as `x` is wide, names no input or comes with a bias.
pub fn project_passing(x: &Panels, maps: &[(Linear<'_>, Option<&[u32]>)]) -> Vec<Panels> {
    let ordered: Vec<Option<Panels>> = maps.iter().map(|(_, order)| order.map(|order| x.ordered(order))).collect();
    let inputs = |ordered: &'_ Option<Panels>, map: &Linear<'_>| match ordered {
        Some(_) => x.width().saturating_sub(map.outputs()),
        None => x.width(),
    };
    let of = |((map, order), ordered): (&(Linear<'_>, Option<&[u32]>), &Option<Panels>)| {
        map.check(inputs(ordered, map));
        assert!(order.is_none() || map.bias.is_none(), "a map that passes inputs on adds no bias");
        Panels::new(x.arch, x.tokens(), map.outputs(), x.lanes())
    };
    let mut outputs: Vec<Panels> = maps.iter().zip(&ordered).map(of).collect();
    let mut tasks = Vec::new();
    for (((map, order), ordered), out) in maps.iter().zip(&ordered).zip(&mut outputs) {
        let passed = order.map_or(0, |_| map.outputs());
        let blocks = blocks(ordered.as_ref().unwrap_or(x), *map, Finish::Plain);
        tasks.extend(place(blocks.map(|task| Task { passed, ..task }).collect(), out));
    }
    run(tasks);
    outputs
}

/// For each of `joined` the outputs of its maps side by side, each map of an input of its own. None may be without maps.
///
/// # Panics
///
/// As [`project`], and if the inputs are of different numbers of tokens or there is none.
pub fn project_joined(joined: &[Vec<(&Panels, Linear<'_>)>]) -> Vec<Panels> {
    let of = |parts: &Vec<(&Panels, Linear<'_>)>| {
        let (first, _) = parts[0];
        for (x, map) in parts {
            map.check(x.width());
            assert_eq!((x.tokens(), x.lanes()), (first.tokens(), first.lanes()), "inputs of other numbers of tokens");
        }
        let total = parts.iter().map(|(_, map)| map.outputs()).sum();
        Panels::new(first.arch, first.tokens(), total, first.lanes())
    };
    let mut outputs: Vec<Panels> = joined.iter().map(of).collect();
    let mut tasks = Vec::new();
    for (parts, out) in joined.iter().zip(&mut outputs) {
        let blocks = parts.iter().flat_map(|(x, map)| blocks(x, *map, Finish::Plain));
        tasks.extend(place(blocks.collect(), out));
    }
    run(tasks);
    outputs
}

/// The inner numbers of an MLP: `activation(up x)`, or `activation(gate x) * (up x)`.
///
/// # Panics
///
/// As [`project`], and if `gate` and `up` have different numbers of outputs.
pub fn gated(x: &Panels, gate: Option<Linear<'_>>, up: Linear<'_>, activation: Activation) -> Panels {
    let finish = match gate {
        Some(gate) => {
            gate.check(x.width());
            assert_eq!(gate.outputs(), up.outputs(), "gate and up differ in their outputs");
            Finish::Gated(activation, gate)
        }
        None => Finish::Activated(activation),
    };
    let mut out = output(x, &up);
    run(split(x, up, finish, &mut out));
    out
}

fn output(x: &Panels, map: &Linear<'_>) -> Panels {
    map.check(x.width());
    Panels::new(x.arch, x.tokens(), map.outputs(), x.lanes())
}

/// Some outputs for all tokens.
struct Task<'a> {
    x: &'a Panels,
    map: Linear<'a>,
    /// So many inputs come before those that are multiplied: the sums start from them.
    passed: usize,
    finish: Finish<'a>,
    outputs: Range<usize>,
    /// Where they go, one slice to a strip.
    out: Vec<&'a mut [f32]>,
}

/// One task for each block of outputs.
fn split<'a>(x: &'a Panels, map: Linear<'a>, finish: Finish<'a>, out: &'a mut Panels) -> Vec<Task<'a>> {
    place(blocks(x, map, finish).collect(), out)
}

/// The same before it is known where the outputs go.
fn blocks<'a>(x: &'a Panels, map: Linear<'a>, finish: Finish<'a>) -> impl Iterator<Item = Task<'a>> {
    let total = map.outputs();
    let size = match x.lanes() {
        // Weights are read once for so few tokens; for more they stay in a cache meanwhile, as for strips.
        1 if x.tokens() <= FEW_TOKENS => {
            total.div_ceil(TASKS_OF_A_THREAD * rayon::current_num_threads()).next_multiple_of(8).max(BLOCK)
        }
        _ => BLOCK,
    };
    let starts = (0..total).step_by(size);
    let task = move |start: usize| start..(start + size).min(total);
    starts.map(move |start| Task { x, map, passed: 0, finish, outputs: task(start), out: Vec::new() })
}

/// Gives the tasks their places in `out`, one after the other.
fn place<'a>(mut tasks: Vec<Task<'a>>, out: &'a mut Panels) -> Vec<Task<'a>> {
    let lanes = out.lanes();
    let strip = (out.width() * lanes).max(1);
    for mut rest in out.data.chunks_exact_mut(strip) {
        for task in &mut tasks {
            let (block, after) = rest.split_at_mut(task.outputs.len() * lanes);
            task.out.push(block);
            rest = after;
        }
    }
    tasks
}

fn run(tasks: Vec<Task<'_>>) {
    // Codes are made before the tasks begin: threads that wait for each other's sleep.
    for task in &tasks {
        if task.maps().any(|map| task.in_codes(map)) {
            task.x.codes();
        }
    }
    // One by one: threads take turns at what is left, and none waits long for the last.
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let arch = task.x.arch;
        arch.dispatch(task);
    });
}

impl WithSimd for Task<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.x.lanes() == 1 {
            return self.rows(simd);
        }
        match self.x.lanes() / S::F32_LANES {
            1 => self.strips::<S, 1>(simd),
            2 => self.strips::<S, 2>(simd),
            _ => self.strips::<S, 4>(simd),
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn strips<S: Simd, const V: usize>(self, simd: S) {
        let (mut room, mut gate_room) = (None, None);
        let arch = self.x.arch;
        let map = self.map.part(self.outputs.clone());
        let map = map.widened(arch, &mut room);
        let gate = match self.finish {
            Finish::Gated(activation, gate) => Some((activation, gate.part(self.outputs.clone()))),
            Finish::Plain | Finish::Activated(_) => None,
        };
        let gate = gate.as_ref().map(|(activation, gate)| (*activation, gate.widened(arch, &mut gate_room)));
        for ((strip, _), out) in self.x.strips().zip(self.out) {
            let (passed, x) = S::as_simd_f32s(strip).0.as_chunks::<V>().0.split_at(self.passed);
            let passed = passed.get(self.outputs.clone()).unwrap_or_default();
            let out = S::as_mut_simd_f32s(out).0.as_chunks_mut::<V>().0;
            for (at, out) in out.chunks_mut(OUTPUTS).enumerate() {
                let first = at * OUTPUTS;
                let mut sums = outputs(simd, x, map, first, passed);
                if let Finish::Activated(activation) = self.finish {
                    for sum in sums.as_flattened_mut() {
                        *sum = activated(simd, activation, *sum);
                    }
                }
                if let Some((activation, gate)) = gate {
                    let gates = outputs(simd, x, gate, first, &[]);
                    for (sum, &gate) in sums.as_flattened_mut().iter_mut().zip(gates.as_flattened()) {
                        *sum = simd.mul_f32s(activated(simd, activation, gate), *sum);
                    }
                }
                out.copy_from_slice(&sums[..out.len()]);
            }
        }
    }
}

impl<'a> Task<'a> {
    /// Its maps.
    fn maps(&self) -> impl Iterator<Item = &Linear<'a>> {
        let gate = match &self.finish {
            Finish::Gated(_, gate) => Some(gate),
            Finish::Plain | Finish::Activated(_) => None,
        };
        std::iter::once(&self.map).chain(gate)
    }

    /// Whether the input meets a map as codes.
    fn in_codes(&self, map: &Linear<'_>) -> bool {
        self.x.lanes() == 1 && self.passed == 0 && map.takes_codes()
    }

    /// The same for tokens that stand as rows: few tokens, for which reading the weights is what takes the time.
    #[inline(always)]
    fn rows<S: Simd>(self, simd: S) {
        let (arch, count, width) = (self.x.arch, self.outputs.len(), self.x.width() - self.passed);
        let of_map = |map: &Linear<'_>, x: &[f32]| {
            let map = map.part(self.outputs.clone());
            let mut sums = vec![0.0; self.out.len() * count];
            if self.in_codes(&map) {
                weights::int8::dots(arch, map.weight, self.x.codes(), &mut sums);
            } else {
                weights::dots(arch, map.weight, x, &mut sums);
            }
            for sums in sums.chunks_exact_mut(count.max(1)) {
                sums.iter_mut().zip(map.bias.unwrap_or_default()).for_each(|(sum, bias)| *sum += bias);
            }
            sums
        };
        let gathered: Vec<f32>;
        let x = if self.passed == 0 {
            // Rows follow each other.
            &self.x.data[..self.out.len() * width]
        } else {
            gathered = self.x.strips().flat_map(|(row, _)| &row[self.passed..]).copied().collect();
            &gathered
        };
        let mut sums = of_map(&self.map, x);
        match self.finish {
            Finish::Plain => {}
            Finish::Activated(activation) => each(simd, &mut sums, &[], |x, _| activated(simd, activation, x)),
            Finish::Gated(activation, gate) => {
                let gates = of_map(&gate, x);
                each(simd, &mut sums, &gates, |x, gate| simd.mul_f32s(activated(simd, activation, gate), x));
            }
        }
        for (((row, _), sums), out) in self.x.strips().zip(sums.chunks_exact(count.max(1))).zip(self.out) {
            out.copy_from_slice(sums);
            if let Some(passed) = row[..self.passed].get(self.outputs.clone()) {
                out.iter_mut().zip(passed).for_each(|(out, passed)| *out += passed);
            }
        }
    }
}

/// Replaces each number of `out` by what `f` makes of it and of its partner in `with`, where there are any.
#[inline(always)]
fn each<S: Simd>(simd: S, out: &mut [f32], with: &[f32], f: impl Fn(S::f32s, S::f32s) -> S::f32s) {
    for (at, out) in out.chunks_mut(S::F32_LANES).enumerate() {
        let with = with.get(at * S::F32_LANES..).map_or(simd.splat_f32s(0.0), |with| simd.partial_load_f32s(with));
        let x = f(simd.partial_load_f32s(out), with);
        simd.partial_store_f32s(out, x);
    }
}

/// Outputs `first..first + OUTPUTS` for a strip; past the last output, the last again.
#[inline(always)]
fn outputs<S: Simd, const V: usize>(
    simd: S,
    x: &[[S::f32s; V]],
    map: Wide<'_>,
    first: usize,
    passed: &[[S::f32s; V]],
) -> [[S::f32s; V]; OUTPUTS] {
    let last = map.numbers.len() / map.inputs.max(1) - 1;
    let row = |at: usize| (first + at).min(last);
    let rows: [&[f32]; OUTPUTS] = std::array::from_fn(|at| &map.numbers[row(at) * map.inputs..][..map.inputs]);
    let start = |at: usize| match passed.get(row(at)) {
        Some(passed) => *passed,
        None => [simd.splat_f32s(map.bias.map_or(0.0, |bias| bias[row(at)])); V],
    };
    let mut sums: [[S::f32s; V]; OUTPUTS] = std::array::from_fn(start);
    let [r0, r1, r2, r3, r4, r5] = rows;
    for ((((((x, a), b), c), d), e), f) in x.iter().zip(r0).zip(r1).zip(r2).zip(r3).zip(r4).zip(r5) {
        let weights = [a, b, c, d, e, f];
        for output in 0..OUTPUTS {
            let weight = simd.splat_f32s(*weights[output]);
            for register in 0..V {
                sums[output][register] = simd.mul_add_e_f32s(weight, x[register], sums[output][register]);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;
    use crate::layer::{level::levels, panels::Rows, testing::Numbers};

    struct Map {
        weight: Vec<f32>,
        bias: Vec<f32>,
    }

    impl Map {
        fn new(numbers: &mut Numbers, inputs: usize, outputs: usize) -> Self {
            Self { weight: numbers.normal(inputs * outputs, 0.0, 1.0), bias: numbers.normal(outputs, 0.0, 1.0) }
        }

        fn view(&self, inputs: usize, bias: bool) -> Linear<'_> {
            Linear {
                weight: Matrix::of_f32(&self.weight, inputs),
                bias: bias.then_some(&self.bias),
                arithmetic: Arithmetic::F32,
            }
        }

        /// The outputs of one token in f64, and how large the summands were together.
        fn exact(&self, x: &[f32], bias: bool) -> Vec<(f64, f64)> {
            let products = |row: &[f32]| x.iter().zip(row).map(|(&x, &w)| x as f64 * w as f64).collect::<Vec<_>>();
            let rows = self.weight.chunks(x.len()).zip(&self.bias);
            rows.map(|(row, &start)| {
                let start = if bias { start as f64 } else { 0.0 };
                let products = products(row);
                (start + products.iter().sum::<f64>(), start.abs() + products.iter().map(|x| x.abs()).sum::<f64>())
            })
            .collect()
        }
    }

    /// Tokens around every number of lanes, inputs and outputs that are no multiple of anything.
    const SHAPES: [(usize, usize, usize); 12] = [
        (1, 1, 1),
        (1, 576, 100),
        (2, 33, 7),
        (7, 64, 48),
        (8, 31, 49),
        (9, 40, 6),
        (16, 17, 5),
        (17, 100, 12),
        (33, 64, 97),
        (64, 20, 13),
        (65, 50, 47),
        (150, 129, 101),
    ];

    fn rows(panels: &Panels) -> Vec<f32> {
        let mut out = vec![0.0; panels.tokens() * panels.width()];
        panels.write(&mut out);
        out
    }

    fn each_case(mut check: impl FnMut(Arch, &Panels, &[f32], &mut Numbers, usize, usize)) {
        let mut numbers = Numbers::new(5);
        for arch in levels() {
            for (tokens, inputs, outputs) in SHAPES {
                let x = numbers.normal(tokens * inputs, 0.0, 1.0);
                let panels = Panels::pack_at(arch, Rows::new(&x, inputs), None);
                check(arch, &panels, &x, &mut numbers, inputs, outputs);
            }
        }
    }

    #[test]
    fn a_map_of_any_shape_is_that_of_f64_at_every_level() {
        each_case(|arch, panels, x, numbers, inputs, outputs| {
            let maps = [Map::new(numbers, inputs, outputs), Map::new(numbers, inputs, outputs + 3)];
            let found = project(panels, &[maps[0].view(inputs, true), maps[1].view(inputs, false)]);
            for ((map, bias), found) in maps.iter().zip([true, false]).zip(&found) {
                let found = rows(found);
                for (x, found) in x.chunks(inputs).zip(found.chunks(map.bias.len())) {
                    for (found, (expected, size)) in found.iter().zip(map.exact(x, bias)) {
                        // As many roundings as summands, each of the sum so far.
                        let bound = size * (inputs + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
                        let error = (*found as f64 - expected).abs();
                        assert!(error <= bound, "{arch:?} {inputs} to {outputs}: {found}, expected {expected}");
                    }
                }
            }
        });
    }

    #[test]
    fn the_inner_numbers_of_an_mlp_are_those_of_f64_with_and_without_a_gate() {
        each_case(|arch, panels, x, numbers, inputs, outputs| {
            let (gate, up) = (Map::new(numbers, inputs, outputs), Map::new(numbers, inputs, outputs));
            for with_gate in [false, true] {
                let view = with_gate.then(|| gate.view(inputs, true));
                let found = rows(&gated(panels, view, up.view(inputs, true), Activation::Silu));
                for (x, found) in x.chunks(inputs).zip(found.chunks(outputs)) {
                    let silu = |x: f64| x / (1.0 + (-x).exp());
                    for ((found, (up, size)), (gate, gate_size)) in
                        found.iter().zip(up.exact(x, true)).zip(gate.exact(x, true))
                    {
                        let expected = if with_gate { silu(gate) * up } else { silu(up) };
                        let rounding = (inputs + 8) as f64 * f64::from(f32::EPSILON);
                        let bound = if with_gate {
                            (gate_size * up.abs() + gate.abs() * size) * rounding
                        } else {
                            size * rounding
                        };
                        let error = (*found as f64 - expected).abs();
                        assert!(error <= bound + 1e-30, "{arch:?} {inputs} to {outputs}: {found}, expected {expected}");
                    }
                }
            }
        });
    }

    #[test]
    fn maps_of_several_inputs_stand_side_by_side_as_each_alone() {
        let mut numbers = Numbers::new(7);
        for tokens in [1, 5, 20, 70] {
            let [a, b] =
                [33, 20].map(|width| Panels::pack(Rows::new(&numbers.normal(tokens * width, 0.0, 1.0), width), None));
            let maps = [(33, 50), (20, 7), (33, 100)].map(|(inputs, outputs)| Map::new(&mut numbers, inputs, outputs));
            let parts = vec![(&a, maps[0].view(33, true)), (&b, maps[1].view(20, false)), (&a, maps[2].view(33, true))];
            let alone: Vec<Vec<f32>> = parts.iter().map(|(x, map)| rows(&project(x, &[*map])[0])).collect();
            let found = project_joined(&[parts, vec![(&b, maps[1].view(20, true))]]);
            assert_eq!(found.len(), 2);
            let found = rows(&found[0]);
            for token in 0..tokens {
                let expected: Vec<f32> = [(0, 50), (1, 7), (2, 100)]
                    .into_iter()
                    .flat_map(|(map, outputs): (usize, usize)| &alone[map][token * outputs..][..outputs])
                    .copied()
                    .collect();
                assert_eq!(found[token * 157..][..157], expected);
            }
        }
    }

    #[test]
    fn a_map_that_passes_inputs_on_is_that_of_f64_at_every_level() {
        each_case(|arch, panels, x, numbers, inputs, outputs| {
            let passed = outputs.min(inputs - 1);
            if passed == 0 {
                return;
            }
            // Inputs in an order that is no run: every third first.
            let order: Vec<u32> = (0..3).flat_map(|start| (start..inputs as u32).step_by(3)).collect();
            let map = Map::new(numbers, inputs - passed, passed);
            let plain = Map::new(numbers, inputs, outputs);
            let maps = [(map.view(inputs - passed, false), Some(&order[..])), (plain.view(inputs, true), None)];
            let found = project_passing(panels, &maps);
            assert_eq!(rows(&found[1]), rows(&project(panels, &[plain.view(inputs, true)])[0]));
            for (x, found) in x.chunks(inputs).zip(rows(&found[0]).chunks(passed)) {
                let x: Vec<f32> = order.iter().map(|&at| x[at as usize]).collect();
                for ((found, &start), (expected, size)) in found.iter().zip(&x).zip(map.exact(&x[passed..], false)) {
                    let (expected, size) = (expected + f64::from(start), size + f64::from(start).abs());
                    let bound = size * (inputs + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
                    let error = (*found as f64 - expected).abs();
                    assert!(error <= bound, "{arch:?} {inputs} past {passed}: {found}, expected {expected}");
                }
            }
        });
    }

    #[test]
    fn a_row_gives_the_same_whichever_rows_of_its_text_stand_beside_it() {
        let mut numbers = Numbers::new(8);
        for arch in levels() {
            for tokens in [1, 2, 7, 9, 20, 70, 140] {
                let x = numbers.normal(tokens * 40, 0.0, 1.0);
                let (gate, up) = (Map::new(&mut numbers, 40, 50), Map::new(&mut numbers, 40, 50));
                let of = |chosen: &[usize]| {
                    let x: Vec<f32> = chosen.iter().flat_map(|at| &x[at * 40..(at + 1) * 40]).copied().collect();
                    let panels = Panels::pack_among_at(arch, Rows::new(&x, 40), tokens);
                    rows(&gated(&panels, Some(gate.view(40, false)), up.view(40, true), Activation::Silu))
                };
                let whole = of(&(0..tokens).collect::<Vec<_>>());
                for step in [1, 2, 3, 5, 64] {
                    let chosen: Vec<usize> = (0..tokens).step_by(step).collect();
                    for (found, at) in of(&chosen).chunks(50).zip(&chosen) {
                        assert_eq!(found, &whole[at * 50..(at + 1) * 50], "{arch:?} {tokens} {step}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_gives_the_same_whatever_stands_beside_it() {
        let mut numbers = Numbers::new(6);
        let map = Map::new(&mut numbers, 40, 50);
        for tokens in [5, 20, 70] {
            let mut x = numbers.normal(tokens * 40, 0.0, 1.0);
            let of = |x: &[f32]| rows(&project(&Panels::pack(Rows::new(x, 40), None), &[map.view(40, true)])[0]);
            let before = of(&x);
            x[(tokens - 1) * 40..].fill(f32::NAN);
            let after = of(&x);
            assert_eq!(before[..(tokens - 1) * 50], after[..(tokens - 1) * 50]);
        }
    }
}
