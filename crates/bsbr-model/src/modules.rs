//! The parts of a decoder block, made of burn's own modules.

use std::sync::Arc;

use burn::{
    module::{Module, Param},
    nn::{LayerNorm, Linear, RmsNorm},
    tensor::Tensor,
};

use crate::{
    Activation, AdapterTarget, BlockConfig, BlockForm, ClampedGate, ExpertsConfig, Projection, Table,
    latent::LatentProjections,
    ops::{self, Packing},
    recurrent::DeltaRule,
};

/// LayerNorm or RMSNorm.
#[derive(Module, Debug)]
pub enum Normalisation {
    /// Mean and variance.
    Layer(LayerNormalisation),
    /// Root mean square.
    Rms(RmsNorm),
    /// Root mean square, times `1 + weight`. The weight stays as it is stored: adding 1 would lose bits of it.
    RmsPlusOne(RmsNorm),
    /// Mean and variance, times `1 + weight`.
    LayerPlusOne(LayerNormalisation),
}

/// LayerNorm, and its epsilon for everyone to see.
#[derive(Module, Debug)]
pub struct LayerNormalisation {
    /// Weight and bias.
    pub norm: LayerNorm,
    /// Added to the variance.
    #[module(skip)]
    pub epsilon: f64,
}

impl Normalisation {
    /// `[.., width]` to the same.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::normalise(self, x)
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

impl EachHeadNorm {
    /// What each number of each head is multiplied by besides the norm's own weight, `[heads, head_dim]`.
    pub(crate) fn factor(&self) -> Tensor<2> {
        if self.plus_one { self.weight.val() + 1.0 } else { self.weight.val() }
    }
}

impl HeadNormalisation {
    /// `[tokens, heads, head_dim]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Head(norm) => norm.forward(x),
            Self::EachHead(norm) => norm.plain.forward(x) * norm.factor().unsqueeze(),
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
    pub query: Projection,
    /// `[hidden_size]` to `[kv_heads * head_dim]`, unless the layer reads the keys and values of another.
    pub key: Option<Projection>,
    /// `[hidden_size]` to `[kv_heads * head_dim]`, unless values are what the keys are made of.
    pub value: Option<Projection>,
    /// `[heads * head_dim]` to `[hidden_size]`.
    pub output: Projection,
    /// Of latent attention, where `query`, `key` and `value` make what does not rotate, of narrow vectors.
    pub latent: Option<LatentProjections>,
    /// Of what the heads read, to their width.
    pub gate: Option<Projection>,
    /// Of a layer that keeps a state in place of keys and values.
    pub recurrent: Option<DeltaRule>,
    /// Of the queries.
    pub query_norm: Option<HeadNormalisation>,
    /// Of the keys.
    pub key_norm: Option<HeadNormalisation>,
    /// Of the values.
    pub value_norm: Option<HeadNormalisation>,
    /// Queries and keys are rotated before they are normalised.
    #[module(skip)]
    pub norm_after_rotary: bool,
    /// Of each query head: see [`bsbr_attn::AttentionOptions::sink_logits`]. Training leaves them as they are.
    #[module(skip)]
    pub sink_logits: Option<Arc<[f32]>>,
    /// `[hidden_size]` to `[heads * head_dim]`.
    pub meta_query: Option<Linear>,
    /// `[hidden_size]` to `[heads * head_dim]`.
    pub meta_key: Option<Linear>,
    /// `[kv_heads, head_dim, head_dim]`: orthonormal columns along which states are compressed, the leading ones first.
    pub state_basis: Option<Param<Tensor<3>>>,
    /// `[heads]`: see [`bsbr_attn::BlockAttentionConfig::head_gates`].
    pub gates: Option<Param<Tensor<1>>>,
    /// Of the four projections.
    pub adapters: Option<Adapters>,
}

impl Projections {
    /// The adapter of a projection, where there is one and it is used.
    pub(crate) fn adapter(&self, target: AdapterTarget) -> Option<&Adapter> {
        let adapters = self.adapters.as_ref().filter(|adapters| adapters.used)?;
        adapters.of(target)
    }
}

/// A low-rank map added to a projection.
#[derive(Module, Debug)]
pub struct Adapter {
    /// `[inputs, rank]`.
    pub down: Param<Tensor<2>>,
    /// `[rank, outputs]`.
    pub up: Param<Tensor<2>>,
    /// Factor on both.
    #[module(skip)]
    pub scale: f64,
}

impl Adapter {
    /// `[tokens, inputs]` to `[tokens, outputs]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.down.val()).matmul(self.up.val()) * self.scale
    }

    /// The same map as one matrix, `[inputs, outputs]`.
    pub fn product(&self) -> Tensor<2> {
        self.down.val().matmul(self.up.val()) * self.scale
    }
}

/// The adapters of one attention.
#[derive(Module, Debug)]
pub struct Adapters {
    /// Of the query projection.
    pub query: Option<Adapter>,
    /// Of the key projection.
    pub key: Option<Adapter>,
    /// Of the value projection.
    pub value: Option<Adapter>,
    /// Of the output projection.
    pub output: Option<Adapter>,
    /// Whether they are used: they belong to BSBR attention, the original attention has none.
    #[module(skip)]
    pub used: bool,
}

impl Adapters {
    /// The adapter of a projection.
    pub fn of(&self, target: AdapterTarget) -> Option<&Adapter> {
        match target {
            AdapterTarget::Query => self.query.as_ref(),
            AdapterTarget::Key => self.key.as_ref(),
            AdapterTarget::Value => self.value.as_ref(),
            AdapterTarget::Output => self.output.as_ref(),
        }
    }

    /// Adapters that `make` gives for each projection.
    pub(crate) fn new<E>(mut make: impl FnMut(AdapterTarget) -> Result<Option<Adapter>, E>) -> Result<Self, E> {
        Ok(Self {
            query: make(AdapterTarget::Query)?,
            key: make(AdapterTarget::Key)?,
            value: make(AdapterTarget::Value)?,
            output: make(AdapterTarget::Output)?,
            used: true,
        })
    }
}

/// `down(act(up x))`, or `down(act(gate x) * up x)`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// Gate projection of a gated MLP.
    pub gate: Option<Projection>,
    /// `[hidden_size]` to `[intermediate_size]`.
    pub up: Projection,
    /// `[intermediate_size]` to `[hidden_size]`.
    pub down: Projection,
    /// The non-linearity.
    #[module(skip)]
    pub activation: Activation,
    /// The numbers of [`Activation::Xielu`].
    #[module(skip)]
    pub xielu: Option<Xielu>,
    /// What is done to gate and up besides.
    #[module(skip)]
    pub clamped_gate: Option<ClampedGate>,
}

/// The numbers of [`Activation::Xielu`] in one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xielu {
    /// Factor on the square of what is above 0: the softplus of what is stored.
    pub above: f32,
    /// Factor on the exponential below 0, less `linear`: likewise.
    pub below: f32,
    /// Factor on the number itself.
    pub linear: f32,
    /// The exponential is taken of what is at most this.
    pub limit: f32,
}

impl Xielu {
    /// From the four numbers in a checkpoint.
    pub fn of_stored([above, below, linear, limit]: [f32; 4]) -> Self {
        // As in torch: beyond 20 the rest is lost in rounding.
        let softplus = |x: f32| if x > 20.0 { x } else { f64::from(x).exp().ln_1p() as f32 };
        Self { above: softplus(above), below: softplus(below), linear, limit }
    }

    /// What becomes of `x`.
    pub fn of(&self, x: f32) -> f32 {
        if x > 0.0 {
            return self.above * x * x + self.linear * x;
        }
        (x.min(self.limit).exp_m1() - x) * (self.linear + self.below) + self.linear * x
    }
}

impl Mlp {
    /// `[tokens, hidden_size]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::mlp(x, None, self, None, Packing::ByNumber)
    }
}

/// Several MLPs of which a token goes through a few.
#[derive(Module, Debug)]
pub struct Mixture {
    /// Scores of the experts, `[hidden_size]` to `[experts]`; some have a bias.
    pub router: Linear,
    /// Added to the scores for the choice.
    #[module(skip)]
    pub correction: Option<Vec<f32>>,
    /// The experts.
    pub experts: Vec<Mlp>,
    /// One that every token goes through.
    pub shared: Option<Mlp>,
    /// A score whose sigmoid multiplies what that gives.
    pub shared_gate: Option<Linear>,
    /// An MLP whose output is added to what they give.
    pub beside: Option<BesideMlp>,
    /// Of what the router reads, which is the stream itself then.
    pub router_norm: Option<Normalisation>,
    /// Factors on the weights of the experts.
    #[module(skip)]
    pub expert_scale: Option<Vec<f32>>,
    /// How they are chosen.
    #[module(skip)]
    pub config: ExpertsConfig,
}

/// An MLP beside experts.
#[derive(Module, Debug)]
pub struct BesideMlp {
    /// It reads what the norm of the block gives.
    pub mlp: Mlp,
    /// After it.
    pub post_norm: Normalisation,
    /// Before the experts.
    pub experts_norm: Normalisation,
    /// After the experts.
    pub experts_post_norm: Normalisation,
}

/// What makes the inputs of all layers; see [`crate::PerLayerInputs`].
#[derive(Module, Debug)]
pub struct LayerInputs {
    /// `[vocabulary, layers * width]`.
    pub embed: Table,
    /// `[hidden_size]` to `[layers * width]`.
    pub project: Projection,
    /// Of what that gives, for each layer by itself.
    pub norm: Normalisation,
}

/// What joins the inputs of a layer to the stream `x`: `x + norm(down(act(gate x) * inputs))`.
#[derive(Module, Debug)]
pub struct PerLayerInput {
    /// `[hidden_size]` to the width of the inputs.
    pub gate: Projection,
    /// Back to `[hidden_size]`.
    pub down: Projection,
    /// After it.
    pub norm: Normalisation,
    /// The non-linearity.
    #[module(skip)]
    pub activation: Activation,
}

/// What a block has besides attention.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one to a block")]
pub enum BlockMlp {
    /// One MLP.
    Dense(Mlp),
    /// Experts.
    Mixture(Mixture),
}

impl BlockMlp {
    /// `[tokens, hidden_size]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::block_mlp(x, None, self, None, Packing::ByNumber)
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
    /// MLP or experts.
    pub mlp: BlockMlp,
    /// After the MLP.
    pub mlp_post_norm: Option<Normalisation>,
    /// Joins the inputs of the layer.
    pub per_layer: Option<PerLayerInput>,
    /// `[1]`: a factor on the stream behind everything else.
    pub scalar: Option<Param<Tensor<1>>>,
    /// What is added to what, and the factor on it.
    #[module(skip)]
    pub config: BlockConfig,
}

impl Block {
    /// `[tokens, hidden_size]` to the same; `inputs` are those of the layer, `[tokens, width]`, where it has some; `attend` is
    /// attention from inputs that its norm is still to be applied to, `[1, heads, tokens, head_dim]`.
    ///
    /// # Errors
    ///
    /// Those of `attend`.
    pub fn forward<E>(
        &self,
        x: Tensor<2>,
        inputs: Option<Tensor<2>>,
        attend: impl FnOnce(&Projections, Option<&Normalisation>, &Tensor<2>) -> Result<Tensor<4>, E>,
    ) -> Result<Tensor<2>, E> {
        self.forward_packed((x, inputs), Packing::ByNumber, attend)
    }

    /// [`Block::forward`] of tokens that are packed in this way.
    pub(crate) fn forward_packed<E>(
        &self,
        (x, inputs): (Tensor<2>, Option<Tensor<2>>),
        packing: Packing,
        attend: impl FnOnce(&Projections, Option<&Normalisation>, &Tensor<2>) -> Result<Tensor<4>, E>,
    ) -> Result<Tensor<2>, E> {
        let factor = self.config.residual_multiplier.unwrap_or(1.0);
        let read = attend(&self.attention, self.attention_norm.as_ref(), &x)?;
        let gate_inputs = || self.attention_norm.as_ref().map_or_else(|| x.clone(), |norm| norm.forward(x.clone()));
        let read = self.attention.opened(read, gate_inputs, packing);
        let output = (&self.attention.output, self.attention.adapter(AdapterTarget::Output));
        let x = match self.config.form {
            BlockForm::Sequential => {
                let x = ops::join_heads(read, output, Some((x, factor)), packing);
                ops::block_mlp(x, self.mlp_norm.as_ref(), &self.mlp, Some(factor), packing)
            }
            BlockForm::Sandwich | BlockForm::NormedBranches => {
                let branch = normed(&self.attention_post_norm, ops::join_heads(read, output, None, packing));
                let x = x + scaled(branch, factor);
                let branch = ops::block_mlp(x.clone(), self.mlp_norm.as_ref(), &self.mlp, None, packing);
                x + scaled(normed(&self.mlp_post_norm, branch), factor)
            }
            BlockForm::NormAfter => {
                let x = normed(&self.attention_post_norm, ops::join_heads(read, output, Some((x, factor)), packing));
                normed(&self.mlp_post_norm, ops::block_mlp(x, None, &self.mlp, Some(factor), packing))
            }
            BlockForm::Parallel | BlockForm::ParallelSharedNorm => {
                let norm = self.mlp_norm.as_ref().or(self.attention_norm.as_ref());
                let x = ops::block_mlp(x, norm, &self.mlp, Some(factor), packing);
                ops::join_heads(read, output, Some((x, factor)), packing)
            }
        };
        let x = match (&self.per_layer, inputs) {
            (Some(own), Some(inputs)) => {
                let branch = ops::per_layer(&x, inputs, own, packing);
                x + own.norm.forward(branch)
            }
            _ => x,
        };
        Ok(match &self.scalar {
            Some(scalar) => x * scalar.val().unsqueeze(),
            None => x,
        })
    }
}

fn scaled(x: Tensor<2>, factor: f64) -> Tensor<2> {
    if factor == 1.0 { x } else { x * factor }
}

fn normed(norm: &Option<Normalisation>, x: Tensor<2>) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
