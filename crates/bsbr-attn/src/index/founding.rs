//! What fixes the integers of an index: made once, on the host, from the first tokens of a text.

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::BLOCK;
use crate::buffer::copied;

/// Sums of squares of queries, per KV head and channel: token by token, within a token head by head.
#[derive(Debug, Clone)]
pub(super) struct QuerySquares {
    /// `[batch, kv_heads, head_dim]`.
    sums: Vec<f32>,
    kv_heads: usize,
    /// Queries that are not summed yet, oldest first: to fetch every one alone would make a device wait for each token.
    waiting: Vec<Tensor<4>>,
}

impl QuerySquares {
    pub(super) fn new(batch: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self { sums: vec![0.0; batch * kv_heads * head_dim], kv_heads, waiting: Vec::new() }
    }

    /// Takes in queries `[batch, heads, tokens, head_dim]`; so many may wait before they are summed.
    pub(super) fn push(&mut self, queries: Tensor<4>, most: usize) {
        self.waiting.push(copied(queries));
        if self.waiting.iter().map(|rows| rows.dims()[2]).sum::<usize>() >= most {
            self.sum();
        }
    }

    fn sum(&mut self) {
        for rows in std::mem::take(&mut self.waiting) {
            let [batch, heads, tokens, width] = rows.dims();
            let numbers = host(rows);
            let group = heads / self.kv_heads;
            for (pair, sums) in self.sums.chunks_exact_mut(width).enumerate() {
                debug_assert!(pair < batch * self.kv_heads);
                for row in
                    (0..tokens).flat_map(|token| (0..group).map(move |head| (pair * group + head) * tokens + token))
                {
                    for (sum, x) in sums.iter_mut().zip(&numbers[row * width..(row + 1) * width]) {
                        *sum += x * x;
                    }
                }
            }
        }
    }

    /// The sums over every query so far.
    pub(super) fn sums(&mut self) -> &[f32] {
        self.sum();
        &self.sums
    }

    pub(super) fn bytes(&self) -> usize {
        let rows = |rows: &Tensor<4>| rows.shape().num_elements() * rows.dtype().size();
        self.sums.len() * size_of::<f32>() + self.waiting.iter().map(rows).sum::<usize>()
    }
}

/// What every integer of an index depends on.
#[derive(Debug, Clone)]
pub(super) struct Founding {
    /// `[batch, kv_heads, 1, head_dim]`.
    pub(super) centre: Tensor<4>,
    /// The channels of residuals, `[batch, kv_heads, 1, channels]`, ascending.
    pub(super) channels: Tensor<4, Int>,
    /// Likewise.
    pub(super) balance: Tensor<4>,
}

impl Founding {
    /// From the keys of the first tokens, `[batch, kv_heads, tokens, head_dim]`, whole blocks of them, and the sums of squares of
    /// their queries.
    pub(super) fn new(keys: Tensor<4>, squares: &[f32], sinks: usize, channels: usize) -> Self {
        let [batch, kv_heads, tokens, width] = keys.dims();
        let device = keys.device();
        let numbers = host(keys);
        let heads = numbers.chunks_exact(tokens * width).zip(squares.chunks_exact(width));
        let heads: Vec<Head> = heads.map(|(keys, squares)| Head::new(keys, squares, sinks, channels)).collect();
        let floats = |of: fn(&Head) -> &Vec<f32>, count: usize| {
            let data: Vec<f32> = heads.iter().flat_map(of).copied().collect();
            Tensor::from_data(TensorData::new(data, [batch, kv_heads, 1, count]), (&device, DType::F32))
        };
        let indices: Vec<i32> = heads.iter().flat_map(|head| &head.channels).map(|&at| at as i32).collect();
        Self {
            centre: floats(|head| &head.centre, width),
            channels: Tensor::from_data(TensorData::new(indices, [batch, kv_heads, 1, channels]), &device),
            balance: floats(|head| &head.balance, channels),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let tensor = |rows: &Tensor<4>| rows.shape().num_elements() * rows.dtype().size();
        let channels = self.channels.shape().num_elements() * self.channels.dtype().size();
        tensor(&self.centre) + tensor(&self.balance) + channels
    }
}

/// What one KV head contributes.
struct Head {
    centre: Vec<f32>,
    channels: Vec<usize>,
    balance: Vec<f32>,
}

impl Head {
    fn new(keys: &[f32], squares: &[f32], sinks: usize, count: usize) -> Self {
        let width = squares.len();
        // Rows of a block that are no sinks.
        let block_rows = |block: usize| {
            let rows = (block * BLOCK).max(sinks).min((block + 1) * BLOCK)..(block + 1) * BLOCK;
            (rows.len(), keys[rows.start * width..rows.end * width].chunks_exact(width))
        };
        let blocks = keys.len() / (width * BLOCK);
        let mut centre = vec![0.0; width];
        let mut spread = vec![0.0; width];
        let mut counted = 0;
        for block in 0..blocks {
            let (rows, keys) = block_rows(block);
            if rows == 0 {
                continue;
            }
            let mut mean = vec![0.0; width];
            keys.clone().for_each(|key| add(&mut mean, key.iter().copied()));
            let share = 1.0 / rows as f32;
            mean.iter_mut().for_each(|x| *x *= share);
            add(&mut centre, mean.iter().copied());
            counted += 1;
            for key in keys {
                let squares = key.iter().zip(&mean).map(|(k, mu)| (k - mu) * (k - mu));
                add(&mut spread, squares);
            }
        }
        let share = 1.0 / counted.max(1) as f32;
        centre.iter_mut().for_each(|x| *x *= share);
        let mut channels: Vec<usize> = (0..width).collect();
        // Stable: of channels that count alike the lower one.
        let weight = |channel: usize| spread[channel] * squares[channel];
        channels.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
        channels.truncate(count);
        channels.sort_unstable();
        let balance = channels.iter().map(|&channel| balance(spread[channel], squares[channel])).collect();
        Self { centre, channels, balance }
    }
}

fn add(sum: &mut [f32], row: impl Iterator<Item = f32>) {
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
}

/// `(spread / squares)^(1/4)`, or 1.
fn balance(spread: f32, squares: f32) -> f32 {
    let balance = (spread / squares).sqrt().sqrt();
    if spread > 0.0 && squares > 0.0 && balance > 0.0 && balance.is_finite() { balance } else { 1.0 }
}

/// The numbers of a tensor.
pub(super) fn host(rows: Tensor<4>) -> Vec<f32> {
    rows.try_into_vec_as::<f32>().unwrap_or_else(|error| unreachable!("floats can be read as f32: {error}"))
}
