//! DeltaNet: linear attention that corrects what is stored under a key instead of adding to it (Schlag et al. 2021), in
//! the chunked form of Yang et al. 2024.
//!
//! Keys and queries pass a SiLU and then have length one, the rate `b_t` is the sigmoid of a projection, one for each head:
//!
//! ```text
//! S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T          o_t = S_t^T q_t
//! ```
//!
//! Within a chunk, `A_ij = b_i k_i . k_j` for `j < i`; the corrections of all tokens solve a triangular system, and with
//! `[W, U] = (I + A)^-1 diag(b) [K, V]` a chunk that starts from `S` computes
//!
//! ```text
//! N = U - W S          O = Q S + causal(Q K^T) N          S' = S + K^T N = (I - K^T W) S + K^T U
//! ```
//!
//! Only the last line runs chunk by chunk, on `head_dim x head_dim` matrices. The published layer norms its outputs too; that
//! is left out here, where it made small decoders learn later.
//!
//! Beside the Python original: there the rate was a constant, corrections, states and outputs were clipped, and a state that
//! was passed on had random noise added, so that text in pieces was another function than text at once.

use burn::{
    module::{Module, Param},
    tensor::{Tensor, activation::sigmoid},
};

use super::chunks::{causal, chunked, joined, pattern};
use crate::{
    DecoderConfig,
    heads::{Projections, linear},
    init::Init,
    layer::copied,
};

/// Added to squared lengths.
const EPSILON: f64 = 1e-6;

#[derive(Module, Debug)]
pub(crate) struct Delta {
    projections: Projections,
    /// `[width, heads]`.
    rate: Param<Tensor<2>>,
    #[module(skip)]
    chunk_size: usize,
}

impl Delta {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        Self {
            projections: Projections::new(config, name, init),
            rate: init.weight(&format!("{name}.rate"), config.width, config.heads),
            chunk_size: config.chunk_size,
        }
    }

    /// `[batch * heads, head_dim, head_dim]`: keys to values.
    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> Tensor<3> {
        let (heads, head_dim) = self.projections.sizes();
        Tensor::zeros([batch * heads, head_dim, head_dim], &like.device())
    }

    /// The parallel form after `state`, and the state then.
    pub(crate) fn forward(&self, x: Tensor<3>, state: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let [query, keys, values, rates] = self.inputs(&x);
        let [_, heads, tokens, width] = query.dims();
        let size = self.chunk_size.min(tokens);
        let device = query.device();
        let key_value = Tensor::cat(vec![keys.clone(), values], 3) * rates;
        let [query, keys, key_value] = [query, keys, key_value].map(|rows| chunked(rows, size));
        let keys_across = keys.clone().transpose();

        let scaled_keys = key_value.clone().narrow(3, 0, width);
        let below = pattern(size, &device, |row, column| column < row);
        let solved = unit_lower_inverse(scaled_keys.matmul(keys_across.clone()) * below).matmul(key_value);
        let (before, state) = states(keys_across.clone().matmul(solved.clone()), state);
        let new = solved.clone().narrow(3, width, width) - solved.narrow(3, 0, width).matmul(before.clone());
        let scores = query.clone().matmul(keys_across) * causal(size, &device);
        let read = joined(query.matmul(before) + scores.matmul(new), heads, tokens);
        (self.projections.output(read), state)
    }

    /// The recurrent form: the next tokens, by the delta rule itself where it is one.
    pub(crate) fn step(&self, x: Tensor<3>, state: &mut Tensor<3>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        if tokens > 1 {
            let (output, after) = self.forward(x, state.clone());
            *state = copied(after);
            return output;
        }
        let [query, key, value, rate] = self.inputs(&x).map(|rows| {
            let [batch, heads, _, width] = rows.dims();
            rows.reshape([batch * heads, 1, width])
        });
        let correction = (value - key.clone().matmul(state.clone())) * rate;
        *state = state.clone() + key.transpose() * correction;
        let read = query.matmul(state.clone());
        let [rows, _, width] = read.dims();
        self.projections.output(read.reshape([batch, rows / batch, 1, width]))
    }

    /// Queries and keys of length one, values, and rates `[batch, heads, tokens, 1]`.
    fn inputs(&self, x: &Tensor<3>) -> [Tensor<4>; 4] {
        let both = self.projections.query_key(x);
        let both = sigmoid(both.clone()) * both;
        let length = ((both.clone() * both.clone()).sum_dim(3) + EPSILON).sqrt();
        let [query, keys] = self.projections.split(both / length);
        let rates = sigmoid(linear(x.clone(), &self.rate)).swap_dims(1, 2).unsqueeze_dim(3);
        [query, keys, self.projections.values(x), rates]
    }
}

/// The states before each chunk, `[rows, chunks, d, d]`, and the last one. `across` `[rows, chunks, d, 2 d]` holds `K^T W` and
/// `K^T U` of each.
fn states(across: Tensor<4>, start: Tensor<3>) -> (Tensor<4>, Tensor<3>) {
    let [_, chunks, width, _] = across.dims();
    let mut state = start;
    let mut before = Vec::with_capacity(chunks);
    for chunk in 0..chunks {
        before.push(state.clone().unsqueeze_dim(1));
        let across: Tensor<3> = across.clone().narrow(1, chunk, 1).squeeze_dim(1);
        let [forgotten, added] = [0, width].map(|first| across.clone().narrow(2, first, width));
        state = state.clone() + added - forgotten.matmul(state);
    }
    (Tensor::cat(before, 1), state)
}

/// `(I + A)^-1` of strictly lower triangular matrices `A` `[rows, chunks, size, size]`.
///
/// Of two neighbouring diagonal blocks with inverses `X` and `Y` and the block `B` below the first and beside the second, the
/// inverse is `[X, 0; -Y B X, Y]`: all pairs of blocks at once, blocks twice as large each time. The series `(I - A)(I + A^2)
/// (I + A^4)...` takes as many products, but its powers grow past what f32 can cancel where keys are alike.
///
/// No graph is kept of that. One Newton step `X - X ((I + A) X - I)` on the result has the gradient of the inverse, and takes
/// off some of its rounding.
fn unit_lower_inverse(a: Tensor<4>) -> Tensor<4> {
    let size = a.dims()[3];
    let device = a.device();
    let identity = pattern(size, &device, |row, column| row == column);
    let fixed = a.clone().detach();
    let mut inverse = identity.clone().expand(a.dims());
    let mut block = 1;
    while block < size {
        let beside = |row: usize, column: usize| {
            row / (2 * block) == column / (2 * block) && row / block % 2 == 1 && column / block % 2 == 0
        };
        let pairs = fixed.clone() * pattern(size, &device, beside);
        inverse =
            if block == 1 { inverse - pairs } else { inverse.clone() - inverse.clone().matmul(pairs).matmul(inverse) };
        block *= 2;
    }
    let rest = inverse.clone() + a.matmul(inverse.clone()) - identity;
    inverse.clone() - inverse.matmul(rest)
}
