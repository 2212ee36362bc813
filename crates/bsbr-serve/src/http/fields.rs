//! The fields of a request, one by one: each is of its type, and none is left over.

use axum::{
    body::{Body, Bytes},
    http::{Request, StatusCode, header},
};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::HttpConfig;

/// Bytes of a body that is too long which are taken and thrown away, so that the client hears why.
const MOST_WASTED: usize = 16 << 20;

/// What a request says.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads the body of a request.
    pub(crate) async fn read(request: Request<Body>, config: &HttpConfig) -> Result<Self, ApiError> {
        let content = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        // A browser sends this type to a foreign page only after asking.
        if !content.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
            let message =
                format!("the body is said to be `{content}`, expected the header Content-Type: application/json");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", message));
        }
        let body = tokio::time::timeout(config.patience, body(request.into_body(), config.body_bytes)).await;
        let body = body.map_err(|_| {
            let message = format!("the body did not arrive within {} seconds", config.patience.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message)
        })??;
        Self::parse(&body)
    }

    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(bad_json("it is not an object".into())),
            Err(error) => Err(bad_json(error.to_string())),
        }
    }

    /// The value of a field; `None` where it is absent or null.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(ApiError::invalid(name, format!("`{name}`: {error}"))),
            },
        }
    }

    /// Fields that change nothing here.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.remove(*name);
        }
    }

    /// A field that may only have values for which `harmless` is true.
    pub(crate) fn only(
        &mut self,
        name: &str,
        harmless: impl FnOnce(&Value) -> bool,
        why: &str,
    ) -> Result<(), ApiError> {
        match self.0.remove(name) {
            Some(value) if !value.is_null() && !harmless(&value) => {
                Err(ApiError::invalid(name, format!("`{name}` is not supported: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// Nothing else was asked for.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            Some(name) => {
                Err(ApiError::invalid(name, format!("`{name}` is no parameter that is known here: leave it out")))
            }
            None => Ok(()),
        }
    }
}

fn bad_json(problem: String) -> ApiError {
    let message = format!("the body cannot be read as JSON: {problem}");
    ApiError::new(StatusCode::BAD_REQUEST, "bad_json", message)
}

/// A whole body of at most `most` bytes.
async fn body(body: Body, most: usize) -> Result<Vec<u8>, ApiError> {
    let mut all = Vec::new();
    let (mut length, mut parts) = (0, body.into_data_stream());
    while let Some(part) = parts.next().await {
        let part: Bytes = part.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, "bad_body", format!("the body cannot be read: {error}"))
        })?;
        length += part.len();
        if length <= most {
            all.extend_from_slice(&part);
        } else if length - most > MOST_WASTED {
            break;
        }
    }
    if length > most {
        let message = format!("the body is longer than the {most} bytes that are allowed");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_of_their_type_and_none_is_left_over() {
        let mut fields = Fields::parse(br#"{"a": 1, "b": null, "c": "x", "d": []}"#).unwrap();
        assert_eq!(fields.take::<usize>("a").unwrap(), Some(1));
        assert_eq!(fields.take::<usize>("b").unwrap(), None);
        let wrong = fields.take::<usize>("c").unwrap_err().json();
        assert_eq!(wrong["error"]["param"], "c");
        fields.only("d", |value| value.as_array().is_some_and(Vec::is_empty), "none").unwrap();
        fields.finish().unwrap();
        let mut fields = Fields::parse(br#"{"d": [1], "temprature": 1}"#).unwrap();
        assert!(fields.only("d", |_| false, "none").is_err());
        assert_eq!(fields.finish().unwrap_err().json()["error"]["param"], "temprature");
        for bad in [&b"[]"[..], b"{", b"\xff", b"", b"{\"a\": 1} x"] {
            assert_eq!(Fields::parse(bad).unwrap_err().status, StatusCode::BAD_REQUEST);
        }
        let deep = [b"{\"a\":".repeat(100_000)].concat();
        assert!(Fields::parse(&deep).is_err());
    }
}
