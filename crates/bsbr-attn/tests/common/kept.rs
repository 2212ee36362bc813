//! The definition of kept tokens, one border after the other, in f64.
#![allow(clippy::needless_range_loop)] // Sums run over the indices of the formulas.

use super::{
    Case, Inputs,
    naive::{Vector, centred, dot, mean, softmax, softmax_beside},
};

/// What one KV head remembers behind the local region.
struct Memory {
    /// Position and score of each kept token, oldest first.
    kept: Vec<(usize, f64)>,
    /// The positions behind each block of statistics.
    blocks: Vec<Vec<usize>>,
}

impl Case {
    /// What a KV head remembers when chunk `chunk` begins.
    fn memory(&self, inputs: &Inputs, b: usize, kv: usize, chunk: usize) -> Memory {
        let config = &self.config;
        let group = self.heads / self.kv_heads;
        let watching = (config.chunk_size / 4).max(1);
        let mut memory = Memory { kept: Vec::new(), blocks: Vec::new() };
        for c in 1..=chunk {
            let (start, next) = (config.local_start(c - 1), c * config.chunk_size);
            let leaving = start.max(config.sink_tokens)..config.local_start(c);
            if leaving.is_empty() {
                continue;
            }
            // The share of attention that each position has, as the last queries of the chunk before see it.
            let mut shares = vec![0.0; next];
            for t in next - watching..next {
                let exact = |i: &usize| {
                    let kept = memory.kept.iter().any(|(position, _)| position == i);
                    *i >= self.first_seen(t) && (*i >= start || *i < config.sink_tokens || kept)
                };
                let read: Vec<usize> = (0..=t).filter(exact).collect();
                for h in kv * group..(kv + 1) * group {
                    let logits: Vec<f64> = read.iter().map(|&i| self.key_score(inputs, (b, h, t), i, None)).collect();
                    for (&i, weight) in read.iter().zip(softmax_beside(self.sink(h), &logits)) {
                        shares[i] += weight / watching as f64;
                    }
                }
            }
            for (position, score) in &mut memory.kept {
                *score = 0.7 * *score + 0.3 * shares[*position];
            }
            memory.kept.extend(leaving.map(|i| (i, shares[i])));
            if memory.kept.len() <= config.kept_tokens {
                continue;
            }
            // Of tokens that score alike the more recent.
            let rank = |at: usize| {
                let (position, score) = memory.kept[at];
                let lost = position < self.first_seen(next);
                score.max(1e-30).ln() + 1e-5 * at as f64 - if lost { 1e30 } else { 0.0 }
            };
            let mut order: Vec<usize> = (0..memory.kept.len()).collect();
            order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
            let mut gone: Vec<usize> = order.drain(config.kept_tokens..).collect();
            gone.sort_unstable();
            order.sort_unstable();
            if config.max_chunks != Some(0) {
                let gone: Vec<usize> = gone.into_iter().map(|at| memory.kept[at].0).collect();
                for block in gone.chunks(config.block_size) {
                    memory.blocks.push(block.to_vec());
                    if config.max_chunks.is_some_and(|limit| memory.blocks.len() > limit) {
                        let size = |i: &usize| memory.blocks[*i].len() + memory.blocks[i + 1].len();
                        let pair = (0..memory.blocks.len() - 1).min_by_key(size).unwrap();
                        let second = memory.blocks.remove(pair + 1);
                        memory.blocks[pair].extend(second);
                    }
                }
            }
            memory.kept = order.into_iter().map(|at| memory.kept[at]).collect();
        }
        memory
    }

    /// What token `t` of query head `h` reads.
    pub(super) fn naive_with_kept(&self, inputs: &Inputs, b: usize, h: usize, t: usize) -> Vector {
        let config = &self.config;
        let kv = h / (self.heads / self.kv_heads);
        let chunk = t / config.chunk_size;
        let memory = self.memory(inputs, b, kv, chunk);
        let near = |i: &usize| *i >= config.local_start(chunk) || *i < config.sink_tokens;
        let exact = (0..=t).filter(near).chain(memory.kept.iter().map(|&(position, _)| position));
        let exact: Vec<usize> = exact.filter(|&i| i >= self.first_seen(t)).collect();
        let mut logits: Vec<f64> = exact.iter().map(|&i| self.key_score(inputs, (b, h, t), i, None)).collect();
        let mut values: Vec<Vector> = exact.iter().map(|&i| inputs.values.row(b, kv, i)).collect();

        // Blocks that even the last token of the chunk sees whole.
        let bound = self.first_seen((chunk + 1) * config.chunk_size - 1);
        let blocks: Vec<&Vec<usize>> = memory.blocks.iter().filter(|block| block.iter().all(|&i| i >= bound)).collect();
        let (query, first) = (inputs.query.row(b, h, t), inputs.query.row(b, h, chunk * config.chunk_size));
        let (mut states, mut mixture) = (Vec::new(), Vec::new());
        for block in &blocks {
            let rows = |rows: &super::Rows| block.iter().map(|&i| rows.row(b, kv, i)).collect::<Vec<Vector>>();
            let (keys, block_values) = (rows(&inputs.keys), rows(&inputs.values));
            let (mean_key, mean_value) = (mean(&keys, self.head_dim), mean(&block_values, self.head_dim));
            let covariance = centred(&keys, &keys, &mean_key, &mean_key);
            let turned: Vector = covariance.iter().map(|row| dot(row, &query)).collect();
            let spread = 0.5 * config.covariance_weight * self.options.scale.powi(2) * dot(&query, &turned);
            let position = block.iter().sum::<usize>() as f64 / block.len() as f64;
            let score = self.score(h, t, &query, (&mean_key, position));
            logits.push((block.len() as f64).ln() + score + spread.min(4.0) + config.far_shift);
            mixture.push(self.options.scale * dot(&first, &mean_key));
            states.push(centred(&keys, &block_values, &mean_key, &mean_value));
            values.push(mean_value);
        }
        let weights = softmax_beside(self.sink(h), &logits);
        let far: f64 = weights[exact.len()..].iter().sum();
        let mixture = softmax(&mixture);
        (0..self.head_dim)
            .map(|x| {
                let read: f64 = weights.iter().zip(&values).map(|(weight, value)| weight * value[x]).sum();
                let state = |j: usize| (0..self.head_dim).map(|y| query[y] * states[j][y][x]).sum::<f64>();
                let shift: f64 = (0..states.len()).map(|j| mixture[j] * state(j)).sum();
                read + far * self.options.scale * shift
            })
            .collect()
    }
}
