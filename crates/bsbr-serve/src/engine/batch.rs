//! The texts that run together.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering,
    time::Instant,
};

use bsbr_model::{DecoderCache, ModelError};
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{
    Shared, Waiting,
    counts::Counters,
    known::{Known, common},
    request::Event,
    running::{Running, expected_length, numbers},
};

/// Running texts and their caches, and what is kept of those that ended.
pub(super) struct Batch<'a> {
    shared: &'a Shared,
    texts: Vec<Running>,
    /// One text for each of `texts`, in the same order.
    cache: DecoderCache,
    known: Known,
}

impl<'a> Batch<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, texts: Vec::new(), cache: shared.empty.clone(), known: Known::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Whether a text can begin.
    pub(super) fn has_room(&self, next: &Waiting) -> bool {
        self.is_empty()
            || (self.texts.len() < self.shared.config.max_texts
                && self.reserved().saturating_add(next.bytes) <= self.shared.config.cache_bytes)
    }

    /// Bytes that running texts may come to take.
    fn reserved(&self) -> usize {
        self.texts.iter().map(|text| text.bytes).sum()
    }

    /// Gives a text a place, behind what is known of its beginning.
    pub(super) fn begin(&mut self, next: Waiting) {
        let Waiting { request, sampler, events, bytes } = next;
        let expected = expected_length(&request);
        let known = if request.score_prompt { None } else { self.known_beginning(&request.prompt, expected) };
        let cache = match known {
            Some(mut cache) => {
                cache.mark(0);
                cache
            }
            None => match self.shared.decoder.new_cache(&[expected]) {
                Ok(cache) => cache,
                Err(error) => {
                    // Nobody has to listen.
                    let _ = events.send(Event::Failed(error.to_string()));
                    Counters::add(&self.shared.counters.failed, 1);
                    return;
                }
            },
        };
        self.texts.push(Running::new((request, sampler, events), bytes, &cache));
        self.cache.join(cache);
        self.shrink_known();
        self.publish();
    }

    /// The longest beginning that a running text or one that has ended has read.
    fn known_beginning(&mut self, prompt: &[u32], expected: usize) -> Option<DecoderCache> {
        let decoder = &self.shared.decoder;
        let of_running = |text: &Running| common(prompt, &text.request.prompt[..text.read]);
        let lengths = self.texts.iter().map(of_running).enumerate();
        let running = lengths.max_by_key(|&(_, length)| length).filter(|&(_, length)| length > 0);
        if let Some((at, length)) = running
            && length > self.known.longest(prompt)
            && let Some(cache) = decoder.begin_with(&self.cache, at, length, expected)
        {
            return Some(cache);
        }
        self.known.begin(decoder, prompt, expected).map(|(cache, _)| cache)
    }

    /// What is kept gives way to what runs.
    fn shrink_known(&mut self) {
        let left = self.shared.config.cache_bytes.saturating_sub(self.reserved());
        self.known.shrink_to(left);
    }

    /// A token for every text that is written, a piece for some of those that are read. Whatever goes wrong ends the texts
    /// of this step and nothing else.
    pub(super) fn step(&mut self) {
        self.dismiss();
        let start = Instant::now();
        let problem = match catch_unwind(AssertUnwindSafe(|| self.advance())) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                Some(format!("a step failed: {}", text.unwrap_or("no reason was given")))
            }
        };
        if let Some(problem) = problem {
            self.texts.iter_mut().for_each(|text| text.fail(&problem));
            Counters::add(&self.shared.counters.failed, self.texts.len() as u64);
            // What the caches hold is not known.
            self.texts.clear();
            self.cache = self.shared.empty.clone();
        }
        let counters = &self.shared.counters;
        Counters::add(&counters.steps, 1);
        Counters::add(&counters.busy_micros, start.elapsed().as_micros() as u64);
        self.dismiss();
    }

    fn advance(&mut self) -> Result<(), ModelError> {
        let (decoder, counters) = (&self.shared.decoder, &self.shared.counters);
        let mut left = self.shared.config.step_tokens;
        let mut first = true;
        let new = self.texts.iter().map(|text| {
            let new = text.next(&mut left, first);
            // One piece is read however long it is.
            first &= !text.is_reading() || new.is_empty();
            new
        });
        let new: Vec<Vec<u32>> = new.collect();
        if new.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let hidden = decoder.hidden(&new, &mut self.cache)?;
        let (mut at, mut ready, mut states) = (0, Vec::new(), Vec::new());
        for (index, (text, new)) in self.texts.iter_mut().zip(&new).enumerate().filter(|(_, (_, new))| !new.is_empty())
        {
            let rows = hidden.clone().narrow(0, at, new.len());
            at += new.len();
            if text.is_reading() {
                if text.read + new.len() == text.whole_pieces() {
                    // Where others may begin: states of recurrent layers cannot be had later.
                    self.cache.mark(index);
                }
                Counters::add(&counters.read_tokens, new.len() as u64);
            }
            if text.has_read(decoder, &rows, new.len())? {
                ready.push(index);
                states.push(rows.narrow(0, new.len() - 1, 1));
            }
        }
        if ready.is_empty() {
            return Ok(());
        }
        let scores = numbers(decoder.logits_each(Tensor::cat(states, 0)))?;
        let width = scores.len() / ready.len();
        self.texts.par_iter_mut().enumerate().for_each(|(index, text)| {
            let Ok(at) = ready.binary_search(&index) else { return };
            let before = text.written();
            if let Err(error) = text.choose(&scores[at * width..][..width]) {
                text.fail(&error.to_string());
            }
            Counters::add(&counters.new_tokens, (text.written() - before) as u64);
        });
        Ok(())
    }

    /// Lets those go that have ended or that nobody listens to, and keeps what they have read.
    fn dismiss(&mut self) {
        for at in (0..self.texts.len()).rev() {
            if !self.texts[at].is_over() {
                continue;
            }
            let (text, cache) = (self.texts.remove(at), self.cache.leave(at));
            let counters = &self.shared.counters;
            let reads = text.reads(&cache);
            Counters::add(&counters.keys_read, reads.keys);
            Counters::add(&counters.keys_all, reads.all);
            Counters::add(&counters.known_tokens, (text.read - text.own()) as u64);
            let outcome = match (text.has_failed(), text.is_gone()) {
                (true, _) => &counters.failed,
                (false, true) => &counters.cancelled,
                (false, false) => &counters.ended,
            };
            Counters::add(outcome, 1);
            self.known.keep(&self.shared.decoder, &text.request.prompt[..text.read], &cache, text.expected());
            self.shrink_known();
            // Whoever hears of the end and asks finds it counted.
            self.publish();
            text.tell_end(&cache, reads);
        }
        self.publish();
    }

    /// Tells whoever watches.
    fn publish(&self) {
        let counters = &self.shared.counters;
        counters.running.store(self.texts.len(), Ordering::Relaxed);
        counters.cache_bytes.store(self.cache.bytes(), Ordering::Relaxed);
        counters.known_bytes.store(self.known.bytes(), Ordering::Relaxed);
        counters.known_texts.store(self.known.len(), Ordering::Relaxed);
    }
}
