//! What stands before every request: the key, the name the server was called by, and a count of answers.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError},
};

use axum::{
    body::Body,
    extract::State,
    http::{Request, Response, StatusCode, header},
    middleware::Next,
};
use sha2::{Digest, Sha256};

use super::{App, error::ApiError};

/// SHA-256 of a key: comparing digests takes as long for a key that is nearly right as for any other.
pub(super) fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Lets those in who have the key.
pub(super) async fn key(
    State(app): State<Arc<App>>,
    request: Request<Body>,
    next: Next,
) -> Result<Response<Body>, ApiError> {
    if let Some(expected) = app.key {
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given =
            given.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        if given.map(|(_, key)| digest(key.trim())) != Some(expected) {
            let message = "this server needs its API key, as the header Authorization: Bearer KEY";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message));
        }
    }
    Ok(next.run(request).await)
}

/// Refuses heads that are too long: how much is read at once may be more than a connection would wait for.
pub(super) async fn head(
    State(app): State<Arc<App>>,
    request: Request<Body>,
    next: Next,
) -> Result<Response<Body>, ApiError> {
    let headers: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let length = headers + request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if length > app.config.header_bytes {
        let message =
            format!("the head of the request has {length} bytes, at most {} are allowed", app.config.header_bytes);
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message));
    }
    Ok(next.run(request).await)
}

/// A server for this machine alone answers to no name of elsewhere: a page in a browser could otherwise give its own name this
/// machine's address, and ask.
pub(super) async fn host(
    State(app): State<Arc<App>>,
    request: Request<Body>,
    next: Next,
) -> Result<Response<Body>, ApiError> {
    let host = request.headers().get(header::HOST).and_then(|value| value.to_str().ok());
    let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
    if app.config.address.ip().is_loopback() && app.key.is_none() && !host.is_none_or(is_local) {
        let message = "this server answers to localhost and to addresses alone, not to names of elsewhere";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message));
    }
    Ok(next.run(request).await)
}

/// Whether a host, with its port or without, can be no name of elsewhere.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.to_ascii_lowercase();
    name.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
}

/// Counts answers by their status.
pub(super) async fn count(State(app): State<Arc<App>>, request: Request<Body>, next: Next) -> Response<Body> {
    let response = next.run(request).await;
    let mut answers = app.answers.lock().unwrap_or_else(PoisonError::into_inner);
    *answers.entry(response.status().as_u16()).or_default() += 1;
    drop(answers);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_elsewhere_are_told_from_this_machine() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "a.localhost", "10.0.0.7"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["example.com", "localhost.example.com:80", "127.0.0.1.example.com", ""] {
            assert!(!is_local(host), "{host}");
        }
    }
}
