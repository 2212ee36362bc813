//! A gate for each head, against the one number for all of them.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Retrieval};
use burn::tensor::{DType, Device, Tensor, TensorData};
use common::Rows;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = 8;
const TOKENS: usize = 60;

fn settings(retrieval: Retrieval) -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        sink_tokens: 2,
        retrieval,
        far_shift: 0.5,
        additive_gate: 3.0,
        ..Default::default()
    }
}

fn cache(attention: BlockAttentionConfig) -> AttentionCache {
    let config = CacheConfig {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: WIDTH,
        options: AttentionOptions::new(WIDTH),
        attention: Some(attention),
        dtype: DType::F32,
        stored: DType::F32,
        kernel: Kernel::Fastest,
    };
    AttentionCache::new(config, &Device::flex()).unwrap()
}

/// `[1, HEADS, TOKENS, WIDTH]`, read in two pieces and one token.
fn read(attention: BlockAttentionConfig, gates: Option<[f32; HEADS]>) -> Tensor<4> {
    let device = Device::flex();
    let mut cache = cache(attention);
    if let Some(gates) = gates {
        cache = cache.with_gates(Tensor::from_data(TensorData::from(gates), &device)).unwrap();
    }
    let rows = |heads: usize, seed: u64| Rows::random([1, heads, TOKENS, WIDTH], seed).tensor(&device).cast(DType::F32);
    let (query, keys, values) = (rows(HEADS, 1), rows(KV_HEADS, 2), rows(KV_HEADS, 3));
    let piece = |rows: &Tensor<4>, start: usize, end: usize| rows.clone().narrow(2, start, end - start);
    let read = [(0, 21), (21, 59), (59, TOKENS)].map(|(start, end)| {
        let rows = [&query, &keys, &values].map(|rows| piece(rows, start, end));
        let [query, keys, values] = rows;
        cache.prefill(query, keys, values, None).unwrap()
    });
    Tensor::cat(read.into(), 2)
}

#[test]
fn the_gate_of_a_head_is_what_one_gate_for_all_would_be_to_it() {
    let gates = [0.0, 1.0, -0.7, 2.5_f32];
    for retrieval in [Retrieval::Additive, Retrieval::State] {
        let own = read(BlockAttentionConfig { head_gates: true, ..settings(retrieval) }, Some(gates));
        for (head, gate) in gates.into_iter().enumerate() {
            let mut same = settings(retrieval);
            match retrieval {
                Retrieval::Additive => same.additive_gate = gate.into(),
                // Nats on the log-mass, beside what is there.
                _ => same.far_shift += f64::from(gate),
            }
            let numbers = |rows: Tensor<4>| rows.narrow(1, head, 1).try_into_vec_as::<f32>().unwrap();
            let (found, expected) = (numbers(own.clone()), numbers(read(same, None)));
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let right = (found - expected).abs() <= 1e-5 * (1.0 + expected.abs());
                assert!(right, "{retrieval:?}, head {head}, number {at}: {found}, expected {expected}");
            }
        }
        let without = numbers_of(read(settings(retrieval), None));
        let differ = numbers_of(own).iter().zip(&without).any(|(a, b)| (a - b).abs() > 1e-2);
        assert!(differ, "gates change something");
    }
}

fn numbers_of(rows: Tensor<4>) -> Vec<f32> {
    rows.try_into_vec_as::<f32>().unwrap()
}

#[test]
fn gates_that_do_not_fit_are_refused() {
    let blocks = BlockAttentionConfig { head_gates: true, chunk_size: 64, ..settings(Retrieval::Blocks) };
    assert!(blocks.validate().unwrap_err().to_string().contains("head_gates"));
    let device = Device::flex();
    let new = |head_gates| cache(BlockAttentionConfig { head_gates, ..settings(Retrieval::State) });
    let gates = |count: usize| Tensor::<1>::ones([count], &device);
    let says = |error: bsbr_attn::AttentionError, part: &str| assert!(error.to_string().contains(part), "{error}");
    says(new(true).with_gates(gates(KV_HEADS)).unwrap_err(), "expected [4]");
    says(new(false).with_gates(gates(HEADS)).unwrap_err(), "no head has a gate");
    let ones = |heads: usize| Tensor::<4>::ones([1, heads, 2, WIDTH], &device);
    let run = |cache: &mut AttentionCache| cache.prefill(ones(HEADS), ones(KV_HEADS), ones(KV_HEADS), None);
    says(run(&mut new(true)).unwrap_err(), "none were given");
    let mut used = new(true).with_gates(gates(HEADS)).unwrap();
    run(&mut used).unwrap();
    says(used.with_gates(gates(HEADS)).unwrap_err(), "before the first token");
}
