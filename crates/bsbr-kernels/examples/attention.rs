//! Full attention by the loops alone, without a tensor framework, checked against the formula.
//!
//! cargo run --release --example attention
#![allow(clippy::print_stdout)]

use bsbr_kernels::{
    Heads,
    attention::{CausalOptions, causal_attention},
};

fn main() {
    let (heads, tokens, width) = (2, 700, 32);
    let rows = |seed: usize| (0..heads * tokens * width).map(move |i| ((i * 31 + seed * 7) % 97) as f32 / 48.0 - 1.0);
    let [query, keys, values]: [Vec<f32>; 3] = [1, 2, 3].map(|seed| rows(seed).collect());
    let of = |rows| Heads::contiguous(rows, [1, heads, tokens, width]);
    let options = CausalOptions {
        scale: (width as f32).sqrt().recip(),
        softcap: None,
        window: None,
        slopes: None,
        sink_logits: None,
    };
    let (output, log_sums) = causal_attention(of(&query), of(&keys), of(&values), &options);
    println!("{} numbers, and the logarithms of {} sums", output.len(), log_sums.len());

    // The last token of the last head, in f64.
    let start = (heads - 1) * tokens * width;
    let row = |rows: &[f32], token: usize| -> Vec<f64> {
        rows[start + token * width..][..width].iter().map(|&x| f64::from(x)).collect()
    };
    let q = row(&query, tokens - 1);
    let weight = |token: usize| {
        let dot: f64 = row(&keys, token).iter().zip(&q).map(|(k, q)| k * q).sum();
        (dot / (width as f64).sqrt()).exp()
    };
    let total: f64 = (0..tokens).map(weight).sum();
    let found = row(&output, tokens - 1);
    for (channel, found) in found.iter().enumerate() {
        let expected = (0..tokens).map(|token| weight(token) * row(&values, token)[channel]).sum::<f64>() / total;
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
    println!("as the formula says");
}
