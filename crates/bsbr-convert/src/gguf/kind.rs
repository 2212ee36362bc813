//! The number formats of GGUF: their sizes, and their numbers as f32.

use std::fmt;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

/// A number format of GGUF, known by name and size. [`GgufKind::is_read`] says whether its numbers can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufKind {
    /// Its number in the file.
    pub id: u32,
    /// Name as the tools print it.
    pub name: &'static str,
    /// Numbers of a block.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

const fn kind(id: u32, name: &'static str, block: usize, bytes: usize) -> GgufKind {
    GgufKind { id, name, block, bytes }
}

/// Every format of ggml that has not been withdrawn.
const KINDS: [GgufKind; 34] = [
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(9, "Q8_1", 32, 36),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(15, "Q8_K", 256, 292),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(24, "I8", 1, 1),
    kind(25, "I16", 1, 2),
    kind(26, "I32", 1, 4),
    kind(27, "I64", 1, 8),
    kind(28, "F64", 1, 8),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
    kind(34, "TQ1_0", 256, 54),
    kind(35, "TQ2_0", 256, 66),
    kind(39, "MXFP4", 32, 17),
    kind(40, "NVFP4", 64, 36),
    kind(41, "Q1_0", 128, 18),
];

/// Largest block of a format that is read.
const LARGEST_BLOCK: usize = 256;

impl GgufKind {
    /// The format with this number.
    pub(crate) fn of(id: u32) -> Option<Self> {
        KINDS.into_iter().find(|kind| kind.id == id)
    }

    /// Whether its numbers can be read.
    pub fn is_read(self) -> bool {
        matches!(
            self.name,
            "F32" | "F16" | "BF16" | "Q8_0" | "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1" | "Q4_K" | "Q5_K" | "Q6_K"
        )
    }

    /// Names of the formats that are read.
    pub(crate) fn all_read() -> String {
        let names = KINDS.into_iter().filter(|kind| kind.is_read()).map(|kind| kind.name);
        names.collect::<Vec<_>>().join(", ")
    }

    /// Whether its numbers are codes that share the scales of their block.
    pub fn is_quantised(self) -> bool {
        self.block > 1
    }

    /// The format its numbers have once read: f32 for a quantised one, as products of a scale and a code need up to
    /// 25 bits.
    pub(crate) fn dtype(self) -> Dtype {
        match self.name {
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    /// Bytes of `numbers` numbers, whole blocks of them.
    pub(crate) fn bytes_of(self, numbers: usize) -> usize {
        numbers / self.block * self.bytes
    }

    /// Appends the numbers `range` of a tensor whose bytes are `data`, in the bytes of [`GgufKind::dtype`].
    pub(crate) fn decode(self, data: &[u8], range: Range<usize>, out: &mut Vec<u8>) {
        if !self.is_quantised() {
            out.extend_from_slice(&data[range.start * self.bytes..range.end * self.bytes]);
            return;
        }
        let mut numbers = [0.0; LARGEST_BLOCK];
        for block in range.start / self.block..range.end.div_ceil(self.block) {
            let first = block * self.block;
            self.decode_block(&data[block * self.bytes..(block + 1) * self.bytes], &mut numbers);
            let (from, to) = (range.start.max(first) - first, range.end.min(first + self.block) - first);
            numbers[from..to].iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        }
    }

    fn decode_block(self, data: &[u8], out: &mut [f32; LARGEST_BLOCK]) {
        match self.name {
            "Q8_0" => q8_0(data, out),
            "Q4_0" => q4_0(data, out),
            "Q4_1" => q4_1(data, out),
            "Q5_0" => q5_0(data, out),
            "Q5_1" => q5_1(data, out),
            "Q4_K" => q4_k(data, out),
            "Q5_K" => q5_k(data, out),
            // The only one left: a file with any other format is refused when it is opened.
            _ => q6_k(data, out),
        }
    }

    /// One number of a tensor as f32; `position` counts numbers.
    pub(crate) fn number(self, data: &[u8], position: usize) -> f32 {
        let mut bytes = Vec::with_capacity(4);
        self.decode(data, position..position + 1, &mut bytes);
        match self.dtype() {
            Dtype::F16 => f16_at(&bytes, 0),
            Dtype::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }
}

impl fmt::Display for GgufKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

fn f16_at(data: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([data[at], data[at + 1]]).to_f32()
}

/// The four-bit codes of 32 numbers in 16 bytes: the low halves first, then the high ones.
fn nibbles(data: &[u8]) -> impl Iterator<Item = u8> + '_ {
    data.iter().map(|byte| byte & 15).chain(data.iter().map(|byte| byte >> 4))
}

/// The fifth bits of 32 numbers.
fn fifth_bits(data: &[u8]) -> impl Iterator<Item = u8> {
    let bits = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
    (0..32).map(move |n| ((bits >> n & 1) as u8) << 4)
}

/// Scale, then 32 signed codes.
fn q8_0(data: &[u8], out: &mut [f32]) {
    let scale = f16_at(data, 0);
    out.iter_mut().zip(&data[2..]).for_each(|(number, &code)| *number = scale * f32::from(code as i8));
}

/// Scale, then codes less 8.
fn q4_0(data: &[u8], out: &mut [f32]) {
    let scale = f16_at(data, 0);
    out.iter_mut().zip(nibbles(&data[2..])).for_each(|(number, code)| *number = scale * (f32::from(code) - 8.0));
}

/// Scale, smallest number, then codes.
fn q4_1(data: &[u8], out: &mut [f32]) {
    let (scale, least) = (f16_at(data, 0), f16_at(data, 2));
    out.iter_mut().zip(nibbles(&data[4..])).for_each(|(number, code)| *number = scale * f32::from(code) + least);
}

/// As [`q4_0`] with a fifth bit, less 16.
fn q5_0(data: &[u8], out: &mut [f32]) {
    let scale = f16_at(data, 0);
    let codes = nibbles(&data[6..]).zip(fifth_bits(&data[2..])).map(|(low, high)| low | high);
    out.iter_mut().zip(codes).for_each(|(number, code)| *number = scale * (f32::from(code) - 16.0));
}

/// As [`q4_1`] with a fifth bit.
fn q5_1(data: &[u8], out: &mut [f32]) {
    let (scale, least) = (f16_at(data, 0), f16_at(data, 2));
    let codes = nibbles(&data[8..]).zip(fifth_bits(&data[4..])).map(|(low, high)| low | high);
    out.iter_mut().zip(codes).for_each(|(number, code)| *number = scale * f32::from(code) + least);
}

/// Scale and offset of each group of 32: eight pairs of six bits in twelve bytes.
fn group_scales(data: &[u8]) -> [(f32, f32); 8] {
    std::array::from_fn(|group| {
        let (scale, offset) = if group < 4 {
            (data[group] & 63, data[group + 4] & 63)
        } else {
            let rest = data[group + 4];
            (rest & 15 | (data[group - 4] >> 6) << 4, rest >> 4 | (data[group] >> 6) << 4)
        };
        (f32::from(scale), f32::from(offset))
    })
}

/// Scales of scales and of offsets, the scales of the groups, then codes: of two groups in 32 bytes each.
fn q4_k(data: &[u8], out: &mut [f32]) {
    let (scale, offset) = (f16_at(data, 0), f16_at(data, 2));
    let groups = group_scales(&data[4..16]);
    let codes = data[16..144].chunks_exact(32).flat_map(nibbles);
    out.iter_mut().zip(codes).enumerate().for_each(|(n, (number, code))| {
        let (group_scale, group_offset) = groups[n / 32];
        *number = scale * group_scale * f32::from(code) - offset * group_offset;
    });
}

/// As [`q4_k`] with fifth bits: bit `g` of byte `n` belongs to number `n` of group `g`.
fn q5_k(data: &[u8], out: &mut [f32]) {
    let (scale, offset) = (f16_at(data, 0), f16_at(data, 2));
    let (groups, high) = (group_scales(&data[4..16]), &data[16..48]);
    let codes = data[48..176].chunks_exact(32).flat_map(nibbles);
    out.iter_mut().zip(codes).enumerate().for_each(|(n, (number, code))| {
        let (group_scale, group_offset) = groups[n / 32];
        let code = code | (high[n % 32] >> (n / 32) & 1) << 4;
        *number = scale * group_scale * f32::from(code) - offset * group_offset;
    });
}

/// Low four bits, high two bits, signed scales of 16 numbers each, the scale of these. In each half of the block the low
/// bits of groups 0 and 2, 1 and 3 share bytes, and all four share those of the high bits.
fn q6_k(data: &[u8], out: &mut [f32]) {
    let scale = f16_at(data, 208);
    for (n, number) in out.iter_mut().enumerate() {
        let (half, group, place) = (n / 128, n % 128 / 32, n % 32);
        let low = data[half * 64 + group % 2 * 32 + place] >> (group / 2 * 4) & 15;
        let high = data[128 + half * 32 + place] >> (group * 2) & 3;
        let code = f32::from(low | high << 4) - 32.0;
        *number = scale * f32::from(data[192 + n / 16] as i8) * code;
    }
}
