//! `GET /metrics`, in the text format of Prometheus.

use std::{collections::BTreeMap, fmt::Write, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::{Response, header},
    response::IntoResponse,
};

use super::App;
use crate::Counts;

pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let text = text(&app.engine.counts(), &app.answers());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// Every number with what it means.
fn text(counts: &Counts, answers: &BTreeMap<u16, u64>) -> String {
    let mut text = String::new();
    let mut head = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    let of = |label: &str, values: &[(&str, f64)]| -> Vec<(String, f64)> {
        values.iter().map(|(name, value)| (format!("{{{label}=\"{name}\"}}"), *value)).collect()
    };
    let codes = answers.iter().map(|(code, count)| (format!("{{code=\"{code}\"}}"), *count as f64));
    head("bsbr_http_responses_total", "counter", "Responses by status code.", &codes.collect::<Vec<_>>());
    head("bsbr_texts_waiting", "gauge", "Texts that wait for a place.", &one(counts.waiting as f64));
    head("bsbr_texts_running", "gauge", "Texts that are read or written.", &one(counts.running as f64));
    let ends = [("ended", counts.ended), ("cancelled", counts.cancelled), ("failed", counts.failed)];
    let ends = ends.map(|(name, count)| (name, count as f64));
    head("bsbr_texts_total", "counter", "Texts that left, by how.", &of("how", &ends));
    let prompt = [("read", counts.read_tokens as f64), ("known", counts.known_tokens as f64)];
    head("bsbr_prompt_tokens_total", "counter", "Tokens of prompts: read, or known already.", &of("how", &prompt));
    head("bsbr_new_tokens_total", "counter", "Tokens written.", &one(counts.new_tokens as f64));
    let bytes = [("running", counts.cache_bytes as f64), ("known", counts.known_bytes as f64)];
    let help = "Bytes of caches: of running texts, and kept for beginnings of others.";
    head("bsbr_cache_bytes", "gauge", help, &of("of", &bytes));
    head("bsbr_known_texts", "gauge", "Texts whose beginnings are kept.", &one(counts.known_texts as f64));
    head("bsbr_keys_read_total", "counter", "Keys read exactly.", &one(counts.keys_read as f64));
    head("bsbr_keys_total", "counter", "Keys that full attention would have read.", &one(counts.keys_all as f64));
    let share = if counts.keys_all > 0 { counts.keys_read as f64 / counts.keys_all as f64 } else { 0.0 };
    head("bsbr_keys_read_share", "gauge", "Share of the keys that were read exactly.", &one(share));
    head("bsbr_steps_total", "counter", "Steps of the model.", &one(counts.steps as f64));
    head("bsbr_step_seconds_total", "counter", "Time they took.", &one(counts.busy_micros as f64 / 1e6));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_comment_or_a_name_and_a_number() {
        let counts = Counts { keys_read: 1, keys_all: 4, ..Counts::default() };
        let text = text(&counts, &BTreeMap::from([(200, 3), (429, 1)]));
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("bsbr_") && value.parse::<f64>().is_ok(), "{line}");
        }
        assert!(text.contains("bsbr_keys_read_share 0.25\n"), "{text}");
        assert!(text.contains("bsbr_http_responses_total{code=\"429\"} 1\n"), "{text}");
    }
}
