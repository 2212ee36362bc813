use bsbr_weights::Format;

use super::*;
use crate::layer::{level::levels, testing::Numbers};

/// Bytes that mean something: any codes, scales of moderate size.
pub(in crate::layer) fn bytes(numbers: &mut Numbers, format: Format, outputs: usize, inputs: usize) -> Vec<u8> {
    if !format.is_quantised() {
        let numbers = numbers.normal(outputs * inputs, 0.0, 1.0);
        return match format {
            Format::F16 => numbers.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
            Format::Bf16 => numbers.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
    }
    let blocks = outputs * inputs / format.block();
    let mut out = Vec::new();
    for _ in 0..blocks {
        let mut block: Vec<u8> =
            numbers.normal(format.block_bytes(), 0.0, 1e4).into_iter().map(|x| x as i32 as u8).collect();
        let scales: &[usize] = match format {
            // Of floats: a power of two near 1, and a scale; no code that is no number.
            Format::Mxfp4 => {
                block[0] = 120 + block[0] % 8;
                &[]
            }
            Format::F8E4M3 => {
                block[4..].iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code &= 0xfe);
                block[..4].copy_from_slice(&numbers.normal(1, 0.0, 0.01)[0].to_le_bytes());
                &[]
            }
            Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
            Format::Q6K => &[208],
            _ => &[0, 2],
        };
        for &at in scales {
            let scale = half::f16::from_f32(numbers.normal(1, 0.0, 0.05)[0]);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        out.extend(block);
    }
    out
}

/// Outputs and inputs: whole blocks for formats that have them, anything for the others.
fn shapes(format: Format) -> Vec<(usize, usize)> {
    match format.block() {
        1 => vec![(1, 1), (5, 31), (7, 32), (6, 33), (9, 100), (50, 577)],
        block => vec![(1, block), (5, 2 * block), (9, 3 * block)],
    }
}

#[test]
fn numbers_are_those_of_the_definition_at_every_level() {
    let mut numbers = Numbers::new(11);
    for format in Format::ALL {
        for (outputs, inputs) in shapes(format) {
            let bytes = bytes(&mut numbers, format, outputs, inputs);
            let matrix = Matrix::new(format, [outputs, inputs], &bytes).unwrap();
            let mut expected = vec![0.0; outputs * inputs];
            bsbr_weights::decode(format, &bytes, &mut expected);
            for arch in levels() {
                let mut found = vec![f32::NAN; outputs * inputs];
                widen(arch, matrix, &mut found);
                assert_eq!(found, expected, "{format} {outputs} x {inputs} {arch:?}");
            }
        }
    }
}

#[test]
fn products_are_those_of_f64_and_of_a_token_alone_at_every_level() {
    let mut numbers = Numbers::new(12);
    for format in Format::ALL {
        for (outputs, inputs) in shapes(format) {
            let bytes = bytes(&mut numbers, format, outputs, inputs);
            let matrix = Matrix::new(format, [outputs, inputs], &bytes).unwrap();
            let mut weights = vec![0.0; outputs * inputs];
            matrix.widen(0..outputs, &mut weights);
            for tokens in [1, 2, 3, 4, 5, 8, 9, 19] {
                let x = numbers.normal(tokens * inputs, 0.0, 1.0);
                for arch in levels() {
                    let mut found = vec![f32::NAN; tokens * outputs];
                    dots(arch, matrix, &x, &mut found);
                    for (x, found) in x.chunks(inputs).zip(found.chunks(outputs)) {
                        let mut alone = vec![0.0; outputs];
                        dots(arch, matrix, x, &mut alone);
                        assert_eq!(found, alone, "{format} {outputs} x {inputs}, {tokens} {arch:?}");
                        for (found, weights) in found.iter().zip(weights.chunks(inputs)) {
                            let products = x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
                            let size: f64 = products.clone().map(f64::abs).sum();
                            let error = (f64::from(*found) - products.sum::<f64>()).abs();
                            assert!(error <= size * (inputs + 1) as f64 * f64::from(f32::EPSILON) / 2.0);
                        }
                    }
                }
            }
        }
    }
}
