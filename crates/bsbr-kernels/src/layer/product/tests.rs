use bsbr_weights::Format;
use pulp::Arch;

use super::*;
use crate::layer::{level::levels, panels::Rows, testing::Numbers, weights::tests::bytes};

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
                    let bound =
                        if with_gate { (gate_size * up.abs() + gate.abs() * size) * rounding } else { size * rounding };
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

#[test]
fn other_arithmetics_give_what_f32_gives_where_they_lose_nothing() {
    let mut numbers = Numbers::new(9);
    for (arithmetic, format) in [
        (Arithmetic::Int8, Format::Q8_0),
        (Arithmetic::Int8, Format::Q4_1),
        (Arithmetic::Int8, Format::Q6K),
        (Arithmetic::Int8, Format::F16),
        (Arithmetic::Bf16, Format::Bf16),
    ] {
        let (inputs, outputs) = (if format == Format::Q6K { 512 } else { 96 }, 101);
        let stored = [(); 2].map(|()| bytes(&mut numbers, format, outputs, inputs));
        let bias = numbers.normal(outputs, 0.0, 1.0);
        let map = |which: usize, arithmetic| Linear {
            weight: Matrix::new(format, [outputs, inputs], &stored[which]).unwrap(),
            bias: Some(&bias),
            arithmetic,
        };
        for arch in levels() {
            for tokens in [1, 8, 9, 20, 40, 70, 130] {
                // Whole numbers up to 127, which every group of inputs has.
                let mut x: Vec<f32> =
                    numbers.normal(tokens * inputs, 0.0, 40.0).iter().map(|x| x.round().clamp(-127.0, 127.0)).collect();
                x.iter_mut().step_by(32).for_each(|x| *x = 127.0);
                let panels = Panels::pack_at(arch, Rows::new(&x, inputs), None);
                let of = |arithmetic| {
                    let plain = rows(&project(&panels, &[map(0, arithmetic)])[0]);
                    let relu = rows(&gated(&panels, None, map(0, arithmetic), Activation::Relu));
                    (plain, relu, rows(&gated(&panels, Some(map(1, arithmetic)), map(0, arithmetic), Activation::Relu)))
                };
                let (found, expected) = (of(arithmetic), of(Arithmetic::F32));
                let largest = |x: &[f32]| x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                for (found, expected) in [(found.0, expected.0), (found.1, expected.1), (found.2, expected.2)] {
                    let bound = 1e-5 * largest(&expected);
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!(
                            (found - expected).abs() <= bound,
                            "{arithmetic:?} {format} {arch:?} {tokens}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn an_arithmetic_is_the_one_asked_for_wherever_the_processor_has_it() {
    let mut numbers = Numbers::new(10);
    let (inputs, outputs) = (96, 50);
    // What loses something gives other numbers than f32; what falls back on f32 gives the very same.
    for (arithmetic, format) in [
        (Arithmetic::Int8, Format::Q8_0),
        (Arithmetic::Int8, Format::Q4_1),
        (Arithmetic::Int8, Format::F16),
        (Arithmetic::Bf16, Format::Bf16),
        (Arithmetic::Bf16, Format::Q4_0),
    ] {
        let stored = bytes(&mut numbers, format, outputs, inputs);
        let map = |arithmetic| Linear {
            weight: Matrix::new(format, [outputs, inputs], &stored).unwrap(),
            bias: None,
            arithmetic,
        };
        for arch in levels() {
            for tokens in [1, 3, 70, 130] {
                let x = numbers.normal(tokens * inputs, 0.0, 1.0);
                let panels = Panels::pack_at(arch, Rows::new(&x, inputs), None);
                let few = panels.lanes() == 1;
                let other = match arithmetic {
                    Arithmetic::Int8 => format.has_groups() && (few || has(arch, "avx512vnni")),
                    Arithmetic::Bf16 => !few && has(arch, "avx512bf16"),
                    Arithmetic::F32 => false,
                };
                let of = |arithmetic| rows(&project(&panels, &[map(arithmetic)])[0]);
                let same = of(arithmetic) == of(Arithmetic::F32);
                assert_eq!(same, !other, "{arithmetic:?} {format} {arch:?} {tokens}");
            }
        }
    }
}

/// Whether a level with AVX-512 has an instruction set besides.
fn has(arch: Arch, feature: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let Arch::V4(_) = arch {
        return match feature {
            "avx512vnni" => is_x86_feature_detected!("avx512vnni"),
            _ => is_x86_feature_detected!("avx512bf16"),
        };
    }
    let _ = (arch, feature);
    false
}
