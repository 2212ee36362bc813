//! The operations in plain tensor operations.

use burn::{
    module::ParamId,
    tensor::{
        Tensor, TensorData,
        activation::{gelu, relu, sigmoid, silu},
    },
};

use super::{Heads, show};
use crate::{
    Activation, AdapterTarget, ClampedGate, Projection,
    modules::{Adapter, HeadNormalisation, Mlp, Normalisation, Projections, Xielu},
    rotary::{Places, Rotation},
};

pub(super) fn normalise<const D: usize>(norm: &Normalisation, x: Tensor<D>) -> Tensor<D> {
    match norm {
        Normalisation::Layer(norm) => norm.norm.forward(x),
        Normalisation::LayerPlusOne(norm) => {
            let centred = x.clone() - x.mean_dim(D - 1);
            let variance = centred.clone().square().mean_dim(D - 1) + norm.epsilon;
            let y = centred / variance.sqrt() * (norm.norm.gamma.val() + 1.0).unsqueeze();
            match &norm.norm.beta {
                Some(beta) => y + beta.val().unsqueeze(),
                None => y,
            }
        }
        Normalisation::Rms(norm) => norm.forward(x),
        Normalisation::RmsPlusOne(norm) => {
            let mean_square = x.clone().square().mean_dim(D - 1) + norm.epsilon;
            x / mean_square.sqrt() * (norm.gamma.val() + 1.0).unsqueeze()
        }
    }
}

pub(super) fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let y = x.matmul(weight);
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

pub(super) fn heads(
    x: &Tensor<2>,
    norm: Option<&Normalisation>,
    projections: &Projections,
    places: Places<'_>,
    width: usize,
) -> Heads {
    let x = match norm {
        Some(norm) => normalise(norm, x.clone()),
        None => x.clone(),
    };
    let mut reduced = Vec::new();
    let mut projected = |target, projection: &Projection| {
        let y = adapted((projection, projections.adapter(target)), x.clone(), &mut reduced);
        let [tokens, total] = y.dims();
        y.reshape([tokens, total / width, width])
    };
    let placed = |mut y: Tensor<3>, norm: Option<&HeadNormalisation>, rotation: Option<&Rotation>| {
        let normed = |y: Tensor<3>| norm.map_or_else(|| y.clone(), |norm| norm.forward(y.clone()));
        if !projections.norm_after_rotary {
            y = normed(y);
        }
        if let Some(rotation) = rotation {
            y = rotation.apply(y);
        }
        if projections.norm_after_rotary {
            y = normed(y);
        }
        y.swap_dims(0, 1)
    };
    let rotation = places.rotation;
    let query = projected(AdapterTarget::Query, &projections.query);
    let query = placed(query, projections.query_norm.as_ref(), rotation);
    let query = match places.temperature {
        Some(factors) => {
            let (tokens, device, dtype) = (factors.len(), query.device(), query.dtype());
            query * Tensor::<3>::from_data(TensorData::new(factors.to_vec(), [1, tokens, 1]), (&device, dtype))
        }
        None => query,
    };
    let rows = projections.key.as_ref().map(|key| {
        let keys = projected(AdapterTarget::Key, key);
        let values = match &projections.value {
            Some(value) => projected(AdapterTarget::Value, value),
            None => keys.clone(),
        };
        let values = placed(values, projections.value_norm.as_ref(), None);
        [placed(keys, projections.key_norm.as_ref(), rotation), values]
    });
    Heads { query, rows }
}

/// A projection with its adapter; `reduced` as for [`Projection::forward_with`].
fn adapted(
    (projection, adapter): (&Projection, Option<&Adapter>),
    x: Tensor<2>,
    reduced: &mut Vec<(ParamId, Tensor<2>)>,
) -> Tensor<2> {
    let y = projection.forward_with(x.clone(), reduced);
    match adapter {
        Some(adapter) => y + adapter.forward(x),
        None => y,
    }
}

pub(super) fn join_heads(
    read: Tensor<4>,
    output: (&Projection, Option<&Adapter>),
    onto: Option<(Tensor<2>, f64)>,
) -> Tensor<2> {
    let [_, heads, tokens, width] = read.dims();
    let branch = adapted(output, read.swap_dims(1, 2).reshape([tokens, heads * width]), &mut Vec::new());
    match onto {
        Some((x, factor)) => x + scaled(branch, factor),
        None => branch,
    }
}

pub(super) fn mlp(x: Tensor<2>, norm: Option<&Normalisation>, mlp: &Mlp, onto: Option<f64>) -> Tensor<2> {
    let input = match norm {
        Some(norm) => normalise(norm, x.clone()),
        None => x.clone(),
    };
    let mut reduced = Vec::new();
    let up = mlp.up.forward_with(input.clone(), &mut reduced);
    let inner = match &mlp.gate {
        Some(gate) => gated(gate.forward_with(input, &mut reduced), up, mlp),
        None => activate(up, mlp.activation, mlp.xielu),
    };
    show([Some(&mlp.down)], || inner.clone());
    let branch = mlp.down.forward_with(inner, &mut Vec::new());
    match onto {
        Some(factor) => x + scaled(branch, factor),
        None => branch,
    }
}

/// `x` and a factor times `branch`.
pub(super) fn add(x: Tensor<2>, branch: Tensor<2>, factor: f64) -> Tensor<2> {
    x + scaled(branch, factor)
}

fn scaled(x: Tensor<2>, factor: f64) -> Tensor<2> {
    if factor == 1.0 { x } else { x * factor }
}

fn gated(gate: Tensor<2>, up: Tensor<2>, mlp: &Mlp) -> Tensor<2> {
    let Some(ClampedGate { limit, alpha }) = mlp.clamped_gate else {
        return activate(gate, mlp.activation, mlp.xielu) * up;
    };
    let gate = gate.clamp_max(limit);
    let open = sigmoid(gate.clone() * alpha);
    (up.clamp(-limit, limit) + 1.0) * (gate * open)
}

pub(super) fn activate(x: Tensor<2>, activation: Activation, xielu: Option<Xielu>) -> Tensor<2> {
    match activation {
        // Written out: burn's form cubes with `powf`, many times slower.
        Activation::GeluTanh => {
            let inner = (x.clone() * x.clone() * 0.044715 + 1.0) * x.clone() * (2.0 / std::f64::consts::PI).sqrt();
            (inner.tanh() + 1.0) * x * 0.5
        }
        Activation::GeluErf => gelu(x),
        Activation::Silu => silu(x),
        Activation::Relu => relu(x),
        Activation::Relu2 => relu(x).square(),
        Activation::Xielu => {
            // The loader gives every such MLP its numbers.
            let Some(Xielu { above, below, linear, limit }) = xielu else { return x };
            let positive = x.clone().clamp_min(0.0);
            let negative = x.clone().clamp_max(0.0);
            let exponential = negative.clone().clamp_max(limit).exp() - 1.0 - negative.clone();
            // At 0 the part below is exp(limit) - 1, and not nothing.
            let below_zero = x.clone().lower_equal_elem(0.0).float().cast(x.dtype());
            positive.square() * above + exponential * below_zero * (linear + below) + x * linear
        }
    }
}
