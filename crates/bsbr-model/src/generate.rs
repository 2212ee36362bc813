//! Continuing texts.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use crate::{Decoder, DecoderCache, ModelError, Sampler};

/// Tokens of a prompt that are read at once: bounds the memory of a long prompt.
pub const PREFILL_PIECE: usize = 1024;

/// When a continuation ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateConfig {
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// Tokens that end the text; they are not part of the continuation.
    pub stop_tokens: Vec<u32>,
}

/// A continuation and what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Whether a stop token ended it.
    pub stopped: bool,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time for the new tokens.
    pub decode: Duration,
    /// Bytes of the cache at the end.
    pub cache_bytes: usize,
}

/// Continues `prompt`, handing each new token to `each` as it comes; `each` returns `false` to end early.
///
/// # Errors
///
/// [`ModelError::EmptyInput`] for an empty prompt, and what [`Decoder::hidden`] refuses. Where positions are learned and
/// the policy is `error`, prompt and continuation together must fit; that is checked before anything runs.
pub fn generate(
    decoder: &Decoder,
    prompt: &[u32],
    config: &GenerateConfig,
    sampler: &mut Sampler,
    mut each: impl FnMut(u32) -> bool,
) -> Result<Generation, ModelError> {
    // The last new token is never read, so it needs no position.
    let length = prompt.len().saturating_add(config.max_new_tokens.saturating_sub(1));
    decoder.check_length(length)?;
    let mut cache = decoder.new_cache(&[length])?;
    let start = Instant::now();
    let mut hidden = prefill(decoder, prompt, &mut cache)?;
    let mut logits = scores(decoder, hidden)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    let (mut tokens, mut stopped) = (Vec::new(), false);
    while tokens.len() < config.max_new_tokens {
        let token = sampler.choose(&logits)?;
        if config.stop_tokens.contains(&token) {
            stopped = true;
            break;
        }
        tokens.push(token);
        if !each(token) || tokens.len() == config.max_new_tokens {
            break;
        }
        hidden = decoder.hidden(&[vec![token]], &mut cache)?;
        logits = scores(decoder, hidden)?;
    }
    Ok(Generation { tokens, stopped, prefill, decode: start.elapsed(), cache_bytes: cache.bytes() })
}

/// Reads `tokens` piece by piece into a cache of one text; the hidden state of the last token, `[1, hidden_size]`.
///
/// # Errors
///
/// As [`Decoder::hidden`].
pub fn prefill(decoder: &Decoder, tokens: &[u32], cache: &mut DecoderCache) -> Result<Tensor<2>, ModelError> {
    let mut last = Err(ModelError::EmptyInput);
    for piece in tokens.chunks(PREFILL_PIECE) {
        let hidden = decoder.hidden(&[piece.to_vec()], cache)?;
        last = Ok(hidden.narrow(0, piece.len() - 1, 1));
    }
    last
}

fn scores(decoder: &Decoder, hidden: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    let logits = decoder.logits(hidden).try_into_vec_as::<f32>();
    logits.map_err(|error| ModelError::Input(format!("the scores cannot be read back: {error:?}")))
}
