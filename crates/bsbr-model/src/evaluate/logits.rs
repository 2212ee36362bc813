//! Logits against expected ones.

use serde::{Deserialize, Serialize};

use super::rows::{best, numbers};
use crate::{Decoder, ModelError};

/// How far logits are from expected ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LogitDifference {
    /// Largest absolute difference; NaN if any logit is.
    pub max: f64,
    /// Mean absolute difference.
    pub mean: f64,
    /// Share of tokens with the same best token.
    pub top1: f64,
    /// Tokens compared.
    pub tokens: usize,
}

/// Compares the logits of some texts, each read as a whole, with expected ones, `[tokens, vocab_size]` row by row.
///
/// # Errors
///
/// [`ModelError::Input`] if the number of logits does not fit, and what [`Decoder::hidden`] refuses.
pub fn compare_logits(
    decoder: &Decoder,
    texts: &[Vec<u32>],
    expected: &[Vec<f32>],
) -> Result<LogitDifference, ModelError> {
    if texts.len() != expected.len() {
        let problem = format!("{} texts were given, and expected logits of {}", texts.len(), expected.len());
        return Err(ModelError::Input(problem));
    }
    let (mut max, mut sum, mut count, mut same, mut tokens) = (0.0f64, 0.0, 0usize, 0usize, 0usize);
    for (text, expected) in texts.iter().zip(expected) {
        let found = numbers(decoder.forward(text)?)?;
        if found.len() != expected.len() {
            let width = expected.len() / text.len().max(1);
            let vocab_size = decoder.config().decoder.vocab_size;
            let problem = format!("the expected logits are {width} to a token, the vocabulary has {vocab_size} tokens");
            return Err(ModelError::Input(problem));
        }
        for (&a, &b) in found.iter().zip(expected) {
            let difference = (a as f64 - b as f64).abs();
            // `f64::max` would swallow a NaN.
            max = if max.is_nan() || difference.is_nan() { f64::NAN } else { max.max(difference) };
            sum += difference;
        }
        let vocab = found.len() / text.len();
        let rows = found.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
        same += rows.filter(|(a, b)| best(a)[0] == best(b)[0]).count();
        count += found.len();
        tokens += text.len();
    }
    let share = |part: f64, whole: usize| part / whole.max(1) as f64;
    Ok(LogitDifference { max, mean: share(sum, count), top1: share(same as f64, tokens), tokens })
}
