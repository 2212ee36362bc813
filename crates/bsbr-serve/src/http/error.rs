//! Errors in the form of OpenAI's API.

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use bsbr_model::ModelError;
use serde_json::{Value, json};

use crate::Refusal;

/// An error as a client sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code: Some(code), param: None, message: message.into() }
    }

    /// A request that asks for something impossible through the parameter `param`.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let (param, message) = (Some(param.to_owned()), message.into());
        Self { status: StatusCode::BAD_REQUEST, code: None, param, message }
    }

    /// The model or the server failed.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// As JSON.
    pub(crate) fn json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = (self.status, json_type(), self.json().to_string()).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The header of JSON.
pub(crate) fn json_type() -> [(header::HeaderName, &'static str); 1] {
    [(header::CONTENT_TYPE, "application/json")]
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message),
            Refusal::TooMany { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_texts", message),
            Refusal::TooLong { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "context_length_exceeded", message),
            Refusal::TooMuchMemory { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "cache_too_large", message),
            Refusal::Stopping => Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", message),
            Refusal::Input(error) => error.into(),
        }
    }
}

impl From<ModelError> for ApiError {
    /// Of what a request brought with it.
    fn from(error: ModelError) -> Self {
        let message = error.to_string();
        match error {
            ModelError::Config { setting, problem } => Self::invalid(setting, format!("`{setting}` {problem}")),
            ModelError::EmptyInput => Self::invalid("prompt", message),
            ModelError::TokenOutOfRange { .. } => Self::invalid("prompt", message),
            ModelError::Template(_) => Self::invalid("messages", message),
            _ => Self::internal(message),
        }
    }
}
