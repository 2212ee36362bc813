//! Queries as integers, and what they make of blocks, sections and keys.

use burn::tensor::{DType, Tensor};

use super::{BLOCK, founding::Founding, statistics::Integers};
use crate::plain::Tile;

/// The queries of a tile, one row for each head of a group and token: `[batch, kv_heads, group * tokens, ..]`.
pub(super) struct Queries {
    whole: Integers,
    /// In the channels of residuals.
    chosen: Integers,
    /// `q' . centre`.
    centre: Tensor<4>,
    /// The queries as floats, for gradients.
    through: Option<Tensor<4>>,
}

impl Queries {
    pub(super) fn new(tile: &Tile, founding: &Founding, scale: f64) -> Self {
        let queries = tile.flat().cast(DType::F32) * scale;
        let through = queries.is_autodiff().then(|| queries.clone());
        let queries = queries.inner();
        let [batch, kv_heads, rows, _] = queries.dims();
        let channels = founding.channels.dims()[3];
        let in_channels = founding.channels.clone().expand([batch, kv_heads, rows, channels]);
        let chosen = queries.clone().gather(3, in_channels) * founding.balance.clone();
        Self {
            centre: queries.clone().matmul(founding.centre.clone().swap_dims(2, 3)),
            whole: Integers::of(queries),
            chosen: Integers::of(chosen),
            through,
        }
    }

    /// `base` of blocks or sections, `[batch, kv_heads, rows, runs]`.
    pub(super) fn base(&self, means: &Integers) -> Tensor<4> {
        self.centre.clone() + products(&self.whole.rows, &means.rows) * scales(&self.whole, &means.scales)
    }

    /// 0, with the gradient of `base` where one is asked for: `through` are the means as floats, with theirs.
    pub(super) fn carried(
        &self,
        means: &Integers,
        through: Option<Tensor<4>>,
        founding: &Founding,
    ) -> Option<Tensor<4>> {
        if self.through.is_none() && through.is_none() {
            return None;
        }
        // What stands for a number in the score, with the gradient of the number.
        let stands = |number: Option<Tensor<4>>, by: Tensor<4>| match number {
            Some(number) => number.clone() + (by - number.inner()),
            None => by,
        };
        let queries = stands(self.through.clone(), self.whole.floats());
        let means = stands(through, means.floats() + founding.centre.clone());
        let base = queries.matmul(means.swap_dims(2, 3));
        Some(base.clone() - base.inner())
    }

    /// `est` of the keys of blocks with these `base`, `[batch, kv_heads, rows, keys]`.
    pub(super) fn estimates(&self, base: &Tensor<4>, residuals: &Integers) -> Tensor<4> {
        let [batch, kv_heads, rows, blocks] = base.dims();
        let by_block = |rows_of: Tensor<4>, size| rows_of.reshape([batch, kv_heads, rows, blocks, size]);
        let dots = by_block(products(&self.chosen.rows, &residuals.rows), BLOCK);
        let estimates = by_block(base.clone(), 1) + dots * by_block(scales(&self.chosen, &residuals.scales), 1);
        estimates.reshape([batch, kv_heads, rows, blocks * BLOCK])
    }

    /// `bound` of sections with these `base`, likewise.
    pub(super) fn bounds(&self, base: &Tensor<4>, radii: &Integers) -> Tensor<4> {
        let reach = products(&self.whole.rows.clone().abs(), &radii.rows) * scales(&self.whole, &radii.scales);
        base.clone() + reach * 0.5
    }
}

/// Dot products of integers: exact, for they stay below 2^24.
fn products(queries: &Tensor<4>, rows: &Tensor<4>) -> Tensor<4> {
    queries.clone().matmul(rows.clone().swap_dims(2, 3))
}

fn scales(queries: &Integers, of: &Tensor<4>) -> Tensor<4> {
    queries.scales.clone() * of.clone().swap_dims(2, 3)
}
