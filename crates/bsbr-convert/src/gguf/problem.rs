//! What is wrong with a GGUF file.

/// What is wrong with the header of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufProblem {
    /// Shorter than the fixed part of the header.
    #[error("the file has {len} bytes, expected at least the 24 bytes with which every GGUF file begins")]
    TooShort {
        /// Bytes in the file.
        len: usize,
    },
    /// Not a GGUF file.
    #[error("the file begins with `{found}`, expected `GGUF`")]
    Magic {
        /// The first four bytes.
        found: String,
    },
    /// A version that is not read.
    #[error(
        "version {found} is not read, expected 2 or 3 in little-endian order: convert the file with a current \
         llama.cpp"
    )]
    Version {
        /// Version in the file.
        found: u32,
    },
    /// The header ends in the middle of something.
    #[error("the file is cut off: {what} needs {len} bytes at byte {at}, {left} are left")]
    Cut {
        /// What was being read.
        what: String,
        /// Where.
        at: usize,
        /// Bytes it claims.
        len: u64,
        /// Bytes to the end of the file.
        left: usize,
    },
    /// A text that is not UTF-8.
    #[error("{what} at byte {at} is not UTF-8 text")]
    Text {
        /// What it is.
        what: String,
        /// Where.
        at: usize,
    },
    /// Metadata of a type that is not known, or a list of lists.
    #[error("metadata `{key}` has type {found}, expected a number, true or false, a text, or a list of one of them")]
    ValueType {
        /// The key.
        key: String,
        /// Number of the type.
        found: u32,
    },
    /// One key twice.
    #[error("metadata `{key}` is there twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// One tensor twice.
    #[error("tensor `{tensor}` is listed twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// An alignment nobody uses.
    #[error("`general.alignment` is {found}, expected a power of two up to 1048576")]
    Alignment {
        /// Value in the file.
        found: String,
    },
    /// Too many axes, or none.
    #[error("tensor `{tensor}` has {found} axes, expected 1 to 4")]
    Axes {
        /// The tensor.
        tensor: String,
        /// Axes in the file.
        found: usize,
    },
    /// A number format nobody knows.
    #[error("tensor `{tensor}` has number format {found}, which is not known")]
    UnknownKind {
        /// The tensor.
        tensor: String,
        /// Number of the format.
        found: u32,
    },
    /// A known number format that is not read.
    #[error(
        "tensor `{tensor}` is {found}, which is not read; read are {read}: quantise the original again to one of them"
    )]
    UnreadKind {
        /// The tensor.
        tensor: String,
        /// Its format.
        found: &'static str,
        /// The formats that are read.
        read: String,
    },
    /// A size that does not fit in memory.
    #[error("tensor `{tensor}` of shape {shape:?} is larger than any file")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Rows that end within a block.
    #[error("tensor `{tensor}` has rows of {row} numbers, {kind} needs a multiple of {block}")]
    Row {
        /// The tensor.
        tensor: String,
        /// Numbers of a row.
        row: usize,
        /// Its format.
        kind: &'static str,
        /// Numbers of a block.
        block: usize,
    },
    /// An offset that is not a multiple of the alignment.
    #[error("tensor `{tensor}` starts at offset {offset}, expected a multiple of {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset.
        offset: u64,
        /// The alignment.
        alignment: u64,
    },
    /// Tensors that share bytes.
    #[error("tensor `{tensor}` starts at byte {found}, inside `{previous}`, which ends at byte {end}")]
    Overlap {
        /// The tensor.
        tensor: String,
        /// The one before it.
        previous: String,
        /// Where that ends.
        end: usize,
        /// Where the tensor starts.
        found: usize,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {end} to {found} before tensor `{tensor}` belong to no tensor")]
    Gap {
        /// The tensor after the gap.
        tensor: String,
        /// Where the one before it ends.
        end: usize,
        /// Where it starts.
        found: usize,
    },
    /// Data missing at the end.
    #[error("the file is cut off: tensor `{tensor}` ends at byte {end}, the file at byte {len}")]
    Truncated {
        /// The tensor.
        tensor: String,
        /// Where it must end.
        end: usize,
        /// Bytes in the file.
        len: usize,
    },
    /// Data left over at the end.
    #[error("the tensors end at byte {end}, the file goes on to byte {len}")]
    Trailing {
        /// Where the tensors end.
        end: usize,
        /// Bytes in the file.
        len: usize,
    },
    /// What was kept of a file does not go with the weights.
    #[error(
        "it has {rest} bytes of a GGUF file of {file}, and the weights hold {weights} of its bytes: they do not belong together, convert the \
         file again"
    )]
    Rest {
        /// Bytes kept.
        rest: u64,
        /// Bytes that are in the weights.
        weights: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// One part of a file in several.
    #[error("the file is one of {parts} parts: join them first with `llama-gguf-split --merge FIRST OUT`")]
    Split {
        /// How many there are.
        parts: usize,
    },
    /// No embedding table: a file that holds something else than a language model.
    #[error("there is no tensor `token_embd.weight`: this is not a whole language model")]
    NoEmbedding,
}
