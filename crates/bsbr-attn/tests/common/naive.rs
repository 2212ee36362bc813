//! The definitions of BSBR attention, one token at a time, in f64 and without a single tensor.
#![allow(clippy::needless_range_loop)] // Sums run over the indices of the formulas.

use std::ops::Range;

use bsbr_attn::{Far, Retrieval};

use super::{Case, Inputs};

pub(super) type Vector = Vec<f64>;
pub(super) type Matrix = Vec<Vec<f64>>;

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn mean(rows: &[Vector], width: usize) -> Vector {
    (0..width).map(|x| rows.iter().map(|row| row[x]).sum::<f64>() / rows.len() as f64).collect()
}

pub(crate) fn softmax(logits: &[f64]) -> Vec<f64> {
    let highest = logits.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = logits.iter().map(|x| (x - highest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// The same with one more column, which is left out.
pub(crate) fn softmax_beside(sink: Option<f64>, logits: &[f64]) -> Vec<f64> {
    let all: Vec<f64> = logits.iter().copied().chain(sink).collect();
    softmax(&all)[..logits.len()].to_vec()
}

/// Pairs of dimensions turned by so many positions.
fn turned(mut row: Vector, frequencies: &[f64], by: f64) -> Vector {
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (by * frequency).sin_cos();
        let (a, b) = (row[i], row[i + frequencies.len()]);
        (row[i], row[i + frequencies.len()]) = (a * cos - b * sin, a * sin + b * cos);
    }
    row
}

/// A block as its own tokens tell it.
#[derive(Clone)]
struct Block {
    positions: Range<usize>,
    mean_key: Vector,
    mean_value: Vector,
    /// `(1/n) sum (k - mu)(v - vbar)^T`.
    state: Matrix,
    /// `(1/n) sum (k - mu)(k - mu)^T`.
    covariance: Matrix,
    /// `sum k v^T`.
    raw_state: Matrix,
    /// One per query head.
    meta_key: Vec<Vector>,
}

pub(super) fn centred(left: &[Vector], right: &[Vector], left_mean: &[f64], right_mean: &[f64]) -> Matrix {
    let width = left_mean.len();
    let mut sum = vec![vec![0.0; width]; width];
    for (l, r) in left.iter().zip(right) {
        for a in 0..width {
            for b in 0..width {
                sum[a][b] += (l[a] - left_mean[a]) * (r[b] - right_mean[b]) / left.len() as f64;
            }
        }
    }
    sum
}

impl Case {
    fn naive_block(&self, inputs: &Inputs, b: usize, kv: usize, positions: Range<usize>, far: Option<usize>) -> Block {
        let keys: Vec<Vector> = positions.clone().map(|i| self.key(inputs, (b, kv, i), far)).collect();
        let values: Vec<Vector> = positions.clone().map(|i| inputs.values.row(b, kv, i)).collect();
        let (mean_key, mean_value) = (mean(&keys, self.head_dim), mean(&values, self.head_dim));
        let zero = vec![0.0; self.head_dim];
        let mut raw_state = centred(&keys, &values, &zero, &zero);
        raw_state.iter_mut().flatten().for_each(|x| *x *= keys.len() as f64);
        // The meta key of a merged block is the mean of its blocks' meta keys, weighted by their tokens.
        let size = self.config.statistics_block();
        let meta_key = (0..self.heads)
            .map(|h| {
                let each = |i: usize| inputs.meta_key.row(b, h, i / size * size + size - 1);
                mean(&positions.clone().map(each).collect::<Vec<_>>(), self.head_dim)
            })
            .collect();
        Block {
            state: centred(&keys, &values, &mean_key, &mean_value),
            covariance: centred(&keys, &keys, &mean_key, &mean_key),
            raw_state,
            positions,
            mean_key,
            mean_value,
            meta_key,
        }
    }

    /// The blocks that end before the local region of chunk `c`, merged as `max_chunks` says.
    fn naive_blocks(&self, c: usize) -> Vec<Range<usize>> {
        let size = self.config.statistics_block();
        let mut blocks: Vec<Range<usize>> = Vec::new();
        for j in 0..self.config.local_start(c) / size {
            blocks.push((j * size).max(self.config.sink_tokens).min((j + 1) * size)..(j + 1) * size);
            while self.config.max_chunks.is_some_and(|limit| blocks.len() > limit) {
                let pair = (0..blocks.len() - 1).min_by_key(|&i| blocks[i].len() + blocks[i + 1].len()).unwrap();
                let (end, start) = (blocks[pair + 1].end, blocks[pair].start);
                // Position `start` of a block of sinks alone is a sink.
                let start = if blocks[pair].is_empty() { blocks[pair + 1].start } else { start };
                blocks.splice(pair..pair + 2, std::iter::once(start..end));
            }
        }
        blocks.retain(|block| !block.is_empty());
        blocks
    }

    /// The ALiBi slope of a head: a geometric sequence from the power of two below, the rest from the one above.
    pub(super) fn slope(&self, h: usize) -> f64 {
        let power = 1 << self.heads.ilog2();
        if h < power {
            0.5_f64.powf(8.0 / power as f64 * (h + 1) as f64)
        } else {
            0.5_f64.powf(4.0 / power as f64 * (2 * (h - power) + 1) as f64)
        }
    }

    /// The sink of a head.
    pub(crate) fn sink(&self, h: usize) -> Option<f64> {
        self.options.sink_logits.as_ref().map(|sinks| f64::from(sinks[h]))
    }

    /// Score of a key that stands at `position` for the token at `t`.
    pub(super) fn score(&self, h: usize, t: usize, q: &[f64], (k, position): (&[f64], f64)) -> f64 {
        let score = self.options.scale * dot(q, k);
        let score = self.options.softcap.map_or(score, |cap| cap * (score / cap).tanh());
        score - self.options.alibi.unwrap_or(0.0) * self.slope(h) * (t as f64 - position)
    }

    pub(crate) fn key_score(
        &self,
        inputs: &Inputs,
        (b, h, t): (usize, usize, usize),
        i: usize,
        far: Option<usize>,
    ) -> f64 {
        let kv = h / (self.heads / self.kv_heads);
        self.score(h, t, &self.query(inputs, (b, h, t), far), (&self.key(inputs, (b, kv, i), far), i as f64))
    }

    /// A query, or what it would be at the position it reads far keys from.
    fn query(&self, inputs: &Inputs, (b, h, t): (usize, usize, usize), far: Option<usize>) -> Vector {
        let row = inputs.query.row(b, h, t);
        match self.far.as_ref().zip(far) {
            Some((positions, group)) => {
                let local = (self.config.local_chunks + 1) * self.config.chunk_size;
                let stands = t / group + local - local / group;
                turned(row, &positions.frequencies, stands as f64 - t as f64)
            }
            None => row,
        }
    }

    /// A key, or what it would be at the position where it is read from afar.
    fn key(&self, inputs: &Inputs, (b, kv, i): (usize, usize, usize), far: Option<usize>) -> Vector {
        let row = inputs.keys.row(b, kv, i);
        match self.far.as_ref().zip(far) {
            Some((positions, group)) => turned(row, &positions.frequencies, (i / group) as f64 - i as f64),
            None => row,
        }
    }

    fn log_mass(&self, (h, t): (usize, usize), q: &[f64], block: &Block, covariance_weight: f64) -> f64 {
        let position = block.positions.clone().map(|i| i as f64).sum::<f64>() / block.positions.len() as f64;
        let turned: Vector = block.covariance.iter().map(|row| dot(row, q)).collect();
        let spread = 0.5 * covariance_weight * self.options.scale.powi(2) * dot(q, &turned);
        (block.positions.len() as f64).ln() + self.score(h, t, q, (&block.mean_key, position)) + spread.min(4.0)
    }

    /// What token `t` of query head `h` reads.
    pub(crate) fn naive(&self, inputs: &Inputs, b: usize, h: usize, t: usize) -> Vector {
        let config = &self.config;
        if config.kept_tokens > 0 {
            return self.naive_with_kept(inputs, b, h, t);
        }
        let group = self.heads / self.kv_heads;
        let kv = h / group;
        let c = t / config.chunk_size;
        let local_start = config.local_start(c);
        let first_visible = self.first_seen(t);
        // Past the trained length everything before the local region stands elsewhere.
        let far = Some(self.group(t)).filter(|&group| group > 1);
        let q = self.query(inputs, (b, h, t), far);
        let exact: Vec<usize> = (first_visible..=t).filter(|&i| i >= local_start || i < config.sink_tokens).collect();
        let blocks: Vec<Block> =
            self.naive_blocks(c).into_iter().map(|r| self.naive_block(inputs, b, kv, r, far)).collect();

        let mut logits: Vec<f64> =
            exact.iter().map(|&i| self.key_score(inputs, (b, h, t), i, far.filter(|_| i < local_start))).collect();
        let mut values: Vec<Vector> = exact.iter().map(|&i| inputs.values.row(b, kv, i)).collect();
        let mut add = vec![0.0; self.head_dim];
        let first_query = (c * config.chunk_size, inputs);
        // r . h_j for a query head of this KV head.
        let meta_score = |head: usize, block: &Block| {
            let (start, inputs) = first_query;
            if config.needs_meta() {
                dot(&inputs.meta_query.row(b, head, start), &block.meta_key[head])
            } else {
                dot(&inputs.query.row(b, head, start), &block.mean_key)
            }
        };
        // Mixtures of a chunk hold the blocks its last token sees whole.
        let chunk_visible = self.first_seen((c + 1) * config.chunk_size - 1);
        match config.retrieval {
            Retrieval::None => {}
            // With the meta selector: one choice for the chunk.
            Retrieval::Blocks => {
                let weight = if config.far == Far::State { config.covariance_weight } else { 0.0 };
                let chunk_first_visible = self.first_seen(c * config.chunk_size);
                let oldest = config.sink_tokens.max(chunk_first_visible);
                let everything = (c + 1) * config.chunk_size - chunk_first_visible <= config.exact_tokens
                    || (local_start / config.block_size).saturating_sub(oldest / config.block_size)
                        <= config.meta_blocks;
                let chosen: Vec<usize> = if everything {
                    (0..blocks.len()).collect()
                } else {
                    let score = |block: &Block| -> f64 {
                        // Of blocks that score alike the most recent.
                        let number = (block.positions.end / config.block_size) as f64;
                        let heads = kv * group..(kv + 1) * group;
                        heads.map(|h| self.options.scale * meta_score(h, block)).sum::<f64>() + 1e-4 * number
                    };
                    let seen = blocks.iter().enumerate().filter(|(_, block)| block.positions.end > chunk_first_visible);
                    let mut ranked: Vec<(f64, usize)> = seen.map(|(j, block)| (score(block), j)).collect();
                    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
                    ranked.into_iter().take(config.meta_blocks).map(|(_, j)| j).collect()
                };
                let mut state_reads: Vec<(usize, usize)> = Vec::new();
                for (j, block) in blocks.iter().enumerate() {
                    if chosen.contains(&j) {
                        for i in block.positions.clone().filter(|&i| i >= first_visible) {
                            logits.push(self.key_score(inputs, (b, h, t), i, far));
                            values.push(inputs.values.row(b, kv, i));
                        }
                    } else if config.far != Far::None && block.positions.start >= first_visible {
                        state_reads.push((logits.len(), j));
                        logits.push(self.log_mass((h, t), &q, block, weight) + config.far_shift);
                        values.push(block.mean_value.clone());
                    }
                }
                if config.far == Far::State {
                    let weights = softmax_beside(self.sink(h), &logits);
                    for (column, j) in state_reads {
                        for x in 0..self.head_dim {
                            let read: f64 = (0..self.head_dim).map(|y| q[y] * blocks[j].state[y][x]).sum();
                            add[x] += weights[column] * self.options.scale * read;
                        }
                    }
                }
            }
            Retrieval::State | Retrieval::Additive => {
                let seen: Vec<&Block> = blocks.iter().filter(|x| x.positions.start >= chunk_visible).collect();
                let mixture = softmax(&seen.iter().map(|x| self.options.scale * meta_score(h, x)).collect::<Vec<_>>());
                let additive = config.retrieval == Retrieval::Additive;
                let near = logits.len();
                if !additive {
                    for block in &seen {
                        logits.push(self.log_mass((h, t), &q, block, config.covariance_weight) + config.far_shift);
                        values.push(block.mean_value.clone());
                    }
                }
                let factor = if additive {
                    config.additive_gate
                } else {
                    self.options.scale * softmax_beside(self.sink(h), &logits)[near..].iter().sum::<f64>()
                };
                for (block, p) in seen.iter().zip(&mixture) {
                    let matrix = if additive { &block.raw_state } else { &block.state };
                    for x in 0..self.head_dim {
                        let read: f64 = (0..self.head_dim).map(|y| q[y] * matrix[y][x]).sum();
                        add[x] += factor * p * read;
                    }
                }
            }
        }
        let weights = softmax_beside(self.sink(h), &logits);
        for (w, v) in weights.iter().zip(&values) {
            for x in 0..self.head_dim {
                add[x] += w * v[x];
            }
        }
        add
    }
}
