//! A continuation as text, as its tokens come.

use bsbr_model::{StopTexts, TextStream, TextTokenizer};
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::ApiError;
use crate::{Ended, Ending, Event, TokenScore};

/// A continuation on its way.
#[derive(Debug)]
pub(crate) struct Choice<'a> {
    events: UnboundedReceiver<Event>,
    /// Until the end.
    text: Option<(TextStream<'a>, StopTexts)>,
    tokens: usize,
    known: usize,
}

/// What comes next of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// Scores of the next tokens of the prompt.
    Prompt(Vec<TokenScore>),
    /// A token and the text that is certain now, possibly none.
    Token(TokenScore, String),
    /// The end.
    End(Finish),
}

/// The end of a continuation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finish {
    /// As OpenAI's API calls it.
    pub(crate) reason: &'static str,
    /// The rest of the text.
    pub(crate) text: String,
    /// New tokens.
    pub(crate) tokens: usize,
    /// Tokens of the prompt that were known.
    pub(crate) known: usize,
    /// What it took, unless a text ended it.
    pub(crate) took: Option<Ended>,
}

impl<'a> Choice<'a> {
    pub(crate) fn new(events: UnboundedReceiver<Event>, tokenizer: &'a TextTokenizer, stops: &[String]) -> Self {
        let text = Some((tokenizer.stream(), StopTexts::new(stops.iter().cloned())));
        Self { events, text, tokens: 0, known: 0 }
    }

    /// What comes next; nothing behind the end.
    pub(crate) async fn next(&mut self) -> Result<Piece, ApiError> {
        if self.text.as_ref().is_some_and(|(_, watch)| watch.found()) {
            return self.finish(None).map(Piece::End);
        }
        loop {
            let Some(event) = self.events.recv().await else {
                return Err(ApiError::internal("the server ended before the text did"));
            };
            match event {
                Event::Begun { known } => self.known = known,
                Event::Prompt(scores) => return Ok(Piece::Prompt(scores)),
                Event::Failed(problem) => return Err(ApiError::internal(problem)),
                Event::Token(score) => {
                    let Some((stream, watch)) = &mut self.text else { continue };
                    self.tokens += 1;
                    let text = watch.push(&stream.push(score.token).map_err(failed)?);
                    if watch.found() {
                        // Nobody needs what comes after: with the channel the text leaves its place.
                        self.events.close();
                        while self.events.try_recv().is_ok() {}
                    }
                    return Ok(Piece::Token(score, text));
                }
                Event::Ended(ended) => return self.finish(Some(ended)).map(Piece::End),
            }
        }
    }

    /// The end.
    fn finish(&mut self, took: Option<Ended>) -> Result<Finish, ApiError> {
        let (mut text, mut found) = (String::new(), false);
        if let Some((stream, mut watch)) = self.text.take() {
            text = watch.push(&stream.finish().map_err(failed)?);
            found = watch.found();
            text.push_str(&watch.finish());
        }
        let reason = match &took {
            Some(ended) if ended.ending == Ending::Length && !found => "length",
            _ => "stop",
        };
        Ok(Finish { reason, text, tokens: self.tokens, known: self.known, took })
    }
}

fn failed(error: bsbr_model::ModelError) -> ApiError {
    ApiError::internal(error.to_string())
}
