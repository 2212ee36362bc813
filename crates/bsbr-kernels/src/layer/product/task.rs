//! Blocks of outputs, which threads take turns at.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::{Finish, Form, Linear};
use crate::{
    layer::{
        activation::activated,
        panels::Panels,
        scratch::Scratch,
        weights::{self, bf16, int8},
    },
    team::share,
};

/// Outputs computed together: their sums for a strip of tokens fill the registers.
const OUTPUTS: usize = 6;

/// Outputs to a task: their weights stay in the cache nearest to the core while the strips pass by.
const BLOCK: usize = 8 * OUTPUTS;

/// Tasks that a thread gets where tokens are few: two, so that one that was held up does not keep the others waiting, and no more,
/// since each begins to read somewhere else and memory is slow at that.
const TASKS_OF_A_THREAD: usize = 2;

/// Tokens that stand as rows for which weights are read once, at most.
const FEW_TOKENS: usize = 8;

/// Some outputs for all tokens.
pub(super) struct Task<'a> {
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
pub(super) fn split<'a>(x: &'a Panels, map: Linear<'a>, finish: Finish<'a>, out: &'a mut Panels) -> Vec<Task<'a>> {
    place(blocks(x, map, finish).collect(), out)
}

/// The same before it is known where the outputs go.
pub(super) fn blocks<'a>(x: &'a Panels, map: Linear<'a>, finish: Finish<'a>) -> impl Iterator<Item = Task<'a>> {
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
pub(super) fn place<'a>(mut tasks: Vec<Task<'a>>, out: &'a mut Panels) -> Vec<Task<'a>> {
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

pub(super) fn run(tasks: Vec<Task<'_>>) {
    // Codes are made before the tasks begin: threads that wait for each other's sleep.
    for task in &tasks {
        for map in task.maps() {
            match (task.form(map), task.x.lanes()) {
                (Form::F32, _) => {}
                (Form::Int8, 1) => _ = task.x.codes(),
                (Form::Int8, _) => _ = task.x.strip_codes(),
                (Form::Bf16, _) => _ = task.x.strip_pairs(),
            }
        }
    }
    share(tasks, |task| {
        let arch = task.x.arch;
        arch.dispatch(task);
    });
}

impl WithSimd for Task<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.x.lanes() == 1 { self.rows(simd) } else { self.strips(simd) }
    }
}

impl<'a> Task<'a> {
    /// The same where so many inputs pass.
    pub(super) fn passing(self, passed: usize) -> Self {
        Self { passed, ..self }
    }

    /// Its maps.
    fn maps(&self) -> impl Iterator<Item = &Linear<'a>> {
        let gate = match &self.finish {
            Finish::Gated(_, gate) => Some(gate),
            Finish::Plain | Finish::Activated(_) => None,
        };
        std::iter::once(&self.map).chain(gate)
    }

    /// What it multiplies one of its maps in.
    fn form(&self, map: &Linear<'_>) -> Form {
        // Sums that start from inputs are those of f32.
        if self.passed == 0 { map.form(self.x) } else { Form::F32 }
    }

    /// Tokens that stand in strips.
    #[inline(always)]
    fn strips<S: Simd>(self, simd: S) {
        let (mut room, mut gate_room) = (None, None);
        let (x, arch, lanes) = (self.x, self.x.arch, self.x.lanes());
        let own = Ready::new(arch, self.map.part(self.outputs.clone()), self.form(&self.map), &mut room);
        let gate = match self.finish {
            Finish::Gated(activation, map) => {
                let gate = Ready::new(arch, map.part(self.outputs.clone()), self.form(&map), &mut gate_room);
                Some((activation, gate, Scratch::new(self.outputs.len() * lanes)))
            }
            Finish::Plain | Finish::Activated(_) => None,
        };
        let mut gate = gate;
        for (at, out) in self.out.into_iter().enumerate() {
            own.sums(simd, x, at, self.passed, &self.outputs, out);
            if let Finish::Activated(activation) = self.finish {
                each(simd, out, &[], |x, _| activated(simd, activation, x));
            }
            if let Some((activation, gate, gates)) = &mut gate {
                gate.sums(simd, x, at, 0, &self.outputs, gates);
                each(simd, out, gates, |x, gate| simd.mul_f32s(activated(simd, *activation, gate), x));
            }
        }
    }

    /// The same for tokens that stand as rows: few tokens, for which reading the weights is what takes the time.
    #[inline(always)]
    fn rows<S: Simd>(self, simd: S) {
        let (arch, count, width) = (self.x.arch, self.outputs.len(), self.x.width() - self.passed);
        let of_map = |map: &Linear<'_>, x: &[f32]| {
            let form = self.form(map);
            let map = map.part(self.outputs.clone());
            let mut sums = vec![0.0; self.out.len() * count];
            if form == Form::Int8 {
                int8::dots(arch, map.weight, self.x.codes(), &mut sums);
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

/// Weights of a task as its strips meet them.
enum Ready<'a> {
    F32(Wide<'a>),
    Int8(int8::strips::RowCodes, Option<&'a [f32]>),
    Bf16(bf16::RowPairs, Option<&'a [f32]>),
}

/// Weights in f32 and the bias.
#[derive(Clone, Copy)]
struct Wide<'a> {
    numbers: &'a [f32],
    inputs: usize,
    bias: Option<&'a [f32]>,
}

impl<'a> Ready<'a> {
    /// Numbers that are no f32 are widened into `room`.
    fn new(arch: Arch, map: Linear<'a>, form: Form, room: &'a mut Option<Scratch>) -> Self {
        match form {
            Form::Int8 => Self::Int8(int8::strips::RowCodes::new(arch, map.weight), map.bias),
            Form::Bf16 => Self::Bf16(bf16::RowPairs::new(arch, map.weight), map.bias),
            Form::F32 => {
                let inputs = map.weight.inputs();
                let numbers = map.weight.as_f32().unwrap_or_else(|| {
                    let room = room.insert(Scratch::new(map.weight.outputs() * inputs));
                    weights::widen(arch, map.weight, room);
                    room
                });
                Self::F32(Wide { numbers, inputs, bias: map.bias })
            }
        }
    }

    /// The sums of strip `at` of `x`, `[outputs, lanes]`. The first `passed` inputs are what sums begin with, those of `outputs`.
    #[inline(always)]
    fn sums<S: Simd>(&self, simd: S, x: &Panels, at: usize, passed: usize, outputs: &Range<usize>, out: &mut [f32]) {
        let (lanes, size) = (x.lanes(), x.width() * x.lanes());
        let bias = match self {
            Self::F32(map) => {
                let strip = &x.data[at * size..(at + 1) * size];
                return match lanes / S::F32_LANES {
                    1 => map.sums::<S, 1>(simd, strip, passed, outputs, out),
                    2 => map.sums::<S, 2>(simd, strip, passed, outputs, out),
                    _ => map.sums::<S, 4>(simd, strip, passed, outputs, out),
                };
            }
            Self::Int8(rows, bias) => {
                int8::strips::dots(x.arch, rows, x.strip_codes().strip(at), out);
                bias
            }
            Self::Bf16(rows, bias) => {
                bf16::dots(x.arch, rows, x.strip_pairs().strip(at), out);
                bias
            }
        };
        for (out, &bias) in out.chunks_exact_mut(lanes).zip(bias.unwrap_or_default()) {
            out.iter_mut().for_each(|sum| *sum += bias);
        }
    }
}

impl Wide<'_> {
    #[inline(always)]
    fn sums<S: Simd, const V: usize>(
        self,
        simd: S,
        strip: &[f32],
        passed: usize,
        outputs: &Range<usize>,
        out: &mut [f32],
    ) {
        let (passed, x) = S::as_simd_f32s(strip).0.as_chunks::<V>().0.split_at(passed);
        let passed = passed.get(outputs.clone()).unwrap_or_default();
        let out = S::as_mut_simd_f32s(out).0.as_chunks_mut::<V>().0;
        for (at, out) in out.chunks_mut(OUTPUTS).enumerate() {
            let sums = self.tile(simd, x, at * OUTPUTS, passed);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    /// Outputs `first..first + OUTPUTS` for a strip; past the last output, the last again.
    #[inline(always)]
    fn tile<S: Simd, const V: usize>(
        self,
        simd: S,
        x: &[[S::f32s; V]],
        first: usize,
        passed: &[[S::f32s; V]],
    ) -> [[S::f32s; V]; OUTPUTS] {
        let last = self.numbers.len() / self.inputs.max(1) - 1;
        let row = |at: usize| (first + at).min(last);
        let rows: [&[f32]; OUTPUTS] = std::array::from_fn(|at| &self.numbers[row(at) * self.inputs..][..self.inputs]);
        let start = |at: usize| match passed.get(row(at)) {
            Some(passed) => *passed,
            None => [simd.splat_f32s(self.bias.map_or(0.0, |bias| bias[row(at)])); V],
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
}
