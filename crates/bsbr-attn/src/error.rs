//! What can go wrong before any arithmetic starts.

/// An input that attention cannot accept.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
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
    /// A tensor has the wrong shape.
    #[error("`{tensor}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Name of the argument.
        tensor: &'static str,
        /// What was expected, in terms of the other arguments.
        expected: String,
        /// The shape found.
        found: Vec<usize>,
    },
    /// The settings need an input that was not given, or the reverse.
    #[error("{0}")]
    Input(String),
}
