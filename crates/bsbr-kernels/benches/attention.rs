//! Attention over all keys and over those that an index finds, forward and backward: `cargo bench -p bsbr-kernels`.

use bsbr_kernels::{
    Heads,
    attention::{
        BlockInput, BlockOptions, CausalOptions, Forward, IndexOptions, block_attention, causal_attention,
        causal_attention_backward,
    },
    index::{KeyIndex, SECTION},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const HEADS: usize = 12;
const HEAD_DIM: usize = 64;
/// How much of a row is that of the token before it, as in a real model.
const CORRELATION: f32 = 0.9;

fn options() -> CausalOptions {
    CausalOptions { scale: 0.125, softcap: None, window: None, slopes: None, sink_logits: None }
}

/// A walk along the text, `[1, HEADS, tokens, HEAD_DIM]`.
fn rows(seed: u64, tokens: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let mut rows: Vec<f32> =
        (0..HEADS * tokens * HEAD_DIM).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect();
    for head in rows.chunks_exact_mut(tokens * HEAD_DIM) {
        for at in HEAD_DIM..head.len() {
            head[at] = CORRELATION * head[at - HEAD_DIM] + (1.0 - CORRELATION * CORRELATION).sqrt() * head[at];
        }
    }
    rows
}

fn view(rows: &[f32], count: usize) -> Heads<'_> {
    Heads::contiguous(rows, [1, HEADS, count, HEAD_DIM])
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(10);
    for tokens in [1024, 4096, 16384] {
        group.throughput(Throughput::Elements(tokens as u64));
        let [query, keys, values] = [1, 2, 3].map(|seed| rows(seed, tokens));
        let [query, keys, values] = [&query, &keys, &values].map(|rows| view(rows, tokens));
        group.bench_function(BenchmarkId::new("causal", tokens), |bencher| {
            bencher.iter(|| causal_attention(query, keys, values, &options()));
        });
        // The default settings.
        let index = IndexOptions {
            exact_tokens: 512,
            log_threshold: (1.0_f32 / 2048.0).ln(),
            max_keys: 1024,
            fine_tokens: 8192,
            max_sections: 32,
            far: true,
            far_shift: 0.0,
        };
        let settings = BlockOptions { chunk_size: 128, local_chunks: 1, sink_tokens: 4, index: Some(index) };
        group.bench_function(BenchmarkId::new("blocks", tokens), |bencher| {
            bencher.iter(|| {
                let mut index = KeyIndex::new([1, HEADS, HEAD_DIM], HEAD_DIM / 2, settings.sink_tokens);
                index.watch(query, 0..512);
                index.found(keys, 512);
                index.extend(keys, values, tokens / SECTION);
                let (keys, values, index) = (keys.into(), values.into(), Some(&index));
                let input = BlockInput { query, keys, values, first: 0, sinks: None, index, near: None };
                block_attention(&input, &settings, &options())
            });
        });
        if tokens <= 4096 {
            let (output, log_mass) = causal_attention(query, keys, values, &options());
            let forward = Forward { output: view(&output, tokens), log_mass: &log_mass, gradient: query };
            group.bench_function(BenchmarkId::new("causal backward", tokens), |bencher| {
                bencher.iter(|| causal_attention_backward((query, keys, values), &forward, &options()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);
