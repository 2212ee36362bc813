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
    /// A tensor has the wrong type of numbers.
    #[error("`{tensor}` holds {found}, expected {expected}: cast it")]
    Type {
        /// Name of the argument.
        tensor: &'static str,
        /// The types that fit.
        expected: String,
        /// The type found.
        found: String,
    },
    /// A tensor is on another device than the cache.
    #[error("`{tensor}` is on {found}, expected {expected}: move it there")]
    Device {
        /// Name of the argument.
        tensor: &'static str,
        /// Where the cache is.
        expected: String,
        /// Where the tensor is.
        found: String,
    },
    /// The settings need an input that was not given, or the reverse.
    #[error("{0}")]
    Input(String),
}
