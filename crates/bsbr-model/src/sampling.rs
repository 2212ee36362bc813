//! Choosing the next token from its scores.

use std::cmp::Ordering;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Scores are divided by this; 0 takes the best token (greedy).
    pub temperature: f64,
    /// Only the best `top_k` tokens can be chosen.
    pub top_k: Option<usize>,
    /// Only the smallest set of best tokens whose probabilities reach `top_p` can be chosen.
    pub top_p: Option<f64>,
    /// Start of the random numbers: the same seed and text give the same continuation.
    pub seed: u64,
}

impl Default for SamplingConfig {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }
}

impl SamplingConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`].
    pub fn validate(&self) -> Result<(), ModelError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let problem = format!("is {}, expected 0 (greedy) or more", self.temperature);
            return Err(ModelError::Config { setting: "temperature", problem });
        }
        if self.top_k == Some(0) {
            return Err(ModelError::Config { setting: "top_k", problem: "is 0, expected at least 1".into() });
        }
        if let Some(p) = self.top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(ModelError::Config { setting: "top_p", problem: format!("is {p}, expected above 0, up to 1") });
        }
        Ok(())
    }
}

/// A sampling configuration with its stream of random numbers.
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    random: StdRng,
}

impl Sampler {
    /// Starts the random numbers from the seed.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] if a setting is out of range.
    pub fn new(config: SamplingConfig) -> Result<Self, ModelError> {
        config.validate()?;
        let random = StdRng::seed_from_u64(config.seed);
        Ok(Self { config, random })
    }

    /// The next token from its scores, `[vocab_size]`. Equal scores go to the lower token.
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] if a score is not a number or the best one is infinite.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        if logits.is_empty() {
            return Err(ModelError::EmptyInput);
        }
        if let Some(token) = logits.iter().position(|score| score.is_nan()) {
            return Err(ModelError::Input(format!("the score of token {token} is not a number")));
        }
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if highest.is_infinite() {
            return Err(ModelError::Input(format!("the best score is {highest}, expected a finite number")));
        }
        if self.config.temperature == 0.0 {
            return Ok(logits.iter().position(|&score| score == highest).unwrap_or_default() as u32);
        }
        let mut ranked: Vec<usize> = (0..logits.len()).collect();
        // By value, so that 0 and -0 are equal; there is no NaN.
        let best_first =
            |&a: &usize, &b: &usize| logits[b].partial_cmp(&logits[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b));
        if let Some(k) = self.config.top_k.filter(|&k| k < ranked.len()) {
            ranked.select_nth_unstable_by(k - 1, best_first);
            ranked.truncate(k);
        }
        ranked.sort_unstable_by(best_first);
        let below = |token: usize| logits[token] as f64 - highest as f64;
        let weights = ranked.iter().map(|&token| (below(token) / self.config.temperature).exp());
        let mut weights: Vec<f64> = weights.collect();
        if let Some(p) = self.config.top_p {
            let enough = p * weights.iter().sum::<f64>();
            let mut reached = 0.0;
            let kept = weights.iter().position(|weight| {
                reached += weight;
                reached >= enough
            });
            weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        }
        let mut at = self.random.random::<f64>() * weights.iter().sum::<f64>();
        for (&token, weight) in ranked.iter().zip(&weights) {
            at -= weight;
            if at < 0.0 {
                return Ok(token as u32);
            }
        }
        // Rounding can leave a sliver past the last weight.
        Ok(ranked[weights.len() - 1] as u32)
    }
}
