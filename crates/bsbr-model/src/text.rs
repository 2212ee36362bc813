//! Text in, text out: Hugging Face tokenizers.

mod companions;
mod stream;

use std::path::Path;

pub use stream::TextStream;

use tokenizers::{ModelWrapper, Tokenizer};

use crate::ModelError;

/// A tokenizer read from a `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`, and from the files beside it the tokens that it does not name itself: `tokenizer_config.json`,
    /// or for older directories `special_tokens_map.json` and `added_tokens.json`.
    ///
    /// A truncation, a padding or merges left out at random, which training leaves there, are not applied.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`] naming the file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let problem = |problem: String| ModelError::Tokenizer(format!("{}: {problem}", path.display()));
        if !path.is_file() {
            return Err(problem(
                "not found. Only the fast format is read; in Python: \
                 AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)"
                    .into(),
            ));
        }
        let bytes = std::fs::read(path).map_err(|error| problem(error.to_string()))?;
        let mut tokenizer = Self::from_bytes(&bytes, &path.display().to_string())?;
        companions::read(path)?.add_to(&mut tokenizer.inner)?;
        Ok(tokenizer)
    }

    /// The tokenizer of the `tokenizer.json` whose content is `bytes`, by itself; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`] with the name.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Self, ModelError> {
        let problem = |error: tokenizers::Error| ModelError::Tokenizer(format!("{name}: {error}"));
        // The library panics at parts it does not know, and at some mistakes of JSON.
        let syntax = serde_json::from_slice::<serde::de::IgnoredAny>(bytes);
        syntax.map_err(|error| ModelError::Tokenizer(format!("{name} is no JSON: {error}")))?;
        let mut inner = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
            .unwrap_or_else(|panic| Err(said(&*panic).into()))
            .map_err(problem)?;
        inner.with_truncation(None).map_err(problem)?.with_padding(None);
        if let ModelWrapper::BPE(model) = inner.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            inner.with_model(model);
        }
        Ok(Self { inner })
    }

    /// Tokens of a text, with whatever the tokenizer's own post-processor adds around it.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode(text, true).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of a text that stands inside another: nothing is added around it, and a tokenizer that writes a blank before
    /// a text writes none here.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn encode_within(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let plain = |text: &str| {
            let encoding = self.inner.encode(text, false).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
            Ok(encoding.get_ids().to_vec())
        };
        // Nothing merges with a digit but digits.
        let (before, both) = (plain("0")?, plain(&format!("0{text}"))?);
        both.strip_prefix(before.as_slice()).map_or_else(|| plain(text), |tokens| Ok(tokens.to_vec()))
    }

    /// The special tokens that [`TextTokenizer::encode`] puts before a text.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn prefix(&self) -> Result<Vec<u32>, ModelError> {
        let plain = self.inner.encode("0", false).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        let whole = self.encode("0")?;
        let at = whole.windows(plain.get_ids().len().max(1)).position(|tokens| tokens == plain.get_ids());
        Ok(whole[..at.unwrap_or_default()].to_vec())
    }

    /// Text of some tokens, special ones left out.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(tokens, true).map_err(|error| ModelError::Tokenizer(error.to_string()))
    }

    /// Turns tokens into text as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }
}

/// What a panic said.
fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("it has a part that is not known here ({})", text.unwrap_or("no reason was given"))
}
