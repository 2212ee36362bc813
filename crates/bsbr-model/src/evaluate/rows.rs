//! Scores of single tokens, and what sets two rows of them apart.

#[cfg(feature = "flex")]
use bsbr_kernels::layer::{log_sum_exp, mean_gap};
use burn::tensor::Tensor;

use crate::ModelError;

/// What the scores of one token say.
#[derive(Debug, Clone)]
pub(super) struct Row {
    /// Log of the sum of the exponentials.
    log_sum: f64,
    /// The ten best tokens, best first.
    best: Vec<usize>,
}

/// How close the scores of a variant are to those of the original.
#[derive(Debug, Clone, Copy)]
pub(super) struct Closeness {
    /// Share of the 1, 5 and 10 best tokens among those of the variant.
    pub(super) top: [f64; 3],
    /// Kullback-Leibler divergence.
    pub(super) kl: f64,
}

impl Row {
    pub(super) fn new(scores: &[f32]) -> Self {
        Self { log_sum: log_sum_exp(scores), best: best(scores) }
    }

    /// Negative log-likelihood of a token.
    pub(super) fn loss(&self, scores: &[f32], token: u32) -> f64 {
        self.log_sum - f64::from(scores[token as usize])
    }

    /// The best token.
    #[cfg(feature = "text")]
    pub(super) fn first(&self) -> Option<u32> {
        self.best.first().map(|&token| token as u32)
    }

    /// `self` and `scores` of the original against those of a variant.
    pub(super) fn compare(&self, scores: &[f32], variant: &Self, variant_scores: &[f32]) -> Closeness {
        let share = |k: usize| {
            let k = k.min(scores.len());
            let common = self.best[..k].iter().filter(|token| variant.best[..k].contains(token)).count();
            common as f64 / k as f64
        };
        let kl = mean_gap(scores, variant_scores) - self.log_sum + variant.log_sum;
        Closeness { top: [1, 5, 10].map(share), kl }
    }
}

/// The ten best tokens, best first; equal scores go to the lower token.
pub(super) fn best(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::with_capacity(11);
    let mut worst = f32::NEG_INFINITY;
    for (token, &score) in scores.iter().enumerate() {
        if order.len() == 10 && score <= worst {
            continue;
        }
        let at = order.partition_point(|&other| scores[other] >= score);
        order.insert(at, token);
        order.truncate(10);
        worst = order.last().map_or(worst, |&last| scores[last]);
    }
    order
}

pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

pub(super) fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| ModelError::Input(format!("numbers cannot be read back: {error:?}")))
}

#[cfg(not(feature = "flex"))]
fn log_sum_exp(scores: &[f32]) -> f64 {
    let highest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum::<f64>().ln()
}

/// `sum_i softmax(a)_i (a_i - b_i)`.
#[cfg(not(feature = "flex"))]
fn mean_gap(a: &[f32], b: &[f32]) -> f64 {
    let log_sum = log_sum_exp(a);
    let pairs = a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    pairs.map(|(a, b)| ((a - log_sum).exp(), a - b)).filter(|&(p, _)| p != 0.0).map(|(p, gap)| p * gap).sum()
}
