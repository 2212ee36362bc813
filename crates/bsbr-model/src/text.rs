//! Text in, text out: Hugging Face tokenizers.

mod byte_pairs;
mod bytes;
mod chat;
mod companions;
mod stop;
mod stream;

use std::panic::AssertUnwindSafe;
use std::path::Path;

pub use chat::{ChatTemplate, Message, strftime};
pub use stop::StopTexts;
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
        let mut inner = match contained(|| Ok(byte_pairs::read(bytes))).map_err(problem)? {
            Some(tokenizer) => tokenizer,
            None => {
                // Some mistakes of JSON are not told from parts of an unknown kind further on.
                let syntax = serde_json::from_slice::<serde::de::IgnoredAny>(bytes);
                syntax.map_err(|error| ModelError::Tokenizer(format!("{name}: it is no JSON: {error}")))?;
                contained(|| Tokenizer::from_bytes(bytes)).map_err(problem)?
            }
        };
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
        self.ids(text, true)
    }

    /// Tokens of a text that says itself what belongs around it, such as a rendered chat: nothing is added.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.ids(text, false)
    }

    /// The id of a special token by its text; `None` if there is none, or if that is an ordinary token.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        let added = self.inner.get_added_vocabulary().get_vocab().get(text).copied();
        added.filter(|_| self.inner.get_added_vocabulary().is_special_token(text))
    }

    /// Whether a token is a special one, which belongs to no text.
    pub fn is_special(&self, token: u32) -> bool {
        let text = self.inner.id_to_token(token);
        text.is_some_and(|text| self.inner.get_added_vocabulary().is_special_token(&text))
    }

    /// Tokens of a text, and where `around` says so what belongs around it.
    fn ids(&self, text: &str, around: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = contained(|| self.inner.encode(text, around));
        Ok(encoding.map_err(|error| ModelError::Tokenizer(error.to_string()))?.get_ids().to_vec())
    }

    /// Tokens of a text that stands inside another: nothing is added around it, and a tokenizer that writes a blank before
    /// a text writes none here.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn encode_within(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let plain = |text: &str| self.ids(text, false);
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
        let (plain, whole) = (self.ids("0", false)?, self.encode("0")?);
        let at = whole.windows(plain.len().max(1)).position(|tokens| tokens == plain);
        Ok(whole[..at.unwrap_or_default()].to_vec())
    }

    /// Text of some tokens, special ones left out.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        contained(|| self.inner.decode(tokens, true)).map_err(|error| ModelError::Tokenizer(error.to_string()))
    }

    /// What a token adds to a text, special ones by their name; a part of a character as the bytes it is.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn token_bytes(&self, token: u32) -> Result<Vec<u8>, ModelError> {
        let Some(name) = self.inner.id_to_token(token) else { return Ok(Vec::new()) };
        if self.inner.get_added_vocabulary().is_special_token(&name) {
            return Ok(name.into_bytes());
        }
        // Behind something else, as decoders may treat the first token in a way of their own.
        let mut tokens = self.ids("0", false)?;
        let before = self.decode(&tokens)?;
        tokens.push(token);
        let text = self.decode(&tokens)?;
        let text = text.strip_prefix(before.as_str()).unwrap_or(&text);
        Ok(match bytes::of_name(&name) {
            Some(bytes) if text.contains('\u{fffd}') => bytes,
            _ => text.as_bytes().to_vec(),
        })
    }

    /// Turns tokens into text as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }
}

/// What the library makes; an error where it panics, as it does at parts that are of no known kind or contradict each other.
fn contained<T>(make: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        let reason = text.unwrap_or("no reason was given");
        Err(format!("the tokenizer has a part that is not known here, or does not fit the others ({reason})").into())
    })
}
