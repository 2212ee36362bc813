//! Attention over keys and values that another cache holds.

mod common;

use bsbr_attn::{AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, Retrieval};
use burn::tensor::{DType, Tensor};
use common::{Rows, Runner, devices};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = 16;
/// Where an index of chunks of 64 tokens is founded.
const FOUNDED: usize = 192;
const TOKENS: usize = 500;

fn indexed() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 1,
        sink_tokens: 4,
        exact_tokens: FOUNDED,
        max_keys: 20,
        threshold: 1.0 / 64.0,
        ..Default::default()
    }
}

/// The settings two caches may share keys under, with and without a window.
fn cases() -> Vec<(Option<BlockAttentionConfig>, AttentionOptions)> {
    let options = |window| AttentionOptions { window, ..AttentionOptions::new(WIDTH) };
    [None, Some(indexed())]
        .into_iter()
        .flat_map(|attention| [None, Some(100), Some(400)].map(|window| (attention.clone(), options(window))))
        .collect()
}

fn cache(runner: &Runner, attention: Option<BlockAttentionConfig>, options: &AttentionOptions) -> AttentionCache {
    let config = CacheConfig {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: WIDTH,
        options: options.clone(),
        attention,
        dtype: DType::F32,
        stored: DType::F32,
        kernel: runner.kernel,
    };
    AttentionCache::new(config, runner).unwrap()
}

fn rows(runner: &Runner, heads: usize, seed: u64) -> Tensor<4> {
    Rows::random([1, heads, TOKENS, WIDTH], seed).tensor(runner)
}

fn part(rows: &Tensor<4>, from: usize, to: usize) -> Tensor<4> {
    rows.clone().narrow(2, from, to - from)
}

fn difference(a: &Tensor<4>, b: &Tensor<4>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let numbers = (a.clone() - b.clone()).abs().try_into_vec_as::<f32>().unwrap();
    numbers.into_iter().fold(0.0, |worst, x| if x.is_nan() { f32::INFINITY } else { worst.max(x) })
}

#[test]
fn the_same_queries_read_the_same_through_another_cache_whatever_the_pieces() {
    for runner in devices() {
        let [query, keys, values] =
            [(HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)].map(|(heads, seed)| rows(&runner, heads, seed));
        for (attention, options) in cases() {
            for piece in [TOKENS, 7, 100] {
                let (mut owner, mut reader) =
                    (cache(&runner, attention.clone(), &options), cache(&runner, attention.clone(), &options));
                let mut at = 0;
                while at < TOKENS {
                    let end = (at + piece).min(TOKENS);
                    let [q, k, v] = [&query, &keys, &values].map(|rows| part(rows, at, end));
                    let expected = owner.prefill(q.clone(), k, v, None).unwrap();
                    let found = reader.read_shared(&owner, q).unwrap();
                    let error = difference(&found, &expected);
                    assert!(error <= 1e-5, "{attention:?} {options:?} {at}..{end} differs by {error}");
                    at = end;
                }
                assert_eq!(reader.retrieved().keys, owner.retrieved().keys, "{attention:?} {options:?}");
                assert_eq!((reader.bytes(), reader.len()), (cache(&runner, attention.clone(), &options).bytes(), 0));
            }
        }
    }
}

#[test]
fn other_queries_read_what_they_would_of_an_index_that_the_owner_founded() {
    for runner in devices() {
        let [first, other] = [1, 4].map(|seed| rows(&runner, HEADS, seed));
        let [keys, values] = [2, 3].map(|seed| rows(&runner, KV_HEADS, seed));
        for (attention, options) in cases() {
            let mut owner = cache(&runner, attention.clone(), &options);
            owner.prefill(first.clone(), keys.clone(), values.clone(), None).unwrap();
            let found = cache(&runner, attention.clone(), &options).read_shared(&owner, other.clone()).unwrap();
            // Their own cache, founded by the queries of the other.
            let mut own = cache(&runner, attention.clone(), &options);
            let founding = Tensor::cat(vec![part(&first, 0, FOUNDED), part(&other, FOUNDED, TOKENS)], 2);
            let expected = own.prefill(founding, keys.clone(), values.clone(), None).unwrap();
            let error = difference(&part(&found, FOUNDED, TOKENS), &part(&expected, FOUNDED, TOKENS));
            assert!(error <= 1e-4, "{attention:?} {options:?} differs by {error}");
            // Up to there everything is read.
            let before =
                cache(&runner, None, &options).prefill(other.clone(), keys.clone(), values.clone(), None).unwrap();
            let error = difference(&part(&found, 0, FOUNDED), &part(&before, 0, FOUNDED));
            assert!(error <= 1e-5, "{attention:?} {options:?} differs by {error} before the index");
        }
    }
}

#[test]
fn what_the_owner_does_not_hold_is_refused() {
    for runner in devices() {
        let options = AttentionOptions::new(WIDTH);
        let [query, keys, values] =
            [(HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)].map(|(heads, seed)| rows(&runner, heads, seed));
        let state = BlockAttentionConfig { retrieval: Retrieval::State, ..Default::default() };
        let none =
            BlockAttentionConfig { retrieval: Retrieval::None, chunk_size: 8, block_size: 4, ..Default::default() };
        let held = |attention: Option<BlockAttentionConfig>| {
            let mut owner = cache(&runner, attention, &options);
            owner.prefill(query.clone(), keys.clone(), values.clone(), None).unwrap();
            owner
        };
        let refused = |own: Option<BlockAttentionConfig>, owner: &AttentionCache, query: Tensor<4>| {
            let error = cache(&runner, own, &options).read_shared(owner, query).unwrap_err();
            assert!(matches!(error, AttentionError::Input(_) | AttentionError::Shape { .. }), "{error}");
        };
        refused(None, &held(Some(none)), query.clone());
        refused(Some(state), &held(None), query.clone());
        refused(Some(indexed()), &held(None), query.clone());
        refused(None, &cache(&runner, None, &options), query.clone());
        refused(None, &held(None), query.clone().narrow(1, 0, 2));
        let longer = Tensor::cat(vec![query.clone(), query.clone()], 2);
        refused(None, &held(None), longer);
        // Keys that an index was made of serve a layer that reads all of them.
        let full = held(None);
        let expected = cache(&runner, None, &options).read_shared(&full, query.clone()).unwrap();
        let found = cache(&runner, None, &options).read_shared(&held(Some(indexed())), query.clone()).unwrap();
        assert!(difference(&found, &expected) <= 1e-6);
    }
}
