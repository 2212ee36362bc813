//! Keys and values that a cache keeps in f16 or bf16.
#![cfg(feature = "flex")]

use bsbr_attn::{
    AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, FarPositions, Kernel, Retrieval, attend,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = 8;
const TOKENS: usize = 150;

fn rows(heads: usize, salt: f32) -> Tensor<4> {
    let numbers: Vec<f32> = (0..heads * TOKENS * WIDTH).map(|at| (salt + 1.7 * at as f32).sin() * 1.3).collect();
    Tensor::from_data(TensorData::new(numbers, [1, heads, TOKENS, WIDTH]), &Device::flex())
}

fn inputs() -> [Tensor<4>; 3] {
    [rows(HEADS, 0.1), rows(KV_HEADS, 5.3), rows(KV_HEADS, 9.7)]
}

fn cache(attention: Option<BlockAttentionConfig>, stored: DType, kernel: Kernel) -> AttentionCache {
    let config = CacheConfig {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: WIDTH,
        options: AttentionOptions::new(WIDTH),
        attention,
        dtype: DType::F32,
        stored,
        kernel,
    };
    AttentionCache::new(config, &Device::flex()).unwrap()
}

/// Every kind of retrieval, and full attention.
fn kinds() -> Vec<Option<BlockAttentionConfig>> {
    let base = BlockAttentionConfig { chunk_size: 8, block_size: 4, sink_tokens: 2, ..Default::default() };
    let blocks = BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 0,
        sink_tokens: 2,
        exact_tokens: 0,
        threshold: 1.0 / 128.0,
        max_keys: 30,
        fine_tokens: 0,
        max_sections: 1,
        ..Default::default()
    };
    let kind = |retrieval| BlockAttentionConfig { retrieval, ..base.clone() };
    let kept = BlockAttentionConfig { kept_tokens: 10, ..kind(Retrieval::State) };
    let kinds = [kind(Retrieval::None), blocks, kind(Retrieval::State), kind(Retrieval::Additive), kept];
    kinds.into_iter().map(Some).chain([None]).collect()
}

/// Reads the text in pieces.
fn read(cache: &mut AttentionCache, [query, keys, values]: &[Tensor<4>; 3]) -> Tensor<4> {
    let mut outputs = Vec::new();
    let mut at = 0;
    for count in [60, 1, 1, 70, 18] {
        let of = |rows: &Tensor<4>| rows.clone().narrow(2, at, count);
        outputs.push(cache.prefill(of(query), of(keys), of(values), None).unwrap());
        at += count;
    }
    Tensor::cat(outputs, 2)
}

fn bits(tensor: Tensor<4>) -> Vec<u32> {
    tensor.try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn keys_and_values_are_rounded_as_they_come_in_and_nothing_else_is() {
    let [query, keys, values] = inputs();
    for stored in [DType::F16, DType::BF16] {
        let rounded =
            [query.clone(), keys.clone().cast(stored).cast(DType::F32), values.clone().cast(stored).cast(DType::F32)];
        for kind in kinds() {
            for kernel in [Kernel::Fastest, Kernel::Plain] {
                let narrow =
                    read(&mut cache(kind.clone(), stored, kernel), &[query.clone(), keys.clone(), values.clone()]);
                let whole = read(&mut cache(kind.clone(), DType::F32, kernel), &rounded);
                assert_eq!(bits(narrow), bits(whole), "{stored:?} {kernel:?} {kind:?}");
            }
        }
    }
}

#[test]
fn half_the_bytes_hold_a_text() {
    for stored in [DType::F16, DType::BF16] {
        let bytes = |attention: Option<BlockAttentionConfig>, stored| {
            let mut cache = cache(attention, stored, Kernel::Fastest);
            read(&mut cache, &inputs());
            cache.bytes()
        };
        let full = bytes(None, DType::F32);
        assert_eq!(bytes(None, stored) * 2, full);
        // The index stays as it is: exactly as much is saved as without any.
        let blocks = kinds().remove(1);
        let (whole, narrow) = (bytes(blocks.clone(), DType::F32), bytes(blocks, stored));
        let room = 2 * KV_HEADS * WIDTH * 2;
        let saved = whole - narrow;
        assert!(saved.is_multiple_of(room) && (TOKENS..2 * TOKENS + 64).contains(&(saved / room)), "{saved} bytes");
    }
}

#[test]
fn keys_that_move_are_rounded_at_every_move_and_no_more() {
    let [query, keys, values] = inputs();
    let blocks = kinds().remove(1);
    let positions = FarPositions { trained: 100, frequencies: vec![0.9, 0.2, 0.05] };
    let of = |stored, kernel| {
        let cache = cache(blocks.clone(), stored, kernel).with_far_positions(positions.clone()).unwrap();
        read(&mut { cache }, &[query.clone(), keys.clone(), values.clone()])
    };
    let whole = of(DType::F32, Kernel::Fastest);
    // A few moves of a text that is longer than trained: a few roundings of 2^-11 or 2^-8.
    for (stored, bound) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let narrow = of(stored, Kernel::Fastest);
        let difference = (narrow - whole.clone()).powi_scalar(2).mean().sqrt().into_scalar::<f32>();
        assert!(difference > 0.0 && difference < bound, "{stored:?}: {difference}");
        // Both forms hold the same rounded keys.
        let apart = (of(stored, Kernel::Fastest) - of(stored, Kernel::Plain)).abs().max().into_scalar::<f32>();
        assert!(apart < 1e-4, "{stored:?}: {apart}");
    }
}

#[test]
fn numbers_beyond_the_type_make_no_panic() {
    let [query, keys, values] = inputs();
    for stored in [DType::F16, DType::BF16] {
        for extreme in [1e6, f32::INFINITY, f32::NAN, 1e-40] {
            for kind in kinds() {
                let keys = keys.clone() * extreme;
                read(&mut cache(kind, stored, Kernel::Fastest), &[query.clone(), keys, values.clone() * extreme]);
            }
        }
    }
}

#[test]
fn rows_of_a_narrower_type_than_the_query_are_read_as_they_are() {
    let [query, keys, values] = inputs();
    let narrow = |rows: &Tensor<4>| rows.clone().cast(DType::F16);
    let options = AttentionOptions::new(WIDTH);
    let rounded = |rows: &Tensor<4>| narrow(rows).cast(DType::F32);
    for kind in kinds().into_iter().take(2) {
        let expected =
            attend(query.clone(), rounded(&keys), rounded(&values), None, kind.as_ref(), options.clone()).unwrap();
        let found =
            attend(query.clone(), narrow(&keys), narrow(&values), None, kind.as_ref(), options.clone()).unwrap();
        let apart = (found - expected).abs().max().into_scalar::<f32>();
        assert!(apart < 1e-5, "{kind:?}: {apart}");
    }
}

#[test]
fn gradients_reach_a_query_whose_keys_and_values_are_of_another_type() {
    let [query, keys, values] = inputs();
    let gradient = |narrow: bool, kind: Option<&BlockAttentionConfig>| {
        let rows = |rows: &Tensor<4>| {
            let rounded = rows.clone().cast(DType::F16);
            let rows = if narrow { rounded } else { rounded.cast(DType::F32) };
            rows.autodiff()
        };
        let query = query.clone().autodiff().require_grad();
        let output =
            attend(query.clone(), rows(&keys), rows(&values), None, kind, AttentionOptions::new(WIDTH)).unwrap();
        let gradients = output.powi_scalar(2).sum().backward();
        query.grad(&gradients).expect("the query is asked for one")
    };
    for kind in kinds().into_iter().take(2).chain([None]) {
        let expected = gradient(false, kind.as_ref());
        let (apart, largest) = ((gradient(true, kind.as_ref()) - expected.clone()).abs().max(), expected.abs().max());
        let (apart, largest) = (apart.into_scalar::<f32>(), largest.into_scalar::<f32>());
        assert!(largest > 0.0 && apart < 1e-4 * largest, "{kind:?}: {apart} of {largest}");
    }
}
