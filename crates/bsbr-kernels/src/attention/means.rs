//! Mean rows of blocks.

use std::ops::Range;

use rayon::prelude::*;

use crate::heads::Heads;

/// Mean row of each of the blocks `blocks` of `block` rows, `[batch, heads, blocks, width]`.
///
/// Row `r` of `rows` stands at position `first + r`. Positions before `sinks` are left out; a block of sinks alone has the
/// mean 0.
///
/// # Panics
///
/// If a block reaches beyond the rows.
pub fn block_means(rows: Heads<'_>, first: usize, block: usize, sinks: usize, blocks: Range<usize>) -> Vec<f32> {
    let [batch, heads, _, width] = rows.dims();
    let mut means = vec![0.0; batch * heads * blocks.len() * width];
    if means.is_empty() {
        return means;
    }
    means.par_chunks_mut(blocks.len() * width).enumerate().for_each(|(pair, means)| {
        let rows = rows.head(pair / heads, pair % heads);
        for (index, mean) in blocks.clone().zip(means.chunks_exact_mut(width)) {
            let positions = (index * block).max(sinks)..(index + 1) * block;
            if positions.is_empty() {
                continue;
            }
            let share = 1.0 / positions.len() as f32;
            for position in positions {
                for (sum, value) in mean.iter_mut().zip(rows.row(position - first)) {
                    *sum += value;
                }
            }
            for sum in mean {
                *sum *= share;
            }
        }
    });
    means
}
