//! Metadata of a GGUF file: typed values under dotted keys.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::ConvertError;

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Numbers(Numbers),
}

/// An array of numbers as the bytes of the file: a hostile file then fills no more memory than it has bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Numbers {
    pub(crate) kind: u32,
    pub(crate) size: usize,
    pub(crate) bytes: Vec<u8>,
}

impl Value {
    /// A number or a truth value of the GGUF type `kind` from its little-endian bytes.
    pub(crate) fn scalar(kind: u32, bytes: &[u8]) -> Option<Self> {
        let mut wide = [0; 8];
        wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let (unsigned, unused) = (u64::from_le_bytes(wide), 64 - 8 * bytes.len() as u32);
        Some(match kind {
            0 | 2 | 4 | 10 => Self::Unsigned(unsigned),
            // Shifted up and down again: the sign bit spreads.
            1 | 3 | 5 | 11 => Self::Signed((unsigned << unused) as i64 >> unused),
            6 => Self::Float(shortest(f32::from_bits(unsigned as u32))),
            12 => Self::Float(f64::from_bits(unsigned)),
            7 => Self::Bool(unsigned != 0),
            _ => return None,
        })
    }

    fn describe(&self) -> String {
        match self {
            Self::Unsigned(value) => value.to_string(),
            Self::Signed(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::Text(text) => format!("the text `{}`", text.chars().take(60).collect::<String>()),
            Self::Texts(texts) => format!("a list of {} texts", texts.len()),
            Self::Numbers(numbers) => format!("a list of {} numbers", numbers.bytes.len() / numbers.size.max(1)),
        }
    }
}

/// The f64 that is written as the f32 is: 1e-5 in a configuration becomes 1e-5 again, not 9.99999974737875e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

/// The metadata of one file. Errors name the file and the key.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(crate) fn new(path: &Path, values: BTreeMap<String, Value>) -> Self {
        Self { path: path.to_owned(), values }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub(crate) fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub(crate) fn optional_usize(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        self.optional(key, "a whole number, 0 or more", |value| match *value {
            Value::Unsigned(number) => number.try_into().ok(),
            Value::Signed(number) => number.try_into().ok(),
            _ => None,
        })
    }

    pub(crate) fn usize(&self, key: &str) -> Result<usize, ConvertError> {
        self.optional_usize(key)?.ok_or_else(|| self.error(key, "a whole number, 0 or more"))
    }

    pub(crate) fn optional_f64(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.optional(key, "a finite number", |value| match *value {
            Value::Unsigned(number) => Some(number as f64),
            Value::Signed(number) => Some(number as f64),
            Value::Float(number) => Some(number).filter(|number| number.is_finite()),
            _ => None,
        })
    }

    pub(crate) fn f64(&self, key: &str) -> Result<f64, ConvertError> {
        self.optional_f64(key)?.ok_or_else(|| self.error(key, "a finite number"))
    }

    pub(crate) fn optional_bool(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        self.optional(key, "true or false", |value| if let Value::Bool(set) = *value { Some(set) } else { None })
    }

    pub(crate) fn optional_str(&self, key: &str) -> Result<Option<&str>, ConvertError> {
        self.optional(key, "a text", |value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    pub(crate) fn str(&self, key: &str) -> Result<&str, ConvertError> {
        self.optional_str(key)?.ok_or_else(|| self.error(key, "a text"))
    }

    pub(crate) fn texts(&self, key: &str) -> Result<&[String], ConvertError> {
        let expected = "a list of texts";
        self.optional(
            key,
            expected,
            |value| if let Value::Texts(texts) = value { Some(texts.as_slice()) } else { None },
        )?
        .ok_or_else(|| self.error(key, expected))
    }

    /// A list of numbers, each as f64.
    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>, ConvertError> {
        let expected = "a list of numbers";
        let read = |value: &Value| {
            let Value::Numbers(Numbers { kind, size, bytes }) = value else { return None };
            let number = |bytes| match Value::scalar(*kind, bytes)? {
                Value::Unsigned(number) => Some(number as f64),
                Value::Signed(number) => Some(number as f64),
                Value::Float(number) => Some(number),
                _ => None,
            };
            bytes.chunks_exact(*size).map(number).collect()
        };
        self.optional(key, expected, read)?.ok_or_else(|| self.error(key, expected))
    }

    /// The error for a `key` that must be `expected` and is not.
    pub(crate) fn error(&self, key: &str, expected: &str) -> ConvertError {
        ConvertError::ConfigKey {
            path: self.path.clone(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: self.values.get(key).map_or_else(|| "no such key".to_owned(), Value::describe),
        }
    }

    /// The error for a `key` whose value asks for what the decoder does not compute.
    pub(crate) fn rejected(&self, key: &str, why: &'static str) -> ConvertError {
        let value = self.values.get(key).map_or_else(|| "no such key".to_owned(), Value::describe);
        ConvertError::Rejected { path: self.path.clone(), key: key.to_owned(), value, why }
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConvertError> {
        self.values.get(key).map(|value| read(value).ok_or_else(|| self.error(key, expected))).transpose()
    }
}
