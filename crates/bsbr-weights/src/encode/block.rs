//! The scale and the codes of a block of Q4_0.

use half::f16;

/// Numbers of a block.
const LEN: usize = 32;
/// Sums are kept in as many parts, which the compiler keeps in vector registers.
const LANES: usize = 8;

/// Where the search begins: the number of largest magnitude over quarters of these, with either sign, is a scale. With fewer steps for
/// that number the grid is too coarse for the rest, with more too much is cut of it; numbers that lie on a grid of their own need the last.
const QUARTERS: std::ops::RangeInclusive<i32> = 20..=44;
/// Most times that codes and scale are fitted to each other.
const ROUNDS: usize = 6;

/// A scale and codes from -8 to 7.
pub(super) struct Block {
    scale: f16,
    codes: [f32; LEN],
}

impl Block {
    /// The block for `numbers`: the best that a search finds, or ggml's where that is as good.
    ///
    /// Beginning with scales around those that suit the largest number, codes are the nearest and the scale is the least-squares one
    /// for the codes, in turn. `weights` are those of the squared errors; all equal where there are none or all are zero.
    pub(super) fn new(numbers: &[f32; LEN], weights: Option<&[f32; LEN]>) -> Self {
        let weights = weights.filter(|weights| weights.iter().any(|&weight| weight > 0.0)).copied();
        let weights = weights.map_or([1.0; LEN], relative);
        let largest = numbers.iter().fold(
            0.0_f32,
            |largest, &number| {
                if number.abs() > largest.abs() { number } else { largest }
            },
        );
        if largest == 0.0 {
            return Self { scale: f16::ZERO, codes: [0.0; LEN] };
        }
        let mut best = Self::plain(numbers, largest);
        let mut least = best.error(numbers, &weights);
        // What is left of the squares is what the least-squares scale explains.
        let (mut start, mut most) = (None, 0.0);
        for quarter in QUARTERS {
            for sign in [-0.25, 0.25] {
                let steps = quarter as f32 * sign;
                let codes = nearest(numbers, steps / largest);
                let (product, square) = sums(numbers, &weights, &codes);
                let explained = product / square * product;
                if explained > most {
                    (start, most) = (Some(product / square), explained);
                }
            }
        }
        let mut scale = start.map_or(f16::ZERO, f16::from_f32);
        for _ in 0..ROUNDS {
            let inverse = 1.0 / scale.to_f32();
            if !inverse.is_finite() {
                break;
            }
            let found = Self { scale, codes: nearest(numbers, inverse) };
            let error = found.error(numbers, &weights);
            let (product, square) = sums(numbers, &weights, &found.codes);
            if error < least {
                (best, least) = (found, error);
            }
            let next = f16::from_f32(product / square);
            if next == scale {
                break;
            }
            scale = next;
        }
        best
    }

    /// With the scale of `quantize_row_q4_0_ref` of ggml, which puts the largest number eight steps below zero, and the nearest codes for
    /// it: no worse than ggml's, which are the nearest before that scale is rounded.
    fn plain(numbers: &[f32; LEN], largest: f32) -> Self {
        let scale = f16::from_f32(largest / -8.0);
        // Numbers so small that their scale is rounded to zero are zero.
        let codes = if scale.to_f32() == 0.0 { [0.0; LEN] } else { nearest(numbers, 1.0 / scale.to_f32()) };
        Self { scale, codes }
    }

    /// The weighted sum of squared errors.
    fn error(&self, numbers: &[f32; LEN], weights: &[f32; LEN]) -> f64 {
        let scale = f64::from(self.scale.to_f32());
        let errors = numbers.iter().zip(&self.codes).zip(weights).map(|((&number, &code), &weight)| {
            let error = f64::from(number) - scale * f64::from(code);
            f64::from(weight) * error * error
        });
        errors.sum()
    }

    /// Scale, then the codes of number `n` and `n + 16` in one byte.
    pub(super) fn write(&self, out: &mut [u8]) {
        out[..2].copy_from_slice(&self.scale.to_le_bytes());
        let (low, high) = self.codes.split_at(LEN / 2);
        for ((out, low), high) in out[2..].iter_mut().zip(low).zip(high) {
            *out = (low + 8.0) as u8 | ((high + 8.0) as u8) << 4;
        }
    }
}

/// The weights over the largest: their squares and products stay in range whatever their unit.
fn relative(weights: [f32; LEN]) -> [f32; LEN] {
    let largest = weights.iter().fold(0.0_f32, |largest, &weight| largest.max(weight));
    weights.map(|weight| weight / largest)
}

/// The codes nearest to `numbers * inverse`.
fn nearest(numbers: &[f32; LEN], inverse: f32) -> [f32; LEN] {
    // Adding and taking away 1.5 * 2^23 leaves the nearest whole number, without a call for each.
    const MAGIC: f32 = 12_582_912.0;
    let mut codes = [0.0; LEN];
    for (code, number) in codes.iter_mut().zip(numbers) {
        let inside = (number * inverse).clamp(-8.0, 7.0);
        *code = (inside + MAGIC) - MAGIC;
    }
    codes
}

/// The weighted sums of products of numbers and codes, and of squares of codes.
fn sums(numbers: &[f32; LEN], weights: &[f32; LEN], codes: &[f32; LEN]) -> (f32, f32) {
    let (mut products, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for part in 0..LEN / LANES {
        for lane in 0..LANES {
            let at = part * LANES + lane;
            let weighted = weights[at] * codes[at];
            products[lane] += weighted * numbers[at];
            squares[lane] += weighted * codes[at];
        }
    }
    (products.iter().sum(), squares.iter().sum())
}
