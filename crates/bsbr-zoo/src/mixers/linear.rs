//! Linear attention: the softmax kernel replaced by a product of positive features, so that the past fits one matrix
//! (Katharopoulos et al. 2020).
//!
//! With `phi(x) = elu(x) + 1`,
//!
//! ```text
//! o_t = (sum_{i <= t} phi(q_t).phi(k_i) v_i) / (sum_{i <= t} phi(q_t).phi(k_i))
//! S_t = S_{t-1} + phi(k_t) [v_t, 1]^T          o_t = numerator / denominator of S_t^T phi(q_t)
//! ```
//!
//! The column of ones keeps the denominator in the same matrix. In parallel, the first line holds within a chunk and the
//! second from chunk to chunk.
//!
//! Beside the Python original: that had neither features nor a normaliser, and added the number `k_t . v_t` to every entry
//! of the state instead of the matrix `k_t v_t^T`.

use burn::{
    module::Module,
    tensor::{Tensor, activation::relu},
};

use super::chunks::{causal, chunked, joined, sums_before};
use crate::{DecoderConfig, heads::Projections, init::Init, layer::copied};

/// Added to the denominator, which is above zero but for underflow.
const EPSILON: f64 = 1e-6;

#[derive(Module, Debug)]
pub(crate) struct Linear {
    projections: Projections,
    #[module(skip)]
    chunk_size: usize,
}

impl Linear {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        Self { projections: Projections::new(config, name, init), chunk_size: config.chunk_size }
    }

    /// `[batch * heads, head_dim, head_dim + 1]`.
    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> Tensor<3> {
        let (heads, head_dim) = self.projections.sizes();
        Tensor::zeros([batch * heads, head_dim, head_dim + 1], &like.device())
    }

    /// The parallel form after `state`, and the state then.
    pub(crate) fn forward(&self, x: Tensor<3>, state: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let [query, keys, values] = self.inputs(&x);
        let [_, heads, tokens, _] = query.dims();
        let size = self.chunk_size.min(tokens);
        let [query, keys, values] = [query, keys, values].map(|rows| chunked(rows, size));
        let (before, state) = sums_before(keys.clone().transpose().matmul(values.clone()), state);
        let scores = query.clone().matmul(keys.transpose()) * causal(size, &query.device());
        let sums = joined(scores.matmul(values) + query.matmul(before), heads, tokens);
        (self.projections.output(normalised(sums)), state)
    }

    /// The recurrent form: the next tokens, one by one where it is one.
    pub(crate) fn step(&self, x: Tensor<3>, state: &mut Tensor<3>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        if tokens > 1 {
            let (output, after) = self.forward(x, state.clone());
            *state = copied(after);
            return output;
        }
        let [query, keys, values] = self.inputs(&x).map(|rows| {
            let [batch, heads, _, width] = rows.dims();
            rows.reshape([batch * heads, 1, width])
        });
        *state = state.clone() + keys.transpose() * values;
        let sums = query.matmul(state.clone());
        let [rows, _, width] = sums.dims();
        self.projections.output(normalised(sums.reshape([batch, rows / batch, 1, width])))
    }

    /// Features of queries and keys, and values with a one behind each.
    fn inputs(&self, x: &Tensor<3>) -> [Tensor<4>; 3] {
        let both = self.projections.query_key(x);
        // elu(x) + 1 is x + 1 above zero and exp(x) below.
        let features = relu(both.clone()) + (-relu(-both)).exp();
        let [query, keys] = self.projections.split(features);
        let values = self.projections.values(x);
        let [batch, heads, tokens, _] = values.dims();
        let ones = Tensor::ones([batch, heads, tokens, 1], &values.device());
        [query, keys, Tensor::cat(vec![values, ones], 3)]
    }
}

/// The first columns divided by the last.
fn normalised(sums: Tensor<4>) -> Tensor<4> {
    let width = sums.dims()[3] - 1;
    sums.clone().narrow(3, 0, width) / (sums.narrow(3, width, 1) + EPSILON)
}
