//! Choosing the next token from its scores.

use std::{
    cmp::Ordering,
    collections::{BTreeSet, VecDeque},
};

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
    /// Only tokens at least `min_p` times as probable as the best one can be chosen.
    pub min_p: Option<f64>,
    /// What the scores of tokens among the last [`repeat_last`](Self::repeat_last) are divided by if above 0, and multiplied by
    /// if below; 1 changes nothing.
    pub repeat_penalty: f64,
    /// How many tokens of the text, the newest, count as repeated.
    pub repeat_last: usize,
    /// Start of the random numbers: the same seed and text give the same continuation.
    pub seed: u64,
}

impl Default for SamplingConfig {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repeat_penalty: 1.0, repeat_last: 64, seed: 0 }
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
        if let Some(p) = self.min_p
            && !(0.0..=1.0).contains(&p)
        {
            return Err(ModelError::Config { setting: "min_p", problem: format!("is {p}, expected 0 to 1") });
        }
        if !(self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0) {
            let problem = format!("is {}, expected more than 0", self.repeat_penalty);
            return Err(ModelError::Config { setting: "repeat_penalty", problem });
        }
        Ok(())
    }
}

/// A sampling configuration with its stream of random numbers.
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    random: StdRng,
    /// The newest tokens of the text, at most `repeat_last`, where they matter.
    recent: VecDeque<u32>,
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
        Ok(Self { config, random, recent: VecDeque::new() })
    }

    /// Tells what stands before the next token, oldest first; only a repeat penalty asks for it.
    pub fn see(&mut self, tokens: &[u32]) {
        if self.config.repeat_penalty == 1.0 {
            return;
        }
        let most = self.config.repeat_last;
        self.recent.extend(&tokens[tokens.len().saturating_sub(most)..]);
        self.recent.drain(..self.recent.len().saturating_sub(most));
    }

    /// The next token from its scores, `[vocab_size]`; it counts as [seen](Self::see). Equal scores go to the lower token.
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] if a score is not a number or the best one is infinite.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        let token = if self.recent.is_empty() {
            self.chosen(logits)
        } else {
            let mut penalised = logits.to_vec();
            for &token in self.recent.iter().collect::<BTreeSet<_>>() {
                // A text may hold tokens that the model has no score for.
                if let Some(score) = penalised.get_mut(token as usize) {
                    let penalty = self.config.repeat_penalty as f32;
                    *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
                }
            }
            self.chosen(&penalised)
        }?;
        self.see(&[token]);
        Ok(token)
    }

    fn chosen(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
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
        let weight = |token: usize| ((logits[token] as f64 - highest as f64) / self.config.temperature).exp();
        let mut ranked = Ranked::new(logits, highest);
        let mut kept = self.config.top_k.unwrap_or(logits.len()).min(logits.len());
        let all: f64 = match kept < logits.len() {
            true => ranked.first(kept).iter().map(|&token| weight(token)).sum(),
            false => (0..logits.len()).map(weight).sum(),
        };
        let mut sum = all;
        // Each of these keeps the first few, and at least one.
        let mut keep = |ranked: &mut Ranked<'_>, kept: &mut usize, enough: &dyn Fn(f64, f64) -> bool| {
            let mut reached = 0.0;
            for at in 0..*kept {
                let next = weight(ranked.at(at));
                if at > 0 && enough(reached, next) {
                    (*kept, sum) = (at, reached);
                    return;
                }
                reached += next;
            }
        };
        if let Some(p) = self.config.top_p.filter(|&p| p < 1.0) {
            keep(&mut ranked, &mut kept, &|reached, _| reached >= p * all);
        }
        if let Some(p) = self.config.min_p.filter(|&p| p > 0.0) {
            // The best one has the weight 1.
            keep(&mut ranked, &mut kept, &|_, next| next < p);
        }
        let mut at = self.random.random::<f64>() * sum;
        for place in 0..kept {
            let token = ranked.at(place);
            at -= weight(token);
            if at < 0.0 {
                return Ok(token as u32);
            }
        }
        // Rounding can leave a sliver past the last weight.
        Ok(ranked.at(kept - 1) as u32)
    }
}

/// Tokens that are ranked at first; of most texts one of them is chosen.
const RANKED_AT_FIRST: usize = 64;

/// How far below the best score a token lies, at most, that is looked at first.
const NEAR: f32 = 4.0;

/// Tokens by their scores, best first, equal ones by their number: ranked as far as somebody looks.
struct Ranked<'a> {
    logits: &'a [f32],
    highest: f32,
    tokens: Vec<usize>,
}

impl<'a> Ranked<'a> {
    /// `highest` is the best score.
    fn new(logits: &'a [f32], highest: f32) -> Self {
        Self { logits, highest, tokens: Vec::new() }
    }

    /// The first `count` tokens.
    fn first(&mut self, count: usize) -> &[usize] {
        if count > self.tokens.len() {
            let wanted = count.max(RANKED_AT_FIRST).max(4 * self.tokens.len()).min(self.logits.len());
            self.rank(wanted);
        }
        &self.tokens[..count]
    }

    fn rank(&mut self, wanted: usize) {
        // Few tokens are near the best one: comparing all with one bound is faster than ordering them by halves.
        let mut near = NEAR;
        loop {
            let bound = if near < 64.0 { self.highest - near } else { f32::NEG_INFINITY };
            self.tokens.clear();
            self.tokens.extend((0..self.logits.len()).filter(|&token| self.logits[token] >= bound));
            if self.tokens.len() >= wanted {
                break;
            }
            near *= 2.0;
        }
        // By value, so that 0 and -0 are equal; there is no NaN.
        let best_first = |&a: &usize, &b: &usize| {
            self.logits[b].partial_cmp(&self.logits[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
        };
        if wanted < self.tokens.len() {
            self.tokens.select_nth_unstable_by(wanted - 1, best_first);
            self.tokens.truncate(wanted);
        }
        self.tokens.sort_unstable_by(best_first);
    }

    /// The token at a place.
    fn at(&mut self, place: usize) -> usize {
        self.first(place + 1)[place]
    }
}
