//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{Request, Response},
};
use bsbr_model::ModelError;
use serde::Deserialize;
use serde_json::Value;

use super::{
    App,
    answer::{Asked, Form, Prompt, answer},
    apart,
    error::ApiError,
    fields::Fields,
    parameters::{Parameters, count},
};

/// New tokens where a request names no number, as in OpenAI's API.
const DEFAULT_NEW_TOKENS: usize = 16;
/// Most of the best tokens that are told beside each.
const MOST_LOGPROBS: usize = 20;

/// One prompt or several, as text or as tokens.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

/// One of them.
#[derive(Debug, Clone)]
enum Given {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompts {
    fn list(self) -> Vec<Given> {
        match self {
            Self::Text(text) => vec![Given::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Given::Text).collect(),
            Self::Tokens(tokens) => vec![Given::Tokens(tokens)],
            Self::ManyTokens(all) => all.into_iter().map(Given::Tokens).collect(),
        }
    }
}

pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::read(request, &app.config).await?;
    app.check_model(&mut fields)?;
    let Some(prompts) = fields.take::<Prompts>("prompt")? else {
        return Err(ApiError::invalid("prompt", "`prompt` is missing"));
    };
    let given = prompts.list();
    if given.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` is empty, expected at least one"));
    }
    let most = fields.take("max_tokens")?;
    let mut parameters = Parameters::take(&mut fields)?;
    parameters.max_new_tokens = most;
    let echo = fields.take("echo")?.unwrap_or(false);
    let best = count(&mut fields, "logprobs", MOST_LOGPROBS)?;
    let own_choices = parameters.choices;
    let same = move |value: &Value| value.as_u64() == Some(own_choices as u64);
    fields.only("best_of", same, "every continuation is sent, so it must be `n`")?;
    fields.only("suffix", |value| value.as_str() == Some(""), "texts are continued at their end")?;
    fields.finish()?;
    if parameters.max_new_tokens == Some(0) && !echo {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` is 0 and `echo` is false: nothing is asked for"));
    }

    let own = Arc::clone(&app);
    let tokens = apart(move || {
        let of = |given: Given| match given {
            Given::Text(text) => own.tokenizer.encode(&text).map(|tokens| (Some(text), tokens)),
            Given::Tokens(tokens) => Ok((None, tokens)),
        };
        let all = given.into_iter().map(of).collect::<Result<Vec<_>, ModelError>>()?;
        let echoed = |(text, tokens): (Option<String>, Vec<u32>)| {
            let text = match text {
                Some(text) => text,
                None if echo => own.tokenizer.decode(&tokens)?,
                None => String::new(),
            };
            Ok((text, tokens))
        };
        all.into_iter().map(echoed).collect::<Result<Vec<_>, ModelError>>()
    });
    let tokens = tokens.await??;
    let (mut requests, mut prompts) = (Vec::new(), Vec::new());
    for (text, tokens) in tokens {
        let Some(&first) = tokens.first() else { return Err(ModelError::EmptyInput.into()) };
        let new = app.new_tokens(parameters.max_new_tokens, DEFAULT_NEW_TOKENS, tokens.len());
        requests.extend(parameters.requests(&tokens, (&app.stop_tokens, best, echo && best.is_some()), new));
        prompts.push(Prompt { tokens: tokens.len(), echo: echo.then_some((text, first)) });
    }
    let own = Arc::clone(&app);
    let events = apart(move || own.engine.submit(requests)).await??;
    answer(app, Asked { form: Form::Completion, parameters, logprobs: best.is_some(), prompts }, events).await
}
