//! A linear layer whole, as two factors, and as pivoted factors, each with the rank that keeping 0.8 of the parameters
//! gives. What the multiplications are in units of those of the whole layer stands in the name.

use std::hint::black_box;

use bsbr_kernels::layer::{Linear, Panels, Rows, in_pool, project, project_joined, project_passing};
use bsbr_weights::{Arithmetic, Matrix};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Inputs, outputs, rank of two factors, rank of pivoted ones.
const LAYERS: [(usize, usize, usize, usize); 3] = [(768, 3072, 491, 578), (768, 768, 307, 423), (576, 1536, 335, 417)];

fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// Every third input first, so that no two of them stand side by side.
fn order(inputs: usize) -> Vec<u32> {
    (0..3).flat_map(|start| (start..inputs as u32).step_by(3)).collect()
}

fn factors(c: &mut Criterion) {
    for (inputs, outputs, two, pivoted) in LAYERS {
        let mut group = c.benchmark_group(format!("{inputs} to {outputs}"));
        let order = order(inputs);
        let dense = (inputs * outputs) as f64;
        let cost = |rank: usize, inputs: usize| (rank * (inputs + outputs)) as f64 / dense;
        let whole = numbers(inputs * outputs);
        let [left, right] = [inputs, outputs].map(|side| numbers(side * two));
        let [rest, own] = [inputs - pivoted, outputs].map(|side| numbers(side * pivoted));
        for tokens in [1, 16, 1024] {
            let x = numbers(tokens * inputs);
            group.throughput(Throughput::Elements(tokens as u64));
            let whole = Linear { weight: Matrix::of_f32(&whole, inputs), bias: None, arithmetic: Arithmetic::F32 };
            group.bench_function(BenchmarkId::new("whole", tokens), |b| {
                b.iter(|| in_pool(|| black_box(project(&Panels::pack(Rows::new(&x, inputs), None), &[whole]))));
            });
            let (left, right) = (
                Linear { weight: Matrix::of_f32(&left, inputs), bias: None, arithmetic: Arithmetic::F32 },
                Linear { weight: Matrix::of_f32(&right, two), bias: None, arithmetic: Arithmetic::F32 },
            );
            let name = format!("two factors of {two}, cost {:.2}", cost(two, inputs));
            group.bench_function(BenchmarkId::new(name, tokens), |b| {
                b.iter(|| {
                    in_pool(|| {
                        let x = Panels::pack(Rows::new(&x, inputs), None);
                        let reduced = project(&x, &[left]);
                        black_box(project_joined(&[vec![(&reduced[0], right)]]))
                    })
                });
            });
            let rest =
                Linear { weight: Matrix::of_f32(&rest, inputs - pivoted), bias: None, arithmetic: Arithmetic::F32 };
            let own = Linear { weight: Matrix::of_f32(&own, pivoted), bias: None, arithmetic: Arithmetic::F32 };
            let name = format!("pivoted factors of {pivoted}, cost {:.2}", cost(pivoted, inputs - pivoted));
            group.bench_function(BenchmarkId::new(name, tokens), |b| {
                b.iter(|| {
                    in_pool(|| {
                        let x = Panels::pack(Rows::new(&x, inputs), None);
                        let reduced = project_passing(&x, &[(rest, Some(&order[..]))]);
                        black_box(project_joined(&[vec![(&reduced[0], own)]]))
                    })
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, factors);
criterion_main!(benches);
