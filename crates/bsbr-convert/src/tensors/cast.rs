//! Numbers of one weight format in another.

use bsbr_weights::Matrix;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::float::numbers;

/// What a cast changed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct CastLoss {
    /// Numbers that are not what they were.
    pub(crate) changed: u64,
    /// Those of them that became zero.
    pub(crate) underflowed: u64,
    /// Largest change of a number, relative to it; 1 for one that became zero.
    pub(crate) largest_relative_error: f64,
    /// Sum of squares; of codes alone.
    pub(crate) squares: f64,
    /// Sum of squared changes; of codes alone.
    pub(crate) squared_errors: f64,
}

impl CastLoss {
    /// Adds what became of a number.
    fn count(&mut self, value: f32, cast: f32) {
        if cast != value {
            let (before, after) = (f64::from(value), f64::from(cast));
            self.changed += 1;
            self.underflowed += u64::from(cast == 0.0);
            self.largest_relative_error = self.largest_relative_error.max(((after - before) / before).abs());
        }
    }

    /// Adds what became of numbers that are codes now.
    pub(crate) fn count_codes(&mut self, values: &[f32], codes: Matrix<'_>) {
        let inputs = codes.inputs().max(1);
        let parts: Vec<Self> = values
            .par_chunks(inputs)
            .enumerate()
            .map(|(row, values)| {
                let (mut decoded, mut loss) = (vec![0.0; values.len()], Self::default());
                codes.widen(row..row + 1, &mut decoded);
                for (&value, &cast) in values.iter().zip(&decoded) {
                    loss.count(value, cast);
                    loss.squares += f64::from(value).powi(2);
                    loss.squared_errors += (f64::from(value) - f64::from(cast)).powi(2);
                }
                loss
            })
            .collect();
        // In their order: the sums are the same every time.
        for part in parts {
            self.changed += part.changed;
            self.underflowed += part.underflowed;
            self.largest_relative_error = self.largest_relative_error.max(part.largest_relative_error);
            self.squares += part.squares;
            self.squared_errors += part.squared_errors;
        }
    }
}

/// A number that is infinite in the other format.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Overflow {
    /// Its index.
    pub(crate) index: usize,
    /// The number.
    pub(crate) value: f32,
}

/// Appends the numbers in `bytes` to `out` in another format, each rounded to the nearest (ties to even), and adds what
/// that changed to `loss`. All numbers must be finite, and stay so.
pub(crate) fn cast(
    [from, to]: [Dtype; 2],
    bytes: &[u8],
    out: &mut Vec<u8>,
    loss: &mut CastLoss,
) -> Result<(), Overflow> {
    for (index, value) in numbers(from, bytes).enumerate() {
        let cast = match to {
            Dtype::F16 => {
                let cast = f16::from_f32(value);
                out.extend_from_slice(&cast.to_le_bytes());
                cast.to_f32()
            }
            Dtype::BF16 => {
                let cast = bf16::from_f32(value);
                out.extend_from_slice(&cast.to_le_bytes());
                cast.to_f32()
            }
            _ => {
                out.extend_from_slice(&value.to_le_bytes());
                value
            }
        };
        if !cast.is_finite() {
            return Err(Overflow { index, value });
        }
        loss.count(value, cast);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    /// A format by its definition: bits of the significand with the leading one, least exponent, largest number.
    fn format(dtype: Dtype) -> (i32, i32, f64) {
        match dtype {
            Dtype::F16 => (11, -14, 65504.0),
            Dtype::BF16 => (8, -126, f64::from(bf16::MAX.to_f32())),
            _ => (24, -126, f64::from(f32::MAX)),
        }
    }

    /// Rounds to the nearest number of a format in f64, which holds every quotient here exactly; `None` past its range.
    fn rounded(value: f64, dtype: Dtype) -> Option<f64> {
        let (bits, least, largest) = format(dtype);
        let exponent = if value == 0.0 { least } else { (value.abs().log2().floor() as i32).max(least) };
        // The logarithm of a number just below a power of two may round up to it.
        let exponent = if value.abs() < 2_f64.powi(exponent) { (exponent - 1).max(least) } else { exponent };
        let step = 2_f64.powi(exponent - bits + 1);
        let result = (value / step).round_ties_even() * step;
        (result.abs() <= largest).then_some(result)
    }

    /// Numbers of a format, all of them where there are 65536.
    fn samples(dtype: Dtype) -> Vec<u8> {
        match dtype {
            Dtype::F32 => {
                // A step that is odd meets every pattern of low bits; it and its neighbours are ties and near ties.
                let grid =
                    (0..u32::MAX).step_by(40_009).flat_map(|bits| [bits, bits & !0xffff, bits & !0xfff | 0x8000]);
                let bits = grid.chain([0, 1, 0x7f_ffff, 0x80_0000, 0x7f7f_ffff, 0x477f_e000, 0x477f_efff, 0x477f_f000]);
                bits.map(f32::from_bits).filter(|x| x.is_finite()).flat_map(f32::to_le_bytes).collect()
            }
            dtype => {
                let all = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
                let finite = all.chunks_exact(2).filter(|bytes| numbers(dtype, bytes).all(f32::is_finite));
                finite.flatten().copied().collect()
            }
        }
    }

    #[test]
    fn every_pair_of_formats_rounds_each_number_to_the_nearest_and_counts_what_changed() {
        for from in DTYPES {
            for to in DTYPES {
                for bytes in samples(from).chunks_exact(from.bitsize() / 8) {
                    let value = f64::from(numbers(from, bytes).next().expect("a number"));
                    let (mut out, mut loss) = (Vec::new(), CastLoss::default());
                    let result = cast([from, to], bytes, &mut out, &mut loss);
                    let Some(expected) = rounded(value, to) else {
                        assert_eq!(
                            result,
                            Err(Overflow { index: 0, value: value as f32 }),
                            "{from} to {to}: {value:e}"
                        );
                        continue;
                    };
                    let found = f64::from(numbers(to, &out).next().expect("a number"));
                    assert_eq!((result, found), (Ok(()), expected), "{from} to {to}: {value:e}");
                    assert_eq!(found.is_sign_negative(), value.is_sign_negative(), "{from} to {to}: {value:e}");
                    let changed = expected != value;
                    assert_eq!((loss.changed, loss.underflowed), (changed.into(), (changed && expected == 0.0).into()));
                    let error = if changed { ((expected - value) / value).abs() } else { 0.0 };
                    assert_eq!(loss.largest_relative_error, error, "{from} to {to}: {value:e}");
                }
            }
        }
    }

    #[test]
    fn a_wider_format_and_back_gives_the_same_bits() {
        for from in [Dtype::F16, Dtype::BF16] {
            let (bytes, mut wide, mut back, mut loss) = (samples(from), Vec::new(), Vec::new(), CastLoss::default());
            cast([from, Dtype::F32], &bytes, &mut wide, &mut loss).expect("in range");
            cast([Dtype::F32, from], &wide, &mut back, &mut loss).expect("in range");
            assert_eq!((back, loss), (bytes, CastLoss::default()));
        }
    }

    #[test]
    fn the_first_number_out_of_range_is_named() {
        let bytes: Vec<u8> = [1.0, 65_519.0, 65_520.0, 7e4].into_iter().flat_map(f32::to_le_bytes).collect();
        let overflow = cast([Dtype::F32, Dtype::F16], &bytes, &mut Vec::new(), &mut CastLoss::default());
        assert_eq!(overflow, Err(Overflow { index: 2, value: 65_520.0 }));
    }
}
