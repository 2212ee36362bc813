//! `config.json` of a checkpoint, read key by key with errors that say what was expected.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::ConvertError;
use crate::placeholder::check_file;

/// A parsed configuration file, or an object inside one. A key with the value `null` counts as absent, as in
/// transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    path: PathBuf,
    parent: String,
    object: Map<String, Value>,
}

impl ConfigFile {
    /// Reads and parses `path`.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Io`] or [`ConvertError::Json`].
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        check_file(path)?;
        let bytes = std::fs::read(path).map_err(ConvertError::io("read", path))?;
        Self::parse(path, &bytes)
    }

    /// Parses the content of a file; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Json`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ConvertError> {
        let object = serde_json::from_slice(bytes).map_err(ConvertError::json(path))?;
        Ok(Self { path: path.to_owned(), parent: String::new(), object })
    }

    /// A configuration that is in no file of its own; `path` is for messages.
    pub(crate) fn of(path: &Path, object: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), parent: String::new(), object }
    }

    /// The content as it is written to a file.
    pub(crate) fn text(&self) -> String {
        format!("{:#}\n", Value::Object(self.object.clone()))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key`, unless absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The same file with one key set to another value.
    pub fn with(&self, key: &str, value: Value) -> Self {
        let mut other = self.clone();
        other.object.insert(key.to_owned(), value);
        other
    }

    /// The same file without a key.
    pub(crate) fn without(&self, key: &str) -> Self {
        let mut other = self.clone();
        other.object.remove(key);
        other
    }

    /// Every key with its value.
    pub(crate) fn entries(&self) -> &Map<String, Value> {
        &self.object
    }

    /// The same object with every key of `other` set as it is there.
    pub(crate) fn overlaid(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.object.extend(other.object.clone());
        both
    }

    /// An object inside this one.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn object(&self, key: &str) -> Result<Option<Self>, ConvertError> {
        self.optional(key, "an object", |value| {
            let object = value.as_object()?.clone();
            Some(Self { path: self.path.clone(), parent: format!("{}{key}.", self.parent), object })
        })
    }

    /// A whole number, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_usize(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        self.optional(key, "a whole number, 0 or more", |value| value.as_u64()?.try_into().ok())
    }

    /// A whole number.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is absent or something else.
    pub fn usize(&self, key: &str) -> Result<usize, ConvertError> {
        self.optional_usize(key)?.ok_or_else(|| self.error(key, "a whole number, 0 or more"))
    }

    /// A number, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_f64(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.optional(key, "a number", Value::as_f64)
    }

    /// A number.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is absent or something else.
    pub fn f64(&self, key: &str) -> Result<f64, ConvertError> {
        self.optional_f64(key)?.ok_or_else(|| self.error(key, "a number"))
    }

    /// A list of numbers.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is absent or something else.
    pub fn f64_list(&self, key: &str) -> Result<Vec<f64>, ConvertError> {
        let list = |value: &Value| value.as_array()?.iter().map(Value::as_f64).collect();
        self.optional(key, "a list of numbers", list)?.ok_or_else(|| self.error(key, "a list of numbers"))
    }

    /// A list of whole numbers, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_usize_list(&self, key: &str) -> Result<Option<Vec<usize>>, ConvertError> {
        let number = |value: &Value| value.as_u64()?.try_into().ok();
        self.optional(key, "a list of whole numbers", |value| value.as_array()?.iter().map(number).collect())
    }

    /// A list of texts, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_str_list(&self, key: &str) -> Result<Option<Vec<String>>, ConvertError> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        self.optional(key, "a list of texts", |value| value.as_array()?.iter().map(text).collect())
    }

    /// Whether `key` is there, even as `null`: some defaults hold only for a key that is absent altogether.
    pub fn contains(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// `true` or `false`, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    /// `true` or `false`, or `default`.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConvertError> {
        Ok(self.optional_bool(key)?.unwrap_or(default))
    }

    /// A text, if present.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn optional_str(&self, key: &str) -> Result<Option<String>, ConvertError> {
        self.optional(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// One token id or a list of them; empty when absent. A negative number means no token, as in older files.
    ///
    /// # Errors
    ///
    /// [`ConvertError::ConfigKey`] when `key` is something else.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConvertError> {
        // `Some(None)` for no token.
        let id = |value: &Value| match value.as_i64() {
            Some(negative) if negative < 0 => Some(None),
            _ if value.is_null() => Some(None),
            _ => Some(Some(u32::try_from(value.as_u64()?).ok()?)),
        };
        let ids = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => Some(vec![id(one)?]),
        };
        let ids = self.optional(key, "a token id or a list of token ids", ids)?.unwrap_or_default();
        Ok(ids.into_iter().flatten().collect())
    }

    /// The error for a `key` that must be `expected` and is not.
    pub fn error(&self, key: &str, expected: &str) -> ConvertError {
        let found = match self.object.get(key) {
            None => "no such key".to_owned(),
            Some(value) => {
                let text = value.to_string();
                if text.chars().count() > 60 {
                    format!("{}...", text.chars().take(60).collect::<String>())
                } else {
                    text
                }
            }
        };
        ConvertError::ConfigKey {
            path: self.path.clone(),
            key: self.full_key(key),
            expected: expected.to_owned(),
            found,
        }
    }

    /// The key with those of the objects around it.
    pub(crate) fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.parent)
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConvertError> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.error(key, expected))).transpose()
    }
}
