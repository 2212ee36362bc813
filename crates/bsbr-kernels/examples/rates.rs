use bsbr_kernels::{Heads, attention::*};
use std::time::Instant;
fn main() {
    let (heads, d) = (12usize, 64usize);
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let size = args[0];
    let top_k = args[1];
    for &n in &args[2..] {
        let mut state = 12345u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let mut r = |c: usize| -> Vec<f32> { (0..c).map(|_| (next() + next() + next()) * 2.0).collect() };
        let (q, k, v) = (r(heads * n * d), r(heads * n * d), r(heads * n * d));
        let of = |x| Heads::contiguous(x, [1, heads, n, d]);
        let options = CausalOptions { scale: 0.125, softcap: None, window: None, slopes: None };
        let settings = BlockOptions {
            chunk_size: 128,
            local_chunks: 1,
            sink_tokens: 4,
            blocks: Some(Blocks { size, top_k, far: true }),
        };
        let reps = if n <= 4096 {
            7
        } else if n <= 32768 {
            3
        } else {
            1
        };
        let (mut a, mut b) = (f64::MAX, f64::MAX);
        for _ in 0..reps {
            if n <= 32768 && std::env::var("NODENSE").is_err() {
                let t = Instant::now();
                std::hint::black_box(causal_attention(of(&q), of(&k), of(&v), &options));
                a = a.min(t.elapsed().as_secs_f64());
            }
            let t = Instant::now();
            let m = block_means(of(&k), 0, size, 4, 0..n / size);
            let mv = block_means(of(&v), 0, size, 4, 0..n / size);
            let tm = t.elapsed().as_secs_f64();
            let mo = |x| Heads::contiguous(x, [1, heads, n / size, d]);
            let input = BlockInput {
                query: of(&q),
                keys: of(&k),
                values: of(&v),
                first: 0,
                sinks: None,
                means: Some((mo(&m), mo(&mv))),
            };
            std::hint::black_box(block_attention(&input, &settings, &options));
            b = b.min(t.elapsed().as_secs_f64());
            if n >= 32768 {
                println!("means {tm:.3}");
            }
        }
        let flops = 4.0 * d as f64 * (n as f64).powi(2) / 2.0 * heads as f64;
        println!(
            "{n}: dense {:.4} s ({:.0} GFLOP/s)  blocks {:.4} s ({:.2} us per token and head)  ratio {:.2}",
            a,
            flops / a / 1e9,
            b,
            b / (n * heads) as f64 * 1e6,
            a / b
        );
    }
}
