//! Rotary positions past the trained length.

use burn::tensor::{Tensor, TensorData};

use crate::{AttentionError, AttentionOptions, BlockAttentionConfig};

/// Positions at which a token past the trained length reads what lies before its local region.
///
/// Grouped positions, as Self-Extend has them (Jin et al. 2024), with a group that grows with the text: for a token at `t`, with
/// `w` tokens in a whole local region, the key at `i` stands at `floor(i / G)` and the query at `floor(t / G) + w - floor(w / G)`,
/// `G` the fewest tokens that share a position so that no distance is longer than trained: `ceil((t - w) / (trained - 1 - w))`. So
/// the order of far tokens is kept, and it goes on from the local region, which keeps its true positions. `G = 1`, up to the
/// trained length, is no change at all.
#[derive(Debug, Clone, PartialEq)]
pub struct FarPositions {
    /// Tokens of the longest text the model was trained on.
    pub trained: usize,
    /// Angle by which each pair of dimensions turns from one position to the next: dimension `i` with `i + frequencies.len()`.
    pub frequencies: Vec<f64>,
}

/// How many tokens share a position, and how many tokens of a text are read so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stage {
    pub(crate) group: usize,
    pub(crate) end: usize,
    local: usize,
}

impl Stage {
    /// Where the key at `position` stands for far tokens.
    fn key(&self, position: usize) -> usize {
        position / self.group
    }

    /// Where the query at `position` stands for far keys.
    fn query(&self, position: usize) -> usize {
        position / self.group + self.local - self.local / self.group
    }
}

impl FarPositions {
    pub(crate) fn check(
        &self,
        attention: Option<&BlockAttentionConfig>,
        options: &AttentionOptions,
        head_dim: usize,
    ) -> Result<(), AttentionError> {
        let fail = |setting: &'static str, value: String, expected: String| {
            Err(AttentionError::Config { setting, value, expected })
        };
        let Some(attention) = attention else {
            return fail(
                "attention",
                "full".into(),
                "blocks or none with grouped positions: there is no far part in full attention".into(),
            );
        };
        if options.alibi.is_some() {
            return fail("alibi", "set".into(), "unset with grouped positions: they are rotary".into());
        }
        if self.frequencies.is_empty() || 2 * self.frequencies.len() > head_dim {
            let expected = format!("1 to head_dim / 2 = {}", head_dim / 2);
            return fail("frequencies", self.frequencies.len().to_string(), expected);
        }
        if let Some(frequency) = self.frequencies.iter().find(|frequency| !frequency.is_finite()) {
            return fail("frequencies", frequency.to_string(), "finite numbers".into());
        }
        attention.validate_trained_length(self.trained)
    }

    /// How the token at `position` reads.
    pub(crate) fn stage(&self, attention: &BlockAttentionConfig, position: usize) -> Stage {
        let local = attention.local_tokens();
        let reach = self.trained - 1 - local;
        let group = position.saturating_sub(local).div_ceil(reach).max(1);
        Stage { group, end: local + group * reach + 1, local }
    }

    /// Queries that stand at the positions from `start` on, turned to where they read far keys from.
    pub(crate) fn turn_queries(&self, queries: Tensor<4>, start: usize, stage: Stage) -> Tensor<4> {
        self.turn(queries, start, |position| stage.query(position) as f64 - position as f64)
    }

    /// Keys of the tokens from `start` on, turned from where they stand (at their own positions, or where another stage has
    /// them) to where far tokens read them.
    pub(crate) fn turn_keys(&self, keys: Tensor<4>, start: usize, from: Option<Stage>, to: Stage) -> Tensor<4> {
        let stands = |position: usize| from.map_or(position, |stage| stage.key(position));
        self.turn(keys, start, |position| to.key(position) as f64 - stands(position) as f64)
    }

    /// Turns the rows of the tokens from `start` on, `[batch, heads, tokens, head_dim]`, by so many positions each.
    fn turn(&self, rows: Tensor<4>, start: usize, by: impl Fn(usize) -> f64) -> Tensor<4> {
        let [_, _, count, width] = rows.dims();
        let half = self.frequencies.len();
        let angles = (start..start + count).flat_map(|position| {
            let by = by(position);
            self.frequencies.iter().map(move |frequency| (by * frequency).sin_cos())
        });
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        let (device, dtype) = (rows.device(), rows.dtype());
        let tensor = |data| Tensor::<4>::from_data(TensorData::new(data, [1, 1, count, half]), (&device, dtype));
        let (sin, cos) = (tensor(sin), tensor(cos));
        let (first, second) = (rows.clone().narrow(3, 0, half), rows.clone().narrow(3, half, half));
        let mut parts = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
        if 2 * half < width {
            parts.push(rows.narrow(3, 2 * half, width - 2 * half));
        }
        Tensor::cat(parts, 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_tokens_keep_their_order_within_the_trained_length_in_the_smallest_groups_that_allow_it() {
        for (chunk_size, local_chunks, trained) in [(4, 1, 10), (4, 1, 11), (4, 0, 16), (8, 2, 61), (128, 1, 1024)] {
            let attention =
                BlockAttentionConfig { chunk_size, local_chunks, block_size: 4, ..BlockAttentionConfig::default() };
            let positions = FarPositions { trained, frequencies: vec![1.0] };
            positions.check(Some(&attention), &AttentionOptions::new(2), 2).unwrap();
            let local = chunk_size * (local_chunks + 1);
            for token in 0..9 * trained {
                let stage = positions.stage(&attention, token);
                assert!(token < stage.end);
                assert_eq!(token < trained, stage.group == 1);
                let next = positions.stage(&attention, stage.end);
                assert_eq!(next.group, stage.group + 1);
                let distance = |key: usize| stage.query(token) as isize - stage.key(key) as isize;
                assert!(distance(0) < trained as isize);
                for key in [0, token / 3, token / 2].into_iter().filter(|key| key + local < token) {
                    assert!(distance(key) >= distance(key + 1));
                    assert!(distance(key) >= local as isize);
                }
            }
        }
    }
}
