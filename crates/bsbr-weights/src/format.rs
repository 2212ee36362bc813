//! Number formats.

use std::fmt;

/// How a file stores the numbers of a weight.
///
/// Numbers are little-endian. Those of a quantised format come in blocks along a row, each with scales of its own: see
/// [`crate::decode`] for what they mean. The layouts are those of ggml, which has no [`Format::F8E4M3`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 codes of 8 bits and a scale.
    Q8_0,
    /// 32 codes of 4 bits and a scale.
    Q4_0,
    /// 32 codes of 4 bits, a scale and a smallest number.
    Q4_1,
    /// 32 codes of 5 bits and a scale.
    Q5_0,
    /// 32 codes of 5 bits, a scale and a smallest number.
    Q5_1,
    /// 256 codes of 4 bits; each 32 have a scale and an offset of 6 bits.
    Q4K,
    /// 256 codes of 5 bits; each 32 have a scale and an offset of 6 bits.
    Q5K,
    /// 256 codes of 6 bits; each 16 have a scale of 8 bits.
    Q6K,
    /// 32 floats of 4 bits (E2M1) and a power of two (E8M0): MX of the Open Compute Project.
    Mxfp4,
    /// 128 floats of 8 bits (E4M3, without infinities) and a scale in single precision, which stands before them.
    F8E4M3,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Mxfp4,
        Self::F8E4M3,
    ];

    /// The name that ggml gives it, which is also that of safetensors where that has the format.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Mxfp4 => "MXFP4",
            Self::F8E4M3 => "F8_E4M3",
        }
    }

    /// The format of this [`Format::name`].
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Numbers of a block, 1 where every number stands for itself.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Mxfp4 => 32,
            Self::F8E4M3 => 128,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Mxfp4 => 17,
            Self::F8E4M3 => 132,
        }
    }

    /// Whether its numbers are codes that share the scales of their block.
    pub const fn is_quantised(self) -> bool {
        self.block() > 1
    }

    /// Whether they are multiples of those scales by integers of 8 bits, as [`crate::Group`] has them.
    pub const fn has_groups(self) -> bool {
        self.is_quantised() && !matches!(self, Self::F8E4M3)
    }

    /// Bits that a number takes, its share of the scales included.
    pub fn bits_per_weight(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block() as f64
    }

    /// Bytes of a row of `inputs` numbers; `None` where they are no whole blocks, or too many to count.
    pub fn row_bytes(self, inputs: usize) -> Option<usize> {
        if !inputs.is_multiple_of(self.block()) {
            return None;
        }
        (inputs / self.block()).checked_mul(self.block_bytes())
    }
}

/// What stored weights are multiplied in. What a processor does not know how to do fast it does in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// f32 over exactly the numbers that the weights mean.
    #[default]
    F32,
    /// Codes of weights in integers: tokens become codes of 8 bits too, 32 numbers to a scale. Faster, and less exact by what 8 bits
    /// cannot hold. Weights that are no codes are multiplied in f32, and so are many tokens on a processor without VNNI.
    Int8,
    /// Many tokens in products of bf16 with sums in f32, which needs AVX-512 BF16: numbers of tokens, and of weights that are no bf16
    /// themselves, lose all but 8 bits of their mantissa. Few tokens, whose products are not what takes the time, in f32.
    Bf16,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
