//! Numbers of the three weight formats, and whole numbers.

use half::{bf16, f16};
use safetensors::Dtype;

/// Whether weights may have this format.
pub(crate) fn is_weight_dtype(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The numbers in `bytes`, little-endian, of a weight format or of I32, which is exact below 2^24.
pub(crate) fn numbers(dtype: Dtype, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => Box::new(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Box::new(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
        Dtype::I32 => Box::new(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32)),
        _ => Box::new(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    }
}

/// The first number in `bytes` that is NaN or infinite, and its index.
///
/// Looks at the exponent bits alone, and at all of a block before it decides: that much the compiler turns into vector
/// instructions, and all conversions and loads go through here.
pub(crate) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    const BLOCK: usize = 4096;
    if dtype == Dtype::I32 {
        return None;
    }
    let (size, exponent) = match dtype {
        Dtype::F16 => (2, 0x7c00_u32),
        Dtype::BF16 => (2, 0x7f80),
        _ => (4, 0x7f80_0000),
    };
    let any = |block: &[u8]| match size {
        2 => {
            let mask = exponent as u16;
            let full = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & mask == mask;
            block.chunks_exact(2).fold(false, |any, b| any | full(b))
        }
        _ => {
            let full = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & exponent == exponent;
            block.chunks_exact(4).fold(false, |any, b| any | full(b))
        }
    };
    let block = bytes.chunks(BLOCK).position(any)?;
    let start = block * BLOCK;
    let (index, value) = numbers(dtype, &bytes[start..]).enumerate().find(|(_, number)| !number.is_finite())?;
    Some((start / size + index, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinity_are_found_in_every_format_and_the_largest_numbers_are_not() {
        let cases: [(Dtype, Vec<u8>, Vec<u8>); 3] = [
            (Dtype::F32, f32::NAN.to_le_bytes().into(), f32::MAX.to_le_bytes().into()),
            (Dtype::F16, f16::NEG_INFINITY.to_le_bytes().into(), f16::MAX.to_le_bytes().into()),
            (Dtype::BF16, bf16::INFINITY.to_le_bytes().into(), bf16::MIN.to_le_bytes().into()),
        ];
        for (dtype, bad, good) in cases {
            assert_eq!(first_not_finite(dtype, &good), None);
            // At either end of a block, in between, and in a last one that is not full.
            for place in [0, 1, 1023, 1024, 2047, 2048, 4095, 4096, 5000] {
                let mut bytes = good.repeat(5001);
                bytes[place * bad.len()..(place + 1) * bad.len()].copy_from_slice(&bad);
                let (index, value) = first_not_finite(dtype, &bytes).expect("one is bad");
                assert_eq!(index, place);
                assert!(!value.is_finite());
            }
        }
    }
}
