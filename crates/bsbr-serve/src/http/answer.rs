//! Answers as a whole or as a stream, of either way of asking.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    body::{Body, Bytes},
    http::{Response, header},
    response::IntoResponse,
};
use futures_util::{future::try_join_all, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel};

use super::{
    App,
    choice::{Choice, Finish, Piece},
    error::{ApiError, json_type},
    logprobs::{Lists, of_chat},
    parameters::Parameters,
};
use crate::{Event, TokenScore};

/// Pieces of a stream that wait for a slow reader.
const WAITING_PIECES: usize = 32;

/// In which of the two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Completion,
}

/// What is to be answered.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) form: Form,
    pub(crate) parameters: Parameters,
    pub(crate) logprobs: bool,
    pub(crate) prompts: Vec<Prompt>,
}

/// A prompt as the answer needs it.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Number of its tokens.
    pub(crate) tokens: usize,
    /// What is repeated of it before the continuation: its text and, for scores, its first token.
    pub(crate) echo: Option<(String, u32)>,
}

/// What all parts of an answer say about it.
#[derive(Debug, Clone)]
struct Head {
    id: String,
    created: u64,
    form: Form,
}

impl Head {
    fn new(form: Form) -> Self {
        let kind = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            id: format!("{kind}-{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>()),
            created: since.as_secs(),
            form,
        }
    }

    fn json(&self, app: &App, streamed: bool, choices: Vec<Value>) -> Value {
        let object = match (self.form, streamed) {
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": app.name,
            "system_fingerprint": app.fingerprint, "choices": choices,
        })
    }
}

/// Sums of what answers took.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    prompt: usize,
    known: usize,
    new: usize,
}

impl Usage {
    /// Of all finishes, the continuations of each prompt side by side.
    fn new(asked: &Asked, finishes: &[Finish]) -> Self {
        let of_prompt = asked.parameters.choices;
        Self {
            prompt: asked.prompts.iter().map(|prompt| prompt.tokens).sum(),
            known: finishes.iter().step_by(of_prompt).map(|finish| finish.known).sum(),
            new: finishes.iter().map(|finish| finish.tokens).sum(),
        }
    }

    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": { "cached_tokens": self.known },
        })
    }
}

/// What the model took, beyond what OpenAI's API tells.
fn took(finishes: &[&Finish]) -> Value {
    let ended = || finishes.iter().filter_map(|finish| finish.took.as_ref());
    let sum = |of: fn(&crate::Ended) -> f64| ended().map(of).sum::<f64>();
    let (keys, all) = ended().fold((0, 0), |(keys, all), ended| (keys + ended.reads.keys, all + ended.reads.all));
    json!({
        "cache_bytes": ended().map(|ended| ended.cache_bytes).sum::<usize>(),
        "keys_read_share": if all > 0 { keys as f64 / all as f64 } else { 0.0 },
        "prefill_seconds": sum(|ended| ended.prefill.as_secs_f64()),
        "decode_seconds": sum(|ended| ended.decode.as_secs_f64()),
    })
}

/// A continuation as JSON, piece by piece.
struct Writer {
    form: Form,
    index: usize,
    logprobs: bool,
    lists: Lists,
    scores: Vec<Value>,
}

impl Writer {
    fn new(asked: &Asked, index: usize) -> Self {
        let (lists, scores) = (Lists::default(), Vec::new());
        Self { form: asked.form, index, logprobs: asked.logprobs, lists, scores }
    }

    fn push_first(&mut self, app: &App, token: u32) -> Result<(), ApiError> {
        if self.logprobs { self.lists.push_first(&app.tokenizer, token) } else { Ok(()) }
    }

    fn push(&mut self, app: &App, scores: &[TokenScore]) -> Result<(), ApiError> {
        match (self.logprobs, self.form) {
            (false, _) => {}
            (true, Form::Chat) => self.scores.extend(of_chat(&app.tokenizer, scores)?),
            (true, Form::Completion) => {
                for score in scores {
                    self.lists.push(&app.tokenizer, score)?;
                }
            }
        }
        Ok(())
    }

    /// The scores since this was asked last.
    fn take_scores(&mut self) -> Value {
        match (self.logprobs, self.form) {
            (false, _) => Value::Null,
            (true, Form::Chat) => json!({ "content": std::mem::take(&mut self.scores), "refusal": null }),
            (true, Form::Completion) => self.lists.take(),
        }
    }

    /// A whole continuation.
    fn whole(&mut self, text: &str, reason: &str) -> Value {
        let (index, logprobs) = (self.index, self.take_scores());
        match self.form {
            Form::Chat => json!({
                "index": index, "message": { "role": "assistant", "content": text, "refusal": null },
                "logprobs": logprobs, "finish_reason": reason,
            }),
            Form::Completion => {
                json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason })
            }
        }
    }

    /// More of it.
    fn more(&mut self, text: &str) -> Value {
        let (index, logprobs) = (self.index, self.take_scores());
        match self.form {
            Form::Chat => json!({
                "index": index, "delta": { "content": text }, "logprobs": logprobs, "finish_reason": null,
            }),
            Form::Completion => json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": null }),
        }
    }

    /// Its beginning, where there is one to tell.
    fn beginning(&self) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        let begins = json!({ "index": self.index, "delta": delta, "logprobs": null, "finish_reason": null });
        (self.form == Form::Chat).then_some(begins)
    }

    /// Its end, behind the last text.
    fn end(&self, reason: &str) -> Value {
        match self.form {
            Form::Chat => json!({ "index": self.index, "delta": {}, "logprobs": null, "finish_reason": reason }),
            Form::Completion => json!({ "index": self.index, "text": "", "logprobs": null, "finish_reason": reason }),
        }
    }
}

/// Answers what was asked; `events` are those of the continuations, prompt by prompt.
pub(crate) async fn answer(
    app: Arc<App>,
    asked: Asked,
    events: Vec<UnboundedReceiver<Event>>,
) -> Result<Response<Body>, ApiError> {
    if asked.parameters.stream {
        return Ok(streamed(app, asked, events));
    }
    let head = Head::new(asked.form);
    let all = events.into_iter().enumerate().map(|(index, events)| whole(&app, &asked, index, events));
    let (choices, finishes): (Vec<Value>, Vec<Finish>) = try_join_all(all).await?.into_iter().unzip();
    let mut json = head.json(&app, false, choices);
    json["usage"] = Usage::new(&asked, &finishes).json();
    json["bsbr"] = took(&finishes.iter().collect::<Vec<_>>());
    Ok((json_type(), json.to_string()).into_response())
}

/// One continuation to its end.
async fn whole(
    app: &App,
    asked: &Asked,
    index: usize,
    events: UnboundedReceiver<Event>,
) -> Result<(Value, Finish), ApiError> {
    let mut choice = Choice::new(events, &app.tokenizer, &asked.parameters.stops);
    let (mut writer, mut all) = (Writer::new(asked, index), String::new());
    if let Some((text, first)) = &asked.prompts[index / asked.parameters.choices].echo {
        all.push_str(text);
        writer.push_first(app, *first)?;
    }
    loop {
        match choice.next().await? {
            Piece::Prompt(scores) => writer.push(app, &scores)?,
            Piece::Token(score, text) => {
                writer.push(app, &[score])?;
                all.push_str(&text);
            }
            Piece::End(finish) => {
                all.push_str(&finish.text);
                return Ok((writer.whole(&all, finish.reason), finish));
            }
        }
    }
}

/// The answer as server-sent events.
fn streamed(app: Arc<App>, asked: Asked, events: Vec<UnboundedReceiver<Event>>) -> Response<Body> {
    let (sender, receiver) = channel::<String>(WAITING_PIECES);
    tokio::spawn(async move {
        let head = Head::new(asked.form);
        let all = events.into_iter().enumerate().map(|(index, events)| {
            let (app, asked, head, sender) = (&app, &asked, &head, &sender);
            // With the stream its continuations end.
            async move {
                tokio::select! {
                    () = sender.closed() => Ok(None),
                    end = send(app, asked, head, index, events, sender) => end.map(Some),
                }
            }
        });
        let last = match try_join_all(all).await {
            Ok(finishes) => {
                let Some(finishes) = finishes.into_iter().collect::<Option<Vec<Finish>>>() else { return };
                let mut json = head.json(&app, true, Vec::new());
                json["usage"] = Usage::new(&asked, &finishes).json();
                asked.parameters.usage.then_some(json)
            }
            Err(error) => Some(error.json()),
        };
        if let Some(json) = last {
            say(&sender, &json).await;
        }
        // The reader may be gone.
        let _ = sender.send("data: [DONE]\n\n".to_owned()).await;
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(stream::unfold(receiver, next_part))).into_response()
}

async fn next_part(mut receiver: Receiver<String>) -> Option<(Result<Bytes, Infallible>, Receiver<String>)> {
    let part = receiver.recv().await?;
    Some((Ok(Bytes::from(part)), receiver))
}

async fn say(sender: &Sender<String>, json: &Value) {
    // The reader may be gone: whoever makes the stream watches for that.
    let _ = sender.send(format!("data: {json}\n\n")).await;
}

/// Sends one continuation as it comes.
async fn send(
    app: &App,
    asked: &Asked,
    head: &Head,
    index: usize,
    events: UnboundedReceiver<Event>,
    sender: &Sender<String>,
) -> Result<Finish, ApiError> {
    let mut choice = Choice::new(events, &app.tokenizer, &asked.parameters.stops);
    let mut writer = Writer::new(asked, index);
    let chunk = |choice: Value| head.json(app, true, vec![choice]);
    if let Some(begins) = writer.beginning() {
        say(sender, &chunk(begins)).await;
    }
    // Until there are scores of the prompt, it is not told.
    let mut held = String::new();
    if let Some((text, first)) = &asked.prompts[index / asked.parameters.choices].echo {
        held.push_str(text);
        writer.push_first(app, *first)?;
    }
    loop {
        match choice.next().await? {
            Piece::Prompt(scores) => writer.push(app, &scores)?,
            Piece::Token(score, text) => {
                writer.push(app, &[score])?;
                held.push_str(&text);
                if !held.is_empty() {
                    say(sender, &chunk(writer.more(&std::mem::take(&mut held)))).await;
                }
            }
            Piece::End(finish) => {
                held.push_str(&finish.text);
                let scored = writer.logprobs && (!writer.scores.is_empty() || !writer.lists.is_empty());
                if !held.is_empty() || scored {
                    say(sender, &chunk(writer.more(&held))).await;
                }
                let mut last = chunk(writer.end(finish.reason));
                last["bsbr"] = took(&[&finish]);
                say(sender, &last).await;
                return Ok(finish);
            }
        }
    }
}
