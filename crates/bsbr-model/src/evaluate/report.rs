//! The numbers of an evaluation.

use serde::{Deserialize, Serialize};

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
    /// Over the tokens of the last quarter of each window.
    pub last_quarter: f64,
    /// By position in the window.
    pub by_position: Vec<PositionBucket>,
    /// Seconds of the forward passes, head included.
    pub seconds: f64,
    /// Bytes of the cache after a window, as the cache counts them.
    pub cache_bytes: usize,
    /// Keys read exactly, as a share of those the original reads: the mean over tokens and layers, as measured.
    pub keys_share: f64,
    /// Statistics of blocks, sections and chunks read or scored, as a share of the same number.
    pub summaries_share: f64,
    /// Share of the choices of keys, one for each token and KV head, that `max_keys` cut.
    pub capped_share: f64,
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

/// How close a variant is to the original, over some tokens of each window.
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
    /// How close it is, over tokens after the first `skip` of each window.
    pub agreement: Agreement,
    /// The same over the last quarter of each window.
    pub last_quarter: Agreement,
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
