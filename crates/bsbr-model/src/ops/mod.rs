//! The operations of a decoder block. Each has two forms with one meaning: plain tensor operations, which run on every
//! device and carry gradients, and a fused loop for f32 on the `flex` device without autodiff.
//!
//! The fused form is chosen by looking at the tensors: where one of them is anything else, the plain one runs.

#[cfg(all(test, feature = "flex"))]
mod composed_tests;
mod delta;
#[cfg(all(test, feature = "flex"))]
mod delta_tests;
#[cfg(feature = "flex")]
mod fused;
mod latent;
mod mixture;
#[cfg(all(test, feature = "flex"))]
mod mixture_tests;
mod plain;
mod recurrent;
#[cfg(all(test, feature = "flex"))]
mod tests;

use burn::tensor::{Device, Tensor};

pub(crate) use self::recurrent::recurrent;

use crate::{
    Projection,
    modules::{Adapter, BlockMlp, Mlp, Normalisation, PerLayerInput, Projections},
    rotary::Places,
    stored::Weight,
};

/// How tokens stand before a linear map, which decides the order of its sums: a token gets the same numbers, bit for bit,
/// whichever others are packed with it in the same way. The plain operations know one way only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Packing {
    /// As suits their number.
    #[default]
    ByNumber,
    /// Each by itself, as few tokens stand anyway.
    Rows,
    /// In strips, as many tokens stand anyway.
    Strips,
}

impl Packing {
    /// What suits so many tokens on a device.
    pub(crate) fn of(device: &Device, tokens: usize) -> Self {
        #[cfg(feature = "flex")]
        if fused::is_here(device) {
            return fused::packing_of(tokens);
        }
        let _ = (device, tokens);
        Self::ByNumber
    }
}

/// Runs the work of a device; on the CPU among the threads that its operations are shared by.
pub(crate) fn run<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "flex")]
    if fused::is_here(device) {
        return bsbr_kernels::layer::in_pool(work);
    }
    let _ = device;
    work()
}

/// Whether products on a device take weights as their file stores them.
pub(crate) fn computes_stored(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    if fused::is_here(device) {
        return true;
    }
    let _ = device;
    false
}

/// What `work` makes of each item, in order. On the CPU items share the threads, unless gradients may be asked of `x`, which
/// stands for what they read: what one item leaves to do by itself, such as taking in rows, would leave the others idle.
pub(crate) fn each<const D: usize, I: Send, R: Send>(
    x: &Tensor<D>,
    items: Vec<I>,
    work: impl Fn(I) -> R + Send + Sync,
) -> Vec<R> {
    #[cfg(feature = "flex")]
    if items.len() > 1 && fused::runs(x) {
        return fused::each(items, work);
    }
    let _ = x;
    items.into_iter().map(work).collect()
}

/// Normalises rows, `[.., width]` to the same.
pub(crate) fn normalise<const D: usize>(norm: &Normalisation, x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if let Some(y) = fused::normalise(norm, &x) {
        return y;
    }
    plain::normalise(norm, x)
}

/// `[tokens, inputs]` to `[tokens, outputs]`: times a weight, plus a bias.
pub(crate) fn linear(x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, packing: Packing) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if let Some(y) = fused::linear(&x, &weight, bias.as_ref(), packing) {
        return y;
    }
    let _ = packing;
    let weight = weight.like(&x);
    plain::linear(x, weight, bias)
}

/// What attention reads, each `[heads, tokens, width]`.
pub(crate) struct Heads {
    pub(crate) query: Tensor<3>,
    /// Keys and values, of a layer that has its own.
    pub(crate) rows: Option<[Tensor<3>; 2]>,
}

/// Queries, keys and values of `x` `[tokens, hidden_size]`: normalised by `norm`, projected, normalised by head and, but
/// for values, rotated, queries then multiplied by their temperature.
pub(crate) fn heads(
    x: &Tensor<2>,
    norm: Option<&Normalisation>,
    projections: &Projections,
    places: Places<'_>,
    width: usize,
) -> Heads {
    let Projections { query, key, value, gate, .. } = projections;
    if let Some(latent) = &projections.latent {
        return latent::heads(x, norm, projections, latent, places, width);
    }
    show([Some(query), key.as_ref(), value.as_ref(), gate.as_ref()], || normalised(norm, x));
    #[cfg(feature = "flex")]
    if let Some(heads) = fused::heads(x, norm, projections, places, width) {
        return heads;
    }
    plain::heads(x, norm, projections, places, width)
}

/// What the heads read, `[1, heads, tokens, width]`, through the output projection and its adapter; with `onto`, a factor
/// times that added to a tensor. `[tokens, hidden_size]`.
pub(crate) fn join_heads(
    read: Tensor<4>,
    output: (&Projection, Option<&Adapter>),
    onto: Option<(Tensor<2>, f64)>,
    packing: Packing,
) -> Tensor<2> {
    let [_, heads, tokens, width] = read.dims();
    show([Some(output.0)], || read.clone().swap_dims(1, 2).reshape([tokens, heads * width]));
    #[cfg(feature = "flex")]
    if let Some(inputs) = fused::JoinHeads::new(&read, output, &onto) {
        drop(read);
        return inputs.run(onto, packing);
    }
    let _ = packing;
    plain::join_heads(read, output, onto)
}

/// The MLP or the experts of a block, as [`mlp`].
pub(crate) fn block_mlp(
    x: Tensor<2>,
    norm: Option<&Normalisation>,
    block: &BlockMlp,
    onto: Option<f64>,
    packing: Packing,
) -> Tensor<2> {
    match block {
        BlockMlp::Dense(block) => mlp(x, norm, block, onto, packing),
        BlockMlp::Mixture(mixture) => {
            let branch = mixture::forward(&x, norm, mixture, packing);
            match onto {
                Some(factor) => plain::add(x, branch, factor),
                None => branch,
            }
        }
    }
}

/// The MLP of `x` `[tokens, hidden_size]`, normalised by `norm` first; with `onto`, that factor times it added to `x`.
pub(crate) fn mlp(
    x: Tensor<2>,
    norm: Option<&Normalisation>,
    mlp: &Mlp,
    onto: Option<f64>,
    packing: Packing,
) -> Tensor<2> {
    show([Some(&mlp.up), mlp.gate.as_ref()], || normalised(norm, &x));
    #[cfg(feature = "flex")]
    if let Some(inputs) = fused::WholeMlp::new(&x, norm, mlp, packing) {
        return inputs.run(x, onto);
    }
    let _ = packing;
    plain::mlp(x, norm, mlp, onto)
}

/// The gated inputs of a layer back in the stream, `down(act(gate x) * inputs)`: `x` `[tokens, hidden_size]`, `inputs`
/// `[tokens, width]`.
pub(crate) fn per_layer(x: &Tensor<2>, inputs: Tensor<2>, own: &PerLayerInput, packing: Packing) -> Tensor<2> {
    show([Some(&own.gate)], || x.clone());
    let gated = plain::activate(projected(x.clone(), &own.gate, packing), own.activation, None) * inputs;
    show([Some(&own.down)], || gated.clone());
    projected(gated, &own.down, packing)
}

/// What a projection makes of `[tokens, inputs]`, without showing it to anyone.
pub(crate) fn projected(x: Tensor<2>, projection: &Projection, packing: Packing) -> Tensor<2> {
    match projection {
        Projection::Split(split) if !split.is_original() => projection.forward_with(x, &mut Vec::new()),
        _ => {
            let (weight, bias) = projection.as_weight();
            linear(x, weight, bias, packing)
        }
    }
}

/// Shows an input to whoever looks at the layers that read it.
fn show<const N: usize>(readers: [Option<&Projection>; N], x: impl Fn() -> Tensor<2>) {
    for tap in readers.into_iter().flatten().filter_map(Projection::tap) {
        tap.show(x());
    }
}

fn normalised(norm: Option<&Normalisation>, x: &Tensor<2>) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward(x.clone()),
        None => x.clone(),
    }
}

/// `cap tanh(x / cap)`.
pub(crate) fn softcap(x: Tensor<2>, cap: f64) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if fused::runs(&x) {
        return fused::softcap(x, cap);
    }
    (x / cap).tanh() * cap
}
