//! The small model of the command line, a server of it, and a client that knows HTTP and nothing else.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::Duration,
};

use bsbr_attn::BlockAttentionConfig;
use bsbr_model::{
    ChatTemplate, Decoder, Device, GenerateConfig, Sampler, SamplingConfig, TextTokenizer, generate_behind,
};
use bsbr_serve::{Chat, EngineConfig, HttpConfig, Model, StopHandle, serve};
use serde_json::Value;

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr/builtin")
}

/// Text the model never saw.
pub fn heldout() -> String {
    std::fs::read_to_string(dir().join("heldout.txt")).unwrap()
}

/// The model as BSBR reads it, and its tokenizer.
pub fn model() -> (Decoder, TextTokenizer) {
    let (decoder, tokenizer) = bsbr_convert::load(&dir(), &Device::flex()).unwrap();
    (decoder.with_config(|config| config.attention = Some(BlockAttentionConfig::default())).unwrap(), tokenizer)
}

/// A tiny model without training, with recurrent layers.
pub fn recurrent() -> Decoder {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr-convert/tests/fixtures/qwen3_5_text");
    let mut source = bsbr_convert::ModelSource::open(&fixture).unwrap();
    let mut config = source.model_config().clone();
    config.attention = Some(BlockAttentionConfig::default());
    // Texts of any length.
    config.stop_tokens = vec![0];
    Decoder::load(config, &mut source, &Device::flex()).unwrap()
}

/// What `generate` continues a prompt with.
pub fn generated(decoder: &Decoder, prompt: &[u32], new: usize, sampling: SamplingConfig) -> Vec<u32> {
    let mut cache = decoder.new_cache(&[prompt.len() + new]).unwrap();
    let config = GenerateConfig { max_new_tokens: new, stop_tokens: decoder.config().stop_tokens.clone() };
    let mut sampler = Sampler::new(sampling).unwrap();
    generate_behind(decoder, &mut cache, prompt, &config, &mut sampler, |_| true).unwrap().tokens
}

/// A server that runs until it is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn new(engine: EngineConfig, http: HttpConfig) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (decoder, tokenizer) = model();
            let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
            let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
            let chat = Chat { template, variables: BTreeMap::new(), stop_tokens: vec![0] };
            let model = Model { name: "builtin".into(), decoder, tokenizer, chat: Some(chat) };
            let http = HttpConfig { address: "127.0.0.1:0".parse().unwrap(), ..http };
            serve(model, engine, http, |server| sender.send((server.address(), server.stop_handle())).unwrap())
                .unwrap();
        });
        let (address, stop) = receiver.recv().unwrap();
        Self { address, stop, thread: Some(thread) }
    }

    pub fn usual() -> Self {
        Self::new(EngineConfig::default(), HttpConfig::default())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask(&request("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes()))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask(&request("GET", path, &[], b""))
    }

    /// Sends bytes and reads one answer.
    pub fn ask(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        answer(&mut stream).expect("an answer")
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// Waits for the end.
    pub fn wait(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    [text.as_bytes(), body].concat()
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of server-sent events, without the mark of the end, which is there.
    pub fn events(&self) -> Vec<Value> {
        let data: Vec<&str> = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        let (last, data) = data.split_last().expect("events");
        assert_eq!(*last, "[DONE]");
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// Reads until the other end closes; `None` where that is before an answer.
pub fn answer(stream: &mut TcpStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    // An end in the middle of something is one too.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (headers, body) = text.split_once("\r\n\r\n")?;
    let status = headers.split(' ').nth(1)?.parse().ok()?;
    let chunked = headers.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { joined(body) } else { body.to_owned() };
    Some(Answer { status, headers: headers.to_owned(), body })
}

/// A body in chunks.
fn joined(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        body.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    body
}
