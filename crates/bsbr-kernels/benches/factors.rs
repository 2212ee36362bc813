//! A linear layer whole, and as the factors that sharing a basis between two layers at keep 0.8 gives. What the
//! multiplications of the factors are in units of those of the whole layer stands in the name.

use std::hint::black_box;

use bsbr_kernels::layer::{Linear, Panels, Rows, in_pool, project, project_joined};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Name, inputs, outputs, rank.
const LAYERS: [(&str, usize, usize, usize); 4] = [
    ("c_attn whole", 768, 2304, 526),
    ("c_fc", 768, 3072, 546),
    ("c_proj, outputs shared", 3072, 768, 546),
    ("query of its own", 768, 768, 307),
];

fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn factors(c: &mut Criterion) {
    for (name, inputs, outputs, rank) in LAYERS {
        let ratio = rank as f64 * (inputs + outputs) as f64 / (inputs * outputs) as f64;
        let mut group = c.benchmark_group(format!("{name}, {inputs} to {outputs} by {rank}, cost {ratio:.2}"));
        let (whole, left, right) = (numbers(inputs * outputs), numbers(inputs * rank), numbers(rank * outputs));
        for tokens in [1, 128, 1024] {
            let x = numbers(tokens * inputs);
            group.throughput(Throughput::Elements(tokens as u64));
            let whole = Linear { weight: &whole, inputs, bias: None };
            let left = Linear { weight: &left, inputs, bias: None };
            let right = Linear { weight: &right, inputs: rank, bias: None };
            group.bench_function(BenchmarkId::new("whole", tokens), |b| {
                b.iter(|| in_pool(|| black_box(project(&Panels::pack(Rows::new(&x, inputs), None), &[whole]))));
            });
            group.bench_function(BenchmarkId::new("factors", tokens), |b| {
                b.iter(|| {
                    in_pool(|| {
                        let x = Panels::pack(Rows::new(&x, inputs), None);
                        let reduced = project(&x, &[left]);
                        black_box(project_joined(&[vec![(&reduced[0], right)]]))
                    })
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, factors);
criterion_main!(benches);
