//! A conversation whose history is in the cache of keys and values: no text is read twice.

use std::collections::BTreeMap;

use anyhow::Result;
use bsbr_model::{
    ChatTemplate, Decoder, DecoderCache, GenerateConfig, Generation, Message, PositionPolicy, Sampler, Step, StopTexts,
    TextTokenizer, generate_behind,
};
use serde_json::Value;

/// What a conversation runs on.
pub(crate) struct Setting<'a> {
    pub(crate) decoder: &'a Decoder,
    pub(crate) tokenizer: &'a TextTokenizer,
    pub(crate) template: &'a ChatTemplate,
    pub(crate) variables: &'a BTreeMap<String, Value>,
    pub(crate) config: GenerateConfig,
    pub(crate) stops: Vec<String>,
}

/// A conversation.
pub(crate) struct Session<'a> {
    setting: &'a Setting<'a>,
    messages: Vec<Message>,
    history: Option<History>,
}

/// What the model has read and said.
struct History {
    cache: DecoderCache,
    /// The text up to where the last answer begins.
    head: String,
    /// Tokens behind those in the cache.
    unread: Vec<u32>,
}

/// What happens during an answer.
pub(crate) enum Event<'a> {
    /// So many tokens of so many are read.
    Read(usize, usize),
    /// More of the answer.
    Text(&'a str),
}

/// An answer and what it took.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Tokens that were read for it.
    pub(crate) read: usize,
    /// Whether the history had to be read again, as the template changed it.
    pub(crate) again: bool,
    /// Tokens in the cache before.
    pub(crate) held: usize,
    /// Whether the most tokens asked for ended it.
    pub(crate) cut: bool,
    pub(crate) generation: Generation,
}

impl<'a> Session<'a> {
    /// A conversation that has not begun; `system` goes before it.
    pub(crate) fn new(setting: &'a Setting<'a>, system: Option<&str>) -> Self {
        let messages = system.map(|text| Message::new("system", text)).into_iter().collect();
        Self { setting, messages, history: None }
    }

    /// Everything said so far.
    pub(crate) fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Says `text` and has it answered; `each` sees the answer as it comes, and returns `false` to end it. After an error the
    /// conversation is what it was.
    pub(crate) fn ask(
        &mut self,
        text: &str,
        sampler: &mut Sampler,
        mut each: impl FnMut(Event<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        let before = self.messages.len();
        self.messages.push(Message::new("user", text));
        let result = self.answer(sampler, &mut each);
        match &result {
            Ok((_, said)) => self.messages.push(Message::new("assistant", said.trim())),
            Err(_) => self.messages.truncate(before),
        }
        result.map(|(answer, _)| answer)
    }

    fn answer(
        &mut self,
        sampler: &mut Sampler,
        each: &mut dyn FnMut(Event<'_>) -> Result<bool>,
    ) -> Result<(Answer, String)> {
        let Setting { decoder, tokenizer, template, variables, config, stops } = self.setting;
        let head = template.render(&self.messages, true, variables)?;
        // What comes from an error on is read again.
        let history = self.history.take();
        let began = history.is_some();
        let behind = history.and_then(|history| {
            let more = continuation(&head, &history.head, self.last_answer())?;
            let tokens = tokenizer.encode_within(more).ok()?;
            Some((history.cache, [history.unread, tokens].concat()))
        });
        let again = began && behind.is_none();
        let (mut cache, new) = match behind {
            Some(behind) => behind,
            None => {
                let tokens = tokenizer.encode_plain(&head)?;
                (decoder.new_cache(&[tokens.len().saturating_add(config.max_new_tokens)])?, tokens)
            }
        };
        let held = cache.length(0);
        let config = GenerateConfig { max_new_tokens: room(decoder, held + new.len(), config), ..config.clone() };
        let (mut stream, mut watch, mut said) =
            (tokenizer.stream(), StopTexts::new(stops.iter().cloned()), String::new());
        let mut failed = None;
        let generation = generate_behind(decoder, &mut cache, &new, &config, sampler, |step| {
            let mut next = || match step {
                Step::Read(done, all) => each(Event::Read(done, all)),
                Step::Token(token) => {
                    let text = watch.push(&stream.push(token)?);
                    said.push_str(&text);
                    Ok(each(Event::Text(&text))? && !watch.found())
                }
            };
            next().unwrap_or_else(|error: anyhow::Error| {
                failed = Some(error);
                false
            })
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut rest = watch.push(&stream.finish()?);
        let found = watch.found();
        rest.push_str(&watch.finish());
        said.push_str(&rest);
        each(Event::Text(&rest))?;
        let cut = !generation.stopped && !found && generation.tokens.len() == config.max_new_tokens;
        let answer = Answer { read: new.len() - unread_prompt(&generation, new.len()), again, held, cut, generation };
        self.history = Some(History { cache, head, unread: answer.generation.unread.clone() });
        Ok((answer, said))
    }

    /// What the assistant said last, before the message that is asked now.
    fn last_answer(&self) -> &str {
        let last = self.messages.iter().rev().find(|message| message.role == "assistant");
        last.map_or("", |message| message.content.as_str())
    }
}

/// Tokens of the prompt that were not read, where an answer ended before it began.
fn unread_prompt(generation: &Generation, prompt: usize) -> usize {
    if generation.tokens.is_empty() { generation.unread.len().min(prompt) } else { 0 }
}

/// Tokens that an answer behind `length` tokens may have: those asked for, or fewer where the positions of a model end.
fn room(decoder: &Decoder, length: usize, config: &GenerateConfig) -> usize {
    let model = decoder.config();
    let ends = decoder.position.is_some() && model.position_policy == PositionPolicy::Error;
    // The last new token needs no position. At least one is asked for, so that a text that is too long is refused.
    let left = (model.decoder.max_positions + 1).saturating_sub(length).max(1);
    if ends { config.max_new_tokens.min(left) } else { config.max_new_tokens }
}

/// What `text` has behind `head` and the answer, or `None` where the template writes what came before in another way now. Blanks
/// around an answer may differ: the model has read its answer as it gave it.
fn continuation<'t>(text: &'t str, head: &str, answer: &str) -> Option<&'t str> {
    let rest = text.strip_prefix(head)?;
    rest.strip_prefix(answer).or_else(|| rest.trim_start().strip_prefix(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_goes_on_behind_what_was_said() {
        let head = "<user>Hi<end><bot>";
        assert_eq!(continuation("<user>Hi<end><bot>Yes.<end><user>", head, "Yes."), Some("<end><user>"));
        assert_eq!(continuation("<user>Hi<end><bot> Yes.<end><user>", head, "Yes."), Some("<end><user>"));
        assert_eq!(continuation("<user>Hi<end><bot><end><user>", head, ""), Some("<end><user>"));
    }

    #[test]
    fn a_template_that_rewrites_what_was_said_has_it_read_again() {
        let head = "<user>Hi<end><bot>";
        assert_eq!(continuation("<user>Hi<end><bot>Yes.<end>", head, "Let me think.\nYes."), None);
        assert_eq!(continuation("<date>now<user>Hi<end><bot>Yes.<end>", head, "Yes."), None);
    }
}
