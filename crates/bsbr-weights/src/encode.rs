//! Numbers as blocks of a format.

mod block;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::{Format, LayoutError, first_not_finite};
use block::Block;

/// Numbers that cannot be written in a format.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// Rows that are no whole blocks, or numbers that are no whole rows.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A format that is read and not written.
    #[error("{0} is read and not written: written are F32, F16, BF16, Q8_0 and Q4_0")]
    Format(Format),
    /// A number that is NaN or infinite.
    #[error("number {index} is {value}, expected finite ones")]
    NotFinite {
        /// Which.
        index: usize,
        /// The number.
        value: f32,
    },
    /// A number that the format, or the scale of its block, does not reach.
    #[error("number {index} is {value:e}, which is beyond the largest {format}")]
    TooLarge {
        /// The format.
        format: Format,
        /// Which.
        index: usize,
        /// The number.
        value: f32,
    },
    /// Weights of the errors that do not belong to the rows, or are negative or not finite.
    #[error("the importance of inputs is {found}, expected {expected} finite numbers that are not negative")]
    Importance {
        /// Numbers of a row.
        expected: usize,
        /// What is there.
        found: String,
    },
}

/// Rows of `inputs` numbers in `format`, row after row.
///
/// F16 and BF16 are rounded to the nearest, ties to even. Q8_0 rounds to the nearest with the scale that the largest number of a block
/// asks for, and gives the bytes of ggml's own quantiser. Q4_0 looks for the scale and the codes of each block that make `sum w (x - s c)^2`
/// small, which is never more than with ggml's choice: `w` is `importance`, one for each input (mean squares of what is multiplied with
/// it, of any unit), or 1 where there is none. No number of a block is further from its own than half the scale, or than what the codes
/// do not reach: see [`crate::decode`].
///
/// Rows are shared among all threads.
///
/// # Errors
///
/// [`EncodeError`], before anything is written.
pub fn encode(
    format: Format,
    inputs: usize,
    numbers: &[f32],
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, EncodeError> {
    let row = format.row_bytes(inputs).ok_or(LayoutError::Row { format, inputs })?;
    let outputs = numbers.len().checked_div(inputs).unwrap_or(0);
    if outputs * inputs != numbers.len() {
        let (expected, found) = (4 * (outputs as u128 + 1) * inputs as u128, 4 * numbers.len());
        return Err(LayoutError::Size { format: Format::F32, outputs: outputs + 1, inputs, expected, found }.into());
    }
    if let Some(index) = first_not_finite(Format::F32, bytemuck::cast_slice(numbers)) {
        return Err(EncodeError::NotFinite { index, value: numbers[index] });
    }
    if let Some(importance) = importance {
        let bad = |found: String| EncodeError::Importance { expected: inputs, found };
        if importance.len() != inputs {
            return Err(bad(format!("{} numbers", importance.len())));
        }
        if let Some(number) = importance.iter().find(|number| !number.is_finite() || **number < 0.0) {
            return Err(bad(format!("{number} for one of them")));
        }
    }
    check_range(format, numbers)?;
    let mut out = vec![0; outputs * row];
    if out.is_empty() {
        return Ok(out);
    }
    out.par_chunks_mut(row).zip(numbers.par_chunks(inputs)).try_for_each(|(out, numbers)| {
        match format {
            Format::F32 => each(out, numbers, f32::to_le_bytes),
            Format::F16 => each(out, numbers, |number| f16::from_f32(number).to_le_bytes()),
            Format::Bf16 => each(out, numbers, |number| bf16::from_f32(number).to_le_bytes()),
            Format::Q8_0 => {
                for (out, numbers) in out.chunks_exact_mut(34).zip(numbers.as_chunks().0) {
                    q8_0(numbers, out);
                }
            }
            Format::Q4_0 => {
                let mut weights = importance.map(|importance| importance.as_chunks().0.iter());
                for (out, numbers) in out.chunks_exact_mut(18).zip(numbers.as_chunks().0) {
                    let weights = weights.as_mut().and_then(Iterator::next);
                    Block::new(numbers, weights).write(out);
                }
            }
            other => return Err(EncodeError::Format(other)),
        }
        Ok(())
    })?;
    Ok(out)
}

fn each<const SIZE: usize>(out: &mut [u8], numbers: &[f32], bytes: impl Fn(f32) -> [u8; SIZE]) {
    out.as_chunks_mut().0.iter_mut().zip(numbers).for_each(|(out, &number)| *out = bytes(number));
}

/// Refuses what would become infinite. A number is, where its rounding is; a block is, where its scale is.
fn check_range(format: Format, numbers: &[f32]) -> Result<(), EncodeError> {
    let infinite = |number: f32| match format {
        Format::F16 => f16::from_f32(number).is_infinite(),
        Format::Bf16 => bf16::from_f32(number).is_infinite(),
        Format::Q8_0 => f16::from_f32(number / 127.0).is_infinite(),
        Format::Q4_0 => f16::from_f32(number / 8.0).is_infinite(),
        _ => false,
    };
    if format == Format::F32 {
        return Ok(());
    }
    match numbers.par_iter().position_first(|&number| number.abs() > 6e4 && infinite(number)) {
        Some(index) => Err(EncodeError::TooLarge { format, index, value: numbers[index] }),
        None => Ok(()),
    }
}

/// As `quantize_row_q8_0_ref` of ggml.
fn q8_0(numbers: &[f32; 32], out: &mut [u8]) {
    let largest = numbers.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    // Halves away from zero, as `roundf`.
    out[2..].iter_mut().zip(numbers).for_each(|(code, number)| *code = (number * inverse).round() as i8 as u8);
}

#[cfg(test)]
mod tests;
