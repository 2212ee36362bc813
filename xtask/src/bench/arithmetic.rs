//! Floating-point operations that attention takes, so that a time can be held against the rate of matrix products.
//!
//! Counted are multiplications and additions of the products with keys, values and statistics, two for each pair of
//! numbers; exponentials and the statistics themselves (a few operations for each number of K and V) are left out. With
//! head width `d`, for one query head:
//!
//! - exact keys, each: `4 d` (the score `2 d`, the weighted value `2 d`). Causal attention of `n` tokens therefore takes
//!   `4 d n (n + 1) / 2`. What an implementation computes above the diagonal is not counted for it.
//! - `blocks`: exact keys are sinks, local region and `top_k` blocks; a candidate block takes `2 d` for its mean key, `2 d`
//!   for its radius where there is a `reach`, and with `far = mean` another `2 d` for its mean value. Where blocks are scored
//!   by sections first, candidates are the blocks of the last `fine_tokens`, the sections before them, and the blocks of the
//!   opened ones; pages likewise; with `far = state` `2 d^2` more for its state, and as many for the covariance where it has a weight.
//! - `state`: the same without blocks read exactly, but with the kept tokens; states are mixed once for a chunk, `2 d^2`
//!   each, and read with `2 d^2` by each token. The last quarter of a chunk scores every key once more to choose what is
//!   kept.
//! - `additive`: a score and `2 d^2` for each block and chunk, `2 d^2` for each token.
//! - training: [`TRAINING`] times as much.

use bsbr_attn::{BlockAttentionConfig, Far, KeysRead, Retrieval, Selector};

/// What reading and its gradients take, in times of reading alone: a pair of a query and a key has two products when read,
/// and five for its gradients (the score again, and one each for the gradients of weight, query, key and value).
pub(crate) const TRAINING: f64 = 3.5;

/// Operations of one query head for `tokens` tokens, the first of them at position `start`.
pub(crate) fn operations(
    attention: Option<&BlockAttentionConfig>,
    head_dim: usize,
    start: usize,
    tokens: usize,
) -> f64 {
    (start..start + tokens).map(|position| of_token(attention, head_dim as f64, position)).sum()
}

/// Operations of the token at `position`, those of its chunk shared among the chunk's tokens.
fn of_token(attention: Option<&BlockAttentionConfig>, d: f64, position: usize) -> f64 {
    let Some(a) = attention else { return 4.0 * d * (position + 1) as f64 };
    let local_start = a.local_start(position / a.chunk_size);
    let local = position + 1 - local_start;
    let sinks = a.sink_tokens.min(local_start);
    let block = a.statistics_block();
    let complete = local_start / block;
    let state = 2.0 * d * d;
    let per_chunk = |count: usize| count as f64 / a.chunk_size as f64;
    let (read, others) = match a.retrieval {
        Retrieval::None => (0, 0.0),
        Retrieval::Blocks => {
            let first = a.sink_tokens / block;
            let candidates = complete.saturating_sub(first);
            let chunk = position / a.chunk_size;
            if candidates <= a.top_k || (chunk + 1) * a.chunk_size <= a.exact_tokens {
                // Everything is read.
                (local_start - sinks, 0.0)
            } else {
                let far = match a.far {
                    Far::None => 0.0,
                    Far::Mean => 2.0 * d,
                    Far::State => 2.0 * d + state + if a.covariance_weight > 0.0 { state } else { 0.0 },
                };
                let scored = KeysRead::of_token(Some(a), None, position).summaries;
                let reach = if a.selector == Selector::MeanKey && a.reach > 0.0 { 2.0 * d } else { 0.0 };
                (a.top_k * block, scored as f64 * (2.0 * d + reach + far))
            }
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
    4.0 * d * (local + sinks + read) as f64 + others
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(retrieval: Retrieval) -> BlockAttentionConfig {
        let base = BlockAttentionConfig::default();
        BlockAttentionConfig { retrieval, block_size: 16, top_k: 16, exact_tokens: 0, ..base }
    }

    #[test]
    fn causal_attention_takes_the_closed_form() {
        let n = 1000.0;
        assert_eq!(operations(None, 64, 0, 1000), 4.0 * 64.0 * n * (n + 1.0) / 2.0);
    }

    #[test]
    fn a_short_text_takes_what_causal_attention_takes() {
        // 256 local tokens, then 16 blocks of 16 that are all read.
        let blocks = config(Retrieval::Blocks);
        assert_eq!(operations(Some(&blocks), 64, 0, 512), operations(None, 64, 0, 512));
        let none = config(Retrieval::None);
        assert_eq!(operations(Some(&none), 64, 0, 256), operations(None, 64, 0, 256));
    }

    #[test]
    fn a_token_far_into_the_text_reads_what_the_settings_say() {
        // Token 127 of chunk 10: 256 local keys, 4 sinks, 16 blocks of 16, and 72 candidates with a mean, a radius and a value.
        let at = 11 * 128 - 1;
        let blocks = config(Retrieval::Blocks);
        let exact = 4.0 * 64.0 * (256.0 + 4.0 + 256.0);
        assert_eq!(operations(Some(&blocks), 64, at, 1), exact + 72.0 * 6.0 * 64.0);
        let dropped = BlockAttentionConfig { far: Far::None, ..blocks };
        assert_eq!(operations(Some(&dropped), 64, at, 1), exact + 72.0 * 4.0 * 64.0);
        let by_mean = BlockAttentionConfig { reach: 0.0, ..dropped };
        assert_eq!(operations(Some(&by_mean), 64, at, 1), exact + 72.0 * 2.0 * 64.0);
    }

    #[test]
    fn far_back_a_token_scores_sections() {
        // 100 chunks back from the local region: 16 of them block by block, 84 as 4 sections each, 64 of these opened.
        let at = 102 * 128 - 1;
        let blocks =
            BlockAttentionConfig { fine_tokens: 2048, section_size: 32, top_sections: 64, ..config(Retrieval::Blocks) };
        let exact = 4.0 * 64.0 * (256.0 + 4.0 + 256.0);
        let scored = 16 * 8 + 64 * 2 + 84 * 4;
        assert_eq!(operations(Some(&blocks), 64, at, 1), exact + f64::from(scored) * 6.0 * 64.0);
    }

    #[test]
    fn bounded_states_take_the_same_at_every_depth() {
        let bounded = BlockAttentionConfig { max_chunks: Some(8), ..config(Retrieval::State) };
        let of = |chunk: usize| operations(Some(&bounded), 64, chunk * 128, 128);
        assert_eq!(of(50), of(500));
        assert!(of(50) < operations(None, 64, 50 * 128, 128));
        // A hundred keys more to read, and once in four tokens 260 + 100 to score.
        let kept = BlockAttentionConfig { kept_tokens: 100, ..bounded.clone() };
        let more = 128.0 * 64.0 * (4.0 * 100.0 + 2.0 * (4.0 + 100.0 + 256.0) / 4.0);
        assert_eq!(operations(Some(&kept), 64, 50 * 128, 128) - of(50), more);
    }
}
