//! Mean rows of blocks, and how far their rows lie from them.

use std::ops::Range;

use rayon::prelude::*;

use crate::{heads::Heads, stored::Stored};

/// Blocks that one thread does at a time.
const TOGETHER: usize = 128;

/// Mean row of each of the blocks `blocks` of `block` rows, `[batch, heads, blocks, width]`.
///
/// Row `r` of `rows` stands at position `first + r`. Positions before `sinks` are left out; a block of sinks alone has the
/// mean 0.
///
/// # Panics
///
/// If a block reaches beyond the rows.
pub fn block_means<'a>(
    rows: impl Into<Stored<'a>>,
    first: usize,
    block: usize,
    sinks: usize,
    blocks: Range<usize>,
) -> Vec<f32> {
    let rows = rows.into();
    let [batch, heads, _, width] = rows.dims();
    let mut means = vec![0.0; batch * heads * blocks.len() * width];
    for_each_block(&mut means, blocks.len(), width, |pair, at, mean, widened| {
        let positions = positions(blocks.start + at, block, sinks);
        if positions.is_empty() {
            return;
        }
        let share = 1.0 / positions.len() as f32;
        let rows = rows.head(pair / heads, pair % heads).range(positions.start - first..positions.end - first);
        let rows = rows.widened(widened);
        for row in 0..rows.len() {
            for (sum, value) in mean.iter_mut().zip(rows.row(row)) {
                *sum += value;
            }
        }
        for sum in mean {
            *sum *= share;
        }
    });
    means
}

/// Radii of the blocks `blocks`: in each channel the largest distance of a row from the mean, `[batch, heads, blocks, width]`.
/// `means` are theirs, as [`block_means`] gives them; the other arguments are its.
///
/// # Panics
///
/// If a block reaches beyond the rows, or there is another number of means.
pub fn block_radii<'a>(
    rows: impl Into<Stored<'a>>,
    means: Heads<'_>,
    first: usize,
    block: usize,
    sinks: usize,
    blocks: Range<usize>,
) -> Vec<f32> {
    let rows = rows.into();
    let [batch, heads, _, width] = rows.dims();
    assert_eq!(means.dims(), [batch, heads, blocks.len(), width]);
    let mut radii = vec![0.0; batch * heads * blocks.len() * width];
    for_each_block(&mut radii, blocks.len(), width, |pair, at, radius, widened| {
        let positions = positions(blocks.start + at, block, sinks);
        if positions.is_empty() {
            return;
        }
        let (batch, head) = (pair / heads, pair % heads);
        let rows = rows.head(batch, head).range(positions.start - first..positions.end - first);
        let (rows, means) = (rows.widened(widened), means.head(batch, head));
        for row in 0..rows.len() {
            let distances = rows.row(row).iter().zip(means.row(at)).map(|(x, mean)| (x - mean).abs());
            for (radius, distance) in radius.iter_mut().zip(distances) {
                *radius = radius.max(distance);
            }
        }
    });
    radii
}

/// Radii of the runs `runs` of `per_run` blocks each, from those of their blocks: the largest
/// `|block mean - mean of the run| + block radius` in each channel, which no row lies beyond. `means` are those of these runs,
/// `block_means` and `block_radii` those of all blocks from the first row on; a block that ends before `sinks` holds no row.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn run_radii(
    means: Heads<'_>,
    (block_means, block_radii): (Heads<'_>, Heads<'_>),
    block: usize,
    per_run: usize,
    sinks: usize,
    runs: Range<usize>,
) -> Vec<f32> {
    let [batch, heads, count, width] = means.dims();
    assert_eq!(count, runs.len());
    assert_eq!(block_means.dims(), block_radii.dims());
    let mut radii = vec![0.0; batch * heads * count * width];
    for_each_block(&mut radii, count, width, |pair, at, radius, _| {
        let (batch, head) = (pair / heads, pair % heads);
        let (centre, run) = (means.head(batch, head), runs.start + at);
        let (means, spreads) = (block_means.head(batch, head), block_radii.head(batch, head));
        for index in (run * per_run..(run + 1) * per_run).filter(|index| (index + 1) * block > sinks) {
            let row = means.row(index).iter().zip(spreads.row(index)).zip(centre.row(at));
            for (radius, ((mean, spread), centre)) in radius.iter_mut().zip(row) {
                *radius = radius.max((mean - centre).abs() + spread);
            }
        }
    });
    radii
}

/// Positions of a block, sinks left out.
fn positions(index: usize, block: usize, sinks: usize) -> Range<usize> {
    (index * block).max(sinks)..(index + 1) * block
}

/// Has `work` fill every row of `rows`, `[pairs, count, width]`, which it gets with its pair, its place in it, and numbers for
/// any use.
fn for_each_block(
    rows: &mut [f32],
    count: usize,
    width: usize,
    work: impl Fn(usize, usize, &mut [f32], &mut Vec<f32>) + Send + Sync,
) {
    if rows.is_empty() {
        return;
    }
    rows.par_chunks_mut(count * width).enumerate().for_each(|(pair, rows)| {
        rows.par_chunks_mut(TOGETHER * width).enumerate().for_each(|(part, rows)| {
            let mut numbers = Vec::new();
            for (at, row) in rows.chunks_exact_mut(width).enumerate() {
                work(pair, part * TOGETHER + at, row, &mut numbers);
            }
        });
    });
}
