//! OpenAI's API over HTTP, and the pages beside it.

mod answer;
mod chat;
mod choice;
mod completions;
mod error;
mod fields;
mod guard;
mod logprobs;
mod metrics;
mod parameters;
mod server;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{Response, StatusCode, header},
    middleware,
    response::IntoResponse,
    routing::{get, post},
};
use bsbr_model::{ChatTemplate, Decoder, TextTokenizer};
use error::{ApiError, json_type};
use fields::Fields;
use serde_json::{Value, json};
pub use server::{Server, StopHandle, serve};

use crate::{Engine, HttpConfig};

/// The chat page.
const PAGE: &str = include_str!("page.html");
/// The page may load nothing and speak with nobody but its server.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                           img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A model that is ready to be served.
#[derive(Debug)]
pub struct Model {
    /// Under which name clients ask for it.
    pub name: String,
    /// The decoder.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: TextTokenizer,
    /// How it takes conversations, if it does.
    pub chat: Option<Chat>,
}

/// How messages become a text, and what ends an answer.
#[derive(Debug, Clone)]
pub struct Chat {
    /// The template.
    pub template: ChatTemplate,
    /// Variables for it; a request can change them by `chat_template_kwargs`.
    pub variables: BTreeMap<String, Value>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

/// What every request needs.
#[derive(Debug)]
struct App {
    name: String,
    created: u64,
    /// Changes with what would change answers.
    fingerprint: String,
    engine: Engine,
    tokenizer: TextTokenizer,
    stop_tokens: Vec<u32>,
    chat: Option<Chat>,
    config: HttpConfig,
    /// SHA-256 of the key that clients need.
    key: Option<[u8; 32]>,
    /// Responses by status code.
    answers: Mutex<BTreeMap<u16, u64>>,
}

impl App {
    fn new(model: Model, engine: Engine, config: HttpConfig) -> Self {
        let Model { name, tokenizer, chat, .. } = model;
        let fingerprint = format!("bsbr_{}", env!("CARGO_PKG_VERSION").replace('.', "_"));
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let stop_tokens = engine.decoder().config().stop_tokens.clone();
        let key = config.api_key.as_deref().map(guard::digest);
        Self {
            name,
            created,
            fingerprint,
            engine,
            tokenizer,
            stop_tokens,
            chat,
            config,
            key,
            answers: Mutex::default(),
        }
    }

    /// Responses by status code so far.
    fn answers(&self) -> BTreeMap<u16, u64> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A request for another model than the one there is goes nowhere.
    fn check_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        match fields.take::<String>("model")? {
            Some(name) if name != self.name && !name.is_empty() => Err(self.no_model(&name)),
            _ => Ok(()),
        }
    }

    fn no_model(&self, name: &str) -> ApiError {
        let message = format!("the model `{name}` is not here, this server has `{}`", self.name);
        ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message)
    }

    /// New tokens of a text: those asked for, or else as many as usual and as there is room for.
    fn new_tokens(&self, asked: Option<usize>, usual: usize, prompt: usize) -> usize {
        asked.unwrap_or_else(|| usual.min(self.engine.most_tokens().saturating_sub(prompt)).max(1))
    }

    fn model_json(&self) -> Value {
        let most = self.engine.most_tokens();
        json!({ "id": self.name, "object": "model", "created": self.created, "owned_by": "bsbr", "max_model_len": most })
    }
}

/// What takes long for those who wait for something else, elsewhere.
async fn apart<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Result<R, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::internal(format!("a task failed: {error}")))
}

/// Everything the server answers.
fn router(app: Arc<App>) -> Router {
    let wrong_method = || async {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this address takes another method")
    };
    let nothing = || async { ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address") };
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .route("/metrics", get(metrics::metrics))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::key));
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .merge(guarded)
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::host))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::head))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard::count))
        .with_state(app)
}

async fn page() -> Response<Body> {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, PAGE).into_response()
}

async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    if app.engine.is_running() {
        (json_type(), json!({ "status": "ok" }).to_string()).into_response()
    } else {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_running", "the engine does not run").into_response()
    }
}

async fn models(State(app): State<Arc<App>>) -> Response<Body> {
    (json_type(), json!({ "object": "list", "data": [app.model_json()] }).to_string()).into_response()
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response<Body>, ApiError> {
    if name != app.name {
        return Err(app.no_model(&name));
    }
    Ok((json_type(), app.model_json().to_string()).into_response())
}
