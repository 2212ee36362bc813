//! Recurrent layers over packed tokens: [`crate::GatedDelta`].

use std::ops::Range;

use burn::tensor::{
    Tensor,
    activation::{relu, sigmoid, silu},
};

use super::{Packing, delta, linear, normalised, projected, show};
use crate::{
    modules::{Normalisation, Projections},
    recurrent::{DeltaRule, RecurrentState},
    stored::Weight,
};

/// Added to the squared length of queries and keys.
const EPSILON: f64 = 1e-6;

/// What the heads read, `[1, value_heads, tokens, value_dim]`, of `x` `[tokens, hidden_size]`, normalised by `norm` first, and the
/// states behind each text; `pieces` are where the texts stand and the states before them.
pub(crate) fn recurrent(
    x: &Tensor<2>,
    norm: Option<&Normalisation>,
    (projections, rule): (&Projections, &DeltaRule),
    pieces: Vec<(Range<usize>, RecurrentState)>,
    packing: Packing,
) -> (Tensor<4>, Vec<RecurrentState>) {
    let Projections { query, key, value, gate, .. } = projections;
    let x = normalised(norm, x);
    show([Some(query), key.as_ref(), value.as_ref(), gate.as_ref()], || x.clone());
    let parts = [Some(query), key.as_ref(), value.as_ref()].into_iter().flatten();
    let inputs = Tensor::cat(parts.map(|part| projected(x.clone(), part, packing)).collect(), 1);
    let rates = sigmoid(of_heads(&x, &rule.rate, packing));
    let decays = softplus(of_heads(&x, &rule.decay, packing)) * rule.decay_log.val().exp().neg().unsqueeze();
    let read = |(range, state): (Range<usize>, RecurrentState)| {
        let of_text = |rows: &Tensor<2>| rows.clone().narrow(0, range.start, range.len());
        of_one(rule, [of_text(&inputs), of_text(&decays), of_text(&rates)], state)
    };
    let (mut reads, states): (Vec<_>, Vec<_>) = super::each(&inputs, pieces, read).into_iter().unzip();
    let read = if reads.len() == 1 { reads.remove(0) } else { Tensor::cat(reads, 1) };
    (read.unsqueeze(), states)
}

/// The same of the tokens of one text, `[value_heads, tokens, value_dim]`: inputs of the convolution `[tokens, channels]`, logarithms
/// of decays and rates `[tokens, value_heads]`.
fn of_one(
    rule: &DeltaRule,
    [inputs, decays, rates]: [Tensor<2>; 3],
    state: RecurrentState,
) -> (Tensor<3>, RecurrentState) {
    let config = &rule.config;
    let tokens = inputs.dims()[0];
    // A graph does not begin in the middle of an operation.
    let (before, matrices) = if inputs.is_autodiff() && !state.inputs.is_autodiff() {
        (state.inputs.autodiff(), state.matrices.autodiff())
    } else {
        (state.inputs, state.matrices)
    };
    let seen = Tensor::cat(vec![before, inputs], 0);
    let last = copied(seen.clone().narrow(0, tokens, config.kernel - 1));
    let mixed = silu(convolved(&seen, rule.conv.val(), tokens));
    let mut from = 0;
    let mut heads = |count: usize, width: usize| {
        let part = mixed.clone().narrow(1, from, count * width).reshape([tokens, count, width]);
        from += count * width;
        part.swap_dims(0, 1)
    };
    let query = unit(heads(config.key_heads, config.key_dim)) / (config.key_dim as f64).sqrt();
    let key = unit(heads(config.key_heads, config.key_dim));
    let value = heads(config.value_heads, config.value_dim);
    let group = config.value_heads / config.key_heads;
    let (query, key) = (repeated(query, group), repeated(key, group));
    let (read, matrices) =
        delta::gated_delta(query, key, value, [decays.swap_dims(0, 1), rates.swap_dims(0, 1)], matrices);
    (read, RecurrentState { inputs: last, matrices })
}

/// A causal convolution of each channel by itself over `seen` `[kernel - 1 + tokens, channels]` with `weight`
/// `[kernel, channels]`, `[tokens, channels]`.
fn convolved(seen: &Tensor<2>, weight: Tensor<2>, tokens: usize) -> Tensor<2> {
    let [kernel, _] = weight.dims();
    let tap = |at: usize| seen.clone().narrow(0, at, tokens) * weight.clone().narrow(0, at, 1);
    (1..kernel).fold(tap(0), |sum, at| sum + tap(at))
}

/// `[tokens, hidden_size]` to `[tokens, value_heads]`.
fn of_heads(x: &Tensor<2>, map: &burn::nn::Linear, packing: Packing) -> Tensor<2> {
    let bias = map.bias.as_ref().map(burn::module::Param::val);
    linear(x.clone(), Weight::Tensor(map.weight.val()), bias, packing)
}

/// `log(1 + exp(x))`, without an exponential of what is large.
fn softplus(x: Tensor<2>) -> Tensor<2> {
    relu(x.clone()) + x.abs().neg().exp().log1p()
}

/// Rows of length one.
fn unit(x: Tensor<3>) -> Tensor<3> {
    let square = x.clone().square().sum_dim(2);
    x / (square + EPSILON).sqrt()
}

/// Each head so many times, one behind the other.
fn repeated(x: Tensor<3>, times: usize) -> Tensor<3> {
    if times == 1 {
        return x;
    }
    let [heads, tokens, width] = x.dims();
    x.unsqueeze_dim::<4>(1).expand([heads, times, tokens, width]).reshape([heads * times, tokens, width])
}

/// A part of a tensor in memory of its own: a view would keep all of it.
fn copied(part: Tensor<2>) -> Tensor<2> {
    let ranges = part.dims().map(|size| 0..size);
    part.zeros_like().slice_assign(ranges, part)
}
