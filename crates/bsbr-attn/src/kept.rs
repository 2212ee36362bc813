//! Tokens that keep their own keys and values behind the local region: per KV head those that later tokens attend to most.
//!
//! The choice is made at chunk borders alone, from the last queries of the chunk before, the *watchers*. A token that
//! leaves the local region scores the share of attention it has among everything the watchers read exactly, as a mean over
//! them and a sum over the heads of the group; one that was kept already scores the moving average of these shares. So the
//! choice knows nothing of how the text was cut into pieces, and nothing of the tokens that it is made for.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, activation::softmax};

use crate::{
    AttentionOptions,
    buffer::{RowBuffer, copied},
    plain::{MASKED, Part, Tile, Values, biased_at, float_tensor, int_tensor, scores},
    seen::Columns,
    statistics::Sizes,
};

/// Share of its score that a kept token brings to the next border; the rest is what the watchers give it there.
const MEMORY: f64 = 0.7;
/// How much more a token counts than the one before it, in the logarithm of the score: less than any real difference, more
/// than rounding. Of tokens that score alike the more recent is kept.
const MORE_FOR_THE_NEXT: f32 = 1e-5;
/// Shares below this are all alike; its logarithm leaves room for the preference above.
const LEAST_SHARE: f64 = 1e-30;

/// The kept tokens of a layer, oldest first.
#[derive(Debug, Clone)]
pub(crate) struct KeptTokens {
    limit: usize,
    /// The last queries of the current chunk, `[batch, heads, watchers, head_dim]`.
    watchers: RowBuffer,
    watching: usize,
    tokens: Option<Tokens>,
}

/// Tokens that stand anywhere, in order of position.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    /// `[batch, kv_heads, tokens, head_dim]`.
    pub(crate) keys: Tensor<4>,
    /// Like the keys.
    pub(crate) values: Tensor<4>,
    /// `[batch, kv_heads, tokens]`.
    pub(crate) positions: Tensor<3, Int>,
    /// Likewise.
    scores: Tensor<3>,
}

impl Tokens {
    /// Tokens `index`, `[batch, kv_heads, n]`.
    fn gather(&self, index: Tensor<3, Int>) -> Self {
        let [batch, heads, count] = index.dims();
        let width = self.keys.dims()[3];
        let rows = index.clone().unsqueeze_dim::<4>(3).expand([batch, heads, count, width]);
        Self {
            keys: self.keys.clone().gather(2, rows.clone()),
            values: self.values.clone().gather(2, rows),
            positions: self.positions.clone().gather(2, index.clone()),
            scores: self.scores.clone().gather(2, index),
        }
    }

    fn len(&self) -> usize {
        self.keys.dims()[2]
    }

    /// Tokens `range` of these.
    pub(crate) fn range(&self, range: Range<usize>) -> Self {
        let (start, count) = (range.start, range.len());
        Self {
            keys: self.keys.clone().narrow(2, start, count),
            values: self.values.clone().narrow(2, start, count),
            positions: self.positions.clone().narrow(2, start, count),
            scores: self.scores.clone().narrow(2, start, count),
        }
    }
}

/// What the watchers read besides kept tokens.
pub(crate) struct Watched {
    /// The sinks.
    pub(crate) others: Vec<Part>,
    /// Everything from the first token that leaves the local region on.
    pub(crate) rows: Part,
    /// Keys and values of the tokens that leave, and their positions.
    pub(crate) leaving: (Tensor<4>, Tensor<4>, Range<usize>),
}

impl KeptTokens {
    /// At most `limit` tokens per KV head; `watching` queries of each chunk of a sequence score them.
    pub(crate) fn new(sizes: Sizes, limit: usize, watching: usize, device: &Device) -> Self {
        let Sizes { batch, heads, head_dim, dtype, .. } = sizes;
        let watchers = RowBuffer::new(batch, heads, head_dim, watching, device, dtype);
        Self { limit, watchers, watching, tokens: None }
    }

    /// Takes in the queries, `[batch, heads, tokens, head_dim]`, that stand at `place` of a chunk of `chunk` tokens.
    pub(crate) fn watch(&mut self, query: &Tensor<4>, place: Range<usize>, chunk: usize) {
        let first = chunk - self.watching;
        if place.end > first {
            let from = place.start.max(first);
            if from == first {
                self.watchers.clear();
            }
            self.watchers.push(query.clone().narrow(2, from - place.start, place.end - from).detach());
        }
    }

    /// The watchers of a chunk that ends before position `end`.
    pub(crate) fn watchers(&self, kv_heads: usize, end: usize) -> Tile {
        Tile::new(self.watchers.all(), kv_heads, end - self.watching)
    }

    /// The kept tokens as something to read, if there are any.
    pub(crate) fn part(&self, tile: &Tile, options: &AttentionOptions) -> Option<Part> {
        let tokens = self.tokens.as_ref()?;
        let [batch, kv_heads, count] = tokens.positions.dims();
        let positions = tokens.positions.clone().reshape([batch, kv_heads, 1, 1, count]);
        let logits = scores(tile, tokens.keys.clone(), options);
        let logits = biased_at(tile, logits, positions.clone().float(), options);
        let logits = if options.window.is_some() {
            let bounds = (0..tile.tokens()).map(|token| options.first_visible(tile.start + token));
            let bound = int_tensor(bounds, &positions.device()).reshape([1, 1, 1, tile.tokens(), 1]);
            let shape = [batch, kv_heads, 1, tile.tokens(), count];
            let hidden = positions.expand(shape).lower(bound.expand(shape));
            logits + hidden.float().cast(tile.query.dtype()) * MASKED
        } else {
            logits
        };
        let columns = Columns::Kept(tokens.positions.clone());
        Some(Part { logits, values: Values::Shared(tokens.values.clone()), columns })
    }

    /// Chooses anew among the kept tokens and those that leave the local region; returns those that are kept no longer, in
    /// order of position, the same number for every head. `next` is the position of the next token.
    pub(crate) fn choose(
        &mut self,
        tile: &Tile,
        watched: Watched,
        next: usize,
        options: &AttentionOptions,
    ) -> Option<Tokens> {
        let (keys, values, positions) = watched.leaving;
        let [batch, kv_heads, leaving, _] = keys.dims();
        let kept = self.part(tile, options).map(|part| part.logits.detach());
        let before = kept.as_ref().map_or(0, |logits| logits.dims()[4]);
        let others = watched.others.into_iter().map(|part| part.logits);
        let sinks = options.sink_column(&watched.rows.logits);
        let logits = kept.into_iter().chain([watched.rows.logits]).chain(others).chain(sinks);
        let weights = softmax(Tensor::cat(logits.collect(), 4).detach(), 4).narrow(4, 0, before + leaving);
        let shares = weights.mean_dim(3).sum_dim(2).reshape([batch, kv_heads, before + leaving]);

        let device = keys.device();
        let positions = int_tensor(positions, &device).reshape([1, 1, leaving]).expand([batch, kv_heads, leaving]);
        let (keys, values) = if self.tokens.is_none() { (copied(keys), copied(values)) } else { (keys, values) };
        let mut new = Tokens { keys, values, positions, scores: shares.clone().narrow(2, before, leaving) };
        if let Some(old) = self.tokens.take() {
            let remembered = old.scores * MEMORY + shares.narrow(2, 0, before) * (1.0 - MEMORY);
            new = Tokens {
                keys: Tensor::cat(vec![old.keys, new.keys], 2),
                values: Tensor::cat(vec![old.values, new.values], 2),
                positions: Tensor::cat(vec![old.positions, new.positions], 2),
                scores: Tensor::cat(vec![remembered, new.scores], 2),
            };
        }
        let count = new.len();
        if count <= self.limit {
            self.tokens = Some(new);
            return None;
        }
        let preference = (0..count).map(|at| at as f32 * MORE_FOR_THE_NEXT).collect();
        let preference = float_tensor(preference, &device, new.scores.dtype()).reshape([1, 1, count]);
        let mut rank = new.scores.clone().clamp_min(LEAST_SHARE).log() + preference;
        if options.window.is_some() {
            // What no later token can see goes first.
            let gone = new.positions.clone().lower_elem(options.first_visible(next) as i32);
            rank = rank + gone.float().cast(new.scores.dtype()) * MASKED;
        }
        let order = rank.argsort_descending(2);
        let part = |from: usize, count: usize| new.gather(order.clone().narrow(2, from, count).sort(2));
        let gone = part(self.limit, count - self.limit);
        self.tokens = (self.limit > 0).then(|| part(0, self.limit));
        Some(gone)
    }

    /// Bytes of every tensor.
    pub(crate) fn bytes(&self) -> usize {
        let tokens = self.tokens.as_ref().map_or(0, |tokens| {
            let each = tokens.positions.dtype().size() + tokens.scores.dtype().size();
            2 * tokens.keys.shape().num_elements() * tokens.keys.dtype().size()
                + tokens.positions.shape().num_elements() * each
        });
        self.watchers.bytes() + tokens
    }
}
