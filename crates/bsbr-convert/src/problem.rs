//! Single findings: what is wrong with a file, and what does not fit between a checkpoint and the rules.

use std::fmt::{self, Write as _};

/// What is wrong with a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatProblem {
    /// Shorter than the length of the header.
    #[error("the file has {len} bytes, expected at least the 8 bytes of the header length")]
    TooShort {
        /// Bytes in the file.
        len: u64,
    },
    /// The header ends beyond the file.
    #[error("the header claims {header} bytes, only {available} follow")]
    HeaderBeyondFile {
        /// Length written in the file.
        header: u64,
        /// Bytes after it.
        available: u64,
    },
    /// The header is larger than any sensible one.
    #[error("the header claims {header} bytes, expected at most {limit}")]
    HeaderTooLarge {
        /// Length written in the file.
        header: u64,
        /// Most this reader accepts.
        limit: u64,
    },
    /// The header is not JSON of the right form.
    #[error("the header is not valid: {0}")]
    Header(String),
    /// One name twice in one header.
    #[error("tensor `{tensor}` is listed twice in the header")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// A number format that is not in the safetensors specification.
    #[error("tensor `{tensor}` has the unknown dtype `{found}`")]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// What the header says.
        found: String,
    },
    /// Tensors that share bytes.
    #[error("tensor `{tensor}` starts at byte {found}, inside tensor `{previous}`, which ends at byte {expected}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// The one before it.
        previous: String,
        /// Where it must start.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {expected} to {found} before tensor `{tensor}` belong to no tensor")]
    Gap {
        /// The tensor after the gap.
        tensor: String,
        /// Where it must start.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
    /// Offsets that run backwards.
    #[error("tensor `{tensor}` ends at byte {end}, before its start at byte {start}")]
    Backwards {
        /// The tensor.
        tensor: String,
        /// First byte.
        start: usize,
        /// End.
        end: usize,
    },
    /// The byte count is not the one of shape and dtype.
    #[error(
        "tensor `{tensor}` of shape {shape:?} and dtype {dtype} needs {expected} bytes, the header gives it {found}"
    )]
    Size {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype.
        dtype: String,
        /// Bytes that follow from the shape; `too many` when they overflow.
        expected: String,
        /// Bytes between the offsets.
        found: usize,
    },
    /// A number format of codes that is not known.
    #[error("`__metadata__` gives tensor `{tensor}` the format {found}, expected one of {known}")]
    UnknownFormat {
        /// The tensor.
        tensor: String,
        /// What stands there.
        found: String,
        /// Those there are.
        known: String,
    },
    /// A number format of a tensor that is not there.
    #[error("`__metadata__` gives a format to tensor `{tensor}`, which the file does not hold")]
    FormatOfNothing {
        /// The tensor.
        tensor: String,
    },
    /// Rows of codes that are none.
    #[error(
        "tensor `{tensor}` is {dtype} of shape {shape:?}, expected U8 of two axes whose second is a whole number of blocks of {block} \
         bytes, as it is {format}"
    )]
    Codes {
        /// The tensor.
        tensor: String,
        /// Its format by the metadata.
        format: &'static str,
        /// Bytes of a block.
        block: usize,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Data missing at the end.
    #[error("the file is cut off: the tensors need {expected} bytes after the header, {found} are there")]
    Truncated {
        /// Bytes the header promises.
        expected: usize,
        /// Bytes in the file.
        found: u64,
    },
    /// Data left over at the end.
    #[error("{found} bytes follow the header, the tensors account for {expected}")]
    Trailing {
        /// Bytes the header promises.
        expected: usize,
        /// Bytes in the file.
        found: u64,
    },
}

/// What is wrong with a PyTorch file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TorchProblem {
    /// Neither archive nor pickle can be followed.
    #[error("the file cannot be read: {0}")]
    Unreadable(String),
    /// A container older than transformers, or a pickle without storages.
    #[error("the file is neither a zip archive nor of the legacy format")]
    Container,
    /// The pickle is something else than a dictionary.
    #[error("the file holds {found}, not a dictionary of tensors")]
    NoDictionary {
        /// What it is.
        found: String,
    },
    /// The tensors are one level further down.
    #[error(
        "the tensors are nested under `{key}`, as in a training checkpoint: save the state dict of the model alone"
    )]
    Nested {
        /// The key.
        key: String,
    },
    /// Something that is no tensor, such as an object of another program.
    #[error("`{key}` is {found}, not a tensor: nothing else is read, and no code in a pickle is run")]
    NoTensor {
        /// The key.
        key: String,
        /// What it is.
        found: String,
    },
    /// A dictionary without tensors.
    #[error("the file holds no tensor")]
    Empty,
    /// A view that repeats its bytes.
    #[error("tensor `{tensor}` of shape {shape:?} claims {bytes} bytes, the whole file has {file}")]
    LargerThanFile {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes of that shape.
        bytes: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The bytes of a tensor are not where the pickle says.
    #[error("the numbers of tensor `{tensor}` cannot be read: {problem}")]
    Data {
        /// The tensor.
        tensor: String,
        /// Why.
        problem: String,
    },
}

/// One thing that does not fit between the tensors found and the tensors needed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanProblem {
    /// A tensor the rules need is not there.
    MissingSource {
        /// Its name.
        tensor: String,
        /// The weights it would become.
        targets: Vec<String>,
        /// The most similar name that nothing uses.
        nearest: Option<String>,
        /// A setting under which it is not needed.
        hint: Option<String>,
    },
    /// A tensor no rule uses.
    UnusedSource {
        /// Its name.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// A setting under which it is used.
        hint: Option<String>,
    },
    /// Codes without their scales.
    MissingScales {
        /// Name of the scales.
        tensor: String,
        /// Name of the codes.
        codes: String,
    },
    /// Scales without codes, or of a tensor that is none.
    ScalesOfNothing {
        /// Name of the scales.
        tensor: String,
        /// Name of the codes.
        codes: String,
    },
    /// Scales of another shape than the codes ask for.
    ScalesShape {
        /// Name of the scales.
        tensor: String,
        /// Name of the codes.
        codes: String,
        /// Shape that belongs to them.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has another shape than the configuration gives it.
    Shape {
        /// Its name.
        tensor: String,
        /// The weights it becomes.
        targets: Vec<String>,
        /// Shape that follows from the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
        /// A setting under which the shape fits.
        hint: Option<String>,
    },
    /// A rule gives a weight another shape than the model wants.
    TargetShape {
        /// The weight.
        target: String,
        /// Why it does not fit.
        problem: String,
    },
    /// A weight in a number format that is not a weight's.
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// Two rules give the same weight.
    DuplicateTarget {
        /// The weight.
        target: String,
    },
    /// Two rules read the same tensor.
    DuplicateSource {
        /// The tensor.
        tensor: String,
    },
    /// No rule gives a weight the model has.
    UnfilledTarget {
        /// The weight.
        target: String,
    },
    /// A rule gives a weight the model does not have.
    UnknownTarget {
        /// The weight.
        target: String,
    },
}

impl fmt::Display for PlanProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingSource { tensor, targets, nearest, hint } => {
                write!(f, "missing: `{tensor}`")?;
                if !targets.is_empty() {
                    write!(f, " (needed for {})", quoted(targets))?;
                }
                if let Some(nearest) = nearest {
                    write!(f, "; nearest unused name: `{nearest}`")?;
                }
                write_hint(f, hint)
            }
            Self::UnusedSource { tensor, shape, hint } => {
                write!(f, "unused: no rule reads `{tensor}` {shape:?}")?;
                write_hint(f, hint)
            }
            Self::Shape { tensor, targets, expected, found, hint } => {
                write!(f, "shape: `{tensor}` is {found:?}, expected {expected:?} (for {})", quoted(targets))?;
                write_hint(f, hint)
            }
            Self::MissingScales { tensor, codes } => {
                write!(f, "missing: `{tensor}`, the scales of the codes `{codes}`")
            }
            Self::ScalesOfNothing { tensor, codes } => {
                write!(f, "unused: `{tensor}` holds scales, but `{codes}` is not there or holds no codes")
            }
            Self::ScalesShape { tensor, codes, expected, found } => {
                write!(f, "shape: `{tensor}` is {found:?}, expected {expected:?} as scales of the codes `{codes}`")
            }
            Self::TargetShape { target, problem } => write!(f, "rule: `{target}` {problem}"),
            Self::Dtype { tensor, found, expected } => {
                write!(f, "dtype: `{tensor}` is {found}, expected {expected}")
            }
            Self::DuplicateTarget { target } => write!(f, "rule: `{target}` is given by two rules"),
            Self::DuplicateSource { tensor } => write!(f, "rule: `{tensor}` is read by two rules"),
            Self::UnfilledTarget { target } => write!(f, "rule: no rule gives `{target}`"),
            Self::UnknownTarget { target } => write!(f, "rule: the model has no weight `{target}`"),
        }
    }
}

fn write_hint(f: &mut fmt::Formatter<'_>, hint: &Option<String>) -> fmt::Result {
    hint.as_ref().map_or(Ok(()), |hint| write!(f, "; {hint}"))
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Most problems shown in a message; the error value holds all of them.
const SHOWN: usize = 50;

/// The text of an error that lists `problems`.
pub(crate) fn list(headline: &str, problems: &[PlanProblem], sizes: &str) -> String {
    let count = problems.len();
    let mut text = format!("{headline} ({count} {})", if count == 1 { "problem" } else { "problems" });
    for problem in problems.iter().take(SHOWN) {
        let _ = write!(text, "\n  - {problem}");
    }
    if count > SHOWN {
        let _ = write!(text, "\n  - and {} more", count - SHOWN);
    }
    if !sizes.is_empty() {
        let _ = write!(text, "\nsizes from config.json: {sizes}");
    }
    text
}
