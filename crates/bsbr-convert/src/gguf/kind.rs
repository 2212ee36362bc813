//! The number formats of GGUF: their sizes, and their numbers as f32.

use std::fmt;
use std::ops::Range;

use bsbr_weights::{Format, decode};
use safetensors::Dtype;

use crate::tensors::numbers;

/// A number format of GGUF, known by name and size. [`GgufKind::is_read`] says whether its numbers can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufKind {
    /// Its number in the file; `u32::MAX` for a format of other files alone.
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

/// A format that no GGUF file has.
const F8: GgufKind = kind(u32::MAX, "F8_E4M3", 128, 132);

/// Largest block of a format that is read.
const LARGEST_BLOCK: usize = 256;

impl GgufKind {
    /// The format with this number.
    pub(crate) fn of(id: u32) -> Option<Self> {
        KINDS.into_iter().find(|kind| kind.id == id)
    }

    /// The one that stands for a format of weights.
    pub(crate) fn of_format(format: Format) -> Option<Self> {
        KINDS.into_iter().chain([F8]).find(|kind| kind.name == format.name())
    }

    /// What its numbers mean, where they can be read.
    pub fn format(self) -> Option<Format> {
        Format::of_name(self.name)
    }

    /// Whether its numbers can be read.
    pub fn is_read(self) -> bool {
        self.format().is_some()
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
        // A file with a format that is not read is refused when it is opened.
        let Some(format) = self.format() else { return };
        let mut numbers = [0.0; LARGEST_BLOCK];
        let numbers = &mut numbers[..self.block];
        for block in range.start / self.block..range.end.div_ceil(self.block) {
            let first = block * self.block;
            decode(format, &data[block * self.bytes..(block + 1) * self.bytes], numbers);
            let (from, to) = (range.start.max(first) - first, range.end.min(first + self.block) - first);
            numbers[from..to].iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        }
    }

    /// One number of a tensor as f32; `position` counts numbers.
    pub(crate) fn number(self, data: &[u8], position: usize) -> f32 {
        let mut bytes = Vec::with_capacity(4);
        self.decode(data, position..position + 1, &mut bytes);
        numbers(self.dtype(), &bytes).next().unwrap_or(f32::NAN)
    }
}

impl fmt::Display for GgufKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
