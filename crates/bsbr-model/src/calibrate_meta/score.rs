//! How much of the attention to far blocks two meta projections catch.

use bsbr_attn::Retrieval;
use burn::nn::Linear;

use super::{
    heads::{ChunkShares, Heads},
    numbers,
};
use crate::ModelError;

/// As the choice of a whole chunk has it: of blocks that score alike the most recent.
const MORE_FOR_THE_NEXT: f64 = 1e-4;

/// Attention caught of all there was.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Score {
    caught: f64,
    all: f64,
}

impl Score {
    /// Share of it; 0 where there was none.
    pub(super) fn share(&self) -> f64 {
        if self.all > 0.0 { self.caught / self.all } else { 0.0 }
    }

    /// Adds the chunks of one window that have more candidates than they choose.
    pub(super) fn add(
        &mut self,
        heads: &Heads<'_>,
        shares: &ChunkShares,
        query: &Linear,
        key: &Linear,
    ) -> Result<(), ModelError> {
        let (chunk_size, block) = (heads.attention.chunk_size, heads.block());
        let starts: Vec<usize> = (0..shares.len()).map(|chunk| chunk * chunk_size).collect();
        let ends: Vec<usize> = (0..heads.tokens / block).map(|at| (at + 1) * block - 1).collect();
        let (queries, keys) = (project(heads, query, &starts)?, project(heads, key, &ends)?);
        let width = heads.head_dim;
        for (chunk, shares) in shares.iter().enumerate() {
            let candidates = heads.candidates(chunk);
            let logits: Vec<Vec<f64>> = (0..heads.heads)
                .map(|head| {
                    let query = &queries[(chunk * heads.heads + head) * width..][..width];
                    let logit = |block: usize| {
                        let key = &keys[(block * heads.heads + head) * width..][..width];
                        query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * heads.options.scale
                    };
                    candidates.clone().map(logit).collect()
                })
                .collect();
            let shares: Vec<&[f64]> = shares.iter().map(|head| &head[candidates.clone()]).collect();
            if heads.attention.retrieval == Retrieval::Blocks {
                if candidates.len() > heads.attention.meta_blocks {
                    self.chosen(heads, &logits, &shares);
                }
            } else if candidates.len() > 1 {
                self.weighed(&logits, &shares);
            }
        }
        Ok(())
    }

    /// The shares of the blocks that the heads of each group choose together.
    fn chosen(&mut self, heads: &Heads<'_>, logits: &[Vec<f64>], shares: &[&[f64]]) {
        let group = heads.heads / heads.kv_heads;
        for (logits, shares) in logits.chunks(group).zip(shares.chunks(group)) {
            let blocks = shares[0].len();
            let sum = |block: usize| shares.iter().map(|head| head[block]).sum::<f64>();
            let score =
                |block: usize| logits.iter().map(|head| head[block]).sum::<f64>() + block as f64 * MORE_FOR_THE_NEXT;
            let scores: Vec<f64> = (0..blocks).map(score).collect();
            let mut order: Vec<usize> = (0..blocks).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            self.caught += order.iter().take(heads.attention.meta_blocks).map(|&block| sum(block)).sum::<f64>();
            self.all += (0..blocks).map(sum).sum::<f64>();
        }
    }

    /// What the weights of each head have in common with its shares.
    fn weighed(&mut self, logits: &[Vec<f64>], shares: &[&[f64]]) {
        for (logits, shares) in logits.iter().zip(shares) {
            let all: f64 = shares.iter().sum();
            let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
            let weights = logits.iter().map(|logit| (logit - highest).exp() / sum);
            self.caught += weights.zip(*shares).map(|(weight, share)| (weight * all).min(*share)).sum::<f64>();
            self.all += all;
        }
    }
}

/// Projections of the inputs at `positions`, rotated, `[positions, heads, head_dim]`.
fn project(heads: &Heads<'_>, linear: &Linear, positions: &[usize]) -> Result<Vec<f64>, ModelError> {
    let rows = numbers(linear.forward(heads.inputs(positions)))?;
    let mut rows: Vec<f64> = rows.into_iter().map(f64::from).collect();
    for (row, &position) in rows.chunks_exact_mut(heads.heads * heads.head_dim).zip(positions) {
        for head in row.chunks_exact_mut(heads.head_dim) {
            heads.rotate(head, position, false);
        }
    }
    Ok(rows)
}
