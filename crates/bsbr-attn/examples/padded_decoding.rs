//! Texts of different lengths in one batch: read with padding, then decoded token by token, each with a cache of its own. A text gets
//! the same outputs as alone.
//!
//! cargo run --release --example padded_decoding
#![allow(clippy::print_stdout)]

use bsbr_attn::{
    AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Padding, attend_padded,
};
use burn::tensor::{DType, Device, Distribution, Tensor};

const HEADS: usize = 4;
const HEAD_DIM: usize = 32;

fn numbers(x: Tensor<4>) -> Vec<f32> {
    x.try_into_vec_as::<f32>().expect("numbers")
}

fn main() -> Result<(), AttentionError> {
    let device = Device::flex();
    let lengths = [150, 90, 211];
    let longest = 211;
    let rows = || Tensor::<4>::random([lengths.len(), HEADS, longest, HEAD_DIM], Distribution::Default, &device);
    let (query, keys, values) = (rows(), rows(), rows());
    let attention = BlockAttentionConfig { chunk_size: 64, exact_tokens: 64, ..Default::default() };
    let options = AttentionOptions::new(HEAD_DIM);

    // Padded on the left, as for generating: texts end together. Rotary embeddings would use these positions.
    let mask: Vec<Vec<bool>> = lengths.iter().map(|&n| (0..longest).map(|at| at >= longest - n).collect()).collect();
    let padding = Padding::new(&mask)?;
    println!(
        "positions of the last tokens: {:?}",
        padding.positions().iter().map(|row| row[longest - 1]).collect::<Vec<_>>()
    );
    let whole =
        attend_padded(query.clone(), keys.clone(), values.clone(), &padding, Some(&attention), options.clone())?;

    for (row, &length) in lengths.iter().enumerate() {
        let config = CacheConfig {
            batch: 1,
            heads: HEADS,
            kv_heads: HEADS,
            head_dim: HEAD_DIM,
            options: options.clone(),
            attention: Some(attention.clone()),
            dtype: DType::F32,
            stored: DType::F32,
            kernel: Kernel::Fastest,
        };
        let mut cache = AttentionCache::new(config, &device)?;
        let first = longest - length;
        let part =
            |x: &Tensor<4>, from: usize, tokens: usize| x.clone().narrow(0, row, 1).narrow(2, first + from, tokens);
        // All but the last ten tokens at once, then one by one.
        let prompt = length - 10;
        cache.prefill(part(&query, 0, prompt), part(&keys, 0, prompt), part(&values, 0, prompt), None)?;
        for at in prompt..length {
            let next = cache.decode(part(&query, at, 1), part(&keys, at, 1), part(&values, at, 1), None)?;
            let expected = part(&whole, at, 1);
            let off = numbers(next).iter().zip(numbers(expected)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-4, "text {row}, token {at}: {off}");
        }
        println!("text {row}: {length} tokens, a cache of {} bytes", cache.bytes());
    }
    Ok(())
}
