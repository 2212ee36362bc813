//! What the meta projections should give.

use super::{heads::Heads, numbers, ridge::NormalEquations};
use crate::ModelError;

/// Rows handed over at once, so that the numbers of a long window are not all there twice.
const ROWS: usize = 512;

/// For each token the mean query of the `chunk_size` tokens that it begins.
pub(super) fn meta_queries(heads: &Heads<'_>, equations: &mut NormalEquations) -> Result<(), ModelError> {
    let length = heads.attention.chunk_size;
    let width = heads.head_dim;
    let sums: Vec<Vec<f64>> = (0..heads.heads).map(|head| running_sums(heads, head)).collect();
    let first: Vec<usize> = (0..=heads.tokens - length).collect();
    add(heads, equations, &first, |head, at| {
        let sum = |position: usize| &sums[head][position * width..][..width];
        sum(at + length).iter().zip(sum(at)).map(|(end, start)| (end - start) / length as f64).collect()
    })
}

/// Sums of the queries of `head` before each position, `[tokens + 1, head_dim]`.
fn running_sums(heads: &Heads<'_>, head: usize) -> Vec<f64> {
    let mut sum = vec![0.0; heads.head_dim];
    let mut sums = sum.clone();
    for at in 0..heads.tokens {
        sum.iter_mut().zip(heads.query(head, at)).for_each(|(sum, x)| *sum += f64::from(*x));
        sums.extend_from_slice(&sum);
    }
    sums
}

/// For each token the mean key of the block that it ends, each key weighted by the attention it receives from further on.
pub(super) fn meta_keys(heads: &Heads<'_>, equations: &mut NormalEquations) -> Result<(), ModelError> {
    let block = heads.block();
    let received = heads.received();
    // Of the positions that the last chunk at least reads from afar.
    let end = heads.local_start(heads.tokens - 1);
    let last: Vec<usize> = (heads.attention.sink_tokens + block - 1..end).collect();
    add(heads, equations, &last, |head, at| {
        let weights = &received[head][at + 1 - block..=at];
        let all: f64 = weights.iter().sum();
        let mut mean = vec![0.0; heads.head_dim];
        for (position, weight) in (at + 1 - block..=at).zip(weights) {
            // A block that nothing reads: any mean serves.
            let weight = if all > 0.0 { weight / all } else { 1.0 / block as f64 };
            mean.iter_mut().zip(heads.key(head, position)).for_each(|(mean, x)| *mean += weight * f64::from(*x));
        }
        mean
    })
}

/// Adds a row for each of `positions`: its input and the rotated `target` of each head, rotated back to it.
fn add(
    heads: &Heads<'_>,
    equations: &mut NormalEquations,
    positions: &[usize],
    target: impl Fn(usize, usize) -> Vec<f64>,
) -> Result<(), ModelError> {
    for rows in positions.chunks(ROWS) {
        let inputs = numbers(heads.inputs(rows))?;
        let mut outputs = Vec::with_capacity(rows.len() * heads.heads * heads.head_dim);
        for &at in rows {
            for head in 0..heads.heads {
                let mut target = target(head, at);
                heads.rotate(&mut target, at, true);
                outputs.extend(target);
            }
        }
        equations.add(&inputs, &outputs);
    }
    Ok(())
}
