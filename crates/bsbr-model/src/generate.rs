//! Continuing texts.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use crate::{Decoder, DecoderCache, ModelError, Sampler};

/// Tokens of a prompt that are read at once: bounds the memory of a long prompt, and how long others wait for it. Texts are cut
/// at multiples of it, counted from their first token, so that what a text gives does not depend on who has it read.
pub const PREFILL_PIECE: usize = 512;

/// How many of the next `tokens` tokens of a text that has `held` are read at once.
pub fn next_piece(held: usize, tokens: usize) -> usize {
    tokens.min(PREFILL_PIECE - held % PREFILL_PIECE)
}

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
    /// Tokens that belong to the text and that the cache does not hold, as the end came before they were read: the last new
    /// token, or the rest of the prompt. What goes on behind this text begins with them.
    pub unread: Vec<u32>,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time for the new tokens.
    pub decode: Duration,
    /// Bytes of the cache at the end.
    pub cache_bytes: usize,
}

/// What a continuation has just done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// So many tokens of the prompt have been read, of so many.
    Read(usize, usize),
    /// The next token of the continuation.
    Token(u32),
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
    let mut cache = decoder.new_cache(&[expected_length(0, prompt, config)])?;
    generate_behind(decoder, &mut cache, prompt, config, sampler, |step| match step {
        Step::Read(..) => true,
        Step::Token(token) => each(token),
    })
}

/// Goes on behind what `cache` holds of one text, possibly nothing: reads `new` and continues it. `each` sees every step, and
/// returns `false` to end there; [`Generation::unread`] then says what the cache lacks.
///
/// # Errors
///
/// As [`generate`]; [`ModelError::Input`] for a cache of several texts. Where reading fails the cache holds what came before.
pub fn generate_behind(
    decoder: &Decoder,
    cache: &mut DecoderCache,
    new: &[u32],
    config: &GenerateConfig,
    sampler: &mut Sampler,
    mut each: impl FnMut(Step) -> bool,
) -> Result<Generation, ModelError> {
    if cache.batch() != 1 {
        return Err(ModelError::Input(format!("the cache holds {} texts, expected one to continue", cache.batch())));
    }
    if new.is_empty() {
        return Err(ModelError::EmptyInput);
    }
    decoder.check_length(expected_length(cache.length(0), new, config))?;
    let start = Instant::now();
    let (mut read, mut last) = (0, None);
    while read < new.len() {
        let piece = &new[read..][..next_piece(cache.length(0), new.len() - read)];
        let hidden = decoder.hidden(&[piece.to_vec()], cache)?;
        read += piece.len();
        last = Some(hidden.narrow(0, piece.len() - 1, 1));
        if !each(Step::Read(read, new.len())) {
            break;
        }
    }
    sampler.see(&new[..read]);
    let prefill = start.elapsed();
    let mut generation = Generation {
        tokens: Vec::new(),
        stopped: false,
        unread: new[read..].to_vec(),
        prefill,
        decode: Duration::ZERO,
        cache_bytes: cache.bytes(),
    };
    let Some(hidden) = last.filter(|_| read == new.len()) else { return Ok(generation) };
    let start = Instant::now();
    let mut logits = scores(decoder, hidden)?;
    while generation.tokens.len() < config.max_new_tokens {
        let token = sampler.choose(&logits)?;
        if config.stop_tokens.contains(&token) {
            generation.stopped = true;
            break;
        }
        generation.tokens.push(token);
        if !each(Step::Token(token)) || generation.tokens.len() == config.max_new_tokens {
            generation.unread = vec![token];
            break;
        }
        let hidden = decoder.hidden(&[vec![token]], cache)?;
        logits = scores(decoder, hidden)?;
    }
    Ok(Generation { decode: start.elapsed(), cache_bytes: cache.bytes(), ..generation })
}

/// The length to which a text grows at most. The last new token is never read, so it needs no position.
fn expected_length(held: usize, new: &[u32], config: &GenerateConfig) -> usize {
    held.saturating_add(new.len()).saturating_add(config.max_new_tokens.saturating_sub(1))
}

/// Reads `tokens` piece by piece into a cache of one text; the hidden state of the last token, `[1, hidden_size]`.
///
/// # Errors
///
/// As [`Decoder::hidden`].
pub fn prefill(decoder: &Decoder, tokens: &[u32], cache: &mut DecoderCache) -> Result<Tensor<2>, ModelError> {
    let (mut rest, mut last) = (tokens, Err(ModelError::EmptyInput));
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(next_piece(cache.length(0), rest.len()));
        let hidden = decoder.hidden(&[piece.to_vec()], cache)?;
        last = Ok(hidden.narrow(0, piece.len() - 1, 1));
        rest = later;
    }
    last
}

fn scores(decoder: &Decoder, hidden: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    let logits = decoder.logits(hidden).try_into_vec_as::<f32>();
    logits.map_err(|error| ModelError::Input(format!("the scores cannot be read back: {error:?}")))
}
