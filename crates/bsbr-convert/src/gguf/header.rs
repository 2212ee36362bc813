//! The header of a GGUF file, and every check it must pass before a tensor is touched.
//!
//! No claimed count or length is believed: the reader walks the bytes that are there and stops where they end.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::kind::GgufKind;
use super::metadata::{Numbers, Value};
use super::problem::GgufProblem;

/// Most axes of a tensor in ggml.
const MOST_AXES: usize = 4;
/// Start of the tensors is rounded up to this unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
/// GGUF types of metadata that are not scalars.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) kind: GgufKind,
    /// Row-major, as everywhere else here; the file lists the axes the other way round.
    pub(crate) shape: Vec<usize>,
    /// Where in the file.
    pub(crate) bytes: Range<usize>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GgufHeader {
    pub(crate) metadata: BTreeMap<String, Value>,
    /// In the order of the file.
    pub(crate) tensors: Vec<GgufTensor>,
}

impl GgufHeader {
    /// Parses the header of a file whose bytes, all of them, are `file`.
    ///
    /// # Errors
    ///
    /// The first [`GgufProblem`] found.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, GgufProblem> {
        Self::parse_start(file, file.len())
    }

    /// The same of a file of `len` bytes that begins with `file`.
    pub(crate) fn parse_start(file: &[u8], len: usize) -> Result<Self, GgufProblem> {
        let mut bytes = Bytes { file, at: 0 };
        if file.len() < 24 {
            return Err(GgufProblem::TooShort { len: file.len() });
        }
        let magic = bytes.take(4, "the magic number")?;
        if magic != b"GGUF" {
            return Err(GgufProblem::Magic { found: magic.escape_ascii().to_string() });
        }
        let version = bytes.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(GgufProblem::Version { found: version });
        }
        let (tensors, pairs) = (bytes.u64("the number of tensors")?, bytes.u64("the number of metadata")?);
        let mut metadata = BTreeMap::new();
        for _ in 0..pairs {
            let key = bytes.text("a metadata key")?;
            let kind = bytes.u32(&format!("the type of `{key}`"))?;
            let value = bytes.value(&key, kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufProblem::DuplicateKey { key });
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(&Value::Unsigned(found)) if found.is_power_of_two() && found <= 1 << 20 => found,
            Some(found) => return Err(GgufProblem::Alignment { found: format!("{found:?}") }),
        };
        let mut names = HashSet::new();
        let mut read = Vec::new();
        for _ in 0..tensors {
            let tensor = bytes.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return Err(GgufProblem::Duplicate { tensor: tensor.name });
            }
            read.push(tensor);
        }
        let start = (bytes.at as u64).next_multiple_of(alignment);
        let tensors = read.into_iter().map(|tensor| tensor.place(start, alignment)).collect::<Result<Vec<_>, _>>()?;
        check_layout(&tensors, start as usize, len, alignment as usize)?;
        Ok(Self { metadata, tensors })
    }
}

/// Checks that the tensors lie side by side with no more than padding between them, and inside the file.
fn check_layout(tensors: &[GgufTensor], start: usize, len: usize, alignment: usize) -> Result<(), GgufProblem> {
    let mut sorted: Vec<&GgufTensor> = tensors.iter().collect();
    sorted.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let (mut end, mut previous) = (start, "the header");
    for GgufTensor { name, bytes, .. } in sorted {
        let (tensor, found) = (name.clone(), bytes.start);
        if found < end {
            return Err(GgufProblem::Overlap { tensor, previous: previous.to_owned(), end, found });
        }
        if found - end >= alignment {
            return Err(GgufProblem::Gap { tensor, end, found });
        }
        if bytes.end > len {
            return Err(GgufProblem::Truncated { tensor, end: bytes.end, len });
        }
        (end, previous) = (bytes.end, name);
    }
    if len.saturating_sub(end) >= alignment {
        return Err(GgufProblem::Trailing { end, len });
    }
    Ok(())
}

/// A tensor as its entry describes it.
struct Entry {
    name: String,
    kind: GgufKind,
    shape: Vec<usize>,
    len: usize,
    offset: u64,
}

impl Entry {
    fn place(self, start: u64, alignment: u64) -> Result<GgufTensor, GgufProblem> {
        let Self { name, kind, shape, len, offset } = self;
        if offset % alignment != 0 {
            return Err(GgufProblem::Misaligned { tensor: name, offset, alignment });
        }
        let bytes = start.checked_add(offset).and_then(|from| usize::try_from(from).ok());
        let bytes = bytes.and_then(|from| Some(from..from.checked_add(len)?));
        match bytes {
            Some(bytes) => Ok(GgufTensor { name, kind, shape, bytes }),
            None => Err(GgufProblem::TooLarge { tensor: name, shape }),
        }
    }
}

/// The bytes of a file, read from the front.
struct Bytes<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], GgufProblem> {
        let rest = &self.file[self.at..];
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let (at, left) = (self.at, rest.len());
        let taken = taken.ok_or_else(|| GgufProblem::Cut { what: what.to_owned(), at, len, left })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufProblem> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufProblem> {
        let bytes = self.take(8, what)?;
        let mut wide = [0; 8];
        wide.copy_from_slice(bytes);
        Ok(u64::from_le_bytes(wide))
    }

    fn text(&mut self, what: &str) -> Result<String, GgufProblem> {
        let len = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(len, what)?;
        let text = std::str::from_utf8(bytes).map_err(|_| GgufProblem::Text { what: what.to_owned(), at })?;
        Ok(text.to_owned())
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, GgufProblem> {
        let what = || format!("the value of `{key}`");
        let unknown = || GgufProblem::ValueType { key: key.to_owned(), found: kind };
        match kind {
            TEXT => self.text(&what()).map(Value::Text),
            ARRAY => self.array(key),
            _ => {
                let bytes = self.take(scalar_size(kind).ok_or_else(unknown)? as u64, &what())?;
                Value::scalar(kind, bytes).ok_or_else(unknown)
            }
        }
    }

    fn array(&mut self, key: &str) -> Result<Value, GgufProblem> {
        let what = format!("the list `{key}`");
        let (kind, count) = (self.u32(&what)?, self.u64(&what)?);
        if kind == TEXT {
            let mut texts = Vec::new();
            for _ in 0..count {
                texts.push(self.text(&what)?);
            }
            return Ok(Value::Texts(texts));
        }
        let size = scalar_size(kind).ok_or_else(|| GgufProblem::ValueType { key: key.to_owned(), found: kind })?;
        let bytes = self.take(count.saturating_mul(size as u64), &what)?.to_vec();
        Ok(Value::Numbers(Numbers { kind, size, bytes }))
    }

    fn tensor(&mut self) -> Result<Entry, GgufProblem> {
        let name = self.text("the name of a tensor")?;
        let what = format!("the entry of tensor `{name}`");
        let axes = self.u32(&what)? as usize;
        if axes == 0 || axes > MOST_AXES {
            return Err(GgufProblem::Axes { tensor: name, found: axes });
        }
        let mut shape = Vec::with_capacity(axes); // at most MOST_AXES
        for _ in 0..axes {
            shape.insert(0, self.u64(&what)?);
        }
        let (kind, offset) = (self.u32(&what)?, self.u64(&what)?);
        let Some(kind) = GgufKind::of(kind) else {
            return Err(GgufProblem::UnknownKind { tensor: name, found: kind });
        };
        let sizes: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let numbers =
            sizes.as_ref().and_then(|sizes| sizes.iter().try_fold(1_usize, |all, &size| all.checked_mul(size)));
        let (Some(shape), Some(numbers)) = (sizes, numbers) else {
            let shape = shape.into_iter().map(|size| size.try_into().unwrap_or(usize::MAX)).collect();
            return Err(GgufProblem::TooLarge { tensor: name, shape });
        };
        let row = shape[shape.len() - 1];
        if row % kind.block != 0 {
            return Err(GgufProblem::Row { tensor: name, row, kind: kind.name, block: kind.block });
        }
        let Some(len) = (numbers / kind.block).checked_mul(kind.bytes) else {
            return Err(GgufProblem::TooLarge { tensor: name, shape });
        };
        Ok(Entry { name, kind, shape, len, offset })
    }
}

/// Bytes of a number or a truth value in metadata.
fn scalar_size(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}
