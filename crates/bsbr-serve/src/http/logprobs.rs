//! Log-probabilities in the two forms of OpenAI's API.

use bsbr_model::{ModelError, TextTokenizer};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use crate::TokenScore;

/// What stands for a probability of 0: JSON has no infinity.
const LEAST: f64 = -9999.0;

/// A token as text; a part of a character as its bytes.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

fn bytes_of(tokenizer: &TextTokenizer, token: u32) -> Result<Vec<u8>, ApiError> {
    tokenizer.token_bytes(token).map_err(|error: ModelError| ApiError::internal(error.to_string()))
}

/// As chats have it: an entry for each token.
pub(crate) fn of_chat(tokenizer: &TextTokenizer, scores: &[TokenScore]) -> Result<Vec<Value>, ApiError> {
    let entry = |token: u32, logprob: f64| {
        let bytes = bytes_of(tokenizer, token)?;
        Ok::<_, ApiError>(json!({ "token": shown(&bytes), "logprob": logprob.max(LEAST), "bytes": bytes }))
    };
    let of = |score: &TokenScore| {
        let mut value = entry(score.token, score.logprob)?;
        let best: Result<Vec<Value>, ApiError> =
            score.best.iter().map(|&(token, logprob)| entry(token, logprob)).collect();
        value["top_logprobs"] = Value::Array(best?);
        Ok(value)
    };
    scores.iter().map(of).collect()
}

/// As completions have it: lists side by side, which grow with the text.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lists {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    best: Vec<Value>,
    offsets: Vec<Value>,
    /// Characters of the text so far.
    offset: usize,
}

impl Lists {
    /// Adds the first token of a text, which nothing predicts.
    pub(crate) fn push_first(&mut self, tokenizer: &TextTokenizer, token: u32) -> Result<(), ApiError> {
        let bytes = bytes_of(tokenizer, token)?;
        self.place(tokenizer, token, &bytes);
        self.logprobs.push(Value::Null);
        self.best.push(Value::Null);
        Ok(())
    }

    /// Adds a token.
    pub(crate) fn push(&mut self, tokenizer: &TextTokenizer, score: &TokenScore) -> Result<(), ApiError> {
        let bytes = bytes_of(tokenizer, score.token)?;
        self.place(tokenizer, score.token, &bytes);
        self.logprobs.push(json!(score.logprob.max(LEAST)));
        let mut best = Map::new();
        for &(token, logprob) in score.best.iter().rev() {
            // Of tokens that look alike the best stays.
            best.insert(shown(&bytes_of(tokenizer, token)?), json!(logprob.max(LEAST)));
        }
        best.entry(shown(&bytes)).or_insert_with(|| json!(score.logprob.max(LEAST)));
        self.best.push(Value::Object(best));
        Ok(())
    }

    fn place(&mut self, tokenizer: &TextTokenizer, token: u32, bytes: &[u8]) {
        self.tokens.push(json!(shown(bytes)));
        self.offsets.push(json!(self.offset));
        if !tokenizer.is_special(token) {
            // A character begins with every byte that continues none.
            self.offset += bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
        }
    }

    /// Whether nothing was added since they were taken last.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// What was added since this was asked last.
    pub(crate) fn take(&mut self) -> Value {
        let Self { tokens, logprobs, best, offsets, .. } = self;
        let [tokens, logprobs, best, offsets] = [tokens, logprobs, best, offsets].map(std::mem::take);
        json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": best, "text_offset": offsets })
    }
}
