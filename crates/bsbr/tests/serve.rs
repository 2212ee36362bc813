//! `serve` as a process: it says where it is, answers as `generate` does, and ends when asked.
#![cfg(all(feature = "serve", unix))]

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::{Place, bsbr, run};
use serde_json::{Value, json};

const PROMPT: &str = "And the king said unto";

/// A server that is killed when it is dropped.
struct Served {
    child: Child,
    address: String,
}

impl Served {
    fn new(flags: &[&str]) -> Self {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("bsbr"));
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(flags).env_remove("BSBR_API_KEY");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let address = line.trim().strip_prefix("http://").expect("an address").to_owned();
        Self { child, address }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
        let head = "host: localhost\r\nconnection: close\r\ncontent-type: application/json";
        write!(stream, "{method} {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            .expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        (head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status"), body.to_owned())
    }

    fn text(&self) -> String {
        let body = json!({ "prompt": PROMPT, "max_tokens": 24, "temperature": 0.7, "seed": 5 });
        let (status, answer) = self.ask("POST", "/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["choices"][0]["text"].as_str().expect("a text").to_owned()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill").success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn generated(flags: &[&str]) -> String {
    let run =
        run(bsbr().args(["generate", "-n", "24", "-p", PROMPT, "--temperature", "0.7", "--seed", "5"]).args(flags));
    assert_eq!(run.code, 0, "{}", run.stderr);
    run.stdout.strip_suffix('\n').expect("a line").to_owned()
}

#[test]
fn it_answers_as_generate_does_and_ends_when_asked() {
    let mut served = Served::new(&["--preset", "fast", "--name", "small"]);
    assert_eq!(served.text(), generated(&["--preset", "fast"]));
    let (status, models) = served.ask("GET", "/v1/models", "");
    assert_eq!(status, 200);
    assert!(models.contains("\"id\":\"small\""), "{models}");
    // A model that knows no chats.
    let (status, refused) =
        served.ask("POST", "/v1/chat/completions", r#"{"messages": [{"role": "user", "content": "x"}]}"#);
    assert!(status == 400 && refused.contains("no_chat_template"), "{refused}");
    assert!(served.ask("GET", "/", "").1.contains("<title>"));
    served.signal("TERM");
    assert!(served.child.wait().expect("an end").success());
    let mut notes = String::new();
    served.child.stderr.take().expect("a pipe").read_to_string(&mut notes).expect("text");
    assert!(notes.contains("as `small`, up to 2048 tokens") && notes.contains("stopping"), "{notes}");
}

#[test]
fn killed_and_started_again_it_needs_nothing() {
    let expected = generated(&[]);
    for _ in 0..2 {
        let mut served = Served::new(&[]);
        assert_eq!(served.text(), expected);
        served.signal("KILL");
        assert!(!served.child.wait().expect("an end").success());
    }
}

#[test]
fn what_cannot_be_served_is_refused_before_the_model_is_read() {
    let place = Place::empty();
    place.write("empty.txt", "\n");
    place.refused("serve --api-key-file empty.txt", 2, &["API key", "empty.txt", "is empty"]);
    place.refused("serve --api-key-file none.txt", 2, &["cannot read none.txt"]);
    place.refused("serve --max-texts 0", 2, &["max_texts"]);
    place.refused("serve --listen nowhere", 2, &["nowhere"]);
    let served = Served::new(&[]);
    place.refused(&format!("serve -q --listen {}", served.address), 2, &["cannot listen on", "--listen"]);
}
