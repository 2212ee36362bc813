//! Attention over all keys and over retrieved blocks, forward and backward: `cargo bench -p bsbr-kernels`.

use bsbr_kernels::{
    Heads,
    attention::{
        BlockInput, BlockOptions, Blocks, CausalOptions, Coarse, Forward, RunMeans, block_attention, block_means,
        block_radii, causal_attention, causal_attention_backward, run_radii,
    },
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const HEADS: usize = 12;
const HEAD_DIM: usize = 64;
/// How much of a row is that of the token before it, as in a real model.
const CORRELATION: f32 = 0.9;

fn options() -> CausalOptions {
    CausalOptions { scale: 0.125, softcap: None, window: None, slopes: None }
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
        let (size, sink_tokens) = (4, 4);
        let coarse =
            vec![Coarse { size: 64, beyond: 8192, opened: 32 }, Coarse { size: 512, beyond: 131_072, opened: 64 }];
        let sizes = [size, 64, 512];
        let blocks = Blocks { size, top_k: 76, reach: 0.75, far: true, far_shift: 0.0, exact_tokens: 1024, coarse };
        let settings = BlockOptions { chunk_size: 128, local_chunks: 1, sink_tokens, blocks: Some(blocks) };
        group.bench_function(BenchmarkId::new("blocks", tokens), |bencher| {
            bencher.iter(|| {
                let mut rows: Vec<[Vec<f32>; 3]> = Vec::new();
                for size in sizes {
                    let runs = 0..tokens / size;
                    let of = |rows| block_means(rows, 0, size, sink_tokens, runs.clone());
                    let (mean_keys, mean_values) = (of(keys), of(values));
                    let centres = view(&mean_keys, tokens / size);
                    let radii = match rows.first() {
                        None => block_radii(keys, centres, 0, size, sink_tokens, runs),
                        Some([keys, _, radii]) => {
                            let of_blocks = (view(keys, tokens / sizes[0]), view(radii, tokens / sizes[0]));
                            run_radii(centres, of_blocks, sizes[0], size / sizes[0], sink_tokens, runs)
                        }
                    };
                    rows.push([mean_keys, mean_values, radii]);
                }
                let means = rows.iter().zip(sizes).map(|([keys, values, radii], size)| RunMeans {
                    keys: view(keys, tokens / size),
                    values: view(values, tokens / size),
                    radii: Some(view(radii, tokens / size)),
                });
                let means: Vec<RunMeans<'_>> = means.collect();
                let (keys, values) = (keys.into(), values.into());
                let input = BlockInput { query, keys, values, first: 0, sinks: None, means: &means, near: None };
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
