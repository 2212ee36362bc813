//! The parts of a decoder block, made of burn's own modules.

use burn::{
    module::{Module, Param},
    nn::{LayerNorm, Linear, RmsNorm},
    tensor::{Tensor, activation},
};

use crate::{Activation, BlockConfig, BlockForm};

/// LayerNorm or RMSNorm.
#[derive(Module, Debug)]
pub enum Normalisation {
    /// Mean and variance.
    Layer(LayerNorm),
    /// Root mean square.
    Rms(RmsNorm),
    /// Root mean square, times `1 + weight`. The weight stays as it is stored: adding 1 would lose bits of it.
    RmsPlusOne(RmsNorm),
}

impl Normalisation {
    /// `[.., width]` to the same.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
            Self::RmsPlusOne(norm) => {
                let mean_square = x.clone().square().mean_dim(D - 1) + norm.epsilon;
                x / mean_square.sqrt() * (norm.gamma.val() + 1.0).unsqueeze()
            }
        }
    }
}

/// A normalisation of queries or keys.
#[derive(Module, Debug)]
pub enum HeadNormalisation {
    /// Over each head, all with the same weight.
    Head(Normalisation),
    /// Over each head, each with its own weight.
    EachHead(EachHeadNorm),
    /// Over all heads together.
    AllHeads(Normalisation),
}

/// A normalisation of each head with its own weight.
#[derive(Module, Debug)]
pub struct EachHeadNorm {
    /// Without parameters.
    pub plain: Normalisation,
    /// `[heads, head_dim]`.
    pub weight: Param<Tensor<2>>,
    /// Multiplies by `1 + weight`.
    #[module(skip)]
    pub plus_one: bool,
}

impl HeadNormalisation {
    /// `[tokens, heads, head_dim]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Head(norm) => norm.forward(x),
            Self::EachHead(norm) => {
                let weight = if norm.plus_one { norm.weight.val() + 1.0 } else { norm.weight.val() };
                norm.plain.forward(x) * weight.unsqueeze()
            }
            Self::AllHeads(norm) => {
                let [tokens, heads, width] = x.dims();
                norm.forward(x.reshape([tokens, heads * width])).reshape([tokens, heads, width])
            }
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
    /// Of the queries, before they are rotated.
    pub query_norm: Option<HeadNormalisation>,
    /// Of the keys.
    pub key_norm: Option<HeadNormalisation>,
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

/// One block: attention and MLP with the norms that its [form](BlockForm) has.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention, or before both where they share it.
    pub attention_norm: Option<Normalisation>,
    /// Attention.
    pub attention: Projections,
    /// After attention.
    pub attention_post_norm: Option<Normalisation>,
    /// Before the MLP.
    pub mlp_norm: Option<Normalisation>,
    /// MLP.
    pub mlp: Mlp,
    /// After the MLP.
    pub mlp_post_norm: Option<Normalisation>,
    /// What is added to what, and the factor on it.
    #[module(skip)]
    pub config: BlockConfig,
}

impl Block {
    /// `[tokens, hidden_size]` to the same; `attend` is attention from normed inputs.
    ///
    /// # Errors
    ///
    /// Those of `attend`.
    pub fn forward<E>(
        &self,
        x: Tensor<2>,
        attend: impl FnOnce(&Projections, Tensor<2>) -> Result<Tensor<2>, E>,
    ) -> Result<Tensor<2>, E> {
        let scaled = |branch: Tensor<2>| match self.config.residual_multiplier {
            Some(factor) => branch * factor,
            None => branch,
        };
        let input = normed(&self.attention_norm, x.clone());
        match self.config.form {
            BlockForm::Sequential | BlockForm::Sandwich | BlockForm::NormedBranches => {
                let read = attend(&self.attention, input)?;
                let x = x + scaled(normed(&self.attention_post_norm, read));
                let inner = self.mlp.forward(normed(&self.mlp_norm, x.clone()));
                Ok(x + scaled(normed(&self.mlp_post_norm, inner)))
            }
            BlockForm::NormAfter => {
                let x = normed(&self.attention_post_norm, x + scaled(attend(&self.attention, input)?));
                Ok(normed(&self.mlp_post_norm, x.clone() + scaled(self.mlp.forward(x))))
            }
            BlockForm::Parallel | BlockForm::ParallelSharedNorm => {
                let mlp_input = match &self.mlp_norm {
                    Some(norm) => norm.forward(x.clone()),
                    None => input.clone(),
                };
                let read = attend(&self.attention, input)?;
                Ok(x + scaled(read + self.mlp.forward(mlp_input)))
            }
        }
    }
}

fn normed(norm: &Option<Normalisation>, x: Tensor<2>) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
