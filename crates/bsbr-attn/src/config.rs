//! The settings of BSBR attention and their validation.

use serde::{Deserialize, Serialize};

use crate::{AttentionError, index::SECTION};

/// How tokens outside the exact set are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retrieval {
    /// Nothing beyond sinks and the local region: the control for every measurement.
    None,
    /// The keys that matter are found by an index and read exactly; the rest of each block counts through [`Far`].
    Blocks,
    /// Blocks are read through their statistics only; bounded with [`BlockAttentionConfig::max_chunks`].
    State,
    /// The published formula made causal: a retrieved state added outside the softmax.
    Additive,
}

/// What chooses the keys that are retrieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Selector {
    /// The token's own query against an index of every key in 8 bits (see [`crate::index`]): no parameters.
    Index,
    /// Meta query of the reading chunk against the meta key of whole blocks: two extra projections, rotated where queries and
    /// keys are. One choice serves a whole chunk, made for its first token.
    Meta,
}

/// How what is not retrieved of a block counts under [`Retrieval::Blocks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Far {
    /// It is dropped.
    None,
    /// Weight `n exp(scale q . mean key)`, value the mean value, in the same softmax.
    Mean,
    /// As `Mean`, with the centred state added to the value and the key covariance to the weight; with [`Selector::Meta`].
    State,
}

/// Largest chunk: exact attention inside one is quadratic, and a block takes memory as a whole.
const LARGEST_CHUNK: usize = 1 << 16;
/// Channels of an index below which halving saves nothing.
const FEWEST_CHANNELS: usize = 32;
/// Largest shift of a log-mass, in nats: beyond it the far part counts as nothing, or as everything.
const MOST_FAR_SHIFT: f64 = 100.0;

/// The settings of BSBR attention.
///
/// Sizes are in tokens, counted from the first token of each sequence (padding does not count).
///
/// ```
/// use bsbr_attn::BlockAttentionConfig;
///
/// let config = BlockAttentionConfig { max_keys: 256, ..Default::default() };
/// config.validate().unwrap();
/// assert!(BlockAttentionConfig { chunk_size: 100, ..config }.validate().is_err()); // not whole sections of 64
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlockAttentionConfig {
    /// Tokens of a chunk, the unit of exact local attention; up to 65,536.
    pub chunk_size: usize,
    /// Chunks before the token's own that are read exactly.
    pub local_chunks: usize,
    /// First tokens of the sequence that are always read exactly and enter no statistic.
    pub sink_tokens: usize,
    /// How the rest is read.
    pub retrieval: Retrieval,
    /// Chunks of which every token sees at most so many tokens, up to the last of the chunk, read everything under
    /// `retrieval = blocks`: to choose would cost more than it saves.
    pub exact_tokens: usize,
    /// What chooses the keys that are retrieved.
    pub selector: Selector,
    /// The estimated probability `tau` from which on a key is read exactly, with the `index` selector; 0 reads every key up
    /// to `max_keys`.
    pub threshold: f64,
    /// Most keys a token retrieves, per KV head: where more pass, its threshold is doubled until they do not.
    pub max_keys: usize,
    /// Channels of which the index keeps what a key has beyond the mean of its block; `None` is half of the head's, at
    /// least 32.
    pub index_channels: Option<usize>,
    /// What lies further than this before the local region is scored by sections of 64 tokens first, so that the work for a
    /// token grows by one score for each of them.
    pub fine_tokens: usize,
    /// Most of those sections that a token opens, per KV head, to score the keys in them.
    pub max_sections: usize,
    /// Tokens of a block for `retrieval = state` and the `meta` selector; divides `chunk_size`. The index has blocks of 16,
    /// `additive` whole chunks.
    pub block_size: usize,
    /// Blocks each token reads exactly with the `meta` selector, per KV head.
    pub meta_blocks: usize,
    /// How what is not retrieved counts.
    pub far: Far,
    /// Nats added to the estimated log-mass of everything that is read through statistics, so that it counts less or more. It
    /// changes no choice.
    pub far_shift: f64,
    /// Weight `w` of the covariance term `(w/2) scale^2 q^T S q` in the estimated log-mass of a block
    /// (`far = state` and `retrieval = state`); 0 keeps no covariance.
    pub covariance_weight: f64,
    /// Store each `head_dim x head_dim` state as this share of its numbers: along the basis found by calibration where there is
    /// [one](BlockAttentionConfig::calibrated_states), otherwise by truncated SVD; at least one direction is kept. 1 is exact.
    pub compression_factor: usize,
    /// Compress states along the basis of each KV head that calibration found, an extra weight of the model.
    pub calibrated_states: bool,
    /// Tokens behind the local region that keep their own keys and values under `retrieval = state`, per KV head: those
    /// that the last queries of each chunk attend to most. Tokens that are kept no longer enter block statistics. 0 keeps
    /// none: then every block does as soon as it leaves the local region. Not with the `meta` selector.
    pub kept_tokens: usize,
    /// Most block statistics kept under `retrieval = state`: beyond it neighbours are merged, so that the
    /// memory no longer grows with the text. With `kept_tokens`, 0 drops what is not kept.
    pub max_chunks: Option<usize>,
    /// Gate `g` on the retrieved part of `retrieval = additive`; 1 as published.
    pub additive_gate: f64,
    /// Every query head has a gate of its own, an extra weight of the model that tuning finds: with `retrieval = additive` in
    /// place of `additive_gate`, with `retrieval = state` nats added to the log-mass of what is read through statistics.
    pub head_gates: bool,
}

impl Default for BlockAttentionConfig {
    fn default() -> Self {
        Self {
            chunk_size: 128,
            local_chunks: 1,
            sink_tokens: 4,
            retrieval: Retrieval::Blocks,
            exact_tokens: 512,
            selector: Selector::Index,
            threshold: 1.0 / 2048.0,
            max_keys: 1024,
            index_channels: None,
            fine_tokens: 8192,
            max_sections: 32,
            block_size: 16,
            meta_blocks: 32,
            far: Far::Mean,
            far_shift: 0.0,
            covariance_weight: 0.8,
            compression_factor: 1,
            calibrated_states: false,
            kept_tokens: 0,
            max_chunks: None,
            additive_gate: 1.0,
            head_gates: false,
        }
    }
}

impl BlockAttentionConfig {
    /// Checks every setting against the others.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] with the setting, its value and what it must be.
    pub fn validate(&self) -> Result<(), AttentionError> {
        let fail = |setting: &'static str, value: String, expected: &str| {
            Err(AttentionError::Config { setting, value, expected: expected.to_owned() })
        };
        if self.chunk_size == 0 || self.chunk_size > LARGEST_CHUNK {
            let expected = format!("1 to {LARGEST_CHUNK}");
            return fail("chunk_size", self.chunk_size.to_string(), &expected);
        }
        if self.uses_index() && !self.chunk_size.is_multiple_of(SECTION) {
            let expected =
                format!("a multiple of {SECTION} with retrieval = blocks, whose sections do not cross chunks");
            return fail("chunk_size", self.chunk_size.to_string(), &expected);
        }
        if self.block_size == 0 || !self.chunk_size.is_multiple_of(self.block_size) {
            let expected = format!("a divisor of chunk_size = {}", self.chunk_size);
            return fail("block_size", self.block_size.to_string(), &expected);
        }
        if self.retrieval == Retrieval::Blocks {
            let none = [("max_keys", self.max_keys), ("meta_blocks", self.meta_blocks)];
            if let Some((setting, _)) = none.into_iter().find(|(_, value)| *value == 0) {
                let expected = "at least 1 with retrieval = blocks (retrieval = none reads no block)";
                return fail(setting, "0".into(), expected);
            }
        }
        if !(0.0..1.0).contains(&self.threshold) {
            return fail("threshold", self.threshold.to_string(), "a probability: 0 or more, below 1");
        }
        if self.index_channels == Some(0) {
            return fail("index_channels", "0".into(), "at least 1, or unset for half of the channels of a head");
        }
        if self.uses_index() && self.far == Far::State {
            return fail("far", "state".into(), "none or mean with selector = index: it keeps no states");
        }
        if self.compression_factor == 0 {
            return fail("compression_factor", "0".into(), "at least 1 (1 keeps whole states)");
        }
        if self.kept_tokens > 0 && self.retrieval != Retrieval::State {
            let expected = "0 unless retrieval = state: the other kinds keep every token or none";
            return fail("kept_tokens", self.kept_tokens.to_string(), expected);
        }
        if self.kept_tokens > 0 && self.selector == Selector::Meta {
            let expected = "0 with selector = meta: meta keys belong to whole blocks, and kept tokens break these up";
            return fail("kept_tokens", self.kept_tokens.to_string(), expected);
        }
        if self.max_chunks == Some(0) && self.kept_tokens == 0 {
            return fail("max_chunks", "0".into(), "at least 1 without kept_tokens (retrieval = none keeps no state)");
        }
        if self.max_chunks.is_some() && self.retrieval != Retrieval::State {
            let value = format!("{:?}", self.max_chunks.unwrap_or_default());
            return fail(
                "max_chunks",
                value,
                "unset unless retrieval = state: the other kinds read blocks as they are",
            );
        }
        if self.far_shift.is_nan() || self.far_shift.abs() > MOST_FAR_SHIFT {
            let expected = format!("a number of nats from -{MOST_FAR_SHIFT} to {MOST_FAR_SHIFT}");
            return fail("far_shift", self.far_shift.to_string(), &expected);
        }
        if !(self.covariance_weight.is_finite() && self.covariance_weight >= 0.0) {
            return fail("covariance_weight", self.covariance_weight.to_string(), "a finite number, 0 or more");
        }
        if self.head_gates && self.retrieval == Retrieval::Blocks {
            return fail(
                "head_gates",
                "true".into(),
                "false with retrieval = blocks: only state and additive have gates",
            );
        }
        if !self.additive_gate.is_finite() {
            return fail("additive_gate", self.additive_gate.to_string(), "a finite number");
        }
        Ok(())
    }

    /// Checks that far tokens can be read at other positions past `trained` tokens; see [`crate::FarPositions`].
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] where blocks are read through states, which are of keys at their own positions, or where
    /// the local region alone is longer than trained.
    pub fn validate_trained_length(&self, trained: usize) -> Result<(), AttentionError> {
        let fail = |setting: &'static str, value: String, expected: String| {
            Err(AttentionError::Config { setting, value, expected })
        };
        if matches!(self.retrieval, Retrieval::State | Retrieval::Additive) {
            let value = format!("{:?}", self.retrieval).to_lowercase();
            let expected = "blocks or none with grouped positions: states hold keys at their own positions";
            return fail("retrieval", value, expected.into());
        }
        let local = self.local_tokens();
        if local.saturating_add(1) >= trained {
            let expected = format!("at least 2 fewer than the trained length = {trained} with grouped positions");
            return fail("(local_chunks + 1) * chunk_size", local.to_string(), expected);
        }
        Ok(())
    }

    /// These settings with another kind of retrieval, and what belongs to the kind they had at rest: kept tokens, merged
    /// blocks, gates and calibrated bases are of one kind each.
    pub fn with_retrieval(&self, retrieval: Retrieval) -> Self {
        if retrieval == self.retrieval {
            return self.clone();
        }
        if retrieval == Retrieval::None {
            return self.without_retrieval();
        }
        Self {
            retrieval,
            kept_tokens: 0,
            max_chunks: None,
            calibrated_states: false,
            head_gates: false,
            ..self.clone()
        }
    }

    /// The control for every measurement: the local region and the sinks of these settings, and nothing behind them.
    pub fn without_retrieval(&self) -> Self {
        Self {
            chunk_size: self.chunk_size,
            local_chunks: self.local_chunks,
            sink_tokens: self.sink_tokens,
            block_size: self.block_size,
            retrieval: Retrieval::None,
            ..Self::default()
        }
    }

    /// Tokens of the local region of the last token of a chunk.
    pub(crate) fn local_tokens(&self) -> usize {
        self.local_chunks.saturating_add(1).saturating_mul(self.chunk_size)
    }

    /// Tokens of the blocks that carry statistics: `block_size`, or whole chunks under `additive`.
    pub fn statistics_block(&self) -> usize {
        if self.retrieval == Retrieval::Additive { self.chunk_size } else { self.block_size }
    }

    /// Queries at the end of each chunk that decide which tokens are kept: a quarter of the chunk.
    pub(crate) fn watchers(&self) -> usize {
        (self.chunk_size / 4).max(1)
    }

    /// First token of the local region of a token of chunk `chunk`.
    pub fn local_start(&self, chunk: usize) -> usize {
        chunk.saturating_sub(self.local_chunks) * self.chunk_size
    }

    /// Whether keys are chosen by an index of them.
    pub fn uses_index(&self) -> bool {
        self.retrieval == Retrieval::Blocks && self.selector == Selector::Index
    }

    /// Channels of residuals that the index keeps of heads of width `head_dim`.
    pub fn residual_channels(&self, head_dim: usize) -> usize {
        self.index_channels.unwrap_or((head_dim / 2).max(FEWEST_CHANNELS)).min(head_dim)
    }

    /// How many tokens at the start of a text decide how its index is built: all before the first chunk that can choose.
    pub(crate) fn index_founding(&self) -> usize {
        (self.exact_tokens / self.chunk_size).max(self.local_chunks.saturating_add(1)).saturating_mul(self.chunk_size)
    }

    /// Whether meta queries and keys are needed, and with them the two meta projections.
    pub fn needs_meta(&self) -> bool {
        self.selector == Selector::Meta && self.retrieval != Retrieval::None
    }

    /// Whether states are compressed along a calibrated basis, and with it that extra weight.
    pub fn needs_state_basis(&self) -> bool {
        self.calibrated_states && self.needs_states()
    }

    /// Whether every query head has a gate, and with them that extra weight.
    pub fn needs_gates(&self) -> bool {
        self.head_gates && matches!(self.retrieval, Retrieval::State | Retrieval::Additive)
    }

    /// Whether centred states and covariances are read, and so must be kept.
    pub fn needs_states(&self) -> bool {
        match self.retrieval {
            Retrieval::None => false,
            Retrieval::Blocks => self.far == Far::State,
            Retrieval::State | Retrieval::Additive => true,
        }
    }

    /// Whether key covariances are read.
    pub(crate) fn needs_covariance(&self) -> bool {
        self.needs_states() && self.retrieval != Retrieval::Additive && self.covariance_weight > 0.0
    }
}
