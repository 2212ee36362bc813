//! OpenAI's API as it goes over the wire, asked by a client that knows nothing of it.

mod common;

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use bsbr_model::SamplingConfig;
use bsbr_serve::{EngineConfig, HttpConfig};
use common::{Running, answer, generated, heldout, model, request};
use serde_json::{Value, json};

fn text(choice: &Value) -> String {
    let of = |value: &Value| value.as_str().map(str::to_owned);
    of(&choice["text"])
        .or_else(|| of(&choice["message"]["content"]))
        .or_else(|| of(&choice["delta"]["content"]))
        .unwrap_or_default()
}

#[test]
fn a_chat_is_the_same_as_generate_whole_and_streamed() {
    let server = Running::usual();
    let (decoder, tokenizer) = model();
    let body = |stream: bool| {
        json!({
            "model": "builtin", "messages": [{ "role": "system", "content": "A tale." }, { "role": "user", "content": "And then?" }],
            "max_tokens": 40, "temperature": 0.8, "seed": 7, "stream": stream, "stream_options": { "include_usage": true },
        })
    };
    let prompt = tokenizer.encode_plain("system: A tale.\nuser: And then?\nassistant:").unwrap();
    let sampling = SamplingConfig { temperature: 0.8, seed: 7, ..Default::default() };
    let expected = tokenizer.decode(&generated(&decoder, &prompt, 40, sampling)).unwrap();
    let whole = server.post("/v1/chat/completions", &body(false));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(text(&whole["choices"][0]), expected);
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["usage"]["prompt_tokens"], prompt.len());
    assert!(whole["bsbr"]["cache_bytes"].as_u64().unwrap() > 0);
    let streamed = server.post("/v1/chat/completions", &body(true));
    assert!(streamed.headers.contains("text/event-stream"), "{}", streamed.headers);
    let events = streamed.events();
    assert!(events.len() > 10, "{} events", events.len());
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
    let all: String = events.iter().map(|event| text(&event["choices"][0])).collect();
    assert_eq!(all, expected);
    let reasons: Vec<&Value> =
        events.iter().map(|event| &event["choices"][0]["finish_reason"]).filter(|reason| !reason.is_null()).collect();
    assert_eq!(reasons, [&whole["choices"][0]["finish_reason"]]);
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], whole["usage"]["completion_tokens"]);
}

#[test]
fn completions_have_echo_logprobs_several_prompts_and_stops() {
    let server = Running::usual();
    let (decoder, tokenizer) = model();
    let prompt = "And the king said unto";
    let tokens = tokenizer.encode(prompt).unwrap();
    let free = generated(&decoder, &tokens, 30, SamplingConfig::default());
    let free = tokenizer.decode(&[tokens.clone(), free].concat()).unwrap();
    let free = free.strip_prefix(prompt).unwrap().to_owned();
    let ask = |more: Value| {
        let mut body = json!({ "model": "builtin", "prompt": prompt, "max_tokens": 30, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer
    };
    let plain = ask(json!({})).json();
    assert_eq!((text(&plain["choices"][0]), plain["object"].as_str()), (free.clone(), Some("text_completion")));
    let echoed =
        ask(json!({ "echo": true, "logprobs": 2, "prompt": [tokens.clone(), tokens.clone()], "max_tokens": 2 })).json();
    assert_eq!(echoed["choices"].as_array().unwrap().len(), 2);
    assert_eq!(echoed["usage"]["prompt_tokens"], 2 * tokens.len());
    for (index, choice) in echoed["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert!(text(choice).starts_with(prompt), "{choice}");
        let lists = &choice["logprobs"];
        let of = |name: &str| lists[name].as_array().unwrap().clone();
        assert_eq!(of("tokens").len(), tokens.len() + 2);
        assert!(of("token_logprobs")[0].is_null() && of("top_logprobs")[0].is_null());
        assert!(of("token_logprobs")[1..].iter().all(|value| value.as_f64().unwrap() <= 0.0));
        assert_eq!(of("tokens").iter().map(|token| token.as_str().unwrap()).collect::<String>(), text(choice));
        for (at, offset) in of("text_offset").iter().enumerate() {
            let before: String = of("tokens")[..at].iter().map(|token| token.as_str().unwrap().to_owned()).collect();
            assert_eq!(offset.as_u64().unwrap() as usize, before.chars().count());
        }
        // The token that was chosen is the best.
        let (new, best) = (&of("token_logprobs")[tokens.len()], &of("top_logprobs")[tokens.len()]);
        let highest = best.as_object().unwrap().values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert_eq!(new.as_f64().unwrap(), highest);
    }
    let scored = ask(json!({ "echo": true, "logprobs": 0, "max_tokens": 0 })).json();
    assert_eq!(text(&scored["choices"][0]), prompt);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let stop: String = free.chars().skip(5).take(3).collect();
    let end = free.find(&stop).unwrap();
    for stops in [json!(stop), json!(["never there", stop])] {
        let stopped = ask(json!({ "stop": stops })).json();
        assert_eq!(text(&stopped["choices"][0]), free[..end]);
        assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
        let streamed = ask(json!({ "stop": stops, "stream": true })).events();
        assert_eq!(streamed.iter().map(|event| text(&event["choices"][0])).collect::<String>(), free[..end]);
    }
    // The first of several continuations is the one of the seed.
    let several = ask(json!({ "n": 3, "temperature": 1.0, "seed": 4 })).json();
    let one = ask(json!({ "temperature": 1.0, "seed": 4 })).json();
    let next = ask(json!({ "temperature": 1.0, "seed": 5 })).json();
    assert_eq!(text(&several["choices"][0]), text(&one["choices"][0]));
    assert_eq!(text(&several["choices"][1]), text(&next["choices"][0]));
    let streamed = ask(json!({ "n": 3, "temperature": 1.0, "seed": 4, "stream": true, "logprobs": 1 })).events();
    for index in 0..3 {
        let own = streamed.iter().filter(|event| event["choices"][0]["index"] == index);
        assert_eq!(own.map(|event| text(&event["choices"][0])).collect::<String>(), text(&several["choices"][index]));
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "logprobs": true, "top_logprobs": 2, "max_tokens": 4, "temperature": 0 });
    let chat = server.post("/v1/chat/completions", &chat).json();
    let entries = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len() as u64, chat["usage"]["completion_tokens"].as_u64().unwrap());
    for entry in entries {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["logprob"], entry["top_logprobs"][0]["logprob"]);
    }
}

#[test]
fn what_is_wrong_is_told_in_the_form_of_the_api() {
    let server = Running::new(
        EngineConfig { max_tokens: Some(200), ..Default::default() },
        HttpConfig { body_bytes: 20_000, ..Default::default() },
    );
    let said = json!([{ "role": "user", "content": "x" }]);
    for (path, body, status, param) in [
        ("/v1/chat/completions", json!({}), 400, Some("messages")),
        ("/v1/chat/completions", json!({ "messages": [] }), 400, Some("messages")),
        ("/v1/chat/completions", json!({ "messages": "x" }), 400, Some("messages")),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            400,
            Some("messages"),
        ),
        ("/v1/chat/completions", json!({ "messages": said, "tools": [{}] }), 400, Some("tools")),
        (
            "/v1/chat/completions",
            json!({ "messages": said, "response_format": { "type": "json_object" } }),
            400,
            Some("response_format"),
        ),
        ("/v1/chat/completions", json!({ "messages": said, "temperature": -1 }), 400, Some("temperature")),
        ("/v1/chat/completions", json!({ "messages": said, "temperature": "hot" }), 400, Some("temperature")),
        ("/v1/chat/completions", json!({ "messages": said, "top_p": 0 }), 400, Some("top_p")),
        ("/v1/chat/completions", json!({ "messages": said, "n": 0 }), 400, Some("n")),
        ("/v1/chat/completions", json!({ "messages": said, "top_logprobs": 3 }), 400, Some("top_logprobs")),
        ("/v1/chat/completions", json!({ "messages": said, "presence_penalty": 3 }), 400, Some("presence_penalty")),
        ("/v1/chat/completions", json!({ "messages": said, "logit_bias": { "x": 1 } }), 400, Some("logit_bias")),
        ("/v1/chat/completions", json!({ "messages": said, "max_tokens": -1 }), 400, Some("max_tokens")),
        ("/v1/chat/completions", json!({ "messages": said, "temprature": 1 }), 400, Some("temprature")),
        ("/v1/chat/completions", json!({ "messages": said, "model": "gpt-4" }), 404, None),
        ("/v1/chat/completions", json!({ "messages": said, "max_tokens": 500 }), 413, None),
        ("/v1/completions", json!({}), 400, Some("prompt")),
        ("/v1/completions", json!({ "prompt": [] }), 400, Some("prompt")),
        ("/v1/completions", json!({ "prompt": [[]] }), 400, Some("prompt")),
        ("/v1/completions", json!({ "prompt": [99_999] }), 400, Some("prompt")),
        ("/v1/completions", json!({ "prompt": [-1] }), 400, Some("prompt")),
        ("/v1/completions", json!({ "prompt": "x", "suffix": "y" }), 400, Some("suffix")),
        ("/v1/completions", json!({ "prompt": "x", "best_of": 2 }), 400, Some("best_of")),
        ("/v1/completions", json!({ "prompt": "x", "logprobs": 50 }), 400, Some("logprobs")),
        ("/v1/completions", json!({ "prompt": "word ".repeat(1000) }), 413, None),
        ("/v1/completions", json!({ "prompt": "word ".repeat(10_000) }), 413, None),
        ("/v1/nothing", json!({}), 404, None),
        ("/health", json!({}), 405, None),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, status, "{path} {body:.300} {}", answer.body);
        let error = &answer.json()["error"];
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 10), "{error}");
        assert_eq!(error["param"].as_str(), param, "{path} {body:.300} {error}");
    }
    let json = [("content-type", "application/json")];
    let status = |bytes: &[u8]| server.ask(bytes).status;
    assert_eq!(status(&request("POST", "/v1/completions", &json, b"{\"prompt\": ")), 400);
    assert_eq!(status(&request("POST", "/v1/completions", &json, &[0xff; 100])), 400);
    assert_eq!(status(&request("POST", "/v1/completions", &[], b"{}")), 415);
    assert_eq!(status(&request("GET", "/v1/completions", &[], b"")), 405);
    let many: Vec<(String, String)> = (0..80).map(|at| (format!("x-{at}"), "y".to_owned())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(status(&request("GET", "/health", &many, b"")), 431);
    assert_eq!(status(&request("GET", "/health", &[("x", &"y".repeat(40_000))], b"")), 431);
    assert_eq!(status(b"\x16\x03\x01 what is this\r\n\r\n"), 400);
    assert_eq!(status(b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"), 403);
    assert_eq!(server.get("/health").json()["status"], "ok");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("bsbr_http_responses_total{code=\"413\"} 3\n"), "{metrics}");
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let server =
        Running::new(EngineConfig::default(), HttpConfig { api_key: Some("secret".into()), ..Default::default() });
    let status = |path: &str, key: &str| server.ask(&request("GET", path, &[("authorization", key)], b"")).status;
    assert_eq!(server.get("/v1/models").status, 401);
    for (key, expected) in
        [("Bearer secret", 200), ("bearer secret", 200), ("Bearer secre", 401), ("secret", 401), ("Basic secret", 401)]
    {
        assert_eq!(status("/v1/models", key), expected, "{key}");
        assert_eq!(status("/metrics", key), expected, "{key}");
    }
    assert_eq!((server.get("/").status, server.get("/health").status), (200, 200));
    let page = server.get("/");
    assert!(page.headers.contains("content-security-policy") && page.body.contains("<main"), "{}", page.headers);
    // One file: nothing is loaded from anywhere.
    for word in ["http://", "https://", "@import", "src="] {
        assert!(!page.body.contains(word), "{word}");
    }
}

#[test]
fn models_are_listed_by_their_name() {
    let server = Running::usual();
    let list = server.get("/v1/models").json();
    assert_eq!((list["object"].as_str(), list["data"][0]["id"].as_str()), (Some("list"), Some("builtin")));
    assert_eq!(server.get("/v1/models/builtin").json()["max_model_len"], 2048);
    assert_eq!(server.get("/v1/models/other").status, 404);
}

#[test]
fn a_text_ends_when_its_client_goes_away() {
    let server = Running::usual();
    let counts = |name: &str| {
        let text = server.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
    };
    let prompt: String = heldout().chars().take(300).collect();
    // A text may end by itself before the server hears that nobody waits for it: then once more.
    let cancelled = |stream: bool| {
        let before = counts("bsbr_texts_total{how=\"cancelled\"}");
        let body = json!({ "prompt": prompt, "max_tokens": 1800, "stream": stream, "temperature": 0, "logit_bias": { "0": -100 } });
        let mut connection = server.connect();
        connection
            .write_all(&request(
                "POST",
                "/v1/completions",
                &[("content-type", "application/json")],
                body.to_string().as_bytes(),
            ))
            .unwrap();
        if stream {
            assert!(connection.read(&mut [0; 1000]).unwrap() > 0);
        } else {
            let began = Instant::now();
            while counts("bsbr_texts_running") == 0.0 && began.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        drop(connection);
        let began = Instant::now();
        while counts("bsbr_texts_running") > 0.0 {
            assert!(began.elapsed() < Duration::from_secs(60), "stream: {stream}");
            std::thread::sleep(Duration::from_millis(5));
        }
        counts("bsbr_texts_total{how=\"cancelled\"}") > before
    };
    for stream in [true, false] {
        assert!((0..5).any(|_| cancelled(stream)), "stream: {stream}");
    }
}

#[test]
fn asked_to_stop_it_finishes_what_runs_and_takes_nothing_more() {
    let server = Running::usual();
    let body = json!({ "prompt": "And", "max_tokens": 400, "stream": true, "logit_bias": { "0": -100 } });
    let mut connection = server.connect();
    connection
        .write_all(&request(
            "POST",
            "/v1/completions",
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        ))
        .unwrap();
    let mut first = [0; 300];
    let read = connection.read(&mut first).unwrap();
    server.stop.stop();
    let mut rest = Vec::new();
    connection.read_to_end(&mut rest).unwrap();
    let all = [&first[..read], &rest].concat();
    assert!(String::from_utf8_lossy(&all).contains("[DONE]"));
    let address = server.address;
    server.wait();
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_slow_head_is_given_up_and_a_slow_body_too() {
    let server = Running::new(
        EngineConfig::default(),
        HttpConfig { patience: Duration::from_millis(300), ..Default::default() },
    );
    let mut head = server.connect();
    head.write_all(b"GET /health HTT").unwrap();
    let mut body = server.connect();
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{").unwrap();
    assert!(answer(&mut head).is_none_or(|answer| answer.status == 408));
    assert_eq!(answer(&mut body).unwrap().status, 408);
}
