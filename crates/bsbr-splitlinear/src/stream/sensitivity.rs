//! What compressing does to what a model predicts.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{BlockModel, CompressedGroup, Window, anchored::block_of, first_states, numbers};
use crate::{SavedGroup, SplitError};

/// Windows of text on which each group is measured by itself.
const WINDOWS: usize = 2;
/// Tokens of them that are read.
const TOKENS: usize = 256;
/// Tokens of these whose predictions count: the last ones, which have read the others.
const COUNTED: usize = 128;
/// The same of a held-out window: predictions of a whole one would take as much memory as a model.
const JUDGED: usize = 256;

/// What a model predicts: for some tokens the probability of every next one.
struct Predictions {
    /// `[tokens, vocabulary]`.
    probabilities: Vec<f32>,
    vocabulary: usize,
    /// Of each token the sum of `p ln p`.
    negentropies: Vec<f64>,
}

impl Predictions {
    fn of<M: BlockModel>(model: &M, states: Tensor<2>) -> Result<Self, M::Error> {
        let (mut scores, vocabulary) = scores(model, states)?;
        let negentropy = |row: &mut [f32]| {
            let log_sum = log_sum_exp(row);
            let mut sum = 0.0;
            for score in row {
                let log = f64::from(*score) - log_sum;
                let probability = log.exp();
                sum += if probability > 0.0 { probability * log } else { 0.0 };
                *score = probability as f32;
            }
            sum
        };
        let negentropies = scores.par_chunks_mut(vocabulary).map(negentropy).collect();
        Ok(Self { probabilities: scores, vocabulary, negentropies })
    }

    /// The Kullback-Leibler divergence of what `model` predicts from the same states, the mean over tokens.
    fn divergence<M: BlockModel>(&self, model: &M, states: Tensor<2>) -> Result<f64, M::Error> {
        let (scores, _) = scores(model, states)?;
        let rows = self.probabilities.par_chunks(self.vocabulary).zip(scores.par_chunks(self.vocabulary));
        let divergence = |((probabilities, scores), negentropy): ((&[f32], &[f32]), &f64)| {
            let expected: f64 =
                probabilities.iter().zip(scores).map(|(&p, &score)| f64::from(p) * f64::from(score)).sum();
            negentropy - expected + log_sum_exp(scores)
        };
        let sum: f64 = rows.zip(&self.negentropies).map(divergence).sum();
        Ok(sum / self.negentropies.len().max(1) as f64)
    }
}

fn scores<M: BlockModel>(model: &M, states: Tensor<2>) -> Result<(Vec<f32>, usize), M::Error> {
    let logits = model.logits(states)?;
    let [_, vocabulary] = logits.dims();
    let scores = numbers("logits", logits)?;
    match scores.iter().position(|score| score.is_nan()) {
        Some(at) => {
            Err(SplitError::shape("logits", "numbers", format!("NaN at token {}", at / vocabulary.max(1))).into())
        }
        None => Ok((scores, vocabulary.max(1))),
    }
}

fn log_sum_exp(scores: &[f32]) -> f64 {
    let highest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum::<f64>().ln()
}

/// The last rows of `states`, at most `count`.
fn last(states: &Tensor<2>, count: usize) -> Tensor<2> {
    let rows = states.dims()[0];
    let count = count.min(rows);
    states.clone().narrow(0, rows - count, count)
}

fn run<M: BlockModel>(model: &M, blocks: std::ops::Range<usize>, states: Tensor<2>) -> Result<Tensor<2>, M::Error> {
    blocks.into_iter().try_fold(states, |states, block| model.run_block(block, states, &mut |_, _| Ok(())))
}

/// How far what the model predicts moves when one group alone is compressed: for each of `groups` the mean divergence over
/// a few hundred tokens of the first `windows` that are not held out. `divided` is the model, divided into the parts of
/// the groups; `each` hears how many groups of how many are done.
///
/// # Errors
///
/// Those of the model; [`SplitError`] if a group is none of its, or no window is there.
pub fn sensitivities<M: BlockModel + Clone>(
    divided: &M,
    groups: &[CompressedGroup],
    (tokens, windows): (&[u32], &[Window]),
    each: &mut dyn FnMut(usize, usize),
) -> Result<Vec<f64>, M::Error> {
    let shortened = windows.iter().filter(|window| !window.held_out).take(WINDOWS).map(|window| {
        let end = window.tokens.end.min(window.tokens.start + TOKENS);
        Window { tokens: window.tokens.start..end, held_out: false }
    });
    let shortened: Vec<Window> = shortened.collect();
    if shortened.is_empty() {
        return Err(SplitError::shape("calibration", "windows that are not held out", "none").into());
    }
    let blocks = divided.blocks();
    // Of each window the states before every block, and what is predicted.
    let mut texts = Vec::new();
    for states in first_states(divided, tokens, &shortened)? {
        let mut borders = vec![states];
        for block in 0..blocks {
            borders.extend(borders.last().cloned().map(|states| run(divided, block..block + 1, states)).transpose()?);
        }
        let predictions = Predictions::of(divided, last(&borders[blocks], COUNTED))?;
        texts.push((borders, predictions));
    }
    let mut found = Vec::with_capacity(groups.len());
    for group in groups {
        let mut model = divided.clone();
        model.install(&group.saved, &group.factors)?;
        let first = first_block(divided, &group.saved)?;
        let mut sum = 0.0;
        for (borders, predictions) in &texts {
            let states = run(&model, first..blocks, borders[first].clone())?;
            sum += predictions.divergence(&model, last(&states, COUNTED))?;
        }
        found.push((sum / texts.len() as f64).max(0.0));
        each(found.len(), groups.len());
    }
    Ok(found)
}

fn first_block<M: BlockModel>(model: &M, group: &SavedGroup) -> Result<usize, M::Error> {
    let mut first = usize::MAX;
    for target in group.members.iter().flat_map(|member| &member.targets) {
        first = first.min(block_of(model, &target.linear)?.0);
    }
    if first < model.blocks() {
        Ok(first)
    } else {
        Err(SplitError::shape(&group.name, "layers of the model", "none").into())
    }
}

/// How far what `compressed` predicts on held-out windows is from what `original` does: the mean divergence over the
/// last tokens of at most `most` windows. `None` where no window is held out.
///
/// # Errors
///
/// Those of the models.
pub fn held_out_divergence<M: BlockModel>(
    original: &M,
    compressed: &M,
    (tokens, windows): (&[u32], &[Window]),
    most: usize,
) -> Result<Option<f64>, M::Error> {
    let held: Vec<Window> = windows.iter().filter(|window| window.held_out).take(most).cloned().collect();
    let (mut sum, blocks) = (0.0, original.blocks());
    let states = first_states(original, tokens, &held)?;
    for (own, states) in first_states(compressed, tokens, &held)?.into_iter().zip(states) {
        let predictions = Predictions::of(original, last(&run(original, 0..blocks, states)?, JUDGED))?;
        sum += predictions.divergence(compressed, last(&run(compressed, 0..blocks, own)?, JUDGED))?;
    }
    Ok((!held.is_empty()).then_some(sum / held.len() as f64))
}
