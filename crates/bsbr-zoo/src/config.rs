//! The one decoder as data.

use bsbr_attn::BlockAttentionConfig;
use serde::{Deserialize, Serialize};

use crate::{Family, ZooError};

/// How tokens know where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// By the causal mask and the short convolution alone.
    None,
    /// Rotary embedding of queries and keys with base 10,000 (Su et al. 2021), in the families that [rotate](Family::rotates).
    Rotary,
}

/// A small decoder. Change [`family`](DecoderConfig::family) alone and everything around the attention stays as it is.
///
/// # How families are made comparable
///
/// **By parameters.** All have the same embedding, norms, convolutions, multilayer perceptrons and head, and query, key, value
/// and output projections of `width x width`. `hopfield` adds one inverse temperature for each head, `delta` a rate for
/// each head, `width x heads` numbers. `gau` has no such projections: its inner width is chosen so that its
/// weights are as many, see [`DecoderConfig::gau_width`].
///
/// **Not by state.** What a token can look back on is what the comparison is about: all tokens in `standard`, `bsbr` and
/// `hopfield`, `window + sinks` of them in `window`, `heads` matrices of `head_dim x head_dim` in `linear` and `delta`, one of
/// [`DecoderConfig::shared_width`] ` x gau_width` and one chunk of tokens in `gau`. [`State::bytes`](crate::State::bytes)
/// counts it.
///
/// ```
/// use bsbr_zoo::{DecoderConfig, Family};
///
/// let config = DecoderConfig { family: Family::Delta, ..Default::default() };
/// config.validate().unwrap();
/// assert!(DecoderConfig { heads: 7, ..config }.validate().is_err()); // does not divide 64
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecoderConfig {
    /// What every layer attends with.
    pub family: Family,
    /// Tokens there are: ids run from 0 to this, exclusive.
    pub vocabulary: usize,
    /// Numbers that stand for a token between layers.
    pub width: usize,
    /// Layers, each an attention and a multilayer perceptron.
    pub layers: usize,
    /// Heads of `width / heads` numbers.
    pub heads: usize,
    /// Inner width of the multilayer perceptron in multiples of `width`; 0 leaves it out.
    pub mlp_factor: usize,
    /// Positions of a causal convolution of each channel before queries, keys and values are made; 0 leaves it out.
    pub short_convolution: usize,
    /// How tokens know where they are.
    pub positions: Positions,
    /// Whether the head is the embedding, transposed.
    pub tied_head: bool,
    /// Tokens of a chunk of the parallel forms of `linear` and `delta`, which compute the same whatever it is, and of `gau`,
    /// for which it is the reach of its quadratic attention.
    pub chunk_size: usize,
    /// `window`: tokens that a token sees, itself included.
    pub window: usize,
    /// `window`: first tokens that every later token sees.
    pub sinks: usize,
    /// `hopfield`: retrieval steps, the one that reads the values included. 1 is attention between normalised queries and
    /// keys.
    pub hopfield_steps: usize,
    /// `hopfield`: inverse temperature that heads start from.
    pub hopfield_beta: f64,
    /// `hopfield`: whether the inverse temperature of each head is learned.
    pub hopfield_learned: bool,
    /// `bsbr`: its attention.
    pub bsbr: BlockAttentionConfig,
}

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            family: Family::Standard,
            vocabulary: 256,
            width: 64,
            layers: 2,
            heads: 4,
            mlp_factor: 2,
            short_convolution: 4,
            positions: Positions::Rotary,
            tied_head: true,
            chunk_size: 32,
            window: 32,
            sinks: 4,
            hopfield_steps: 2,
            hopfield_beta: 1.0,
            hopfield_learned: true,
            // The smallest chunks an index has, so that the short texts of small models have something behind them.
            bsbr: BlockAttentionConfig {
                chunk_size: 64,
                local_chunks: 0,
                sink_tokens: 4,
                max_keys: 32,
                exact_tokens: 0,
                ..Default::default()
            },
        }
    }
}

/// Largest size of anything, so that products of sizes stay within what a machine can count.
const LARGEST: usize = 1 << 20;

/// Largest chunk and window: attention inside one is quadratic.
const LARGEST_CHUNK: usize = 1 << 14;

impl DecoderConfig {
    /// Checks every setting against the others.
    ///
    /// # Errors
    ///
    /// [`ZooError::Config`] with the setting, its value and what it must be; [`ZooError::Attention`] for those of `bsbr`.
    pub fn validate(&self) -> Result<(), ZooError> {
        let fail = |setting, value: String, expected: &str| {
            Err(ZooError::Config { setting, value, expected: expected.to_owned() })
        };
        for (setting, value, range) in [
            ("vocabulary", self.vocabulary, 1..=LARGEST),
            ("width", self.width, 1..=LARGEST),
            ("layers", self.layers, 1..=1 << 10),
            ("heads", self.heads, 1..=self.width.max(1)),
            ("mlp_factor", self.mlp_factor, 0..=64),
            ("short_convolution", self.short_convolution, 0..=256),
            ("chunk_size", self.chunk_size, 1..=LARGEST_CHUNK),
            ("window", self.window, 1..=LARGEST_CHUNK),
            ("sinks", self.sinks, 0..=LARGEST_CHUNK),
            ("hopfield_steps", self.hopfield_steps, 1..=64),
        ] {
            if !range.contains(&value) {
                return fail(setting, value.to_string(), &format!("{} to {}", range.start(), range.end()));
            }
        }
        if !self.width.is_multiple_of(self.heads) {
            return fail("heads", self.heads.to_string(), &format!("a divisor of width = {}", self.width));
        }
        if self.rotary_width().is_some_and(|width| !width.is_multiple_of(2)) {
            let expected = "an even number of numbers for each head with positions = rotary";
            return fail("width / heads", self.head_dim().to_string(), expected);
        }
        if self.family == Family::Gau && self.width < 4 {
            return fail("width", self.width.to_string(), "at least 4 with family = gau");
        }
        if !(self.hopfield_beta.is_finite() && self.hopfield_beta > 0.0) {
            return fail("hopfield_beta", self.hopfield_beta.to_string(), "a finite number above 0");
        }
        self.bsbr.validate()?;
        if self.bsbr.needs_meta() {
            return fail("bsbr.selector", "meta".into(), "index: the decoder has no meta projections");
        }
        if self.bsbr.needs_state_basis() {
            return fail("bsbr.calibrated_states", "true".into(), "false: the decoder has no calibrated basis");
        }
        Ok(())
    }

    /// Numbers of a head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// `gau`: width of its queries and keys, which are of one head: half of `width`, 128 at most (as published), even.
    pub fn shared_width(&self) -> usize {
        (self.width / 2).min(128) / 2 * 2
    }

    /// `gau`: width of its gate and values, such that its weights are as many as the `4 width^2` of the others:
    /// `3 width gau_width + width shared_width = 4 width^2`.
    pub fn gau_width(&self) -> usize {
        ((4 * self.width - self.shared_width()) as f64 / 3.0).round() as usize
    }

    /// Width of what is rotated; `None` where nothing is.
    pub(crate) fn rotary_width(&self) -> Option<usize> {
        if self.positions == Positions::None || !self.family.rotates() {
            return None;
        }
        Some(if self.family == Family::Gau { self.shared_width() } else { self.head_dim() })
    }
}
