//! A linear layer of every format its weights may be stored in, for one token, eight and many, in every arithmetic. The bytes of a
//! step are those of the weights.

use std::hint::black_box;

use bsbr_kernels::layer::{Linear, Panels, Rows, in_pool, project};
use bsbr_weights::{Arithmetic, Format, Matrix};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const INPUTS: usize = 2048;
const OUTPUTS: usize = 6144;
/// Layers in turn, so that no cache holds their weights.
const LAYERS: usize = 8;

fn weights(c: &mut Criterion) {
    for format in Format::ALL {
        let mut group = c.benchmark_group(format.name());
        let Some(row) = format.row_bytes(INPUTS) else { continue };
        // Any bits are codes; small bytes make small scales.
        let bytes: Vec<u8> = (0..LAYERS * OUTPUTS * row).map(|at| (at * 7919 % 251) as u8 & 0x33).collect();
        let layers: Vec<Matrix<'_>> = bytes
            .chunks_exact(OUTPUTS * row)
            .filter_map(|bytes| Matrix::new(format, [OUTPUTS, INPUTS], bytes).ok())
            .collect();
        for tokens in [1, 8, 256] {
            let x: Vec<f32> = (0..tokens * INPUTS).map(|at| (at as f32).sin()).collect();
            for arithmetic in [Arithmetic::F32, Arithmetic::Int8, Arithmetic::Bf16] {
                let same_as_f32 = match arithmetic {
                    Arithmetic::F32 => false,
                    Arithmetic::Int8 => !format.has_groups(),
                    Arithmetic::Bf16 => tokens <= 8,
                };
                if same_as_f32 {
                    continue;
                }
                group.throughput(Throughput::Bytes((OUTPUTS * row) as u64));
                let mut turn = layers.iter().cycle();
                group.bench_function(BenchmarkId::new(format!("{arithmetic:?}"), tokens), |b| {
                    b.iter(|| {
                        let Some(&weight) = turn.next() else { return };
                        in_pool(|| {
                            let x = Panels::pack(Rows::new(&x, INPUTS), None);
                            black_box(project(&x, &[Linear { weight, bias: None, arithmetic }]));
                        });
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, weights);
criterion_main!(benches);
