//! What a decoder refuses.

use bsbr_attn::AttentionError;

/// A configuration or an input that a decoder cannot accept.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ZooError {
    /// A setting is out of range or contradicts another.
    #[error("setting `{setting}` is {value}, expected {expected}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// What was found.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// The settings of BSBR attention are refused.
    #[error("`bsbr`: {0}")]
    Attention(#[from] AttentionError),
    /// No family has this name.
    #[error("`{0}` is no attention family, expected one of standard, bsbr, linear, delta, window, hopfield, gau")]
    Family(String),
    /// No token to run on.
    #[error("the input is {batch} texts of {tokens} tokens, expected at least one of each")]
    Empty {
        /// Texts found.
        batch: usize,
        /// Tokens of each.
        tokens: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {token} at position {position} of text {text} is not in the vocabulary of {vocabulary} tokens")]
    Token {
        /// The token found.
        token: i64,
        /// Its text in the batch.
        text: usize,
        /// Its place in the tensor given.
        position: usize,
        /// Tokens run from 0 to this, exclusive.
        vocabulary: usize,
    },
    /// A place outside the texts.
    #[error("place {place} is outside the {places} tokens of all texts together")]
    Place {
        /// The place found.
        place: i64,
        /// Places run from 0 to this, exclusive.
        places: usize,
    },
    /// A state of another batch or of another decoder.
    #[error("the state is of {found}, expected {expected}: start one with the decoder and batch it is for")]
    State {
        /// What the input and the decoder need.
        expected: String,
        /// What the state was made for.
        found: String,
    },
}
