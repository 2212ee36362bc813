//! The header of a safetensors file, and every check it must pass before a byte of data is touched.
//!
//! The `safetensors` crate supplies the dtypes. Its own header reader keeps neither the order of the names nor
//! duplicates among them, and most of its errors name no tensor, so the header is read here.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{IntoDeserializer, MapAccess, Visitor, value};
use serde_json::Value;

use crate::problem::FormatProblem;

/// Longest header accepted, as in the reference implementation.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the end of the header.
    pub bytes: Range<usize>,
}

impl TensorEntry {
    /// Numbers in the tensor.
    pub fn elements(&self) -> usize {
        // Checked against overflow when the header was read.
        self.shape.iter().product()
    }
}

/// A checked header: the tensors cover the data without overlap or gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<TensorEntry>,
    /// The text as it stands in the file, padding included.
    pub text: String,
    /// Bytes of all tensors.
    pub data_len: usize,
    /// What stands under `__metadata__`, where that is an object.
    pub metadata: BTreeMap<String, Value>,
}

impl Header {
    /// Parses and checks the text of a header.
    ///
    /// # Errors
    ///
    /// The first [`FormatProblem`] found.
    pub fn parse(text: String) -> Result<Self, FormatProblem> {
        let raw: RawHeader = serde_json::from_str(&text).map_err(|e| FormatProblem::Header(e.to_string()))?;
        let mut names = HashSet::new();
        let mut tensors = Vec::with_capacity(raw.0.len());
        let mut metadata = BTreeMap::new();
        for (name, value) in raw.0 {
            if !names.insert(name.clone()) {
                return Err(FormatProblem::Duplicate { tensor: name });
            }
            if name != "__metadata__" {
                tensors.push(entry(name, value)?);
            } else if let Value::Object(pairs) = value {
                metadata.extend(pairs);
            }
        }
        tensors.sort_by_key(|tensor: &TensorEntry| (tensor.bytes.start, tensor.bytes.end));
        let data_len = check_layout(&tensors)?;
        Ok(Self { tensors, text, data_len, metadata })
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

fn entry(name: String, value: Value) -> Result<TensorEntry, FormatProblem> {
    let raw: RawEntry =
        serde_json::from_value(value).map_err(|e| FormatProblem::Header(format!("tensor `{name}`: {e}")))?;
    let [start, end] = raw.data_offsets;
    if end < start {
        return Err(FormatProblem::Backwards { tensor: name, start, end });
    }
    let dtype: Result<Dtype, value::Error> = Dtype::deserialize(raw.dtype.as_str().into_deserializer());
    let Ok(dtype) = dtype else {
        return Err(FormatProblem::UnknownDtype { tensor: name, found: raw.dtype });
    };
    let bits = raw.shape.iter().try_fold(dtype.bitsize(), |bits, &size| bits.checked_mul(size));
    let expected = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
    if expected != Some(end - start) {
        return Err(FormatProblem::Size {
            tensor: name,
            shape: raw.shape,
            dtype: raw.dtype,
            expected: expected.map_or("too many or uneven".into(), |n| n.to_string()),
            found: end - start,
        });
    }
    Ok(TensorEntry { name, dtype, shape: raw.shape, bytes: start..end })
}

/// Checks that the tensors, sorted by offset, follow each other exactly; returns where the last one ends.
fn check_layout(tensors: &[TensorEntry]) -> Result<usize, FormatProblem> {
    let mut expected = 0;
    let mut previous = "";
    for TensorEntry { name, bytes, .. } in tensors {
        let (tensor, found) = (name.clone(), bytes.start);
        if found < expected {
            return Err(FormatProblem::Overlap { tensor, previous: previous.to_owned(), expected, found });
        }
        if found > expected {
            return Err(FormatProblem::Gap { tensor, expected, found });
        }
        (expected, previous) = (bytes.end, name);
    }
    Ok(expected)
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The entries in the order of the text. A map type would drop the first of two equal names silently.
struct RawHeader(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
