//! Text as its tokens come.

use super::TextTokenizer;
use crate::ModelError;

/// Most tokens that are held back. A character takes four at most: more of them that show nothing are special tokens, or
/// bytes that will never be one.
const MOST_HELD: usize = 64;

/// Most tokens that are kept of those shown last: what comes depends on the end of them alone.
const MOST_BEFORE: usize = 8;

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

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, tokens: Vec::new(), shown: 0, shown_text: String::new() }
    }

    /// The text that `token` completes, possibly none: a character can take several tokens. What is held back comes with a
    /// later token, or from [`TextStream::finish`].
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        let complete = text.len() > self.shown_text.len() && !text.ends_with('\u{fffd}');
        if complete || self.tokens.len() - self.shown > MOST_HELD { self.show(&text) } else { Ok(String::new()) }
    }

    /// What is held back at the end of the text: a character that no token completed shows as U+FFFD, as it does where all
    /// tokens are decoded at once, and one that is U+FFFD itself shows as what it is.
    ///
    /// # Errors
    ///
    /// [`ModelError::Tokenizer`].
    pub fn finish(mut self) -> Result<String, ModelError> {
        let text = self.tokenizer.decode(&self.tokens)?;
        self.show(&text)
    }

    /// What is new in `text`, that of all tokens here; they count as shown from now on.
    fn show(&mut self, text: &str) -> Result<String, ModelError> {
        // All of `shown_text`, unless broken bytes behind it changed how its own bytes are read.
        let same = text.chars().zip(self.shown_text.chars()).take_while(|(a, b)| a == b);
        let same: usize = same.map(|(character, _)| character.len_utf8()).sum();
        let new = text[same..].to_owned();
        self.tokens.drain(..self.shown.max(self.tokens.len().saturating_sub(MOST_BEFORE)));
        self.shown = self.tokens.len();
        self.shown_text = self.tokenizer.decode(&self.tokens)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_stream_keeps_a_few_tokens_however_long_the_text() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr/builtin/tokenizer.json");
        let tokenizer = TextTokenizer::open(&path).unwrap();
        let line = tokenizer.encode("A line of words with a 🦀 in it.").unwrap();
        let mut stream = tokenizer.stream();
        for &token in line.iter().cycle().take(5_000) {
            stream.push(token).unwrap();
            assert!(stream.tokens.len() <= 8, "{} tokens", stream.tokens.len());
        }
        // Special tokens have no text.
        for _ in 0..1000 {
            stream.push(0).unwrap();
            assert!(stream.tokens.len() <= 8 + MOST_HELD, "{} tokens", stream.tokens.len());
        }
    }
}
