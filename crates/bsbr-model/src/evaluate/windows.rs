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
use crate::{Decoder, DecoderCache, ModelError, PREFILL_PIECE, Reads, ops::Packing};

/// Positions whose scores are held at once, for each model.
pub(super) const SLAB: usize = 128;

/// Tokens of the vocabulary whose scores are held at once: with those of a run of positions they stay in a cache.
const PART: usize = 4096;

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

/// What a model says of the tokens that follow some states.
pub(super) struct Said {
    /// A row to a state.
    pub(super) rows: Vec<Row>,
    /// How long its scores took.
    elapsed: Duration,
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
            let states: Vec<_> = hidden.iter().map(|states: &Tensor<2>| states.clone().narrow(0, at, count)).collect();
            let models: Vec<_> = decoders(original, variants).zip(states.iter().cloned()).collect();
            let said = said(&models, &text[at + 1..=at + count])?;
            for (said, tally) in said.iter().zip(&mut tallies) {
                tally.elapsed += said.elapsed;
                for (row, nll) in said.rows.iter().zip(&mut tally.nll[at..]) {
                    *nll += row.loss();
                }
            }
            let from = skip.min(last_quarter).saturating_sub(at).min(count);
            let states = states.into_iter().map(numbers).collect::<Result<Vec<_>, _>>()?;
            for (number, comparison) in comparisons.iter_mut().enumerate() {
                // Sums are made here: their order must not depend on threads.
                for (row, (closeness, cosine)) in (from..count).zip(compare(&said, &states, number, from..count)) {
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

/// What models say behind states of their own, `[tokens, hidden_size]`, of the tokens that follow each. All are compared with the
/// first: a row of it holds what sets the others apart from it.
///
/// The vocabulary comes in parts: scores of all of it, for so many tokens, would be the largest thing in memory.
pub(super) fn said(models: &[(&Decoder, Tensor<2>)], following: &[u32]) -> Result<Vec<Said>, ModelError> {
    let Some((first, _)) = models.first() else { return Ok(Vec::new()) };
    let vocabulary = first.config().decoder.vocab_size;
    let inputs = models.iter().map(|(decoder, states)| decoder.head_inputs(states.clone(), Packing::ByNumber));
    let inputs: Vec<_> = inputs.collect();
    let mut all: Vec<Said> = (0..models.len())
        .map(|model| {
            let variants = if model == 0 { models.len() - 1 } else { 0 };
            let rows = following.iter().map(|&token| Row::new(token, variants)).collect();
            Said { rows, elapsed: Duration::ZERO }
        })
        .collect();
    for start in (0..vocabulary).step_by(PART) {
        let part = start..vocabulary.min(start + PART);
        let mut scores = Vec::with_capacity(models.len());
        for (((decoder, _), inputs), said) in models.iter().zip(&inputs).zip(&mut all) {
            let begin = Instant::now();
            scores.push(numbers(decoder.scores(inputs.clone(), part.clone(), Packing::ByNumber))?);
            said.elapsed += begin.elapsed();
        }
        let of = |model: usize, row: usize| -> &[f32] { &scores[model][row * part.len()..(row + 1) * part.len()] };
        for (model, said) in all.iter_mut().enumerate() {
            let begin = Instant::now();
            let others = if model == 0 { 1..models.len() } else { 0..0 };
            said.rows.par_iter_mut().enumerate().for_each(|(at, row)| {
                let others: Vec<&[f32]> = others.clone().map(|other| of(other, at)).collect();
                row.push(of(model, at), &others);
            });
            said.elapsed += begin.elapsed();
        }
    }
    Ok(all)
}

/// Closeness and cosine of some rows of a variant, whose states and those of the original are `states`.
fn compare(said: &[Said], states: &[Vec<f32>], number: usize, rows: Range<usize>) -> Vec<(Closeness, f64)> {
    let (original, variant) = (&said[0], &said[number + 1]);
    let count = original.rows.len();
    let of = |model: usize, row: usize| {
        let width = states[model].len() / count;
        &states[model][row * width..(row + 1) * width]
    };
    let compare = |row: usize| {
        let closeness = original.rows[row].compare(number, &variant.rows[row]);
        (closeness, cosine(of(0, row), of(number + 1, row)))
    };
    rows.into_par_iter().map(compare).collect()
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
