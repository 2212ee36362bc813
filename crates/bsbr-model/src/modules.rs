//! The parts of a decoder block, made of burn's own modules.

use burn::{
    module::Module,
    nn::{LayerNorm, Linear, RmsNorm},
    tensor::{Tensor, activation},
};

use crate::Activation;

/// LayerNorm or RMSNorm.
#[derive(Module, Debug)]
pub enum Normalisation {
    /// Mean and variance.
    Layer(LayerNorm),
    /// Root mean square.
    Rms(RmsNorm),
}

impl Normalisation {
    /// `[tokens, hidden_size]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

/// Query, key, value and output projections, and the meta projections where the selector wants them.
#[derive(Module, Debug)]
pub struct Projections {
    /// `[hidden_size]` to `[heads * head_dim]`.
    pub query: Linear,
    /// `[hidden_size]` to `[kv_heads * head_dim]`.
    pub key: Linear,
    /// `[hidden_size]` to `[kv_heads * head_dim]`.
    pub value: Linear,
    /// `[heads * head_dim]` to `[hidden_size]`.
    pub output: Linear,
    /// `[hidden_size]` to `[heads * head_dim]`.
    pub meta_query: Option<Linear>,
    /// `[hidden_size]` to `[heads * head_dim]`.
    pub meta_key: Option<Linear>,
}

/// `down(act(up x))`, or `down(act(gate x) * up x)`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// Gate projection of a gated MLP.
    pub gate: Option<Linear>,
    /// `[hidden_size]` to `[intermediate_size]`.
    pub up: Linear,
    /// `[intermediate_size]` to `[hidden_size]`.
    pub down: Linear,
    /// The non-linearity.
    #[module(skip)]
    pub activation: Activation,
}

impl Mlp {
    /// `[tokens, hidden_size]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let up = self.up.forward(x.clone());
        let inner = match &self.gate {
            Some(gate) => activate(gate.forward(x), self.activation) * up,
            None => activate(up, self.activation),
        };
        self.down.forward(inner)
    }
}

/// Applies the non-linearity.
pub(crate) fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
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

/// One block: attention and MLP, each behind its norm and added to the stream.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention.
    pub attention_norm: Normalisation,
    /// Attention.
    pub attention: Projections,
    /// Before the MLP.
    pub mlp_norm: Normalisation,
    /// MLP.
    pub mlp: Mlp,
}
