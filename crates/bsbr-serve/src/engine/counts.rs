//! What the engine has done and holds, for whoever watches it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Counters that the engine writes and others read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) running: AtomicUsize,
    pub(super) cache_bytes: AtomicUsize,
    pub(super) known_bytes: AtomicUsize,
    pub(super) known_texts: AtomicUsize,
    pub(super) ended: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) busy_micros: AtomicU64,
    pub(super) read_tokens: AtomicU64,
    pub(super) known_tokens: AtomicU64,
    pub(super) new_tokens: AtomicU64,
    pub(super) keys_read: AtomicU64,
    pub(super) keys_all: AtomicU64,
}

/// The state of an engine at a moment; totals are since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Texts that wait for a place.
    pub waiting: usize,
    /// Texts that are read and written.
    pub running: usize,
    /// Bytes of the caches of running texts.
    pub cache_bytes: usize,
    /// Bytes of the caches that are kept for beginnings.
    pub known_bytes: usize,
    /// How many these are.
    pub known_texts: usize,
    /// Texts that ended.
    pub ended: u64,
    /// Texts whose reader went away.
    pub cancelled: u64,
    /// Texts on which the model failed.
    pub failed: u64,
    /// Steps of the model.
    pub steps: u64,
    /// Microseconds they took.
    pub busy_micros: u64,
    /// Tokens of prompts that were read.
    pub read_tokens: u64,
    /// Tokens of prompts that were known.
    pub known_tokens: u64,
    /// New tokens.
    pub new_tokens: u64,
    /// Keys that were read exactly, in texts that have left.
    pub keys_read: u64,
    /// Keys that full attention would have read for them.
    pub keys_all: u64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Ordering::Relaxed);
    }

    pub(super) fn counts(&self, waiting: usize) -> Counts {
        let number = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            waiting,
            running: number(&self.running),
            cache_bytes: number(&self.cache_bytes),
            known_bytes: number(&self.known_bytes),
            known_texts: number(&self.known_texts),
            ended: total(&self.ended),
            cancelled: total(&self.cancelled),
            failed: total(&self.failed),
            steps: total(&self.steps),
            busy_micros: total(&self.busy_micros),
            read_tokens: total(&self.read_tokens),
            known_tokens: total(&self.known_tokens),
            new_tokens: total(&self.new_tokens),
            keys_read: total(&self.keys_read),
            keys_all: total(&self.keys_all),
        }
    }
}
