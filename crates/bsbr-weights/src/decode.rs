//! What the blocks of a format mean.

use half::{bf16, f16};

use crate::Format;

/// The numbers of whole blocks, in f32. Those of the formats with one scale are exact, but for [`Format::F8E4M3`], whose products are
/// rounded once; where an offset is added, the sum is rounded once, as ggml does.
///
/// # Panics
///
/// If `bytes` and `out` are not as many whole blocks.
pub fn decode(format: Format, bytes: &[u8], out: &mut [f32]) {
    let (block, size) = (format.block(), format.block_bytes());
    assert!(
        out.len().is_multiple_of(block) && bytes.len() == out.len() / block * size,
        "{} bytes of {format} are not {} numbers",
        bytes.len(),
        out.len()
    );
    if let Format::F32 | Format::F16 | Format::Bf16 = format {
        for (data, out) in bytes.chunks_exact(size).zip(out) {
            *out = match *data {
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                [a, b] if format == Format::F16 => f16::from_le_bytes([a, b]).to_f32(),
                [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
                _ => unreachable!("two or four bytes"),
            };
        }
        return;
    }
    for (data, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(block)) {
        if let (Format::F8E4M3, Some((scale, codes))) = (format, data.split_first_chunk()) {
            let scale = f32::from_le_bytes(*scale);
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = e4m3(code) * scale);
            continue;
        }
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            Group::of(format, data, group).decode(out);
        }
    }
}

/// The number of a float of 8 bits with 4 bits of exponent and 3 of mantissa, E4M3 without infinities: 448 at most, and NaN where all
/// bits but the sign are set (Micikevicius et al. 2022).
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// Half of the power of two that a byte stands for, `2^(byte - 128)`; NaN for the last.
pub fn half_e8m0(byte: u8) -> f32 {
    // Numbers below the least normal one have no exponent of their own.
    f32::from_bits(match byte {
        0 => 0x0020_0000,
        1 => 0x0040_0000,
        u8::MAX => 0x7fc0_0000,
        _ => (u32::from(byte) - 1) << 23,
    })
}

/// Twice the number of each float of 4 bits, E2M1.
pub const TWICE_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Codes of a group.
pub(crate) const GROUP: usize = 32;

/// 32 codes of a quantised block, and what makes numbers of them: number `n` is `scales[n / 16] codes[n] - offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Signed: those of formats that store them with an offset of their own, less that.
    pub codes: [i8; GROUP],
    /// Of the first and of the last 16.
    pub scales: [f32; 2],
    /// Subtracted from all.
    pub offset: f32,
}

impl Group {
    /// Codes `32 group..32 (group + 1)` of the block `data`.
    ///
    /// # Panics
    ///
    /// If the format [has no groups](Format::has_groups), the block has no such group or too few bytes.
    pub fn of(format: Format, data: &[u8], group: usize) -> Self {
        assert!(format.has_groups() && group < format.block() / GROUP, "{format} has no group {group}");
        assert!(data.len() >= format.block_bytes(), "{} bytes of a block of {format}", data.len());
        match format {
            Format::Q4_0 => Self::new(nibbles(&data[2..18]), 8, f16_at(data, 0), 0.0),
            Format::Q4_1 => Self::new(nibbles(&data[4..20]), 0, f16_at(data, 0), -f16_at(data, 2)),
            Format::Q5_0 => Self::new(with_fifth(nibbles(&data[6..22]), &data[2..6]), 16, f16_at(data, 0), 0.0),
            Format::Q5_1 => {
                Self::new(with_fifth(nibbles(&data[8..24]), &data[4..8]), 0, f16_at(data, 0), -f16_at(data, 2))
            }
            Format::Q4K | Format::Q5K => {
                let (scale, offset) = group_scale(&data[4..16], group);
                let (scale, offset) = (f16_at(data, 0) * scale, f16_at(data, 2) * offset);
                let low = if format == Format::Q4K { 16 } else { 48 } + group / 2 * 32;
                let low = |n: usize| data[low + n] >> (group % 2 * 4) & 15;
                // Bit `g` of byte `n` belongs to number `n` of group `g`.
                let high = |n: usize| if format == Format::Q5K { (data[16 + n] >> group & 1) << 4 } else { 0 };
                Self::new(std::array::from_fn(|n| low(n) | high(n)), 0, scale, offset)
            }
            Format::Q6K => {
                // In each half of the block the low bits of groups 0 and 2, 1 and 3 share bytes, and all four those of
                // the high bits.
                let (half, part) = (group / 4, group % 4);
                let low = |n: usize| data[half * 64 + part % 2 * 32 + n] >> (part / 2 * 4) & 15;
                let high = |n: usize| data[128 + half * 32 + n] >> (part * 2) & 3;
                let scale = |half: usize| f16_at(data, 208) * f32::from(data[192 + 2 * group + half] as i8);
                let codes = std::array::from_fn(|n| low(n) | high(n) << 4);
                Self { scales: [scale(0), scale(1)], ..Self::new(codes, 32, 0.0, 0.0) }
            }
            Format::Mxfp4 => {
                let codes = nibbles(&data[1..17]).map(|code| TWICE_E2M1[usize::from(code)]);
                Self { codes, scales: [half_e8m0(data[0]); 2], offset: 0.0 }
            }
            // The only one left.
            _ => Self::new(std::array::from_fn(|n| data[2 + n]), 0, f16_at(data, 0), 0.0),
        }
    }

    fn new(codes: [u8; GROUP], less: i8, scale: f32, offset: f32) -> Self {
        Self { codes: codes.map(|code| code as i8 - less), scales: [scale; 2], offset }
    }

    /// The numbers.
    fn decode(&self, out: &mut [f32]) {
        for (n, (out, code)) in out.iter_mut().zip(self.codes).enumerate() {
            *out = self.scales[n / 16] * f32::from(code) - self.offset;
        }
    }
}

fn f16_at(data: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([data[at], data[at + 1]]).to_f32()
}

/// The four-bit codes of 32 numbers in 16 bytes: the low halves first, then the high ones.
fn nibbles(data: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|n| data[n % 16] >> (n / 16 * 4) & 15)
}

/// The same with a fifth bit each.
fn with_fifth(codes: [u8; GROUP], bits: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|n| codes[n] | (bits[n / 8] >> (n % 8) & 1) << 4)
}

/// Scale and offset of a group: eight pairs of six bits in twelve bytes.
fn group_scale(data: &[u8], group: usize) -> (f32, f32) {
    let (scale, offset) = if group < 4 {
        (data[group] & 63, data[group + 4] & 63)
    } else {
        let rest = data[group + 4];
        (rest & 15 | (data[group - 4] >> 6) << 4, rest >> 4 | (data[group] >> 6) << 4)
    };
    (f32::from(scale), f32::from(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_of_8_bits_is_its_sign_exponent_and_mantissa() {
        for code in 0..=u8::MAX {
            let (sign, exponent, mantissa) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
            let leading = if exponent == 0 { 0.0 } else { 1.0 };
            let expected = (-1.0_f64).powi(sign.into()) * 2.0_f64.powi(exponent.max(1) - 7) * (leading + mantissa);
            let found = e4m3(code);
            assert_eq!(found.is_nan(), code & 0x7f == 0x7f, "{code:#x}");
            assert!(found.is_nan() || f64::from(found) == expected, "{code:#x}: {found} is not {expected}");
            assert_eq!(found.is_sign_negative(), sign == 1, "{code:#x}");
            // Beside a scale the product is rounded once.
            let scale = 0.001_2_f32;
            let block = [&scale.to_le_bytes()[..], &[code; 128]].concat();
            let mut numbers = [0.0; 128];
            decode(Format::F8E4M3, &block, &mut numbers);
            let product = (expected * f64::from(scale)) as f32;
            assert!(found.is_nan() || numbers == [product; 128], "{code:#x}");
        }
        assert_eq!((e4m3(0x7e), e4m3(0x01)), (448.0, 2.0_f32.powi(-9)));
    }

    #[test]
    fn every_float_of_4_bits_is_exact_beside_every_power_of_two() {
        let sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for byte in 0..=u8::MAX {
            let power = 2.0_f64.powi(i32::from(byte) - 127);
            // Number 0 has the code 0, number 16 the code 1 ...
            let codes: [u8; 16] = std::array::from_fn(|n| (n as u8) | ((15 - n as u8) << 4));
            let mut numbers = [0.0; 32];
            decode(Format::Mxfp4, &[&[byte][..], &codes].concat(), &mut numbers);
            for (n, found) in numbers.into_iter().enumerate() {
                let code = if n < 16 { n } else { 31 - n };
                let expected = sizes[code % 8] * power * if code < 8 { 1.0 } else { -1.0 };
                if byte == u8::MAX {
                    assert!(found.is_nan());
                } else if expected.abs() > f64::from(f32::MAX) {
                    assert!(found.is_infinite(), "{byte} {code}");
                } else {
                    assert_eq!(f64::from(found), expected, "{byte} {code}");
                    assert_eq!(half::bf16::from_f32(found).to_f32(), found, "{byte} {code}: not exact in bf16");
                }
            }
        }
    }
}
