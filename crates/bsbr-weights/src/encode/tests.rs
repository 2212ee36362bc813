use proptest::prelude::*;

use super::*;
use crate::decode;

const ROWS: usize = 256;
const INPUTS: usize = 64;

/// Numbers, and what ggml makes of them in Q8_0 and Q4_0.
fn golden() -> (Vec<f32>, Vec<u8>, Vec<u8>) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ggml.bin");
    let file = std::fs::read(path).unwrap();
    let (numbers, rest) = file.split_at(4 * ROWS * INPUTS);
    let (q8_0, q4_0) = rest.split_at(ROWS * INPUTS / 32 * 34);
    let numbers = numbers.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    (numbers, q8_0.to_vec(), q4_0.to_vec())
}

fn decoded(format: Format, bytes: &[u8]) -> Vec<f32> {
    let mut numbers = vec![0.0; bytes.len() / format.block_bytes() * format.block()];
    decode(format, bytes, &mut numbers);
    numbers
}

/// The weighted squared errors of each block of 32.
fn errors(numbers: &[f32], decoded: &[f32], weights: Option<&[f32]>) -> Vec<f64> {
    let error = |(at, (&number, &decoded)): (usize, (&f32, &f32))| {
        let weight = weights.map_or(1.0, |weights| f64::from(weights[at % weights.len()]));
        weight * (f64::from(number) - f64::from(decoded)).powi(2)
    };
    let all: Vec<f64> = numbers.iter().zip(decoded).enumerate().map(error).collect();
    all.chunks(32).map(|block| block.iter().sum()).collect()
}

/// The least weighted squared error of a block for any scale and any codes from -8 to 7: between two scales at which the nearest code of
/// some number changes, the codes stay, and the error is a parabola.
fn least_error(numbers: &[f32], weights: &[f64]) -> f64 {
    let mut turns: Vec<f64> = Vec::new();
    for &number in numbers.iter().filter(|number| **number != 0.0) {
        turns.extend((-8..7).map(|code| f64::from(code) + 0.5).map(|half| f64::from(number) / half));
    }
    turns.sort_by(f64::total_cmp);
    turns.push(turns.last().unwrap() * 2.0);
    turns.insert(0, turns[0] * 2.0);
    let error = |scale: f64| -> f64 {
        let code = |number: f64| (number / scale).round().clamp(-8.0, 7.0);
        let each = numbers
            .iter()
            .zip(weights)
            .map(|(&number, &weight)| weight * (f64::from(number) - scale * code(f64::from(number))).powi(2));
        each.sum()
    };
    let mut least = numbers.iter().zip(weights).map(|(&number, weight)| weight * f64::from(number).powi(2)).sum();
    for pair in turns.windows(2) {
        let middle = (pair[0] + pair[1]) / 2.0;
        if middle == 0.0 {
            continue;
        }
        let (mut product, mut square) = (0.0, 0.0);
        for (&number, &weight) in numbers.iter().zip(weights) {
            let code = (f64::from(number) / middle).round().clamp(-8.0, 7.0);
            product += weight * f64::from(number) * code;
            square += weight * code * code;
        }
        if square > 0.0 && product != 0.0 {
            least = error(product / square).min(least);
        }
    }
    least
}

#[test]
fn q8_0_gives_the_bytes_of_ggml() {
    let (numbers, expected, _) = golden();
    assert_eq!(encode(Format::Q8_0, INPUTS, &numbers, None).unwrap(), expected);
}

#[test]
fn q4_0_is_never_further_from_the_numbers_than_ggml_and_nearly_as_near_as_possible() {
    let (numbers, _, ggml) = golden();
    let found = errors(&numbers, &decoded(Format::Q4_0, &encode(Format::Q4_0, INPUTS, &numbers, None).unwrap()), None);
    let theirs = errors(&numbers, &decoded(Format::Q4_0, &ggml), None);
    let (mut over, mut blocks) = (0.0, 0);
    for (block, (found, theirs)) in numbers.chunks(32).zip(found.iter().zip(&theirs)) {
        assert!(*found <= theirs * (1.0 + 1e-6), "{found} {theirs}: {block:?}");
        let largest = block.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
        // Whose scale is a half-precision number with all its bits.
        if largest > 1e-3 {
            let least = least_error(block, &[1.0; 32]);
            over += (found / least.max(1e-12 * f64::from(largest).powi(2))).max(1.0) - 1.0;
            blocks += 1;
            // Rounding the scale to 11 bits costs something too.
            assert!(*found <= 1.05 * least + 1e-5 * f64::from(largest).powi(2), "{found} {least}: {block:?}");
        }
    }
    let mean = over / f64::from(blocks);
    assert!(mean < 5e-4, "{mean} over the least");
    let plain = |errors: &[f64]| errors.chunks(2).step_by(8).flatten().sum::<f64>();
    assert!(plain(&found) < 0.92 * plain(&theirs), "normal numbers: {} {}", plain(&found), plain(&theirs));
}

#[test]
fn what_cannot_be_written_is_refused_and_named() {
    let numbers = vec![1.0; 64];
    let bad = |format, at: usize, value: f32| {
        let mut numbers = numbers.clone();
        numbers[at] = value;
        encode(format, 32, &numbers, None).unwrap_err()
    };
    for format in [Format::F16, Format::Q8_0, Format::Q4_0] {
        assert!(matches!(bad(format, 40, f32::NAN), EncodeError::NotFinite { index: 40, .. }));
        assert!(matches!(bad(format, 3, f32::NEG_INFINITY), EncodeError::NotFinite { index: 3, .. }));
        assert!(matches!(bad(format, 33, -3e38), EncodeError::TooLarge { index: 33, .. }));
    }
    assert!(matches!(bad(Format::F16, 5, 65_520.0), EncodeError::TooLarge { index: 5, .. }));
    assert!(encode(Format::Q8_0, 32, &[65_504.0; 32], None).is_ok());
    assert!(matches!(encode(Format::Q4K, 256, &[0.0; 256], None), Err(EncodeError::Format(_))));
    assert!(matches!(encode(Format::Q8_0, 48, &[0.0; 48], None), Err(EncodeError::Layout(LayoutError::Row { .. }))));
    assert!(matches!(encode(Format::Q8_0, 64, &[0.0; 65], None), Err(EncodeError::Layout(LayoutError::Size { .. }))));
    let importance = |importance: &[f32]| encode(Format::Q4_0, 32, &numbers, Some(importance));
    assert!(matches!(importance(&[1.0; 31]), Err(EncodeError::Importance { .. })));
    assert!(matches!(importance(&[-1.0; 32]), Err(EncodeError::Importance { .. })));
    assert!(matches!(importance(&[f32::NAN; 32]), Err(EncodeError::Importance { .. })));
    assert!(importance(&[0.0; 32]).is_ok());
}

/// Numbers of any size that the format reaches, more often of like size.
fn block() -> impl Strategy<Value = Vec<f32>> {
    let like = prop::collection::vec(-1.0_f32..1.0, 32);
    let any = prop::collection::vec((-1.0_f32..1.0, -30..16).prop_map(|(x, e)| x * 2_f32.powi(e)), 32);
    let few = prop::collection::vec(prop_oneof![Just(0.0_f32), Just(0.25), -1.0_f32..1.0], 32);
    prop_oneof![(like, -20..16).prop_map(|(x, e)| x.iter().map(|x| x * 2_f32.powi(e)).collect()), any, few]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_number_is_within_half_a_scale_or_what_the_codes_do_not_reach(numbers in block()) {
        for (format, lowest, highest) in [(Format::Q8_0, -127.0, 127.0), (Format::Q4_0, -8.0, 7.0)] {
            let bytes = encode(format, 32, &numbers, None).unwrap();
            let scale = f64::from(f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
            for (&number, decoded) in numbers.iter().zip(decoded(format, &bytes)) {
                let (number, ends) = (f64::from(number), [scale * lowest, scale * highest]);
                let reached = number.clamp(ends[0].min(ends[1]), ends[0].max(ends[1]));
                // The codes of Q8_0 are chosen before its scale is rounded, to a part in 2048 or a step of 2^-24.
                let rounding = if format == Format::Q8_0 { 127.0 * (scale / 2048.0).max(2_f64.powi(-25)) } else { 0.0 };
                let bound = (number - reached).abs() + scale.abs() / 2.0 * (1.0 + 1e-5) + rounding;
                prop_assert!((number - f64::from(decoded)).abs() <= bound, "{format} {number} {decoded} {scale}");
            }
        }
    }

    #[test]
    fn weighted_errors_are_never_larger_than_those_of_rounding_to_the_nearest(
        numbers in block(), weights in prop::collection::vec(0.0_f32..4.0, 32),
    ) {
        let found = decoded(Format::Q4_0, &encode(Format::Q4_0, 32, &numbers, Some(&weights)).unwrap());
        // ggml's reference, in its own arithmetic.
        let largest = numbers.iter().fold(0.0_f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
        let scale = largest / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let rounded = f16::from_f32(scale).to_f32();
        let plain: Vec<f32> =
            numbers.iter().map(|x| rounded * ((x * inverse + 8.5).trunc().clamp(0.0, 15.0) - 8.0)).collect();
        let [found, plain] = [&found, &plain].map(|decoded| errors(&numbers, decoded, Some(&weights))[0]);
        prop_assert!(found <= plain * (1.0 + 1e-5) + 1e-30, "{found} {plain}");
    }

    #[test]
    fn plain_formats_are_rounded_to_the_nearest(numbers in block()) {
        for format in [Format::F32, Format::F16, Format::Bf16] {
            let found = decoded(format, &encode(format, 32, &numbers, None).unwrap());
            let expected: Vec<f32> = numbers.iter().map(|&x| match format {
                Format::F16 => f16::from_f32(x).to_f32(),
                Format::Bf16 => bf16::from_f32(x).to_f32(),
                _ => x,
            }).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
