//! Puts load on a running server and tells what came of it.
//!
//! `cargo run --release --example load -- 127.0.0.1:8080 64 600 TEXT [PID]`: clients, seconds, a text file to cut questions
//! from, and the process whose memory is watched (on Linux).

#[allow(unreachable_pub)]
mod clients;

use std::{
    error::Error,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use clients::{Load, run};

#[allow(clippy::print_stdout)]
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, clients, seconds, text, process @ ..] = arguments.as_slice() else {
        return Err("expected: ADDRESS:PORT CLIENTS SECONDS TEXT-FILE [PID]".into());
    };
    let load = Load {
        clients: clients.parse()?,
        time: Duration::from_secs(seconds.parse()?),
        text: std::fs::read_to_string(text)?,
        characters: (40, 30_000),
        new_tokens: (32, 256),
        broken: 10,
        rubbish: 20,
        seed: 1,
    };
    let address = address.parse()?;
    let done = AtomicBool::new(false);
    let (outcome, memory) = std::thread::scope(|scope| {
        let watched = scope.spawn(|| memory(process.first(), &done));
        let outcome = run(address, &load);
        done.store(true, Ordering::Relaxed);
        (outcome, watched.join().unwrap_or_default())
    });
    let at = |share: f64| outcome.first.get((share * outcome.first.len() as f64) as usize).copied().unwrap_or_default();
    println!("{} clients, {:.0} s, answers by status (0: none) {:?}", load.clients, outcome.seconds, outcome.statuses);
    println!("{} broken off, {} cut, {} server errors", outcome.broken, outcome.cut, outcome.of_hundred(5));
    println!(
        "{} pieces of text, {:.1}/s; first piece after {:.2} s (median), {:.2} s (nine of ten)",
        outcome.pieces,
        outcome.rate(),
        at(0.5),
        at(0.9)
    );
    if !memory.is_empty() {
        let of = |from: usize, to: usize| {
            let part = &memory[from * memory.len() / 10..(to * memory.len() / 10).max(1)];
            part.iter().sum::<f64>() / part.len().max(1) as f64
        };
        let tenths: Vec<String> = (0..10).map(|at| format!("{:.0}", of(at, at + 1))).collect();
        println!("resident memory by tenths of the time, MB: {}", tenths.join(" "));
    }
    Ok(())
}

/// Resident memory of a process, in megabytes, twice a second.
fn memory(process: Option<&String>, done: &AtomicBool) -> Vec<f64> {
    let Some(process) = process else { return Vec::new() };
    let (mut found, mut next) = (Vec::new(), Instant::now());
    while !done.load(Ordering::Relaxed) {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        found.extend(line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).map(|kb| kb / 1e3));
        next += Duration::from_millis(500);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    found
}
