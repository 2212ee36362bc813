//! Printing: results to standard output, everything else to standard error.

use std::{
    io::{self, IsTerminal, Write},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

/// Writes a result and a line end.
///
/// # Errors
///
/// If it cannot be written.
pub fn result(text: &str) -> Result<()> {
    fragment(&format!("{text}\n"))
}

/// Writes part of a line of the result, at once.
pub(crate) fn fragment(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// How much is told beside results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Errors alone.
    Quiet,
    /// Notes, and progress on a terminal.
    Normal,
    /// Details, and progress anywhere.
    Verbose,
}

static LEVEL: OnceLock<Level> = OnceLock::new();

pub(crate) fn set_level(level: Level) {
    // Once for each process.
    let _ = LEVEL.set(level);
}

fn level() -> Level {
    LEVEL.get().copied().unwrap_or(Level::Normal)
}

/// Writes a line for the person who watches, whatever is told otherwise. That nobody does is no error.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes a line for the person who watches, unless nothing was to be told.
pub fn note(text: &str) {
    if level() >= Level::Normal {
        say(text);
    }
}

/// Writes a line for the person who wants to know all.
pub(crate) fn detail(text: &str) {
    if level() == Level::Verbose {
        say(text);
    }
}

/// Whether the reader of the results went away.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe))
}

/// A Markdown table; every column but the first is aligned to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header.to_vec());
    for row in rows {
        table.add_row(row.iter().enumerate().map(|(column, text)| {
            let alignment = if column == 0 { CellAlignment::Left } else { CellAlignment::Right };
            Cell::new(text).set_alignment(alignment)
        }));
    }
    table.to_string()
}

/// `12345678` as `12,345,678`.
pub fn grouped(number: impl TryInto<u64>) -> String {
    let digits = number.try_into().unwrap_or_default().to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the unit that suits them.
pub fn bytes(number: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (number as f64, 0);
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{number} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// Progress on standard error, shown only once something takes longer than two seconds: a bar on a terminal, lines elsewhere if all
/// is to be told.
pub(crate) struct Progress {
    started: Instant,
    label: &'static str,
    bar: Option<ProgressBar>,
    told: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(label: &'static str) -> Self {
        Self { started: Instant::now(), label, bar: None, told: None }
    }

    /// `done` of `total` are done.
    pub(crate) fn set(&mut self, done: u64, total: u64) {
        let often = Duration::from_secs(2);
        if level() == Level::Quiet || self.started.elapsed() <= often {
            return;
        }
        if !io::stderr().is_terminal() {
            if level() == Level::Verbose && self.told.is_none_or(|told| told.elapsed() > often) {
                say(&format!("{}: {done} of {total}", self.label));
                self.told = Some(Instant::now());
            }
            return;
        }
        if self.bar.is_none() {
            let bar = ProgressBar::new(total);
            if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {percent}% {elapsed}, {eta} left") {
                bar.set_style(style);
            }
            bar.set_message(self.label);
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
