//! Many clients at once: questions of mixed lengths, some broken off, some that are rubbish.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// What clients do.
#[derive(Debug, Clone)]
pub struct Load {
    /// How many ask at once, each one question after the other.
    pub clients: usize,
    /// For how long they begin new ones.
    pub time: Duration,
    /// A text to cut questions from.
    pub text: String,
    /// Characters of a question: from the first to the second, short ones as often as long ones by their logarithm.
    pub characters: (usize, usize),
    /// New tokens of an answer, likewise but evenly.
    pub new_tokens: (usize, usize),
    /// One of so many questions is broken off.
    pub broken: u64,
    /// One of so many is rubbish.
    pub rubbish: u64,
    /// Start of the random numbers.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Answers whose stream came to no end.
    pub cut: u64,
    /// Questions that were broken off.
    pub broken: u64,
    /// Pieces of text that came, each a token or more.
    pub pieces: u64,
    /// Time from a question to the first piece of its answer, in seconds, ascending.
    pub first: Vec<f64>,
    /// Time all of it took.
    pub seconds: f64,
}

impl Outcome {
    /// Pieces of text a second.
    pub fn rate(&self) -> f64 {
        self.pieces as f64 / self.seconds.max(1e-9)
    }

    /// Answers with this status or one of its hundred.
    pub fn of_hundred(&self, hundred: u16) -> u64 {
        self.statuses.iter().filter(|(status, _)| *status / 100 == hundred).map(|(_, count)| count).sum()
    }
}

/// Splitmix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() % most.max(1) as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Asks the server at `address`.
pub fn run(address: SocketAddr, load: &Load) -> Outcome {
    let start = Instant::now();
    let clients: Vec<Outcome> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..load.clients).map(|at| scope.spawn(move || client(address, load, at as u64))).collect();
        all.into_iter().map(|client| client.join().unwrap_or_default()).collect()
    });
    let mut sum = Outcome { seconds: start.elapsed().as_secs_f64(), ..Outcome::default() };
    for client in clients {
        for (status, count) in client.statuses {
            *sum.statuses.entry(status).or_default() += count;
        }
        sum.cut += client.cut;
        sum.broken += client.broken;
        sum.pieces += client.pieces;
        sum.first.extend(client.first);
    }
    sum.first.sort_by(f64::total_cmp);
    sum
}

fn client(address: SocketAddr, load: &Load, at: u64) -> Outcome {
    let mut numbers = Numbers(load.seed.wrapping_mul(1 << 20).wrapping_add(at));
    let (mut outcome, start) = (Outcome::default(), Instant::now());
    while start.elapsed() < load.time {
        // An answer that does not come is counted, or the server is gone and everything after it fails too.
        if ask(address, load, &mut numbers, &mut outcome).is_err() {
            *outcome.statuses.entry(0).or_default() += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    outcome
}

fn ask(address: SocketAddr, load: &Load, numbers: &mut Numbers, outcome: &mut Outcome) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    let began = Instant::now();
    let rubbish = load.rubbish > 0 && numbers.next().is_multiple_of(load.rubbish);
    let broken = load.broken > 0 && numbers.next().is_multiple_of(load.broken);
    let message = if rubbish { nonsense(numbers) } else { question(load, numbers) };
    stream.write_all(&message)?;
    // Broken off before the answer begins, or after some of it.
    let most = if broken { numbers.below(4000) } else { usize::MAX };
    let (mut bytes, mut buffer, mut seen) = (Vec::new(), [0; 4096], 0);
    if broken && most < 500 {
        std::thread::sleep(Duration::from_millis(most as u64));
        outcome.broken += 1;
        return Ok(());
    }
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..read]);
        let pieces = pieces(&bytes);
        if pieces > 0 && seen == 0 {
            outcome.first.push(began.elapsed().as_secs_f64());
        }
        outcome.pieces += (pieces - seen) as u64;
        seen = pieces;
        if bytes.len() > most {
            outcome.broken += 1;
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    *outcome.statuses.entry(status).or_default() += 1;
    outcome.cut += u64::from(status == 200 && !text.contains("[DONE]"));
    if status == 429 {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Pieces of text in what came of a stream.
fn pieces(bytes: &[u8]) -> usize {
    let mark = b"\"finish_reason\":null";
    bytes.windows(mark.len()).filter(|window| window == mark).count()
}

fn question(load: &Load, numbers: &mut Numbers) -> Vec<u8> {
    let (least, most) = load.characters;
    let length = (least as f64 * (most as f64 / least as f64).powf(numbers.unit())) as usize;
    let start = numbers.below(load.text.len().saturating_sub(length));
    let start = load.text.floor_char_boundary(start);
    let end = load.text.floor_char_boundary((start + length).min(load.text.len()));
    let (least, most) = load.new_tokens;
    let body = serde_json::json!({
        "prompt": &load.text[start..end], "max_tokens": least + numbers.below(most - least + 1), "stream": true,
        "temperature": 0.8, "seed": (numbers.next() >> 1) as i64,
    });
    post("/v1/completions", "application/json", body.to_string().as_bytes())
}

fn nonsense(numbers: &mut Numbers) -> Vec<u8> {
    let random: Vec<u8> = (0..300).map(|_| numbers.next() as u8).collect();
    match numbers.below(7) {
        0 => [random.as_slice(), b"\r\n\r\n"].concat(),
        1 => post("/v1/completions", "application/json", &random),
        2 => post("/v1/completions", "application/json", b"{\"prompt\": [1, 2, 99999999]}"),
        3 => post("/v1/completions", "application/json", b"{\"prompt\": \"x\", \"max_tokens\": 999999999999}"),
        4 => post("/v1/chat/completions", "application/json", "{\"messages\":".repeat(2000).as_bytes()),
        5 => post("/v1/../../etc/passwd", "text/plain", b"x"),
        _ => post("/v1/completions", "application/json", &vec![b' '; 5 << 20]),
    }
}

fn post(path: &str, kind: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}
