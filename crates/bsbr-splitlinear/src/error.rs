//! What this crate refuses.

use std::path::{Path, PathBuf};

/// A configuration, a model, a file or a computation that cannot be used.
///
/// Every message names the key, the module or the file, what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A configuration cannot be parsed.
    #[error("{origin}: not a configuration as expected here: {message}")]
    Parse {
        /// The file, or the format of a text without one.
        origin: String,
        /// Where and why.
        message: String,
    },
    /// A setting has a value it must not have.
    #[error("`{key}` must be {expected}, found {found}")]
    Setting {
        /// The key; nested keys are joined by dots.
        key: String,
        /// What it must be.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A pattern is not a regular expression.
    #[error(
        "`{key}`: `{pattern}` is not a regular expression of the kind read here (no look-around, no back-references)"
    )]
    Pattern {
        /// The key; nested keys are joined by dots.
        key: String,
        /// Its value.
        pattern: String,
        /// Where and why.
        #[source]
        source: Box<regex::Error>,
    },
    /// A weight type matches no module.
    #[error(
        "weight type `{weight_type}`: pattern `{pattern}` matches none of the {modules} linear layers, such as `{example}`; \
         a pattern is matched from the start of the name: begin it with `.*\\.` to match the end of one"
    )]
    NoMatch {
        /// The weight type.
        weight_type: String,
        /// Its pattern.
        pattern: String,
        /// How many linear layers there are.
        modules: usize,
        /// The name of one of them.
        example: String,
    },
    /// A module belongs to two weight types.
    #[error("`{module}` is matched by the weight types `{first}` and `{second}`; make one of the patterns narrower")]
    TwoPatterns {
        /// The module.
        module: String,
        /// The first weight type.
        first: String,
        /// The other one.
        second: String,
    },
    /// Two modules of one layer belong to one weight type.
    #[error(
        "weight type `{weight_type}` matches both `{first}` and `{second}` in layer {layer}; give each a weight type of \
         its own"
    )]
    TwoModules {
        /// The weight type.
        weight_type: String,
        /// The layer.
        layer: usize,
        /// One module.
        first: String,
        /// The other one.
        second: String,
    },
    /// Two linear layers have one name.
    #[error("two linear layers are called `{module}`; names must differ")]
    SameName {
        /// The name.
        module: String,
    },
    /// A module has no layer number.
    #[error("`{module}` has no layer number: `block_pattern` is `{pattern}`, and {problem}")]
    NoLayer {
        /// The module.
        module: String,
        /// The pattern.
        pattern: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A module does not have the sizes that its weight type or its group needs.
    #[error("`{module}`: expected {expected}, found {found}")]
    Shape {
        /// The module, part or group.
        module: String,
        /// What was expected, and what to do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A number is not finite.
    #[error("`{module}`: {what} {index} is {value}; the {what}s must be finite: {advice}")]
    NotFinite {
        /// The module.
        module: String,
        /// What holds it.
        what: &'static str,
        /// Which one.
        index: usize,
        /// The value.
        value: f64,
        /// What to look at.
        advice: &'static str,
    },
    /// A module lacks calibration.
    #[error("`{module}`: {problem}; calibrate with text that reaches this module")]
    Calibration {
        /// The module.
        module: String,
        /// What is missing.
        problem: String,
    },
    /// No decomposition passed its checks.
    #[error(
        "`{group}`: no decomposition of its {size} matrix passed its checks ({problem}); are its weights finite and sane?"
    )]
    Decomposition {
        /// The group.
        group: String,
        /// Rows and columns.
        size: String,
        /// The checks that failed.
        problem: String,
    },
    /// The inputs that a basis passes on are not such.
    #[error("`{tensor}` {problem}; the compressed model is damaged: compress the original again")]
    Pivots {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of moments is damaged, hostile or of something else.
    #[error("{}: {problem}; it is not a file of moments as calibration writes it: calibrate again", path.display())]
    MomentsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl SplitError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn setting(key: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Setting { key: key.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn shape(module: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Shape { module: module.into(), expected: expected.into(), found: found.into() }
    }
}
