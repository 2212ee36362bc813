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

    /// Tokens of a text, with whatever the tokenizer's own post-processor adds around it.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode(text, true).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
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
        TextStream { tokenizer: self, tokens: Vec::new(), shown: 0 }
    }
}

/// Text of a growing run of tokens, handed out as soon as its characters are complete.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    tokens: Vec<u32>,
    /// Bytes of the decoded text that were handed out.
    shown: usize,
}

impl TextStream<'_> {
    /// The text that `token` completes, possibly none: a character can take several tokens.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let new = text.get(self.shown..).unwrap_or_default().to_owned();
        self.shown = text.len();
        if new.ends_with('\n') {
            // Decoding does not look back past a line end: start afresh, so that a long text stays linear.
            self.tokens.clear();
            self.shown = 0;
        }
        Ok(new)
    }
}
