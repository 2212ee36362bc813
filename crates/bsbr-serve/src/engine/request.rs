//! What is asked of the engine, and what it tells.

use std::{collections::BTreeMap, time::Duration};

use bsbr_model::{Reads, SamplingConfig};

/// A text to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// Most tokens to add, possibly none.
    pub max_new_tokens: usize,
    /// Tokens that end it; they are not part of the continuation.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// What is added to scores before that.
    pub bias: ScoreBias,
    /// Whether log-probabilities are told, and of how many of the best tokens besides.
    pub logprobs: Option<usize>,
    /// Whether those of the prompt are told too. Such a prompt is read anew, whatever is known of it.
    pub score_prompt: bool,
}

/// What is added to the scores of tokens before one is chosen; log-probabilities are those of the model all the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoreBias {
    /// For each of these tokens.
    pub tokens: BTreeMap<u32, f32>,
    /// Taken from the score of every token that is in the continuation already.
    pub presence: f32,
    /// Taken from it once for each time it is there.
    pub frequency: f32,
}

impl ScoreBias {
    /// Whether nothing is added.
    pub(super) fn is_none(&self) -> bool {
        self.tokens.is_empty() && self.presence == 0.0 && self.frequency == 0.0
    }

    /// Adds it to scores `[vocab_size]`, behind a continuation with so many of each token.
    pub(super) fn apply(&self, scores: &mut [f32], written: &BTreeMap<u32, u32>) {
        for (&token, &bias) in &self.tokens {
            if let Some(score) = scores.get_mut(token as usize) {
                *score += bias;
            }
        }
        for (&token, &count) in written {
            if let Some(score) = scores.get_mut(token as usize) {
                *score -= self.presence + self.frequency * count as f32;
            }
        }
    }
}

/// A token and its log-probability, by the model alone.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability; only 0 where none was asked for.
    pub logprob: f64,
    /// The best tokens with theirs, best first, as many as were asked for.
    pub best: Vec<(u32, f64)>,
}

/// What happens to a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It has a place; so many of its first tokens were known already.
    Begun {
        /// Tokens that are not read again.
        known: usize,
    },
    /// The next tokens of the prompt, from the second on, where their scores were asked for.
    Prompt(Vec<TokenScore>),
    /// The next token of the continuation.
    Token(TokenScore),
    /// The end.
    Ended(Ended),
    /// The model failed, which nothing in the request explains.
    Failed(String),
}

/// By what a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By a stop token.
    StopToken,
    /// With the most tokens asked for.
    Length,
}

/// The end of a continuation and what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// By what it ended.
    pub ending: Ending,
    /// Tokens of the prompt that were not read again.
    pub known: usize,
    /// Bytes of its cache, room for growth included.
    pub cache_bytes: usize,
    /// What was read of keys; not for the tokens that were known.
    pub reads: Reads,
    /// From its place to its first new token.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
}
