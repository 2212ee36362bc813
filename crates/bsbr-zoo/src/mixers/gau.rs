//! Gated attention unit with mixed chunk attention, FLASH (Hua et al. 2022), made causal.
//!
//! With a gate `u = silu(x W_u)` and values `v = silu(x W_v)` of [`DecoderConfig::gau_width`], and two pairs of queries and keys
//! made of one `z = silu(x W_z)` of [`DecoderConfig::shared_width`] by a scale and an offset of each channel, a token `t`
//! of a chunk of `C` tokens reads
//!
//! ```text
//! r_t = sum_{i <= t, same chunk} relu(q_t . k_i / C)^2 v_i + q'_t^T (sum_{i in earlier chunks} k'_i v_i^T / C)
//! o_t = (u_t * r_t) W_o
//! ```
//!
//! There is one head, and no normaliser: what is read across chunks grows with the text. The chunk is part of the
//! definition, not only of the parallel form. Recurrently, the sum over earlier chunks and the rows of the chunk at hand are
//! kept. The published unit replaces attention and multilayer perceptron both; here it replaces the attention, so that every
//! family has as many mixers and the same perceptrons.
//!
//! Beside the Python original: that had a softmax within the chunk and full projections for queries and keys, went through
//! all pairs of chunks and so was quadratic in the length, and had no recurrent form. Its masks were causal, as here: a
//! chunk adds to the sum only once it has ended.

use burn::{
    module::{Module, Param},
    tensor::{
        Tensor,
        activation::{relu, sigmoid},
    },
};

use super::chunks::{causal, chunked, joined, sums_before};
use crate::{
    DecoderConfig,
    heads::{Rotation, linear, residual_deviation},
    init::Init,
    layer::{bytes, copied},
};

#[derive(Module, Debug)]
pub(crate) struct Gau {
    /// `[width, 2 inner + shared]`: gate, values, shared.
    input: Param<Tensor<2>>,
    /// `[4, shared]`: queries and keys within the chunk, queries and keys across chunks.
    scale: Param<Tensor<2>>,
    offset: Param<Tensor<2>>,
    output: Param<Tensor<2>>,
    #[module(skip)]
    chunk_size: usize,
}

/// Sum over earlier chunks and rows of the chunk at hand.
#[derive(Debug, Clone)]
pub(crate) struct GauState {
    /// `[batch, shared, inner]`.
    sum: Tensor<3>,
    rows: Option<ChunkRows>,
}

/// Rows `[batch, 1, rows, width]` of a chunk that has not ended.
#[derive(Debug, Clone)]
struct ChunkRows {
    keys: Tensor<4>,
    far_keys: Tensor<4>,
    values: Tensor<4>,
}

/// What tokens bring, `[batch, 1, tokens, width]` each but the gate, `[batch, tokens, inner]`.
struct Inputs {
    gate: Tensor<3>,
    query: Tensor<4>,
    far_query: Tensor<4>,
    rows: ChunkRows,
}

impl GauState {
    pub(crate) fn bytes(&self) -> usize {
        let rows = self.rows.as_ref().map(|rows| bytes(&rows.keys) + bytes(&rows.far_keys) + bytes(&rows.values));
        bytes(&self.sum) + rows.unwrap_or(0)
    }
}

impl Gau {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        let (width, inner, shared) = (config.width, config.gau_width(), config.shared_width());
        let output = init.normal(&format!("{name}.output"), [inner, width], residual_deviation(inner, config.layers));
        Self {
            input: init.weight(&format!("{name}.input"), width, 2 * inner + shared),
            scale: Self::start_scale(config, init),
            offset: init.constant([4, shared], 0.0),
            output,
            chunk_size: config.chunk_size,
        }
    }

    /// One across chunks. Within the chunk such that scores start as `z.z / sqrt(shared)`: where they start from one, their
    /// squares are so small that nothing is learned for long.
    fn start_scale(config: &DecoderConfig, init: &Init) -> Param<Tensor<2>> {
        let shared = config.shared_width();
        let near = (config.chunk_size as f64 / (shared as f64).sqrt()).sqrt();
        let rows = [near, near, 1.0, 1.0].map(|scale| Tensor::full([1, shared], scale, &init.device));
        Param::from_tensor(Tensor::cat(rows.to_vec(), 0))
    }

    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> GauState {
        let (shared, inner) = (self.scale.dims()[1], self.output.dims()[0]);
        GauState { sum: Tensor::zeros([batch, shared, inner], &like.device()), rows: None }
    }

    /// The parallel form.
    pub(crate) fn forward(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let Inputs { gate, query, far_query, rows } = self.inputs(x, rotation);
        let start = self.start(batch, &self.scale.val()).sum;
        let read = self.by_chunks(query, far_query, rows, start).0;
        linear(gate * read.reshape([batch, tokens, self.output.dims()[0]]), &self.output)
    }

    /// The recurrent form: the next tokens, in pieces that end where chunks end.
    pub(crate) fn step(&self, x: Tensor<3>, rotation: Option<&Rotation>, state: &mut GauState) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let size = self.chunk_size;
        let inputs = self.inputs(x, rotation);
        let mut read = Vec::new();
        let mut at = 0;
        while at < tokens {
            let had = state.rows.as_ref().map_or(0, |rows| rows.keys.dims()[2]);
            let whole = if had == 0 { (tokens - at) / size * size } else { 0 };
            let count = if whole > 0 { whole } else { (size - had).min(tokens - at) };
            let part = |rows: &Tensor<4>| rows.clone().narrow(2, at, count);
            let (query, far_query) = (part(&inputs.query), part(&inputs.far_query));
            let rows = ChunkRows {
                keys: part(&inputs.rows.keys),
                far_keys: part(&inputs.rows.far_keys),
                values: part(&inputs.rows.values),
            };
            at += count;
            if whole > 0 {
                let (output, sum) = self.by_chunks(query, far_query, rows, state.sum.clone());
                state.sum = copied(sum);
                read.push(output);
                continue;
            }
            let rows = match state.rows.take() {
                Some(before) => before.followed_by(rows),
                None => rows,
            };
            read.push(
                self.in_chunk(query, rows.keys.clone(), rows.values.clone(), had)
                    + far_query.matmul(state.sum.clone().unsqueeze_dim(1)),
            );
            if had + count == size {
                let across: Tensor<3> = rows.across(size).squeeze_dim(1);
                state.sum = state.sum.clone() + across;
            } else {
                state.rows = Some(rows.copied());
            }
        }
        let read = Tensor::cat(read, 2).reshape([batch, tokens, self.output.dims()[0]]);
        linear(inputs.gate * read, &self.output)
    }

    /// Tokens from the start of a chunk on, after the sum `start` of the chunks before; with the sum of all that follow.
    fn by_chunks(
        &self,
        query: Tensor<4>,
        far_query: Tensor<4>,
        rows: ChunkRows,
        start: Tensor<3>,
    ) -> (Tensor<4>, Tensor<3>) {
        let tokens = query.dims()[2];
        let [query, far_query] = [query, far_query].map(|rows| chunked(rows, self.chunk_size));
        let rows = ChunkRows {
            keys: chunked(rows.keys, self.chunk_size),
            far_keys: chunked(rows.far_keys, self.chunk_size),
            values: chunked(rows.values, self.chunk_size),
        };
        let (before, sum) = sums_before(rows.across(self.chunk_size), start);
        let read = self.in_chunk(query, rows.keys, rows.values, 0) + far_query.matmul(before);
        (joined(read, 1, tokens), sum)
    }

    /// Squared-ReLU attention of queries to the rows of their chunk, `had` of which come before the first query.
    fn in_chunk(&self, query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, had: usize) -> Tensor<4> {
        let (count, size) = (query.dims()[2], keys.dims()[2]);
        let scores = query.matmul(keys.transpose()) * (1.0 / self.chunk_size as f64);
        let scores = if count == 1 { scores } else { scores * causal(size, &values.device()).narrow(2, had, count) };
        let weights = relu(scores);
        (weights.clone() * weights).matmul(values)
    }

    fn inputs(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Inputs {
        let [batch, tokens, _] = x.dims();
        let (inner, shared) = (self.output.dims()[0], self.scale.dims()[1]);
        let projected = linear(x, &self.input);
        let active = sigmoid(projected.clone()) * projected;
        let channels = |first, count| active.clone().narrow(2, first, count);
        let each = |weight: &Param<Tensor<2>>| weight.val().reshape([1, 1, 4 * shared]);
        let both = channels(2 * inner, shared).repeat_dim(2, 4) * each(&self.scale) + each(&self.offset);
        let both = both.reshape([batch, tokens, 4, shared]);
        let both = match rotation {
            Some(rotation) => rotation.apply(both),
            None => both,
        };
        let of = |at| both.clone().narrow(2, at, 1).swap_dims(1, 2);
        Inputs {
            gate: channels(0, inner),
            query: of(0),
            far_query: of(2),
            rows: ChunkRows { keys: of(1), far_keys: of(3), values: channels(inner, inner).unsqueeze_dim(1) },
        }
    }
}

impl ChunkRows {
    /// `sum_i k'_i v_i^T / size` of each chunk, `[batch, chunks, shared, inner]`.
    fn across(&self, size: usize) -> Tensor<4> {
        self.far_keys.clone().transpose().matmul(self.values.clone()) * (1.0 / size as f64)
    }

    fn followed_by(self, new: Self) -> Self {
        let both = |before, new| Tensor::cat(vec![before, new], 2);
        Self {
            keys: both(self.keys, new.keys),
            far_keys: both(self.far_keys, new.far_keys),
            values: both(self.values, new.values),
        }
    }

    fn copied(self) -> Self {
        Self { keys: copied(self.keys), far_keys: copied(self.far_keys), values: copied(self.values) }
    }
}
