//! The settings of BSBR attention and their validation.

use serde::{Deserialize, Serialize};

use crate::AttentionError;

/// How tokens outside the exact set are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retrieval {
    /// Nothing beyond sinks and the local region: the control for every measurement.
    None,
    /// The `top_k` best blocks are read exactly; the others count through [`Far`].
    Blocks,
    /// Blocks are read through their statistics only; bounded with [`BlockAttentionConfig::max_chunks`].
    State,
    /// The published formula made causal: a retrieved state added outside the softmax.
    Additive,
}

/// What scores a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Selector {
    /// The token's own query against the block's mean key and what its keys may hold [beyond
    /// it](BlockAttentionConfig::reach): no parameters.
    MeanKey,
    /// Meta query of the reading chunk against the meta key of the block: two extra projections, rotated where queries and
    /// keys are. One choice serves a whole chunk, made for its first token.
    Meta,
}

/// How blocks that are not retrieved count under [`Retrieval::Blocks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Far {
    /// They are dropped.
    None,
    /// Weight `n exp(scale q . mean key)`, value the mean value, in the same softmax.
    Mean,
    /// As `Mean`, with the centred state added to the value and the key covariance to the weight.
    State,
}

/// Largest chunk: exact attention inside one is quadratic, and a block takes memory as a whole.
const LARGEST_CHUNK: usize = 1 << 16;
/// Longest section or page.
const LONGEST_RUN: usize = 1 << 30;
/// Largest shift of a log-mass, in nats: beyond it the far part counts as nothing, or as everything.
const MOST_FAR_SHIFT: f64 = 100.0;

/// The settings of BSBR attention.
///
/// Sizes are in tokens, counted from the first token of each sequence (padding does not count).
///
/// ```
/// use bsbr_attn::BlockAttentionConfig;
///
/// let config = BlockAttentionConfig { top_k: 16, ..Default::default() };
/// config.validate().unwrap();
/// assert!(BlockAttentionConfig { block_size: 48, ..config }.validate().is_err()); // does not divide 128
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
    /// Tokens of a block, the unit of retrieval; divides `chunk_size`. `additive` uses whole chunks.
    pub block_size: usize,
    /// Blocks each token reads exactly, per KV head.
    pub top_k: usize,
    /// Tokens of chunks that end within the first `exact_tokens` tokens read everything before them under
    /// `retrieval = blocks`: to choose would cost more than it saves.
    pub exact_tokens: usize,
    /// Blocks further than this before the local region are scored by whole sections first, and count by sections where
    /// they are not [opened](BlockAttentionConfig::top_sections), so that the work for a token grows by one score a section, and
    /// still further back [a page](BlockAttentionConfig::middle_tokens).
    /// With the `mean-key` selector and `far = none` or `mean`; the others score every block. Never less than is retrieved.
    pub fine_tokens: usize,
    /// Tokens of a section, rounded up to whole blocks. The shorter, the better their scores tell what is in them.
    pub section_size: usize,
    /// Of those sections, the ones of which a token scores the blocks, per KV head.
    pub top_sections: usize,
    /// Sections further than this before the local region are scored by whole pages first, and count by pages where they are
    /// not opened. Never less than `fine_tokens`.
    pub middle_tokens: usize,
    /// Tokens of a page, rounded up to whole sections.
    pub page_size: usize,
    /// Of those pages, the ones of which a token scores the sections, per KV head.
    pub top_pages: usize,
    /// What scores a block.
    pub selector: Selector,
    /// How much the `mean-key` selector expects of a block beyond its mean key: the score of a block is
    /// `log n + scale (q . mu + reach sum_c |q_c| r_c)` with the radius `r_c = max_i |k_ic - mu_c|` of each channel. With 1
    /// that is a bound on the score of every key, with 0 the mean key alone. (Bounds by channel: Quest, Tang et al. 2024.)
    pub reach: f64,
    /// How blocks that are not retrieved count.
    pub far: Far,
    /// Nats added to the estimated log-mass of every block that is read through its statistics, so that it counts less
    /// or more. It changes no choice.
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
    /// none: then every block does as soon as it leaves the local region. With the `mean-key` selector.
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
            block_size: 4,
            top_k: 76,
            exact_tokens: 1024,
            fine_tokens: 8192,
            section_size: 64,
            top_sections: 32,
            middle_tokens: 131_072,
            page_size: 512,
            top_pages: 64,
            selector: Selector::MeanKey,
            reach: 0.75,
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
        if self.block_size == 0 || !self.chunk_size.is_multiple_of(self.block_size) {
            let expected = format!("a divisor of chunk_size = {}", self.chunk_size);
            return fail("block_size", self.block_size.to_string(), &expected);
        }
        if self.retrieval == Retrieval::Blocks && self.top_k == 0 {
            return fail("top_k", "0".into(), "at least 1 with retrieval = blocks (retrieval = none reads no block)");
        }
        for (setting, tokens) in [("section_size", self.section_size), ("page_size", self.page_size)] {
            if tokens > LONGEST_RUN {
                return fail(setting, tokens.to_string(), &format!("at most {LONGEST_RUN}"));
            }
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
        if !(self.reach.is_finite() && self.reach >= 0.0) {
            return fail("reach", self.reach.to_string(), "a finite number, 0 or more (0 scores mean keys alone)");
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

    /// Whether every token of a text of `tokens` tokens reads all before it: full attention.
    #[cfg(feature = "flex")]
    pub(crate) fn reads_everything(&self, tokens: usize) -> bool {
        let chunk = tokens.saturating_sub(1) / self.chunk_size;
        let few = self.local_start(chunk) / self.block_size <= self.top_k;
        self.retrieval == Retrieval::Blocks && (few || (chunk + 1) * self.chunk_size <= self.exact_tokens)
    }

    /// Tokens of a section: [`BlockAttentionConfig::section_size`] in whole blocks, at least one.
    pub fn section_tokens(&self) -> usize {
        self.section_size.div_ceil(self.block_size).max(1) * self.block_size
    }

    /// Tokens of a page: [`BlockAttentionConfig::page_size`] in whole sections, at least one.
    pub fn page_tokens(&self) -> usize {
        let section = self.section_tokens();
        self.page_size.div_ceil(section).max(1) * section
    }

    /// Whether what lies far back is scored by whole sections first.
    pub(crate) fn scores_sections(&self) -> bool {
        self.retrieval == Retrieval::Blocks && self.selector == Selector::MeanKey && self.far != Far::State
    }

    /// Whether the radii of blocks count in their scores, and so must be kept.
    pub(crate) fn needs_radii(&self) -> bool {
        self.retrieval == Retrieval::Blocks && self.selector == Selector::MeanKey && self.reach > 0.0
    }

    /// [`BlockAttentionConfig::fine_tokens`], at least what a token retrieves.
    pub(crate) fn scored_finely(&self) -> usize {
        self.fine_tokens.max(self.top_k.saturating_mul(self.block_size))
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
