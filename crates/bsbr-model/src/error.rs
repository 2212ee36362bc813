//! What a decoder refuses.

use bsbr_attn::AttentionError;
use bsbr_splitlinear::SplitError;

/// An input or a set of weights the decoder cannot accept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A setting of the configuration is impossible.
    #[error("setting `{setting}` {problem}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Attention refused its settings or inputs.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// A linear layer in parts was refused.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// A weight has the wrong shape.
    #[error("tensor `{tensor}` has shape {found:?}, the model expects {expected:?}")]
    WeightShape {
        /// Name of the tensor.
        tensor: String,
        /// Shape that follows from the configuration.
        expected: Vec<usize>,
        /// Shape found.
        found: Vec<usize>,
    },
    /// The source of the weights failed.
    #[error("tensor `{tensor}` cannot be read")]
    WeightSource {
        /// Name of the tensor.
        tensor: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No token to run on.
    #[error("the text is empty: at least one token is needed")]
    EmptyInput,
    /// A token id outside the vocabulary.
    #[error("token {token} at position {position} is not in the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The id.
        token: i64,
        /// Its place in the text.
        position: usize,
        /// Ids run from 0 to this, exclusive.
        vocab_size: usize,
    },
    /// The text is longer than the learned positions.
    #[error(
        "the text has {length} tokens, the model has {max_positions} learned positions: shorten the text or choose \
         the position policy `clamp`, `interpolate` or `slide`"
    )]
    TooLong {
        /// Length of the text.
        length: usize,
        /// Rows of the position table.
        max_positions: usize,
    },
    /// Inputs that do not fit each other or the caches.
    #[error("{0}")]
    Input(String),
    /// A checkpoint of a tuning run cannot be written, read or continued.
    #[error("{path}: {problem}", path = .path.display())]
    Checkpoint {
        /// The file or directory.
        path: std::path::PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A chat template cannot be read, or refuses the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// A tokenizer cannot be read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}
