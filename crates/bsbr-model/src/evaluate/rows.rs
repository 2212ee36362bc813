//! Scores of single tokens, and what sets two rows of them apart.

#[cfg(feature = "flex")]
use bsbr_kernels::layer::ScoreSums;
use burn::tensor::Tensor;

#[cfg(not(feature = "flex"))]
use super::score_sums::ScoreSums;
use crate::ModelError;

/// How many of the best tokens are told apart.
const BEST: usize = 10;

/// What the scores of one token say. They come in parts of the vocabulary, one after the other.
#[derive(Debug, Clone)]
pub(super) struct Row {
    sums: ScoreSums,
    /// The best tokens with their scores, best first; equal scores go to the lower token.
    best: Vec<(f32, usize)>,
    /// The token that follows, and its score.
    following: usize,
    score: f32,
    /// Scores so far.
    seen: usize,
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
    /// Of no scores yet, before the token that follows; beside them come those of so many variants.
    pub(super) fn new(following: u32, variants: usize) -> Self {
        let sums = ScoreSums::new(variants);
        Self { sums, best: Vec::with_capacity(BEST + 1), following: following as usize, score: f32::NAN, seen: 0 }
    }

    /// Takes the scores of the next part of the vocabulary in, and those of the variants.
    pub(super) fn push(&mut self, scores: &[f32], variants: &[&[f32]]) {
        self.sums.push(scores, variants);
        if let Some(&score) = self.following.checked_sub(self.seen).and_then(|at| scores.get(at)) {
            self.score = score;
        }
        rank(&mut self.best, scores, self.seen);
        self.seen += scores.len();
    }

    /// Negative log-likelihood of the token that follows.
    pub(super) fn loss(&self) -> f64 {
        self.sums.log_sum() - f64::from(self.score)
    }

    /// The best token.
    #[cfg(feature = "text")]
    pub(super) fn first(&self) -> Option<u32> {
        self.best.first().map(|&(_, token)| token as u32)
    }

    /// The original against its variant of this number.
    pub(super) fn compare(&self, number: usize, variant: &Self) -> Closeness {
        let share = |k: usize| {
            let k = k.min(self.best.len());
            let among = |&(_, token): &(f32, usize)| variant.best[..k].iter().any(|&(_, other)| other == token);
            self.best[..k].iter().filter(|best| among(best)).count() as f64 / k as f64
        };
        let kl = self.sums.mean_gap(number) - self.sums.log_sum() + variant.sums.log_sum();
        Closeness { top: [1, 5, 10].map(share), kl }
    }
}

/// Keeps the best of `best` and of `scores`, whose first is that of token `first`.
fn rank(best: &mut Vec<(f32, usize)>, scores: &[f32], first: usize) {
    let mut worst = best.last().map_or(f32::NEG_INFINITY, |&(score, _)| score);
    for (at, &score) in scores.iter().enumerate() {
        if best.len() == BEST && score <= worst {
            continue;
        }
        let place = best.partition_point(|&(other, _)| other >= score);
        best.insert(place, (score, first + at));
        best.truncate(BEST);
        worst = best.last().map_or(worst, |&(score, _)| score);
    }
}

/// The ten best tokens, best first; equal scores go to the lower token.
pub(super) fn best(scores: &[f32]) -> Vec<usize> {
    let mut best = Vec::with_capacity(BEST + 1);
    rank(&mut best, scores, 0);
    best.into_iter().map(|(_, token)| token).collect()
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
