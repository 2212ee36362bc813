//! Bounded when asked: the bytes of a cache do not depend on the length of the text.

use bsbr_attn::{AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Retrieval, Selector};
use burn::tensor::{DType, Tensor};
use proptest::prelude::*;

use crate::common::{Case, Rows, devices, other_cases, settings};

const CHUNKS: usize = 60;

/// Bytes of the cache after each token of `CHUNKS` chunks.
fn bytes(case: &Case, device: &crate::common::Runner) -> Vec<usize> {
    let inputs = case.inputs();
    let mut cache = case.cache(device);
    (0..case.tokens)
        .map(|t| {
            case.feed(&mut cache, &inputs, t..t + 1, device);
            cache.bytes()
        })
        .collect()
}

fn long(case: Case, config: BlockAttentionConfig) -> Case {
    Case { batch: 1, tokens: CHUNKS * config.chunk_size, config, far: None, ..case }
}

proptest! {
    #![proptest_config(settings(12))]

    #[test]
    fn a_bounded_state_and_no_retrieval_have_constant_bytes(case in other_cases(), limit in 1usize..=4) {
        let chunk = case.config.chunk_size;
        let kept = BlockAttentionConfig { selector: Selector::Index, kept_tokens: 10, ..case.config.clone() };
        let base = BlockAttentionConfig { kept_tokens: 0, ..case.config.clone() };
        let state = |max_chunks, base| BlockAttentionConfig { retrieval: Retrieval::State, max_chunks, ..base };
        for config in [
            state(Some(limit), base.clone()),
            state(Some(limit), kept.clone()),
            state(Some(0), kept),
            BlockAttentionConfig { retrieval: Retrieval::None, max_chunks: None, ..base },
        ] {
            let case = long(case.clone(), config);
            for device in devices() {
                let bytes = bytes(&case, &device);
                // By the tenth chunk the sinks lie behind the local region and blocks have begun to merge.
                let (warm, later) = bytes[9 * chunk..].split_at(chunk);
                for (at, chunk) in later.chunks(chunk).enumerate() {
                    prop_assert_eq!(chunk, warm, "{:?}, chunk {}", case.config, 10 + at);
                }
            }
        }
    }

    #[test]
    fn other_kinds_grow_with_the_text_and_no_faster(case in other_cases()) {
        for retrieval in [Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            let selector = Selector::Meta;
            let base = BlockAttentionConfig { retrieval, selector, ..case.config.clone() };
            let config = BlockAttentionConfig { kept_tokens: 0, max_chunks: None, ..base };
            let case = long(case.clone(), config);
            for device in devices() {
                let bytes = bytes(&case, &device);
                let at = |share: usize| bytes[bytes.len() / share - 1] as f64;
                // Room doubles when it runs out, so four times the text is two to eight times the bytes.
                let growth = at(1) / at(4);
                prop_assert!((2.0..=8.0).contains(&growth), "{retrieval:?} grows by {growth}");
            }
        }
    }
}

/// A text of one KV head of 64 channels with the default settings, but chunks of 64.
fn index_case(tokens: usize) -> Case {
    Case {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        tokens,
        config: BlockAttentionConfig { chunk_size: 64, ..Default::default() },
        options: AttentionOptions::new(64),
        seed: 3,
        far: None,
        stored: DType::F32,
    }
}

#[test]
fn room_that_is_asked_for_is_made_at_once_and_no_more_of_it() {
    let case = index_case(2048 + 64);
    let inputs = case.inputs();
    for device in devices() {
        let mut cache = case.cache(&device);
        cache.reserve(case.tokens);
        case.feed(&mut cache, &inputs, 0..1100, &device);
        let bytes = cache.bytes();
        for start in (1100..case.tokens).step_by(92) {
            case.feed(&mut cache, &inputs, start..start + 92, &device);
            assert_eq!(cache.bytes(), bytes, "{start}");
        }
        assert_eq!(cache.len(), case.tokens);
        // Keys and values, and an index of at most as many numbers as the keys.
        assert!(bytes <= case.tokens * 64 * 4 * 3, "{bytes} bytes");
    }
}

#[test]
fn room_beyond_4096_tokens_grows_by_a_quarter() {
    let case = index_case(6200);
    let inputs = case.inputs();
    for device in devices() {
        let config = CacheConfig { attention: None, ..case.cache(&device).config().clone() };
        let mut cache = AttentionCache::new(config, &device).unwrap();
        let of = |rows: &Rows, from: usize, count: usize| rows.tensor(&device).narrow(2, from, count);
        let mut feed = |from: usize, count: usize| {
            cache.append(of(&inputs.keys, from, count), of(&inputs.values, from, count), None).unwrap();
            cache.bytes() / (2 * 64 * 4)
        };
        let room = [feed(0, 3000), feed(3000, 1), feed(3001, 2999), feed(6000, 1), feed(6001, 199)];
        assert_eq!(room, [3000, 6000, 6000, 7500, 7500]);
    }
}

#[test]
fn compressed_states_take_their_share_of_the_bytes() {
    for device in devices() {
        for retrieval in [Retrieval::State, Retrieval::Additive] {
            let bytes = |factor: usize, calibrated_states: bool| {
                let config = BlockAttentionConfig {
                    chunk_size: 8,
                    block_size: 8,
                    retrieval,
                    covariance_weight: 0.0,
                    compression_factor: factor,
                    calibrated_states,
                    ..Default::default()
                };
                let options = AttentionOptions::new(16);
                let case = Case {
                    batch: 1,
                    heads: 2,
                    kv_heads: 1,
                    head_dim: 16,
                    tokens: 160,
                    config,
                    options,
                    far: None,
                    stored: DType::F32,
                    seed: 3,
                };
                let mut cache = case.cache(&device);
                if calibrated_states {
                    cache = cache.with_state_basis(Tensor::eye(16, &device).unsqueeze::<3>()).unwrap();
                }
                case.feed(&mut cache, &case.inputs(), 0..case.tokens, &device);
                cache.bytes()
            };
            for calibrated in [false, true] {
                let [whole, half, quarter, eighth] = [1, 2, 4, 8].map(|factor| bytes(factor, calibrated));
                // Halves what is left each time; nothing else changes.
                assert_eq!(whole - half, 2 * (half - quarter), "{retrieval:?}");
                assert_eq!(half - quarter, 2 * (quarter - eighth), "{retrieval:?}");
                // 19 blocks of 8 tokens or a few more with the room to grow, 16 * 16 numbers each.
                let blocks = (whole - half) / (16 * 16 * 4 / 2);
                assert!((18..=36).contains(&blocks), "{retrieval:?}: {blocks} blocks");
            }
        }
    }
}

/// The settings of `configs/bounded.toml`, for heads as SmolLM2-135M has them.
#[test]
fn kept_tokens_and_statistics_fit_into_an_eighth_of_the_cache_of_8192_tokens() {
    let config = BlockAttentionConfig {
        retrieval: Retrieval::State,
        kept_tokens: 608,
        block_size: 16,
        max_chunks: Some(8),
        covariance_weight: 0.0,
        compression_factor: 4,
        ..Default::default()
    };
    let options = AttentionOptions::new(64);
    let case = Case {
        batch: 1,
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
        tokens: 1408,
        config,
        options,
        far: None,
        stored: DType::F32,
        seed: 7,
    };
    let inputs = case.inputs();
    for device in devices() {
        let mut cache = case.cache(&device);
        let mut bytes = Vec::new();
        for chunk in 0..11 {
            case.feed(&mut cache, &inputs, chunk * 128..(chunk + 1) * 128, &device);
            bytes.push(cache.bytes());
        }
        assert_eq!(bytes[9], bytes[10], "no longer constant");
        let full = 8192 * 64 * 2 * 4;
        assert!(8 * bytes[10] <= full, "{} bytes of {full}", bytes[10]);
    }
}
