use bsbr_weights::{Format, Group};

use super::*;
use crate::layer::{level::levels, testing::Numbers};

#[test]
fn products_are_those_of_the_codes_in_f64_and_of_a_token_alone_at_every_level() {
    let mut numbers = Numbers::new(21);
    for format in Format::ALL.into_iter().filter(|format| format.has_groups()) {
        for (outputs, blocks) in [(1, 1), (5, 2), (9, 3), (6, 5)] {
            let inputs = blocks * format.block();
            let bytes = super::super::tests::bytes(&mut numbers, format, outputs, inputs);
            let matrix = Matrix::new(format, [outputs, inputs], &bytes).unwrap();
            for tokens in [1, 2, 3, 4, 5, 8, 9, 19] {
                let x = numbers.normal(tokens * inputs, 0.0, 1.0);
                for arch in levels() {
                    let codes = TokenCodes::new(arch, &x, inputs);
                    let mut found = vec![f32::NAN; tokens * outputs];
                    dots(arch, matrix, &codes, &mut found);
                    for (token, found) in found.chunks(outputs).enumerate() {
                        let mut alone = vec![0.0; outputs];
                        let row = TokenCodes::new(arch, &x[token * inputs..(token + 1) * inputs], inputs);
                        dots(arch, matrix, &row, &mut alone);
                        assert_eq!(found, alone, "{format} {outputs} x {inputs}, {tokens} {arch:?}");
                        for (output, &found) in found.iter().enumerate() {
                            let (expected, size) = exact(matrix.rows(output..output + 1), &row);
                            let error = (f64::from(found) - expected).abs();
                            assert!(error <= 16.0 * size * f64::from(f32::EPSILON), "{format} {arch:?} {error} {size}");
                        }
                    }
                }
            }
        }
    }
}

/// The product of a row with a token, from the codes of both, and how large its summands are together.
pub(super) fn exact(row: Matrix<'_>, x: &TokenCodes) -> (f64, f64) {
    let (format, mut sum, mut size) = (row.format(), 0.0, 0.0);
    for group in 0..x.inputs / GROUP {
        let block = group * GROUP / format.block();
        let own = Group::of(format, &row.bytes()[block * format.block_bytes()..], group % (format.block() / GROUP));
        for n in 0..GROUP {
            let scale = f64::from(own.scales[n / 16]);
            let code = x.codes[x.half_at(0, group, n / HALF) + n % HALF];
            let code = f64::from(code) * f64::from(x.scales[x.scale_at(0, group)]);
            sum += (scale * f64::from(own.codes[n]) - f64::from(own.offset)) * code;
            // An offset of the codes is added and taken off again.
            size += ((scale * 128.0).abs() + f64::from(own.offset).abs()) * code.abs();
        }
    }
    (sum, size)
}

#[test]
fn codes_of_a_token_are_within_half_a_step_of_it() {
    let mut numbers = Numbers::new(22);
    for arch in levels() {
        let mut x = numbers.normal(3 * 96, 0.0, 2.0);
        x[40] = 1e-30;
        x[96..128].fill(0.0);
        x[130] = f32::NAN;
        let codes = TokenCodes::new(arch, &x, 96);
        for (at, x) in x.iter().enumerate() {
            let (token, group, n) = (at / 96, at % 96 / GROUP, at % GROUP);
            let place = codes.scale_at(token, group);
            let found = codes.scales[place] * f32::from(codes.codes[codes.half_at(token, group, n / HALF) + n % HALF]);
            if at / GROUP == 130 / GROUP {
                assert_eq!(found, 0.0, "a group with a number that is none");
            } else {
                assert!((found - x).abs() <= 0.5001 * codes.scales[place], "{arch:?} {x} became {found}");
            }
        }
    }
}
