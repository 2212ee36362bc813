//! Numbers of the three weight formats.

use half::{bf16, f16};
use safetensors::Dtype;

/// Whether weights may have this format.
pub(crate) fn is_weight_dtype(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The numbers in `bytes`, little-endian, of a weight format.
pub(crate) fn numbers(dtype: Dtype, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => Box::new(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Box::new(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
        _ => Box::new(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    }
}

/// The first number in `bytes` that is NaN or infinite, and its index.
///
/// Looks at the exponent bits alone, which is several times faster than converting: all conversions load every
/// weight through here.
pub(crate) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    let (size, last_exponent_bits) = match dtype {
        Dtype::F16 => (2, 0x7c00_u32),
        Dtype::BF16 => (2, 0x7f80),
        _ => (4, 0x7f80_0000),
    };
    let index = if size == 2 {
        let mask = last_exponent_bits as u16;
        bytes.chunks_exact(2).position(|b| u16::from_le_bytes([b[0], b[1]]) & mask == mask)
    } else {
        let mask = last_exponent_bits;
        bytes.chunks_exact(4).position(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & mask == mask)
    }?;
    numbers(dtype, &bytes[index * size..]).next().map(|value| (index, value))
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
            let (index, value) = first_not_finite(dtype, &[good.clone(), bad, good].concat()).expect("one is bad");
            assert_eq!(index, 1);
            assert!(!value.is_finite());
        }
    }
}
