//! Floating-point operations that attention takes, so that a time can be held against the rate of matrix products.
//!
//! Counted are multiplications and additions of the products with keys, values and statistics, two for each pair of
//! numbers; exponentials and the statistics themselves (a few operations for each number of K and V) are left out. With
//! head width `d`, for one query head:
//!
//! - exact keys, each: `4 d` (the score `2 d`, the weighted value `2 d`). Causal attention of `n` tokens therefore takes
//!   `4 d n (n + 1) / 2`. What an implementation computes above the diagonal is not counted for it.
//! - `blocks` with an index: exact keys are sinks, local region and the keys it retrieves, which depend on the text and are
//!   measured; where they are not, [`USUAL_KEYS`] stand for them. With `far = mean` a section takes `2 d` more for its mean value.
//! - the index itself computes in integers of 8 bits, which are counted apart: `2 d` for the mean of a block, 2 for each
//!   channel of each of its 16 keys, and `4 d` for the mean and radius of a section beyond `fine_tokens`. Of these `max_sections` are
//!   taken to be opened, the most there can be.
//! - `blocks` with `meta`: exact are `meta_blocks`; a candidate block takes `2 d` for its mean key and with `far = mean` another
//!   `2 d` for its mean value; with `far = state` `2 d^2` more for its state, and as many for the covariance where it has a weight.
//! - `state`: the same without blocks read exactly, but with the kept tokens; states are mixed once for a chunk, `2 d^2`
//!   each, and read with `2 d^2` by each token. The last quarter of a chunk scores every key once more to choose what is
//!   kept.
//! - `additive`: a score and `2 d^2` for each block and chunk, `2 d^2` for each token.
//! - training: [`TRAINING`] times as much.

use std::ops::Range;

use bsbr_attn::{
    BlockAttentionConfig, Far, KeysRead, Retrieval,
    index::{BLOCK, SECTION},
};

/// What reading and its gradients take, in times of reading alone: a pair of a query and a key has two products when read,
/// and five for its gradients (the score again, and one each for the gradients of weight, query, key and value).
pub(crate) const TRAINING: f64 = 3.5;

/// Keys a token retrieves by an index where nobody counted: about what the default settings do in models of text.
const USUAL_KEYS: usize = 64;

/// How much cheaper an operation of 8-bit integers is taken to be than one of floating point: as many times as it is smaller.
const INTEGER_TIME: f64 = 0.25;

/// Operations of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Operations {
    pub(crate) float: f64,
    pub(crate) integer: f64,
}

impl Operations {
    /// About how long they take, in floating-point operations.
    pub(crate) fn time(&self) -> f64 {
        self.float + INTEGER_TIME * self.integer
    }
}

/// Operations of one query head for the tokens `range` of a text. `retrieved` are the keys an index chose for all of them.
pub(crate) fn operations(
    attention: Option<&BlockAttentionConfig>,
    head_dim: usize,
    range: Range<usize>,
    retrieved: Option<f64>,
) -> Operations {
    let mut sum = Operations::default();
    for position in range {
        let of = of_token(attention, head_dim, position, retrieved.is_none());
        sum = Operations { float: sum.float + of.float, integer: sum.integer + of.integer };
    }
    sum.float += 4.0 * head_dim as f64 * retrieved.unwrap_or(0.0);
    sum
}

/// Operations of the token at `position`, those of its chunk shared among the chunk's tokens.
fn of_token(attention: Option<&BlockAttentionConfig>, head_dim: usize, position: usize, usual: bool) -> Operations {
    let d = head_dim as f64;
    let Some(a) = attention else { return Operations { float: 4.0 * d * (position + 1) as f64, integer: 0.0 } };
    let local_start = a.local_start(position / a.chunk_size);
    let local = position + 1 - local_start;
    let sinks = a.sink_tokens.min(local_start);
    let block = a.statistics_block();
    let complete = local_start / block;
    let state = 2.0 * d * d;
    let per_chunk = |count: usize| count as f64 / a.chunk_size as f64;
    let everything = KeysRead::of_token(Some(a), None, position).exact == position as u64 + 1;
    let mut integer = 0.0;
    let (read, others) = match a.retrieval {
        Retrieval::None => (0, 0.0),
        Retrieval::Blocks if everything => (local_start - sinks, 0.0),
        Retrieval::Blocks if a.uses_index() => {
            let (closed, sections, blocks) = scored(a, local_start);
            let key = 2.0 * a.residual_channels(head_dim) as f64;
            integer = blocks as f64 * (2.0 * d + BLOCK as f64 * key) + closed as f64 * 4.0 * d;
            let far = if a.far == Far::None { 0.0 } else { sections as f64 * 2.0 * d };
            let most = a.max_keys.min(local_start - sinks);
            (if usual { USUAL_KEYS.min(most) } else { 0 }, far)
        }
        Retrieval::Blocks => {
            let far = match a.far {
                Far::None => 0.0,
                Far::Mean => 2.0 * d,
                Far::State => 2.0 * d + state + if a.covariance_weight > 0.0 { state } else { 0.0 },
            };
            let candidates = complete.saturating_sub(a.sink_tokens / block);
            (a.meta_blocks * block, candidates as f64 * (2.0 * d + far))
        }
        Retrieval::State => {
            let kept = a.kept_tokens.min(local_start - sinks);
            let rest = if kept > 0 { (local_start - sinks - kept).div_ceil(block) } else { complete };
            let blocks = rest.min(a.max_chunks.unwrap_or(usize::MAX));
            let scored = if kept > 0 { sinks + kept + (a.local_chunks + 1) * a.chunk_size } else { 0 };
            let covariance = if a.covariance_weight > 0.0 { state } else { 0.0 };
            let reads = if blocks > 0 { state } else { 0.0 };
            let choice = scored as f64 * 2.0 * d / 4.0;
            (kept, blocks as f64 * (4.0 * d + covariance) + per_chunk(blocks) * (2.0 * d + state) + reads + choice)
        }
        Retrieval::Additive => {
            let reads = if complete > 0 { state } else { 0.0 };
            (0, per_chunk(complete) * (2.0 * d + state) + reads)
        }
    };
    Operations { float: 4.0 * d * (local + sinks + read) as f64 + others, integer }
}

/// Sections beyond `fine_tokens`, all sections, and blocks that a token scores whose local region begins at `local_start`.
fn scored(a: &BlockAttentionConfig, local_start: usize) -> (usize, usize, usize) {
    let beyond = local_start.saturating_sub(a.fine_tokens) / SECTION;
    let closed = if beyond <= a.max_sections { 0 } else { beyond };
    let opened = a.max_sections.min(closed);
    let blocks = (local_start - SECTION * closed + SECTION * opened).div_ceil(BLOCK);
    (closed, local_start.div_ceil(SECTION), blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(retrieval: Retrieval) -> BlockAttentionConfig {
        BlockAttentionConfig { retrieval, exact_tokens: 0, ..BlockAttentionConfig::default() }
    }

    fn float(attention: Option<&BlockAttentionConfig>, range: Range<usize>) -> f64 {
        operations(attention, 64, range, Some(0.0)).float
    }

    #[test]
    fn causal_attention_takes_the_closed_form() {
        let n = 1000.0;
        let expected = Operations { float: 4.0 * 64.0 * n * (n + 1.0) / 2.0, integer: 0.0 };
        assert_eq!(operations(None, 64, 0..1000, None), expected);
    }

    #[test]
    fn a_short_text_takes_what_causal_attention_takes() {
        let blocks = BlockAttentionConfig { exact_tokens: 512, ..config(Retrieval::Blocks) };
        assert_eq!(operations(Some(&blocks), 64, 0..512, None), operations(None, 64, 0..512, None));
        let none = config(Retrieval::None);
        assert_eq!(operations(Some(&none), 64, 0..256, None), operations(None, 64, 0..256, None));
    }

    #[test]
    fn a_token_far_into_the_text_takes_what_the_settings_say_and_was_retrieved() {
        // Token 127 of chunk 10: 256 local keys and 4 sinks; before it 9 chunks, 18 sections, 72 blocks.
        let at = 11 * 128 - 1..11 * 128;
        let blocks = config(Retrieval::Blocks);
        let exact = 4.0 * 64.0 * (256.0 + 4.0);
        let found = operations(Some(&blocks), 64, at.clone(), Some(37.0));
        assert_eq!(found.float, exact + 4.0 * 64.0 * 37.0 + 18.0 * 2.0 * 64.0);
        // A mean of 64 numbers, and 16 keys of 32 channels.
        assert_eq!(found.integer, 72.0 * (2.0 * 64.0 + 16.0 * 2.0 * 32.0));
        let usual = operations(Some(&blocks), 64, at.clone(), None);
        assert_eq!(usual.float, exact + 4.0 * 64.0 * 64.0 + 18.0 * 2.0 * 64.0);
        let dropped = BlockAttentionConfig { far: Far::None, index_channels: Some(16), ..blocks };
        let found = operations(Some(&dropped), 64, at, Some(0.0));
        assert_eq!((found.float, found.integer), (exact, 72.0 * (2.0 * 64.0 + 16.0 * 2.0 * 16.0)));
    }

    #[test]
    fn far_back_a_token_scores_sections() {
        // 100 chunks before the local region: 16 of them block by block, the 168 sections of the others first, 64 of which are
        // opened.
        let at = 102 * 128 - 1..102 * 128;
        let blocks = BlockAttentionConfig { fine_tokens: 2048, max_sections: 64, ..config(Retrieval::Blocks) };
        let found = operations(Some(&blocks), 64, at, Some(0.0));
        let scored = f64::from(16 * 8 + 64 * 4) * (2.0 * 64.0 + 16.0 * 2.0 * 32.0) + 168.0 * 4.0 * 64.0;
        assert_eq!(found.integer, scored);
        assert_eq!(found.float, 4.0 * 64.0 * (256.0 + 4.0) + 200.0 * 2.0 * 64.0);
    }

    #[test]
    fn meta_projections_choose_whole_blocks() {
        let at = 11 * 128 - 1..11 * 128;
        let meta = BlockAttentionConfig { selector: bsbr_attn::Selector::Meta, ..config(Retrieval::Blocks) };
        // 32 blocks of 16, and 72 candidates with a mean key and a mean value.
        let expected = 4.0 * 64.0 * (256.0 + 4.0 + 512.0) + 72.0 * 4.0 * 64.0;
        assert_eq!(operations(Some(&meta), 64, at, None), Operations { float: expected, integer: 0.0 });
    }

    #[test]
    fn bounded_states_take_the_same_at_every_depth() {
        let bounded = BlockAttentionConfig { max_chunks: Some(8), ..config(Retrieval::State) };
        let of = |chunk: usize| float(Some(&bounded), chunk * 128..chunk * 128 + 128);
        assert_eq!(of(50), of(500));
        assert!(of(50) < float(None, 50 * 128..51 * 128));
        // A hundred keys more to read, and once in four tokens 260 + 100 to score.
        let kept = BlockAttentionConfig { kept_tokens: 100, ..bounded.clone() };
        let more = 128.0 * 64.0 * (4.0 * 100.0 + 2.0 * (4.0 + 100.0 + 256.0) / 4.0);
        assert_eq!(float(Some(&kept), 50 * 128..51 * 128) - of(50), more);
    }
}
