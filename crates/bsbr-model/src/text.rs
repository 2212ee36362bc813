//! Text in, text out: Hugging Face tokenizers.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::ModelError;

/// A tokenizer read from a `tokenizer.json`.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`.
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
        Ok(Self { inner: Tokenizer::from_file(path).map_err(|error| problem(error.to_string()))? })
    }

    /// The tokenizer of the `tokenizer.json` whose content is `bytes`; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`] with the name.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Self, ModelError> {
        let inner = Tokenizer::from_bytes(bytes);
        Ok(Self { inner: inner.map_err(|error| ModelError::Tokenizer(format!("{name}: {error}")))? })
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
        TextStream { tokenizer: self, tokens: Vec::new(), shown: 0, shown_text: String::new() }
    }
}

/// Text of a growing run of tokens, handed out as soon as its characters are complete.
///
/// Decoders may treat the first token of a text in a way of their own, and some let a token depend on the one before
/// it. So new tokens are decoded behind those shown last, and what is new in the text is the difference.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// The tokens shown last, then those that are not shown yet.
    tokens: Vec<u32>,
    /// How many of `tokens` were shown.
    shown: usize,
    /// Text of these alone.
    shown_text: String,
}

impl TextStream<'_> {
    /// The text that `token` completes, possibly none: a character can take several tokens. One that is still incomplete
    /// at the end is never shown.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.len() <= self.shown_text.len() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        // All of `shown_text`, unless broken bytes behind it changed how its own bytes are read.
        let same = text.chars().zip(self.shown_text.chars()).take_while(|(a, b)| a == b);
        let same: usize = same.map(|(character, _)| character.len_utf8()).sum();
        let new = text[same..].to_owned();
        self.tokens.drain(..self.shown);
        self.shown = self.tokens.len();
        self.shown_text = self.tokenizer.decode(&self.tokens)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_keeps_a_few_tokens_however_long_the_text() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/builtin/tokenizer.json");
        let tokenizer = TextTokenizer::open(&path).unwrap();
        let line = tokenizer.encode("A line of words with a 🦀 in it.").unwrap();
        let mut stream = tokenizer.stream();
        for &token in line.iter().cycle().take(5_000) {
            stream.push(token).unwrap();
            assert!(stream.tokens.len() <= 8, "{} tokens", stream.tokens.len());
        }
    }
}
