//! What is known of a block without its tokens: count, mean key, mean value, centred state, covariance.
//!
//! For a block of `n` tokens with keys `k_i` and values `v_i`:
//! mean key `mu = (1/n) sum k_i`, mean value `vbar = (1/n) sum v_i`, centred state
//! `C = (1/n) sum (k_i - mu)(v_i - vbar)^T`, covariance `S = (1/n) sum (k_i - mu)(k_i - mu)^T`.
//! Two blocks merge exactly (Chan, Golub, LeVeque 1979): with `d = mu_2 - mu_1`, `e = vbar_2 - vbar_1`, `n = n_1 + n_2`:
//! `mu = (n_1 mu_1 + n_2 mu_2) / n`, `C = (n_1 C_1 + n_2 C_2) / n + (n_1 n_2 / n^2) d e^T`, `S` likewise with `d d^T`.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};

use crate::buffer::{RowBuffer, copied};
use crate::compress::{Compression, Form};
use crate::kept::Tokens;
use crate::plain::MASKED;

/// Statistics of consecutive blocks. Every tensor is `[batch, heads, blocks, width]`.
#[derive(Debug, Clone)]
pub(crate) struct Statistics {
    /// Positions of each block, sinks left out; neighbours in order. The length is the block's count.
    blocks: Vec<Range<usize>>,
    mean_key: RowBuffer,
    mean_value: RowBuffer,
    /// `C`, stored as [`Compression`] says.
    state: Option<RowBuffer>,
    /// `S`, likewise.
    covariance: Option<RowBuffer>,
    /// Meta keys, one per query head.
    meta_key: Option<RowBuffer>,
    /// Of blocks whose tokens stand elsewhere in every KV head, where that matters: their mean and their first position.
    places: Option<(RowBuffer, RowBuffer)>,
    compression: Compression,
}

/// What to keep of a block.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) state: bool,
    pub(crate) covariance: bool,
    pub(crate) meta_key: bool,
    /// Blocks are [made of any tokens](Statistics::push_tokens), and where these stand matters.
    pub(crate) places: bool,
    /// Room is made for so many blocks at a time.
    pub(crate) room: usize,
    /// How states are stored.
    pub(crate) compression: Compression,
}

/// Sizes shared by every buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: DType,
}

impl Statistics {
    pub(crate) fn new(sizes: Sizes, kept: Kept, device: &Device) -> Self {
        let buffer = |heads, width| RowBuffer::new(sizes.batch, heads, width, kept.room, device, sizes.dtype);
        let compression = kept.compression;
        let matrix = |form| buffer(sizes.kv_heads, compression.numbers(sizes.head_dim, form));
        Self {
            blocks: Vec::new(),
            mean_key: buffer(sizes.kv_heads, sizes.head_dim),
            mean_value: buffer(sizes.kv_heads, sizes.head_dim),
            state: kept.state.then(|| matrix(Form::General)),
            covariance: kept.covariance.then(|| matrix(Form::Symmetric)),
            meta_key: kept.meta_key.then(|| buffer(sizes.heads, sizes.head_dim)),
            places: kept.places.then(|| (buffer(sizes.kv_heads, 1), buffer(sizes.kv_heads, 1))),
            compression,
        }
    }

    /// Adds the block at `positions` from its keys and values, `[batch, kv_heads, n, head_dim]` each, and its meta key
    /// `[batch, heads, 1, head_dim]`.
    pub(crate) fn push_block(
        &mut self,
        positions: Range<usize>,
        keys: Tensor<4>,
        values: Tensor<4>,
        meta_key: Option<Tensor<4>>,
    ) {
        let count = keys.dims()[2];
        debug_assert_eq!(count, positions.len());
        self.blocks.push(positions);
        if let (Some(buffer), Some(key)) = (&mut self.meta_key, meta_key) {
            buffer.push(key);
        }
        let mean_key = keys.clone().mean_dim(2);
        let mean_value = values.clone().mean_dim(2);
        if self.state.is_some() || self.covariance.is_some() {
            let centred = keys - mean_key.clone();
            let scaled = centred.clone().swap_dims(2, 3) / count as f64;
            if let Some(buffer) = &mut self.state {
                let state = scaled.clone().matmul(values - mean_value.clone());
                buffer.push(self.compression.store(state, Form::General));
            }
            if let Some(buffer) = &mut self.covariance {
                buffer.push(self.compression.store(scaled.matmul(centred), Form::Symmetric));
            }
        }
        self.mean_key.push(mean_key);
        self.mean_value.push(mean_value);
    }

    /// Adds tokens that stand anywhere, in order of position, as blocks of `block` tokens, and merges them down to `limit`.
    /// What these blocks have for positions counts tokens: those summarised so far.
    pub(crate) fn push_tokens(&mut self, tokens: &Tokens, block: usize, limit: Option<usize>) {
        let [batch, heads, count, _] = tokens.keys.dims();
        for start in (0..count).step_by(block) {
            let piece = tokens.range(start..count.min(start + block));
            let length = piece.keys.dims()[2];
            if let Some((mean, first)) = &mut self.places {
                let positions = piece.positions.float().cast(piece.keys.dtype()).reshape([batch, heads, length, 1]);
                first.push(positions.clone().narrow(2, 0, 1));
                mean.push(positions.mean_dim(2));
            }
            let begin = self.blocks.last().map_or(0, |block| block.end);
            self.push_block(begin..begin + length, piece.keys, piece.values, None);
            if let Some(limit) = limit {
                self.merge_to(limit);
            }
        }
    }

    /// Adds a block of sinks: no positions are left in it, but block numbers stay positions divided by the block size.
    pub(crate) fn push_empty(&mut self, end: usize) {
        self.blocks.push(end..end);
        for buffer in self.buffers_mut() {
            buffer.push_zero();
        }
    }

    /// Forgets every block. Returns the meta keys, which depend on no position, `[batch, heads, 1, head_dim]` each.
    pub(crate) fn clear(&mut self) -> Vec<Tensor<4>> {
        let meta_keys = self.meta_key.iter().flat_map(|keys| (0..keys.len()).map(|at| copied(keys.range(at, at + 1))));
        let meta_keys = meta_keys.collect();
        self.blocks.clear();
        for buffer in self.buffers_mut() {
            buffer.drop_front(buffer.len());
        }
        meta_keys
    }

    /// Merges neighbours until at most `limit` blocks are left: each time the pair with the fewest tokens, the
    /// oldest of equals. Which pairs merge depends on counts alone, never on values.
    pub(crate) fn merge_to(&mut self, limit: usize) {
        while self.blocks.len() > limit {
            let first = (0..self.blocks.len() - 1)
                .min_by_key(|&i| self.blocks[i].len() + self.blocks[i + 1].len())
                .unwrap_or_default();
            self.merge_pair(first);
        }
    }

    /// Merges blocks `first` and `first + 1`.
    fn merge_pair(&mut self, first: usize) {
        let (n1, n2) = (self.blocks[first].len() as f64, self.blocks[first + 1].len() as f64);
        // Two blocks of sinks have no tokens at all: any weights do.
        let (w1, w2) = if n1 + n2 > 0.0 { (n1 / (n1 + n2), n2 / (n1 + n2)) } else { (0.5, 0.5) };
        let at = |buffer: &RowBuffer, i: usize| buffer.range(i, i + 1);
        let delta = |buffer: &RowBuffer| at(buffer, first + 1) - at(buffer, first);
        let (delta_key, delta_value) = (delta(&self.mean_key), delta(&self.mean_value));
        let compression = &self.compression;
        let spread = |buffer: &mut RowBuffer, right: Tensor<4>, form| {
            let [batch, heads, _, width] = delta_key.dims();
            let between = delta_key.clone().swap_dims(2, 3).matmul(right) * (w1 * w2);
            let square = [batch, heads, width, width];
            let of = |buffer: &RowBuffer, i| compression.load(at(buffer, i), width, form).reshape(square);
            let within = of(buffer, first) * w1 + of(buffer, first + 1) * w2;
            replace_pair(buffer, first, compression.store(within + between, form));
        };
        if let Some(buffer) = &mut self.state {
            spread(buffer, delta_value, Form::General);
        }
        if let Some(buffer) = &mut self.covariance {
            spread(buffer, delta_key.clone(), Form::Symmetric);
        }
        let (mean_place, first_place) = self.places.as_mut().map(|(mean, first)| (mean, first)).unzip();
        if let Some(buffer) = first_place {
            let merged = at(buffer, first).min_pair(at(buffer, first + 1));
            replace_pair(buffer, first, merged);
        }
        let means = [Some(&mut self.mean_key), Some(&mut self.mean_value), self.meta_key.as_mut(), mean_place];
        for buffer in means.into_iter().flatten() {
            let merged = at(buffer, first) * w1 + at(buffer, first + 1) * w2;
            replace_pair(buffer, first, merged);
        }
        let second = self.blocks.remove(first + 1);
        let merged = &mut self.blocks[first];
        *merged = if merged.start == merged.end { second } else { merged.start..second.end };
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The first block that starts at `position` or later.
    pub(crate) fn first_from(&self, position: usize) -> usize {
        self.blocks.partition_point(|block| block.start < position)
    }

    /// Blocks `range` of every statistic.
    pub(crate) fn view(&self, range: std::ops::Range<usize>) -> StatisticsView {
        let of = |buffer: &RowBuffer| buffer.range(range.start, range.end);
        let width = self.mean_key.all().dims()[3];
        let matrices = |buffer: &RowBuffer, form| self.compression.load(of(buffer), width, form);
        StatisticsView {
            blocks: self.blocks[range.clone()].to_vec(),
            mean_key: of(&self.mean_key),
            mean_value: of(&self.mean_value),
            state: self.state.as_ref().map(|buffer| matrices(buffer, Form::General)),
            covariance: self.covariance.as_ref().map(|buffer| matrices(buffer, Form::Symmetric)),
            meta_key: self.meta_key.as_ref().map(of),
            mean_place: None,
            hidden: None,
        }
    }

    /// Every block [made of tokens](Statistics::push_tokens) that stand anywhere; those with one before `visible` are hidden.
    pub(crate) fn view_of_tokens(&self, visible: usize) -> StatisticsView {
        let mut view = self.view(0..self.len());
        if let Some((mean, first)) = &self.places {
            let [batch, heads, blocks, _] = first.all().dims();
            let hidden = first.all().lower_elem(visible as f64).float().cast(first.all().dtype()) * MASKED;
            view.hidden = Some(hidden.reshape([batch, heads, 1, 1, blocks]));
            view.mean_place = Some(mean.all().reshape([batch, heads, 1, 1, blocks]));
        }
        view
    }

    /// Bytes of every buffer.
    pub(crate) fn bytes(&self) -> usize {
        let (mean_place, first_place) = self.places.as_ref().map(|(mean, first)| (mean, first)).unzip();
        let optional = [&self.state, &self.covariance, &self.meta_key].map(Option::as_ref);
        let optional = optional.into_iter().chain([mean_place, first_place]);
        let optional = optional.into_iter().flatten().map(RowBuffer::bytes).sum::<usize>();
        self.mean_key.bytes() + self.mean_value.bytes() + optional + self.blocks.len() * size_of::<Range<usize>>()
    }

    fn buffers_mut(&mut self) -> impl Iterator<Item = &mut RowBuffer> {
        let optional = [self.state.as_mut(), self.covariance.as_mut(), self.meta_key.as_mut()];
        [&mut self.mean_key, &mut self.mean_value].into_iter().chain(optional.into_iter().flatten())
    }
}

/// The statistics of some blocks, as tensors to compute with.
#[derive(Debug, Clone)]
pub(crate) struct StatisticsView {
    /// Positions of each block, sinks left out.
    pub(crate) blocks: Vec<Range<usize>>,
    /// `[batch, kv_heads, blocks, head_dim]`.
    pub(crate) mean_key: Tensor<4>,
    /// `[batch, kv_heads, blocks, head_dim]`.
    pub(crate) mean_value: Tensor<4>,
    /// `[batch, kv_heads, blocks, head_dim^2]`.
    pub(crate) state: Option<Tensor<4>>,
    /// `[batch, kv_heads, blocks, head_dim^2]`.
    pub(crate) covariance: Option<Tensor<4>>,
    /// `[batch, heads, blocks, head_dim]`.
    pub(crate) meta_key: Option<Tensor<4>>,
    /// Mean positions where every KV head has its own, `[batch, kv_heads, 1, 1, blocks]`.
    pub(crate) mean_place: Option<Tensor<5>>,
    /// [`MASKED`] where a block may not be read, likewise.
    pub(crate) hidden: Option<Tensor<5>>,
}

/// Puts `merged` in the place of rows `first` and `first + 1`.
fn replace_pair(buffer: &mut RowBuffer, first: usize, merged: Tensor<4>) {
    let mut rows = Vec::with_capacity(3);
    if first > 0 {
        rows.push(buffer.range(0, first));
    }
    rows.push(merged);
    if first + 2 < buffer.len() {
        rows.push(buffer.range(first + 2, buffer.len()));
    }
    buffer.set(Tensor::cat(rows, 2));
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    const SIZES: Sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, head_dim: 3, dtype: DType::F32 };
    fn kept() -> Kept {
        let compression = Compression::new(1);
        Kept { state: true, covariance: true, meta_key: true, places: false, room: 1, compression }
    }

    /// Rows that differ in everything, `[2, heads, tokens, 3]`.
    fn rows(heads: usize, tokens: usize, salt: f32) -> Tensor<4> {
        let data: Vec<f32> = (0..2 * heads * tokens * 3).map(|at| (salt + 1.7 * at as f32).sin() + 0.3).collect();
        Tensor::from_data(TensorData::new(data, [2, heads, tokens, 3]), &Device::flex())
    }

    /// One block for each of the consecutive ranges that `ends` cut `tokens` tokens into.
    fn blocks(ends: &[usize], keys: &Tensor<4>, values: &Tensor<4>, meta_key: &Tensor<4>) -> Statistics {
        let mut statistics = Statistics::new(SIZES, kept(), &Device::flex());
        let mut start = 0;
        for &end in ends {
            let of = |rows: &Tensor<4>| rows.clone().narrow(2, start, end - start);
            statistics.push_block(start..end, of(keys), of(values), Some(meta_key.clone()));
            start = end;
        }
        statistics
    }

    fn tensors(view: StatisticsView) -> Vec<(&'static str, Vec<f32>)> {
        let of = |tensor: Tensor<4>| tensor.try_into_vec_as::<f32>().unwrap();
        vec![
            ("mean key", of(view.mean_key)),
            ("mean value", of(view.mean_value)),
            ("state", of(view.state.unwrap())),
            ("covariance", of(view.covariance.unwrap())),
            ("meta key", of(view.meta_key.unwrap())),
        ]
    }

    fn assert_close(found: StatisticsView, expected: StatisticsView) {
        assert_eq!(found.blocks, expected.blocks);
        for ((name, found), (_, expected)) in tensors(found).into_iter().zip(tensors(expected)) {
            assert_eq!(found.len(), expected.len(), "{name}");
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-5, "{name}: {found} instead of {expected}");
            }
        }
    }

    #[test]
    fn merged_blocks_have_the_statistics_of_their_union() {
        let (keys, values, meta_key) = (rows(2, 12, 0.0), rows(2, 12, 5.0), rows(4, 1, 9.0));
        let whole = blocks(&[12], &keys, &values, &meta_key);
        for ends in [&[4, 8, 12][..], &[1, 2, 12], &[11, 12], &[2, 3, 7, 8, 12]] {
            let mut merged = blocks(ends, &keys, &values, &meta_key);
            merged.merge_to(1);
            assert_close(merged.view(0..1), whole.view(0..1));
        }
    }

    #[test]
    fn the_smallest_neighbours_merge_first_and_the_oldest_of_equals() {
        let (keys, values, meta_key) = (rows(2, 12, 0.0), rows(2, 12, 5.0), rows(4, 1, 9.0));
        let mut statistics = blocks(&[4, 5, 6, 8, 10, 12], &keys, &values, &meta_key);
        let expected: [&[usize]; 5] = [&[4, 6, 8, 10, 12], &[4, 8, 10, 12], &[4, 8, 12], &[8, 12], &[12]];
        for ends in expected {
            statistics.merge_to(ends.len());
            let found: Vec<usize> = statistics.blocks.iter().map(|block| block.end).collect();
            assert_eq!(found, ends);
        }
    }

    #[test]
    fn blocks_without_tokens_weigh_nothing_in_a_merge() {
        let (keys, values, meta_key) = (rows(2, 4, 0.0), rows(2, 4, 5.0), rows(4, 1, 9.0));
        let mut merged = Statistics::new(SIZES, kept(), &Device::flex());
        merged.push_empty(4);
        merged.push_empty(8);
        merged.push_block(8..12, keys.clone(), values.clone(), Some(meta_key.clone()));
        merged.merge_to(1);
        let mut alone = Statistics::new(SIZES, kept(), &Device::flex());
        alone.push_block(8..12, keys, values, Some(meta_key));
        assert_close(merged.view(0..1), alone.view(0..1));
    }
}
