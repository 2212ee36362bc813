//! Bounds of a server.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// Bounds of the [engine](crate::Engine).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Most texts that are read and written at once.
    pub max_texts: usize,
    /// Most texts that wait for a place; more are refused.
    pub max_waiting: usize,
    /// Most tokens of a text, prompt and continuation together; the length the model was trained on where this is `None`.
    pub max_tokens: Option<usize>,
    /// Most bytes of caches, of running texts and of those kept for their beginnings. A text that would need more is refused,
    /// one that finds no room waits.
    pub cache_bytes: usize,
    /// About so many tokens of prompts are read between two new tokens of other texts; at least a
    /// [piece](bsbr_model::PREFILL_PIECE).
    pub step_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { max_texts: 32, max_waiting: 256, max_tokens: None, cache_bytes: 4 << 30, step_tokens: 512 }
    }
}

impl EngineConfig {
    /// Checks that something can run.
    ///
    /// # Errors
    ///
    /// [`ServeError::Config`](crate::ServeError::Config) naming the setting.
    pub fn validate(&self) -> Result<(), crate::ServeError> {
        let all = [
            ("max_texts", self.max_texts),
            ("max_waiting", self.max_waiting),
            ("max_tokens", self.max_tokens.unwrap_or(2).saturating_sub(1)),
            ("cache_bytes", self.cache_bytes),
        ];
        match all.into_iter().find(|(_, value)| *value == 0) {
            Some((setting, _)) => {
                let least = if setting == "max_tokens" { 2 } else { 1 };
                Err(crate::ServeError::Config { setting, problem: format!("is too small, expected at least {least}") })
            }
            None => Ok(()),
        }
    }
}

/// Bounds of the HTTP layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpConfig {
    /// What it listens on.
    pub address: SocketAddr,
    /// What a client has to send as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// Most bytes of a request's body.
    pub body_bytes: usize,
    /// Most bytes of a request's head.
    pub header_bytes: usize,
    /// Most headers of a request.
    pub headers: usize,
    /// Most connections at once; others wait to be accepted.
    pub connections: usize,
    /// Within which time the head of a request has to arrive, and its body once more.
    pub patience: Duration,
    /// How long running answers may go on once the server is asked to stop.
    pub stop_after: Duration,
    /// Tokens of an answer for which a request names no number.
    pub default_new_tokens: usize,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            api_key: None,
            body_bytes: 4 << 20,
            header_bytes: 32 << 10,
            headers: 64,
            connections: 1024,
            patience: Duration::from_secs(20),
            stop_after: Duration::from_secs(30),
            default_new_tokens: 1024,
        }
    }
}
