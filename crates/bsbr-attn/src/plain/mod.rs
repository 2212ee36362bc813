//! Attention of one tile of queries in plain tensor operations: the reference every faster kernel is held to.
//!
//! A tile is a run of queries inside one chunk. Everything a tile reads is a list of [`Part`]s (keys it reads exactly,
//! blocks it reads through their statistics) that go through one softmax.

mod additive;
mod choose;
mod exact;
mod far;

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::softmax};

pub(crate) use additive::retrieved_state;
pub(crate) use choose::choose_per_chunk;
pub(crate) use exact::{chosen_part, contiguous_part, masked_candidates_part};
pub(crate) use far::{far_logits, far_part, meta_scores, mixed_state, read_mixed_state, read_states};

use crate::{
    AttentionOptions,
    seen::{Columns, Watch},
};

/// Added to a logit that may not be seen. Its exponential is exactly 0, and unlike an infinity it cannot turn into a
/// NaN when subtracted from another.
pub(crate) const MASKED: f64 = -1e30;

/// Queries `[batch, kv_heads, group, tokens, head_dim]` that stand at positions `start..start + tokens`.
#[derive(Debug, Clone)]
pub(crate) struct Tile {
    pub(crate) query: Tensor<5>,
    pub(crate) start: usize,
}

impl Tile {
    /// From `[batch, heads, tokens, head_dim]`; query head `h` reads KV head `h / (heads / kv_heads)`.
    pub(crate) fn new(query: Tensor<4>, kv_heads: usize, start: usize) -> Self {
        let [batch, heads, tokens, width] = query.dims();
        Self { query: query.reshape([batch, kv_heads, heads / kv_heads, tokens, width]), start }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.query.dims()[3]
    }

    /// All queries of a group in a row: `[batch, kv_heads, group * tokens, head_dim]`.
    pub(crate) fn flat(&self) -> Tensor<4> {
        let [batch, kv_heads, group, tokens, width] = self.query.dims();
        self.query.clone().reshape([batch, kv_heads, group * tokens, width])
    }

    /// `[1, 1, 1, tokens, columns]`: 0 where `visible(token, column)`, [`MASKED`] elsewhere; `None` if all is visible.
    pub(crate) fn mask(&self, columns: usize, visible: impl Fn(usize, usize) -> bool) -> Option<Tensor<5>> {
        let tokens = self.tokens();
        let mut data = vec![0f32; tokens * columns];
        let mut any = false;
        for (token, row) in data.chunks_mut(columns.max(1)).enumerate() {
            for (column, value) in row.iter_mut().enumerate() {
                if !visible(token, column) {
                    *value = MASKED as f32;
                    any = true;
                }
            }
        }
        let (device, dtype) = (self.query.device(), self.query.dtype());
        any.then(|| float_tensor(data, &device, dtype).reshape([1, 1, 1, tokens, columns]))
    }
}

/// Adds the ALiBi of columns that stand at `positions` to their logits. A block stands between two tokens when it has
/// an even number of them.
pub(crate) fn biased(
    tile: &Tile,
    logits: Tensor<5>,
    positions: impl Iterator<Item = f64>,
    options: &AttentionOptions,
) -> Tensor<5> {
    let [_, kv_heads, group, tokens, columns] = logits.dims();
    let Some(slopes) = options.slopes(kv_heads, group, &logits) else { return logits };
    // Differences of positions, not positions: the numbers stay small and exact however long the text is.
    let from_start: Vec<f64> = positions.map(|position| position - tile.start as f64).collect();
    let distance = (0..tokens).flat_map(|token| from_start.iter().map(move |at| (at - token as f64) as f32));
    let distance = float_tensor(distance.collect(), &logits.device(), logits.dtype());
    logits + distance.reshape([1, 1, 1, tokens, columns]) * slopes
}

/// [`biased`] where each KV head has its own columns: `positions` is `[batch, kv_heads, 1, 1, columns]`.
pub(crate) fn biased_at(tile: &Tile, logits: Tensor<5>, positions: Tensor<5>, options: &AttentionOptions) -> Tensor<5> {
    let shape = logits.dims();
    let [batch, kv_heads, group, tokens, columns] = shape;
    let Some(slopes) = options.slopes(kv_heads, group, &logits) else { return logits };
    let from_start = positions.cast(logits.dtype()) - tile.start as f64;
    let token = (0..tokens).map(|token| token as f32).collect();
    let token = float_tensor(token, &logits.device(), logits.dtype()).reshape([1, 1, 1, tokens, 1]);
    let each = [batch, kv_heads, 1, tokens, columns];
    logits + (from_start.expand(each) - token.expand(each)) * slopes
}

/// Something a tile reads.
pub(crate) struct Part {
    /// `[batch, kv_heads, group, tokens, columns]`.
    pub(crate) logits: Tensor<5>,
    pub(crate) values: Values,
    pub(crate) columns: Columns,
}

/// The values that belong to the columns of a part.
pub(crate) enum Values {
    /// The same for every token: `[batch, kv_heads, columns, head_dim]`.
    Shared(Tensor<4>),
    /// One set for each choice, `[batch * kv_heads * choices, columns, head_dim]`; `choices` is the number of tokens
    /// or 1.
    PerChoice(Tensor<3>),
}

/// One softmax over the columns of all parts, and that of the sinks. Returns the output `[batch, kv_heads, group, tokens, head_dim]`
/// and the weights of the part `weighed`, for whoever adds to its values. `start` is where the first token stands, for who watches.
pub(crate) fn combine(
    parts: Vec<Part>,
    weighed: Option<usize>,
    options: &AttentionOptions,
    (start, watch): (usize, Option<&mut Watch>),
) -> (Tensor<5>, Option<Tensor<5>>) {
    let (mut logits, mut read_of, mut columns) = (Vec::new(), Vec::new(), Vec::new());
    // First, so that what is behind the last part is nothing.
    if let Some(sinks) = parts.first().and_then(|part| options.sink_column(&part.logits)) {
        logits.push(sinks);
        columns.push(Columns::Sink);
    }
    let mut at = logits.len();
    for part in parts {
        read_of.push((part.logits.dims()[4], part.values));
        logits.push(part.logits);
        columns.push(part.columns);
    }
    let logits = Tensor::cat(logits, 4);
    let weights = match watch {
        Some(watch) => {
            let weights = softmax(logits.clone(), 4);
            watch.see(start, &columns, &logits, &weights);
            weights
        }
        None => softmax(logits, 4),
    };
    let mut output: Option<Tensor<5>> = None;
    let mut weighed_weights = None;
    for (index, (columns, values)) in read_of.into_iter().enumerate() {
        let weight = weights.clone().narrow(4, at, columns);
        at += columns;
        let read = read(weight.clone(), values);
        output = Some(match output {
            Some(sum) => sum + read,
            None => read,
        });
        if weighed == Some(index) {
            weighed_weights = Some(weight);
        }
    }
    let output = output.unwrap_or_else(|| unreachable!("a token reads at least itself"));
    (output, weighed_weights)
}

/// Log of the sum of the exponentials of every column, `[batch, kv_heads, group, tokens, 1]`, that of the sinks left out.
pub(crate) fn log_mass(logits: Vec<Tensor<5>>) -> Tensor<5> {
    let logits = Tensor::cat(logits, 4);
    let highest = logits.clone().max_dim(4);
    (logits - highest.clone()).exp().sum_dim(4).log() + highest
}

/// `sum_x weight_x value_x`, `[batch, kv_heads, group, tokens, head_dim]`.
fn read(weight: Tensor<5>, values: Values) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, columns] = weight.dims();
    match values {
        Values::Shared(values) => {
            let width = values.dims()[3];
            let weight = weight.reshape([batch, kv_heads, group * tokens, columns]);
            weight.matmul(values).reshape([batch, kv_heads, group, tokens, width])
        }
        Values::PerChoice(values) => {
            let [sets, _, width] = values.dims();
            let choices = sets / (batch * kv_heads);
            by_choice(by_set(weight, choices).matmul(values), [batch, kv_heads, group, tokens, width], choices)
        }
    }
}

/// `[batch, kv_heads, group, tokens, x]` as `[batch * kv_heads * choices, group * tokens / choices, x]`.
pub(crate) fn by_set(tensor: Tensor<5>, choices: usize) -> Tensor<3> {
    let [batch, kv_heads, group, tokens, columns] = tensor.dims();
    if choices == 1 {
        return tensor.reshape([batch * kv_heads, group * tokens, columns]);
    }
    tensor.swap_dims(2, 3).reshape([batch * kv_heads * tokens, group, columns])
}

/// The inverse of [`by_set`]; `shape` is the shape to come back to.
pub(crate) fn by_choice(tensor: Tensor<3>, shape: [usize; 5], choices: usize) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, columns] = shape;
    if choices == 1 {
        return tensor.reshape(shape);
    }
    tensor.reshape([batch, kv_heads, tokens, group, columns]).swap_dims(2, 3)
}

/// `scale q . k`, softcapped when the model does: `[batch, kv_heads, group, tokens, columns]` for keys
/// `[batch, kv_heads, columns, head_dim]`.
pub(crate) fn scores(tile: &Tile, keys: Tensor<4>, options: &AttentionOptions) -> Tensor<5> {
    let [batch, kv_heads, group, tokens, _] = tile.query.dims();
    let columns = keys.dims()[2];
    let scores = tile.flat().matmul(keys.swap_dims(2, 3)) * options.scale;
    options.capped(scores).reshape([batch, kv_heads, group, tokens, columns])
}

/// A float tensor of the given type from f32 numbers.
pub(crate) fn float_tensor(data: Vec<f32>, device: &Device, dtype: DType) -> Tensor<1> {
    let length = data.len();
    Tensor::from_data(TensorData::new(data, [length]), (device, dtype))
}

/// An integer tensor from positions or indices.
pub(crate) fn int_tensor(data: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let data: Vec<i32> = data.map(|value| value as i32).collect();
    let length = data.len();
    Tensor::from_data(TensorData::new(data, [length]), device)
}
