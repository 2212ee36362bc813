//! `POST /v1/chat/completions`.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::{Request, Response, StatusCode},
};
use bsbr_model::Message;
use serde::Deserialize;
use serde_json::Value;

use super::{
    App,
    answer::{Asked, Form, Prompt, answer},
    apart,
    error::ApiError,
    fields::Fields,
    parameters::{Parameters, count, is_empty},
};

/// Most of the best tokens that are told beside each.
const MOST_LOGPROBS: usize = 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    role: String,
    content: Option<Content>,
    #[serde(rename = "name")]
    _name: Option<String>,
    /// Of an answer that is sent back.
    #[serde(rename = "refusal")]
    _refusal: Option<String>,
    tool_calls: Option<Value>,
    audio: Option<Value>,
    function_call: Option<Value>,
    annotations: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Said {
    fn message(self) -> Result<Message, ApiError> {
        let more = [&self.tool_calls, &self.audio, &self.function_call, &self.annotations];
        if more.into_iter().flatten().any(|value| !is_empty(value)) {
            return Err(ApiError::invalid("messages", "tools and audio are not supported: send texts alone"));
        }
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |part: Part| match (part.kind.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => {
                        let message = format!("a part of a message is of type `{kind}`, expected `text` with a text");
                        Err(ApiError::invalid("messages", message))
                    }
                };
                parts.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        let role = if self.role == "developer" { "system" } else { &self.role };
        Ok(Message::new(role, &content))
    }
}

pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::read(request, &app.config).await?;
    app.check_model(&mut fields)?;
    let Some(chat) = &app.chat else {
        let message = "the model has no chat template: use /v1/completions";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "no_chat_template", message));
    };
    let Some(said) = fields.take::<Vec<Said>>("messages")? else {
        return Err(ApiError::invalid("messages", "`messages` is missing"));
    };
    if said.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty, expected at least one"));
    }
    let messages: Vec<Message> = said.into_iter().map(Said::message).collect::<Result<_, _>>()?;
    let asked_most = fields.take("max_completion_tokens")?;
    let most = fields.take("max_tokens")?;
    let mut parameters = Parameters::take(&mut fields)?;
    parameters.max_new_tokens = asked_most.or(most);
    let scored = fields.take("logprobs")?.unwrap_or(false);
    let best = count(&mut fields, "top_logprobs", MOST_LOGPROBS)?;
    if best.is_some() && !scored {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
    }
    let mut variables: BTreeMap<String, Value> = chat.variables.clone();
    variables.extend(fields.take::<BTreeMap<String, Value>>("chat_template_kwargs")?.unwrap_or_default());
    let text = |value: &Value| value.get("type").is_some_and(|kind| kind == "text");
    fields.only("response_format", text, "answers are plain text")?;
    for name in ["tools", "functions", "tool_choice", "function_call", "audio", "web_search_options", "prediction"] {
        fields.only(name, is_empty, "the model answers with text alone")?;
    }
    let words = |value: &Value| *value == serde_json::json!(["text"]);
    fields.only("modalities", words, "the model answers with text alone")?;
    fields.ignore(&["parallel_tool_calls", "reasoning_effort", "verbosity", "prompt_cache_retention"]);
    fields.finish()?;

    let own = Arc::clone(&app);
    let tokens = apart(move || {
        let Some(chat) = &own.chat else { return Ok(Vec::new()) };
        own.tokenizer.encode_plain(&chat.template.render(&messages, true, &variables)?)
    });
    let tokens = tokens.await??;
    let new = app.new_tokens(parameters.max_new_tokens, app.config.default_new_tokens, tokens.len());
    let logprobs = scored.then(|| best.unwrap_or(0));
    let requests = parameters.requests(&tokens, (&chat.stop_tokens, logprobs, false), new);
    let own = Arc::clone(&app);
    let events = apart(move || own.engine.submit(requests)).await??;
    let prompts = vec![Prompt { tokens: tokens.len(), echo: None }];
    answer(app, Asked { form: Form::Chat, parameters, logprobs: scored, prompts }, events).await
}
