//! Numbers of the three weight formats, and whole numbers.

use bsbr_weights::Format;
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
pub(crate) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    let (format, size) = (plain_format(dtype)?, dtype.bitsize() / 8);
    let index = bsbr_weights::first_not_finite(format, bytes)?;
    Some((index, numbers(dtype, &bytes[index * size..]).next()?))
}

/// The format of weights of this type; none of whole numbers.
pub(crate) fn plain_format(dtype: Dtype) -> Option<Format> {
    Some(match dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::BF16 => Format::Bf16,
        _ => return None,
    })
}

/// The type of numbers in this format, once they are decoded.
pub(crate) fn plain_dtype(format: Format) -> Dtype {
    match format {
        Format::F16 => Dtype::F16,
        Format::Bf16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}
