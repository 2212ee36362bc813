//! Blocks and sections as integers: made once, when they are complete, in one order of operations.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::{BLOCK, BLOCKS, LARGEST, SECTION, founding::Founding};
use crate::plain::float_tensor;

/// What is known of some sections and of their blocks. `n` sections have `4 n` blocks and `64 n` keys.
pub(super) struct NewSections {
    pub(super) block_means: Integers,
    /// `[batch, kv_heads, keys, channels]`, one scale for each block.
    pub(super) residuals: Integers,
    pub(super) means: Integers,
    pub(super) radii: Integers,
    /// Mean values of sections, `[batch, kv_heads, n, head_dim]`, with a gradient.
    pub(super) values: Tensor<4>,
    /// Mean keys of blocks and of sections, where gradients are asked for.
    pub(super) through: Option<(Tensor<4>, Tensor<4>)>,
}

/// Rows of integers, as floats, and the scale of each row, `[batch, kv_heads, rows, 1]`.
#[derive(Debug, Clone)]
pub(super) struct Integers {
    pub(super) rows: Tensor<4>,
    pub(super) scales: Tensor<4>,
}

impl Integers {
    /// The integers of each row of `[batch, kv_heads, rows, width]`.
    pub(super) fn of(rows: Tensor<4>) -> Self {
        let most = rows.clone().abs().max_dim(3);
        let factor = most.clone().ones_like() * LARGEST / most.clone();
        let none = factor.clone().is_finite().bool_not();
        let scales = (most / LARGEST).mask_fill(none.clone(), 0.0);
        Self { rows: (rows * factor.mask_fill(none, 0.0)).round(), scales }
    }

    /// What the integers stand for.
    pub(super) fn floats(&self) -> Tensor<4> {
        self.rows.clone() * self.scales.clone()
    }
}

impl NewSections {
    /// From the keys and values of the sections `sections`, `[batch, kv_heads, 64 sections, head_dim]`.
    pub(super) fn new(
        sections: Range<usize>,
        keys: Tensor<4>,
        values: Tensor<4>,
        sinks: usize,
        founding: &Founding,
    ) -> Self {
        let [batch, kv_heads, tokens, width] = keys.dims();
        let hidden = sinks.saturating_sub(sections.start * SECTION).min(tokens);
        let blocks = sections.start * BLOCKS..sections.end * BLOCKS;
        let keys = without_first(keys.cast(DType::F32), hidden);
        let values = without_first(values, hidden);

        let means = mean_keys(&keys, (&sections, &blocks), sinks);
        let through = keys.is_autodiff().then(|| means.clone());
        let (keys, (block_means, section_means)) = (keys.inner(), (means.0.inner(), means.1.inner()));
        let shown = (hidden > 0).then(|| {
            let shown = (0..tokens).map(|token| if token < hidden { 0.0 } else { 1.0 }).collect();
            float_tensor(shown, &keys.device(), DType::F32).reshape([1, 1, tokens, 1])
        });
        // How far keys lie from the mean of their run, 0 for sinks.
        let apart = |means: &Tensor<4>, size: usize| {
            let by_run = keys.clone().reshape([batch, kv_heads, tokens / size, size, width]);
            let apart = (by_run - means.clone().unsqueeze_dim::<5>(3)).reshape([batch, kv_heads, tokens, width]);
            match &shown {
                Some(shown) => apart * shown.clone(),
                None => apart,
            }
        };
        let channels = founding.channels.dims()[3];
        let in_channels = founding.channels.clone().expand([batch, kv_heads, tokens, channels]);
        let residuals = apart(&block_means, BLOCK).gather(3, in_channels) / founding.balance.clone();
        let residuals = Integers::of(residuals.reshape([batch, kv_heads, blocks.len(), BLOCK * channels]));
        let radii = apart(&section_means, SECTION).abs().reshape([batch, kv_heads, sections.len(), SECTION, width]);
        let radii = radii.max_dim(3).reshape([batch, kv_heads, sections.len(), width]);
        let shares = shares(&sections, SECTION, sinks, &values);
        Self {
            block_means: Integers::of(block_means - founding.centre.clone()),
            residuals: Integers {
                rows: residuals.rows.reshape([batch, kv_heads, tokens, channels]),
                scales: residuals.scales,
            },
            means: Integers::of(section_means - founding.centre.clone()),
            radii: Integers::of(radii),
            values: sum_in_order(values, SECTION) * shares,
            through,
        }
    }
}

/// Mean keys of blocks and of sections.
fn mean_keys(
    keys: &Tensor<4>,
    (sections, blocks): (&Range<usize>, &Range<usize>),
    sinks: usize,
) -> (Tensor<4>, Tensor<4>) {
    let of_blocks = sum_in_order(keys.clone(), BLOCK) * shares(blocks, BLOCK, sinks, keys);
    let counts = blocks.clone().map(|block| held(block, BLOCK, sinks) as f32).collect();
    let counts = float_tensor(counts, &keys.device(), keys.dtype()).reshape([1, 1, blocks.len(), 1]);
    let of_sections = sum_in_order(of_blocks.clone() * counts, BLOCKS) * shares(sections, SECTION, sinks, keys);
    (of_blocks, of_sections)
}

/// Tokens of run `run` of `size` tokens that are no sinks.
pub(super) fn held(run: usize, size: usize, sinks: usize) -> usize {
    size - sinks.saturating_sub(run * size).min(size)
}

/// One divided by [`held`] for each run, 0 where there are none: `[1, 1, runs, 1]`.
fn shares(runs: &Range<usize>, size: usize, sinks: usize, like: &Tensor<4>) -> Tensor<4> {
    let share = |run| match held(run, size, sinks) {
        0 => 0.0,
        count => 1.0 / count as f32,
    };
    let shares = runs.clone().map(share).collect();
    float_tensor(shares, &like.device(), like.dtype()).reshape([1, 1, runs.len(), 1])
}

/// The rows with 0 in place of the first `count`.
fn without_first(rows: Tensor<4>, count: usize) -> Tensor<4> {
    if count == 0 {
        return rows;
    }
    let [batch, heads, all, width] = rows.dims();
    let zeros = Tensor::zeros([batch, heads, count, width], (&rows.device(), rows.dtype()));
    if count == all {
        return zeros;
    }
    Tensor::cat(vec![zeros, rows.narrow(2, count, all - count)], 2)
}

/// Sums of every `size` rows, one row after the other: the same additions on every device.
fn sum_in_order(rows: Tensor<4>, size: usize) -> Tensor<4> {
    let [batch, heads, count, width] = rows.dims();
    let by_run = rows.reshape([batch, heads, count / size, size, width]);
    let mut sum = by_run.clone().narrow(3, 0, 1);
    for at in 1..size {
        sum = sum + by_run.clone().narrow(3, at, 1);
    }
    sum.reshape([batch, heads, count / size, width])
}
