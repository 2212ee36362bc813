//! Models side by side over windows of a text.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{
    report::{Agreement, EvaluateConfig, EvaluationReport, Perplexity, PositionBucket, VariantReport},
    rows::{Closeness, Row, cosine, numbers},
};
use crate::{Decoder, DecoderCache, ModelError, PREFILL_PIECE, Reads};

/// Positions whose scores are held at once, for each model.
pub(super) const SLAB: usize = 128;

/// Parts a window is divided into for perplexity by position.
const POSITION_BUCKETS: usize = 8;

/// Checks, before anything runs, that a text of `length` tokens can be measured so.
///
/// # Errors
///
/// [`ModelError::Input`] if the text is shorter than one window, the window leaves nothing to measure or no window is
/// asked for; [`ModelError::TooLong`] if the window is longer than the learned positions.
pub fn check_windows(decoder: &Decoder, length: usize, config: EvaluateConfig) -> Result<(), ModelError> {
    let EvaluateConfig { window, windows, skip } = config;
    let problem = if window < 3 || window - 2 < skip {
        format!("a window of {window} tokens leaves none to measure after the first {skip}")
    } else if windows == 0 {
        "0 windows are asked for, at least 1 is needed".to_owned()
    } else if length < window {
        format!("the text has {length} tokens, one window needs {window}: take a longer text or a shorter window")
    } else {
        return decoder.check_length(window);
    };
    Err(ModelError::Input(problem))
}

/// Sums of negative log-likelihoods by position.
#[derive(Debug, Clone)]
struct Tally {
    nll: Vec<f64>,
    elapsed: Duration,
    cache_bytes: usize,
    reads: Reads,
}

/// Sums over compared positions.
#[derive(Debug, Clone, Default)]
struct Comparison {
    positions: usize,
    top: [f64; 3],
    kl: f64,
    cosine: f64,
}

/// What is compared: from position `skip` on, and in the last quarter.
#[derive(Debug, Clone, Default)]
struct Comparisons {
    later: Comparison,
    last_quarter: Comparison,
}

/// Scores of some tokens, `[tokens, vocab_size]`, what they say, and the states `[tokens, hidden_size]` they come from.
pub(super) struct Slab {
    scores: Vec<f32>,
    rows: Vec<Row>,
    states: Vec<f32>,
}

/// Runs `original` and every variant over windows of `tokens` and compares them. `each` hears after every window how
/// many of how many are done.
///
/// # Errors
///
/// [`ModelError::Input`] if the text is shorter than one window or the window than three tokens, and what
/// [`Decoder::hidden`] refuses.
pub fn evaluate(
    original: &Decoder,
    variants: &[(&str, &Decoder)],
    tokens: &[u32],
    config: EvaluateConfig,
    mut each: impl FnMut(usize, usize),
) -> Result<EvaluationReport, ModelError> {
    let EvaluateConfig { window, skip, .. } = config;
    for decoder in decoders(original, variants) {
        check_windows(decoder, tokens.len(), config)?;
    }
    let windows = (tokens.len() / window).min(config.windows);
    let last_quarter = last_quarter(window);
    let tally = Tally { nll: vec![0.0; window - 1], elapsed: Duration::ZERO, cache_bytes: 0, reads: Reads::default() };
    let mut tallies = vec![tally; variants.len() + 1];
    let mut comparisons = vec![Comparisons::default(); variants.len()];
    for (done, text) in tokens.chunks_exact(window).take(windows).enumerate() {
        let mut hidden = Vec::with_capacity(tallies.len());
        for (decoder, tally) in decoders(original, variants).zip(&mut tallies) {
            let start = Instant::now();
            let (states, cache) = read(decoder, text)?;
            hidden.push(states);
            decoder.device().sync().map_err(|error| ModelError::Input(format!("the device failed: {error:?}")))?;
            tally.elapsed += start.elapsed();
            tally.cache_bytes = tally.cache_bytes.max(cache.bytes());
            tally.reads += cache.reads();
        }
        for at in (0..window - 1).step_by(SLAB) {
            let count = SLAB.min(window - 1 - at);
            let mut reference: Option<Slab> = None;
            for (index, (decoder, tally)) in decoders(original, variants).zip(&mut tallies).enumerate() {
                let start = Instant::now();
                let states = hidden[index].clone().narrow(0, at, count);
                let (scores, states) = (numbers(decoder.logits(states.clone()))?, numbers(states)?);
                tally.elapsed += start.elapsed();
                let slab = Slab::new(scores, states, count);
                for (row, loss) in slab.losses(&text[at + 1..]).into_iter().enumerate() {
                    tally.nll[at + row] += loss;
                }
                let Some(reference) = &reference else {
                    reference = Some(slab);
                    continue;
                };
                let from = skip.min(last_quarter).saturating_sub(at).min(count);
                let comparison = &mut comparisons[index - 1];
                for (row, (closeness, cosine)) in (from..count).zip(reference.compare(&slab, from..count)) {
                    for (first, sums) in [(skip, &mut comparison.later), (last_quarter, &mut comparison.last_quarter)] {
                        if at + row >= first {
                            sums.add(closeness, cosine);
                        }
                    }
                }
            }
        }
        each(done + 1, windows);
    }
    let perplexity = |tally: &Tally| tally.perplexity(windows, skip, last_quarter);
    let reports =
        variants.iter().zip(&tallies[1..]).zip(&comparisons).map(|(((name, _), tally), comparison)| VariantReport {
            name: (*name).to_owned(),
            perplexity: perplexity(tally),
            agreement: comparison.later.agreement(),
            last_quarter: comparison.last_quarter.agreement(),
        });
    let variants = reports.collect();
    Ok(EvaluationReport { windows, window, skip, original: perplexity(&tallies[0]), variants })
}

fn decoders<'a>(original: &'a Decoder, variants: &'a [(&str, &Decoder)]) -> impl Iterator<Item = &'a Decoder> {
    std::iter::once(original).chain(variants.iter().map(|(_, decoder)| *decoder))
}

/// The first position of the last quarter of those that predict a token.
fn last_quarter(window: usize) -> usize {
    let predicted = window - 1;
    predicted - predicted.div_ceil(4)
}

/// Final hidden states of a whole text, `[tokens, hidden_size]`, read in pieces, and the cache behind it.
pub(super) fn read(decoder: &Decoder, text: &[u32]) -> Result<(Tensor<2>, DecoderCache), ModelError> {
    let mut cache = decoder.new_cache(&[text.len()])?;
    let pieces: Result<Vec<_>, _> =
        text.chunks(PREFILL_PIECE).map(|piece| decoder.hidden(&[piece.to_vec()], &mut cache)).collect();
    Ok((Tensor::cat(pieces?, 0), cache))
}

impl Slab {
    /// What `decoder` says behind `count` states.
    pub(super) fn of(decoder: &Decoder, states: Tensor<2>, count: usize) -> Result<Self, ModelError> {
        Ok(Self::new(numbers(decoder.logits(states.clone()))?, numbers(states)?, count))
    }

    fn new(scores: Vec<f32>, states: Vec<f32>, count: usize) -> Self {
        let rows = scores.par_chunks_exact(scores.len() / count).map(Row::new).collect();
        Self { scores, rows, states }
    }

    fn scores(&self, row: usize) -> &[f32] {
        let width = self.scores.len() / self.rows.len();
        &self.scores[row * width..(row + 1) * width]
    }

    fn states(&self, row: usize) -> &[f32] {
        let width = self.states.len() / self.rows.len();
        &self.states[row * width..(row + 1) * width]
    }

    /// Negative log-likelihoods of the tokens that follow.
    fn losses(&self, following: &[u32]) -> Vec<f64> {
        let rows = self.rows.iter().zip(following).enumerate();
        rows.map(|(at, (row, &token))| row.loss(self.scores(at), token)).collect()
    }

    /// Closeness and cosine of some rows of `variant`. Sums are left to the caller: their order must not depend on threads.
    pub(super) fn compare(&self, variant: &Self, rows: Range<usize>) -> Vec<(Closeness, f64)> {
        let compare = |row: usize| {
            let scores = (self.scores(row), variant.scores(row));
            let closeness = self.rows[row].compare(scores.0, &variant.rows[row], scores.1);
            (closeness, cosine(self.states(row), variant.states(row)))
        };
        rows.into_par_iter().map(compare).collect()
    }
}

impl Tally {
    fn perplexity(&self, windows: usize, skip: usize, last_quarter: usize) -> Perplexity {
        let over = |range: Range<usize>| {
            let tokens = (range.len() * windows) as f64;
            (self.nll[range].iter().sum::<f64>() / tokens).exp()
        };
        let predicted = self.nll.len();
        let border = |bucket: usize| bucket * predicted / POSITION_BUCKETS;
        let buckets = (0..POSITION_BUCKETS).map(|bucket| border(bucket)..border(bucket + 1));
        let by_position = buckets.filter(|range| !range.is_empty()).map(|range| PositionBucket {
            start: range.start,
            end: range.end,
            perplexity: over(range),
        });
        Perplexity {
            all: over(0..predicted),
            later: over(skip..predicted),
            last_quarter: over(last_quarter..predicted),
            by_position: by_position.collect(),
            seconds: self.elapsed.as_secs_f64(),
            cache_bytes: self.cache_bytes,
            keys_share: self.reads.keys_share(),
            summaries_share: self.reads.summaries_share(),
            capped_share: self.reads.capped_share(),
        }
    }
}

impl Comparison {
    fn add(&mut self, closeness: Closeness, cosine: f64) {
        self.positions += 1;
        for (sum, share) in self.top.iter_mut().zip(closeness.top) {
            *sum += share;
        }
        self.kl += closeness.kl;
        self.cosine += cosine;
    }

    fn agreement(&self) -> Agreement {
        let mean = |sum: f64| sum / self.positions.max(1) as f64;
        Agreement {
            top1: mean(self.top[0]),
            top5: mean(self.top[1]),
            top10: mean(self.top[2]),
            kl: mean(self.kl),
            cosine: mean(self.cosine),
        }
    }
}
