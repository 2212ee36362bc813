//! The parts of a decoder, as data.

use serde::{Deserialize, Serialize};

/// The normalisation of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// Mean and variance, with weight and bias.
    Layer,
    /// Mean and variance, with weight.
    LayerWeight,
    /// Mean and variance, without parameters.
    LayerPlain,
    /// Root mean square, with weight.
    Rms,
    /// Root mean square, times `1 + weight`.
    RmsPlusOne,
    /// Root mean square, without parameters.
    RmsPlain,
    /// Mean and variance, times `1 + weight`, with bias.
    LayerPlusOne,
}

impl Norm {
    /// Whether it has a weight.
    pub fn has_weight(self) -> bool {
        !matches!(self, Self::LayerPlain | Self::RmsPlain)
    }

    /// Whether it has a bias.
    pub fn has_bias(self) -> bool {
        matches!(self, Self::Layer | Self::LayerPlusOne)
    }

    /// Whether it subtracts the mean.
    pub(crate) fn is_layer(self) -> bool {
        matches!(self, Self::Layer | Self::LayerWeight | Self::LayerPlain | Self::LayerPlusOne)
    }

    /// The same without a bias: the form that queries and keys are normalised in. Of [`Norm::LayerPlusOne`] there is none.
    pub(crate) fn without_bias(self) -> Self {
        if self == Self::Layer { Self::LayerWeight } else { self }
    }
}

/// The non-linearity of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`: `gelu`.
    GeluErf,
    /// `x sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
    /// xIELU (Huang et al. 2024), of an MLP without a gate, with four numbers `p, n, b, e` of each layer: `softplus(p) x^2 + b x`
    /// where `x > 0`, else `(b + softplus(n)) (exp(min(x, e)) - 1 - x) + b x`.
    Xielu,
}

/// A gated MLP of which neither factor grows without end: with `g = min(gate x, limit)` and `u` = `up x` held between `-limit` and
/// `limit`, it is `down((u + 1) g sigmoid(alpha g))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClampedGate {
    /// The bound.
    pub limit: f64,
    /// Factor within the sigmoid.
    pub alpha: f64,
}

/// How attention and MLP are joined to the residual stream `x`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockForm {
    /// `x += attention(norm x)`, then `x += mlp(norm x)`.
    #[default]
    Sequential,
    /// `x += norm attention(norm x)`, then `x += norm mlp(norm x)`.
    Sandwich,
    /// `x += norm attention(x)`, then `x += norm mlp(x)`.
    NormedBranches,
    /// `x = norm(x + attention(x))`, then `x = norm(x + mlp(x))`, and no norm before the head.
    NormAfter,
    /// `x += attention(norm x) + mlp(norm x)`, each with its own norm.
    Parallel,
    /// `x += attention(y) + mlp(y)` with `y = norm x`.
    ParallelSharedNorm,
}

impl BlockForm {
    /// Norms before attention and before the MLP.
    pub fn norms_before(self) -> (bool, bool) {
        match self {
            Self::Sequential | Self::Sandwich | Self::Parallel => (true, true),
            Self::ParallelSharedNorm => (true, false),
            Self::NormedBranches | Self::NormAfter => (false, false),
        }
    }

    /// Whether attention and MLP are each followed by a norm.
    pub fn norms_after(self) -> bool {
        matches!(self, Self::Sandwich | Self::NormedBranches | Self::NormAfter)
    }

    /// Whether there is a norm before the head.
    pub fn final_norm(self) -> bool {
        self != Self::NormAfter
    }
}

/// What queries and keys are normalised over, before they are rotated unless a block says otherwise. The kind is [`Norm`]
/// without a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadNorm {
    /// Each head, all with the same weight `[head_dim]`.
    Head,
    /// Each head with its own weight, `[heads, head_dim]`.
    EachHead,
    /// All heads together, `[heads * head_dim]`.
    AllHeads,
}

/// What a block does besides attention and MLP themselves. The default is a plain sequential block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlockConfig {
    /// Where the norms are and what is added to what.
    pub form: BlockForm,
    /// Normalisation of queries and keys.
    pub head_norm: Option<HeadNorm>,
    /// Queries and keys are rotated before they are normalised, head by head.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub head_norm_after_rotary: bool,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_multiplier: Option<f64>,
    /// Values are normalised head by head, by their root mean square, without a weight.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub value_norm: bool,
    /// The stream is multiplied by a number of the layer behind everything else.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub scalar: bool,
}

/// What happens to the embedding of a token. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddingConfig {
    /// Width of the table where it is not `hidden_size`: one projection leads into the stream, another back before the
    /// head.
    pub width: Option<usize>,
    /// Factor on the embedding.
    pub scale: Option<f64>,
    /// The embedding is normalised before the first block.
    pub norm: bool,
    /// Rows of the table of learned positions before that of position 0.
    pub position_offset: usize,
    /// Inputs of a token for each layer, beside the embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_layer: Option<PerLayerInputs>,
}

/// Every layer gets numbers `u` of a token, beside what the stream holds: with the row `a` of the token in a second table, its
/// embedding `e` as it enters the first block, and a projection `W`, `u = (sqrt(width) a + norm(W e / sqrt(hidden_size))) / sqrt 2`.
/// Behind its MLP a layer adds `norm(down(act(gate x) * u))` to the stream `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLayerInputs {
    /// Numbers for each layer.
    pub width: usize,
    /// Rows of the table, at least one for each token.
    pub vocab_size: usize,
}

/// What happens to the scores of the next token. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeadConfig {
    /// The head has a bias.
    pub bias: bool,
    /// Factor on the logits.
    pub scale: Option<f64>,
    /// `cap tanh(logit / cap)`, after the factor.
    pub softcap: Option<f64>,
}
