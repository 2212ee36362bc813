//! What a change of attention costs: perplexity by position, and agreement with the original, token by token.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Decoder, ModelError, PREFILL_PIECE};

/// Positions whose scores are held at once, for each model.
const SLAB: usize = 128;

/// Parts a window is divided into for perplexity by position.
const POSITION_BUCKETS: usize = 8;

/// On what to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluateConfig {
    /// Tokens of a window; windows follow each other through the text.
    pub window: usize,
    /// Most windows to read.
    pub windows: usize,
    /// Positions of a window left out of the `later` perplexity and of agreement: where every kind of attention still
    /// reads everything, nothing can differ.
    pub skip: usize,
}

/// Perplexity of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Over every predicted token.
    pub all: f64,
    /// Over tokens after the first `skip` of each window.
    pub later: f64,
    /// By position in the window.
    pub by_position: Vec<PositionBucket>,
    /// Seconds of the forward passes, head included.
    pub seconds: f64,
}

/// Perplexity of the tokens at some positions of the windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionBucket {
    /// First position.
    pub start: usize,
    /// Past the last position.
    pub end: usize,
    /// Perplexity there.
    pub perplexity: f64,
}

/// How close a variant is to the original, over tokens after the first `skip` of each window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Share of positions with the same best token.
    pub top1: f64,
    /// Mean share of the original's five best tokens among the variant's.
    pub top5: f64,
    /// Mean share of the original's ten best tokens among the variant's.
    pub top10: f64,
    /// Mean Kullback-Leibler divergence of the variant from the original, in nats.
    pub kl: f64,
    /// Mean cosine of the final hidden states.
    pub cosine: f64,
}

/// One variant beside the original.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantReport {
    /// Its name.
    pub name: String,
    /// Its perplexity.
    pub perplexity: Perplexity,
    /// How close it is.
    pub agreement: Agreement,
}

/// The whole measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationReport {
    /// Windows read.
    pub windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Positions left out of `later` and agreement.
    pub skip: usize,
    /// The original.
    pub original: Perplexity,
    /// The variants.
    pub variants: Vec<VariantReport>,
}

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
        format!("the text has {length} tokens, one window needs {window}")
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
}

/// Sums over compared positions.
#[derive(Debug, Clone, Default)]
struct Comparison {
    positions: usize,
    top: [f64; 3],
    kl: f64,
    cosine: f64,
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
    let mut tallies = vec![Tally { nll: vec![0.0; window - 1], elapsed: Duration::ZERO }; variants.len() + 1];
    let mut comparisons = vec![Comparison::default(); variants.len()];
    for (done, text) in tokens.chunks_exact(window).take(windows).enumerate() {
        let mut hidden = Vec::with_capacity(tallies.len());
        for (decoder, tally) in decoders(original, variants).zip(&mut tallies) {
            let start = Instant::now();
            hidden.push(read(decoder, text)?);
            decoder.device().sync().map_err(|error| ModelError::Input(format!("the device failed: {error:?}")))?;
            tally.elapsed += start.elapsed();
        }
        for at in (0..window - 1).step_by(SLAB) {
            let count = SLAB.min(window - 1 - at);
            let mut reference: Option<(Vec<f32>, Vec<f32>)> = None;
            for (index, (decoder, tally)) in decoders(original, variants).zip(&mut tallies).enumerate() {
                let start = Instant::now();
                let states = hidden[index].clone().narrow(0, at, count);
                let states_data = numbers(states.clone())?;
                let scores = numbers(decoder.logits(states))?;
                tally.elapsed += start.elapsed();
                let vocab = scores.len() / count;
                for (row, scores) in scores.chunks_exact(vocab).enumerate() {
                    let target = text[at + row + 1] as usize;
                    tally.nll[at + row] += log_sum_exp(scores) - scores[target] as f64;
                }
                match &reference {
                    None => reference = Some((scores, states_data)),
                    Some((original_scores, original_states)) => {
                        let width = states_data.len() / count;
                        let comparison = &mut comparisons[index - 1];
                        for row in (0..count).filter(|row| at + row >= skip) {
                            let range = row * vocab..(row + 1) * vocab;
                            comparison.scores(&original_scores[range.clone()], &scores[range]);
                            let range = row * width..(row + 1) * width;
                            comparison.cosine += cosine(&original_states[range.clone()], &states_data[range]);
                        }
                    }
                }
            }
        }
        each(done + 1, windows);
    }
    let perplexity = |tally: &Tally| tally.perplexity(windows, skip);
    let reports = variants.iter().zip(&tallies[1..]).zip(&comparisons).map(|(((name, _), tally), comparison)| {
        VariantReport { name: (*name).to_owned(), perplexity: perplexity(tally), agreement: comparison.agreement() }
    });
    let variants = reports.collect();
    Ok(EvaluationReport { windows, window, skip, original: perplexity(&tallies[0]), variants })
}

/// How far logits are from expected ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LogitDifference {
    /// Largest absolute difference; NaN if any logit is.
    pub max: f64,
    /// Mean absolute difference.
    pub mean: f64,
    /// Share of tokens with the same best token.
    pub top1: f64,
    /// Tokens compared.
    pub tokens: usize,
}

/// Compares the logits of some texts, each read as a whole, with expected ones, `[tokens, vocab_size]` row by row.
///
/// # Errors
///
/// [`ModelError::Input`] if the number of logits does not fit, and what [`Decoder::hidden`] refuses.
pub fn compare_logits(
    decoder: &Decoder,
    texts: &[Vec<u32>],
    expected: &[Vec<f32>],
) -> Result<LogitDifference, ModelError> {
    if texts.len() != expected.len() {
        let problem = format!("{} texts were given, and expected logits of {}", texts.len(), expected.len());
        return Err(ModelError::Input(problem));
    }
    let (mut max, mut sum, mut count, mut same, mut tokens) = (0.0f64, 0.0, 0usize, 0usize, 0usize);
    for (text, expected) in texts.iter().zip(expected) {
        let found = numbers(decoder.forward(text)?)?;
        if found.len() != expected.len() {
            let width = expected.len() / text.len().max(1);
            let vocab_size = decoder.config().decoder.vocab_size;
            let problem = format!("the expected logits are {width} to a token, the vocabulary has {vocab_size} tokens");
            return Err(ModelError::Input(problem));
        }
        for (&a, &b) in found.iter().zip(expected) {
            let difference = (a as f64 - b as f64).abs();
            // `f64::max` would swallow a NaN.
            max = if max.is_nan() || difference.is_nan() { f64::NAN } else { max.max(difference) };
            sum += difference;
        }
        let vocab = found.len() / text.len();
        let rows = found.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
        same += rows.filter(|(a, b)| best(a)[0] == best(b)[0]).count();
        count += found.len();
        tokens += text.len();
    }
    let share = |part: f64, whole: usize| part / whole.max(1) as f64;
    Ok(LogitDifference { max, mean: share(sum, count), top1: share(same as f64, tokens), tokens })
}

fn decoders<'a>(original: &'a Decoder, variants: &'a [(&str, &Decoder)]) -> impl Iterator<Item = &'a Decoder> {
    std::iter::once(original).chain(variants.iter().map(|(_, decoder)| *decoder))
}

/// Final hidden states of a whole text, `[tokens, hidden_size]`, read in pieces.
fn read(decoder: &Decoder, text: &[u32]) -> Result<Tensor<2>, ModelError> {
    let mut cache = decoder.new_cache(&[text.len()])?;
    let pieces: Result<Vec<_>, _> =
        text.chunks(PREFILL_PIECE).map(|piece| decoder.hidden(&[piece.to_vec()], &mut cache)).collect();
    Ok(Tensor::cat(pieces?, 0))
}

fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| ModelError::Input(format!("numbers cannot be read back: {error:?}")))
}

impl Tally {
    fn perplexity(&self, windows: usize, skip: usize) -> Perplexity {
        let over = |range: std::ops::Range<usize>| {
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
            by_position: by_position.collect(),
            seconds: self.elapsed.as_secs_f64(),
        }
    }
}

impl Comparison {
    fn scores(&mut self, original: &[f32], variant: &[f32]) {
        self.positions += 1;
        let (best, others) = (best(original), best(variant));
        for (share, k) in self.top.iter_mut().zip([1, 5, 10]) {
            let k = k.min(original.len());
            let common = best[..k].iter().filter(|token| others[..k].contains(token)).count();
            *share += common as f64 / k as f64;
        }
        let (norm, other) = (log_sum_exp(original), log_sum_exp(variant));
        let pairs = original.iter().zip(variant);
        self.kl += pairs
            .map(|(&p, &q)| {
                let (p, q) = (p as f64 - norm, q as f64 - other);
                p.exp() * (p - q)
            })
            .sum::<f64>();
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

/// The ten best tokens, best first; equal scores go to the lower token.
fn best(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::with_capacity(11);
    for (token, &score) in scores.iter().enumerate() {
        if order.len() == 10 && score <= scores[order[9]] {
            continue;
        }
        let at = order.partition_point(|&other| scores[other] >= score);
        order.insert(at, token);
        order.truncate(10);
    }
    order
}

fn log_sum_exp(scores: &[f32]) -> f64 {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    highest + scores.iter().map(|&score| (score as f64 - highest).exp()).sum::<f64>().ln()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
