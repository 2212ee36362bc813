//! Rows of numbers for tests.

use bsbr_kernels::{Heads, Stored};
use half::{bf16, f16};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StoredAs {
    F32,
    F16,
    Bf16,
}

/// Rows in one of the types, and what they say in f32.
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    pub(crate) fn new(numbers: &[f32], stored: StoredAs) -> Self {
        match stored {
            StoredAs::F32 => Self::F32(numbers.to_vec()),
            StoredAs::F16 => Self::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect()),
            StoredAs::Bf16 => Self::Bf16(numbers.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    pub(crate) fn view(&self, dims: [usize; 4]) -> Stored<'_> {
        match self {
            Self::F32(numbers) => Heads::contiguous(numbers, dims).into(),
            Self::F16(numbers) => Heads::contiguous(numbers, dims).into(),
            Self::Bf16(numbers) => Heads::contiguous(numbers, dims).into(),
        }
    }

    pub(crate) fn in_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(numbers) => numbers.clone(),
            Self::F16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

pub(crate) fn numbers(seed: u64, count: usize, size: f64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    // Two of them give something close enough to a normal distribution.
    (0..count).map(|_| ((next() + next() + next() - 1.5) * 2.0 * size) as f32).collect()
}
