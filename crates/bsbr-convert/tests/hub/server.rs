//! A hub on this machine: the part of the protocol that fetching models uses, with faults on demand.
//!
//! Small files come from the hub itself, large ones from a second host, the content network, as on the real one.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use sha2::{Digest, Sha256};

/// The commit of every model that has only one.
pub const COMMIT: &str = "607a30d783dfa663caf39e06633721c8d4cfcd7e";
/// The only token that is worth something.
pub const TOKEN: &str = "hf_aSecretThatNobodyMaySee";

pub type Files = BTreeMap<String, Vec<u8>>;

/// What goes wrong with one answer.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status and these headers.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The connection ends before anything is said.
    Silence,
    /// `Range` is not understood.
    Whole,
    /// Another part than the one asked for.
    OtherPart,
    /// Other bytes.
    Body(Vec<u8>),
    /// Other headers in the place of those of the same name.
    Headers(Vec<(&'static str, String)>),
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Whether it was the hub, not the content network, that was asked.
    pub hub: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

#[derive(Default)]
pub struct State {
    /// Repository, commit, files.
    pub models: BTreeMap<String, BTreeMap<String, Files>>,
    /// Branches and tags, of all repositories alike.
    pub refs: BTreeMap<String, String>,
    /// Repositories that want a token.
    pub gated: Vec<String>,
    /// A part of a method and path, and what goes wrong; used up from the front.
    pub faults: Vec<(&'static str, Fault)>,
    pub seen: Vec<Seen>,
    content: String,
}

/// The server.
#[derive(Clone)]
pub struct Hub {
    /// What belongs into `HF_ENDPOINT`.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

/// Whether a file is large: those are named by their SHA-256 and come from the content network.
fn is_large(name: &str) -> bool {
    [".safetensors", ".bin", ".gguf"].iter().any(|end| name.ends_with(end))
}

pub fn etag(name: &str, bytes: &[u8]) -> String {
    let sha256: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    // Git's name for a content has 40 digits too; what they are does not matter here.
    if is_large(name) { sha256 } else { sha256[..40].to_owned() }
}

/// The files of a directory.
pub fn files_of(dir: &Path) -> Files {
    let entries = std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
    let file = |path: &Path| {
        let name = path.file_name().expect("a name").to_str().expect("plain names").to_owned();
        (name, std::fs::read(path).expect("a file"))
    };
    entries.filter(|path| path.is_file()).map(|path| file(&path)).collect()
}

impl Hub {
    pub fn start() -> Self {
        Self::start_with("http", |stream| stream)
    }

    /// With a layer around every connection.
    pub fn start_with<S: Read + Write>(scheme: &str, layer: impl Fn(TcpStream) -> S + Clone + Send + 'static) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let mut addresses = [true, false].map(|hub| {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = format!("{scheme}://127.0.0.1:{}", listener.local_addr().expect("an address").port());
            let (state, layer) = (state.clone(), layer.clone());
            std::thread::spawn(move || {
                for connection in listener.incoming().flatten() {
                    let (state, layer) = (state.clone(), layer.clone());
                    std::thread::spawn(move || {
                        let closing = connection.try_clone();
                        answer(&mut layer(connection), &state, hub);
                        let _ = closing.map(|connection| connection.shutdown(Shutdown::Both));
                    });
                }
            });
            address
        });
        state.lock().expect("sound").content = std::mem::take(&mut addresses[1]);
        Self { endpoint: std::mem::take(&mut addresses[0]), state }
    }

    /// A hub with one model.
    pub fn with(repository: &str, files: Files) -> Self {
        let hub = Self::start();
        hub.publish(repository, COMMIT, files);
        hub
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("sound")
    }

    /// Adds a commit, which `main` now is.
    pub fn publish(&self, repository: &str, commit: &str, files: Files) {
        let mut state = self.state();
        state.models.entry(repository.to_owned()).or_default().insert(commit.to_owned(), files);
        state.refs.insert("main".to_owned(), commit.to_owned());
    }

    /// The next request whose method and path hold `part` goes wrong.
    pub fn fails(&self, part: &'static str, fault: Fault) {
        self.state().faults.push((part, fault));
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }
}

/// An answer before it is sent.
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn refusal(status: u16, code: &str) -> Self {
        Self { status, headers: vec![("X-Error-Code", code.to_owned())], body: code.as_bytes().to_vec() }
    }

    fn set(&mut self, headers: Vec<(&'static str, String)>) {
        self.headers.retain(|(name, _)| !headers.iter().any(|(new, _)| new == name));
        self.headers.extend(headers);
    }
}

fn answer(stream: &mut (impl Read + Write), state: &Mutex<State>, hub: bool) {
    let Some(request) = read_request(stream, hub) else { return };
    let (reply, fault) = {
        let mut state = state.lock().expect("sound");
        state.seen.push(request.clone());
        let line = format!("{} {}", request.method, request.path);
        let at = state.faults.iter().position(|(part, _)| line.contains(part));
        let fault = at.map(|at| state.faults.remove(at).1);
        (if hub { from_hub(&state, &request) } else { from_content(&state, &request) }, fault)
    };
    let mut reply = reply;
    let mut range = request.range.clone();
    let mut cut = None;
    match fault {
        Some(Fault::Silence) => return,
        Some(Fault::Status(status, headers)) => {
            reply = Reply { status, headers, body: b"no".to_vec() };
        }
        Some(Fault::Cut(bytes)) => cut = Some(bytes),
        Some(Fault::Whole) => range = None,
        Some(Fault::OtherPart) => range = Some("bytes=1-".to_owned()),
        Some(Fault::Body(bytes)) => reply.body = bytes,
        Some(Fault::Headers(headers)) => reply.set(headers),
        None => {}
    }
    if let (200, Some(range)) = (reply.status, range) {
        take_range(&mut reply, &range);
    }
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| *name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let body = if request.method == "HEAD" {
        &[]
    } else {
        &reply.body[..cut.unwrap_or(reply.body.len()).min(reply.body.len())]
    };
    // That the other side went away is for the test to notice.
    let _ = stream.write_all(&[head.as_bytes(), b"\r\n", body].concat()).and_then(|()| stream.flush());
}

fn take_range(reply: &mut Reply, range: &str) {
    let start = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
    let start: usize = start.expect("an open range").parse().expect("a number");
    let size = reply.body.len();
    if start >= size {
        *reply = Reply::refusal(416, "RangeNotSatisfiable");
        return;
    }
    reply.status = 206;
    reply.headers.push(("Content-Range", format!("bytes {start}-{}/{size}", size - 1)));
    reply.body.drain(..start);
}

fn read_request(stream: &mut impl Read, hub: bool) -> Option<Seen> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("ASCII");
    let mut lines = head.lines();
    let mut first = lines.next().expect("a request line").split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let mut seen = Seen { hub, method, path, range: None, token: None };
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        match name.to_lowercase().as_str() {
            "range" => seen.range = Some(value.to_owned()),
            "authorization" => seen.token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    Some(seen)
}

fn from_hub(state: &State, request: &Seen) -> Reply {
    let path = unescaped(&request.path);
    // Some hubs live below a path.
    let path = path.strip_prefix("/mirror").unwrap_or(&path);
    let (listing, parts) = match path.strip_prefix("/api/models/") {
        Some(path) => (true, path.split_once("/revision/")),
        None => (false, path[1..].split_once("/resolve/")),
    };
    let Some((repository, rest)) = parts else { return Reply::refusal(404, "NotFound") };
    let Some(commits) = state.models.get(repository) else { return Reply::refusal(404, "RepoNotFound") };
    if state.gated.iter().any(|gated| gated == repository) && request.token.as_deref() != Some(TOKEN) {
        return Reply::refusal(if request.token.is_some() { 403 } else { 401 }, "GatedRepo");
    }
    // The revision of a listing may hold slashes, that of a file is a commit here.
    let (revision, file) = if listing { (rest, "") } else { rest.split_once('/').expect("a file") };
    let commit = state.refs.get(revision).map_or(revision, String::as_str);
    let Some(files) = commits.get(commit) else { return Reply::refusal(404, "RevisionNotFound") };
    if listing {
        let names: Vec<String> = files.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).collect();
        let body = format!(r#"{{"id":"{repository}","sha":"{commit}","siblings":[{}]}}"#, names.join(","));
        return Reply {
            status: 200,
            headers: vec![("Content-Type", "application/json".to_owned())],
            body: body.into(),
        };
    }
    let Some(content) = files.get(file) else { return Reply::refusal(404, "EntryNotFound") };
    let etag = etag(file, content);
    let mut headers = vec![("X-Repo-Commit", commit.to_owned())];
    if !is_large(file) {
        headers.push(("ETag", format!("W/\"{etag}\"")));
        return Reply { status: 200, headers, body: content.clone() };
    }
    headers.push(("X-Linked-Etag", format!("\"{etag}\"")));
    headers.push(("X-Linked-Size", content.len().to_string()));
    headers.push(("ETag", "\"of the redirect\"".to_owned()));
    headers.push(("Location", format!("{}/{etag}?signature=secret", state.content)));
    Reply { status: 302, headers, body: b"elsewhere".to_vec() }
}

fn from_content(state: &State, request: &Seen) -> Reply {
    let wanted = request.path[1..].split('?').next().expect("a path");
    let all = state.models.values().flat_map(BTreeMap::values).flatten();
    match all.into_iter().find(|(name, content)| etag(name, content) == wanted) {
        Some((_, content)) => {
            Reply { status: 200, headers: vec![("ETag", "\"of another kind\"".to_owned())], body: content.clone() }
        }
        None => Reply::refusal(404, "NoSuchKey"),
    }
}

fn unescaped(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits: Vec<u8> = rest.by_ref().take(2).collect();
            let digits = std::str::from_utf8(&digits).expect("ASCII");
            bytes.push(u8::from_str_radix(digits, 16).expect("two digits"));
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).expect("UTF-8")
}
