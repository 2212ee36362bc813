//! The operations in plain tensor operations.

use burn::{
    module::ParamId,
    tensor::{Tensor, activation},
};

use super::show;
use crate::{
    Activation, AdapterTarget, Projection,
    modules::{Adapter, HeadNormalisation, Mlp, Normalisation, Projections},
    rotary::Rotation,
};

pub(super) fn normalise<const D: usize>(norm: &Normalisation, x: Tensor<D>) -> Tensor<D> {
    match norm {
        Normalisation::Layer(norm) => norm.norm.forward(x),
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
    rotation: Option<&Rotation>,
    width: usize,
) -> [Tensor<3>; 3] {
    let x = match norm {
        Some(norm) => normalise(norm, x.clone()),
        None => x.clone(),
    };
    let mut reduced = Vec::new();
    let mut of = |target, projection: &Projection, norm: Option<&HeadNormalisation>, rotation: Option<&Rotation>| {
        let y = adapted((projection, projections.adapter(target)), x.clone(), &mut reduced);
        let [tokens, total] = y.dims();
        let mut y = y.reshape([tokens, total / width, width]);
        if let Some(norm) = norm {
            y = norm.forward(y);
        }
        if let Some(rotation) = rotation {
            y = rotation.apply(y);
        }
        y.swap_dims(0, 1)
    };
    [
        of(AdapterTarget::Query, &projections.query, projections.query_norm.as_ref(), rotation),
        of(AdapterTarget::Key, &projections.key, projections.key_norm.as_ref(), rotation),
        of(AdapterTarget::Value, &projections.value, None, None),
    ]
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
        Some(gate) => activate(gate.forward_with(input, &mut reduced), mlp.activation) * up,
        None => activate(up, mlp.activation),
    };
    show([Some(&mlp.down)], || inner.clone());
    let branch = mlp.down.forward_with(inner, &mut Vec::new());
    match onto {
        Some(factor) => x + scaled(branch, factor),
        None => branch,
    }
}

fn scaled(x: Tensor<2>, factor: f64) -> Tensor<2> {
    if factor == 1.0 { x } else { x * factor }
}

fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        // Written out: burn's form cubes with `powf`, many times slower.
        Activation::GeluTanh => {
            let inner = (x.clone() * x.clone() * 0.044715 + 1.0) * x.clone() * (2.0 / std::f64::consts::PI).sqrt();
            (inner.tanh() + 1.0) * x * 0.5
        }
        Activation::GeluErf => activation::gelu(x),
        Activation::Silu => activation::silu(x),
        Activation::Relu => activation::relu(x),
    }
}
