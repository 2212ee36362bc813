//! One decoder as data: sizes and switches.

use serde::{Deserialize, Serialize};

use super::{
    Activation, BlockConfig, ClampedGate, EmbeddingConfig, ExpertsConfig, GatedDelta, HeadConfig, HeadNorm,
    LatentAttention, LayerRotary, LayerShape, Norm, Positions, QueryTemperature, RotaryScaling,
};
use crate::ModelError;

/// Far above every decoder there is, and low enough that a list of all weights, and the product of two sizes, stay small.
const MOST_LAYERS: usize = 1 << 12;
const MOST_HEADS: usize = 1 << 16;
const LARGEST_SIZE: usize = 1 << 30;
const MOST_POSITIONS: usize = 1 << 40;

/// One decoder: sizes and switches. Independent of how attention is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; not always `hidden_size / heads`.
    pub head_dim: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Longest text the model was made for; rows of the position table where positions are learned.
    pub max_positions: usize,
    /// Normalisation.
    pub norm: Norm,
    /// Added to the variance or mean square.
    pub norm_eps: f64,
    /// Position scheme.
    pub positions: Positions,
    /// MLP non-linearity.
    pub activation: Activation,
    /// `down(act(gate x) * up x)` instead of `down(act(up x))`.
    pub gated_mlp: bool,
    /// What is done to gate and up besides, where the activation is `silu` and there is a gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamped_gate: Option<ClampedGate>,
    /// Factor on `q . k`.
    pub attention_scale: f64,
    /// Divide `attention_scale` by `layer index + 1` as well.
    pub scale_by_layer: bool,
    /// `cap tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f64>,
    /// Sliding window of each layer in tokens, the current one included; empty when no layer has one.
    pub windows: Vec<Option<usize>>,
    /// Every softmax of attention has one more column, with a learned logit of each head and a value of 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sink_logits: bool,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub attention_output_bias: bool,
    /// MLP projections have biases.
    pub mlp_bias: bool,
    /// The output head is the embedding table.
    pub tied_head: bool,
    /// Embedding.
    #[serde(default)]
    pub embedding: EmbeddingConfig,
    /// Blocks.
    #[serde(default)]
    pub block: BlockConfig,
    /// Output head.
    #[serde(default)]
    pub head: HeadConfig,
    /// What each layer does with rotary positions; empty when all do the same.
    #[serde(default)]
    pub layer_rotary: Vec<LayerRotary>,
    /// Factor on queries by their position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_temperature: Option<QueryTemperature>,
    /// Sizes of each layer, and where its keys and values come from; empty when all layers are alike.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_shapes: Vec<LayerShape>,
    /// Keys and values are made of one narrow vector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<LatentAttention>,
    /// What the heads read is multiplied by the sigmoid of a map of the stream, `[hidden_size]` to `[heads * head_dim]`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attention_gate: bool,
    /// Layers that keep a state in place of keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recurrent: Option<GatedDelta>,
    /// Experts in place of the MLP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsConfig>,
}

impl DecoderConfig {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] naming the first setting that cannot be.
    pub fn validate(&self) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        for (setting, value, largest) in [
            ("vocab_size", self.vocab_size, LARGEST_SIZE),
            ("hidden_size", self.hidden_size, LARGEST_SIZE),
            ("layers", self.layers, MOST_LAYERS),
            ("heads", self.heads, MOST_HEADS),
            ("kv_heads", self.kv_heads, MOST_HEADS),
            ("head_dim", self.head_dim, MOST_HEADS),
            ("intermediate_size", self.intermediate_size, LARGEST_SIZE),
            ("max_positions", self.max_positions, MOST_POSITIONS),
            ("embedding.width", self.embedding.width.unwrap_or(1), LARGEST_SIZE),
            ("embedding.per_layer.width", self.embedding.per_layer.map_or(1, |it| it.width), MOST_HEADS),
            ("embedding.per_layer.vocab_size", self.embedding.per_layer.map_or(1, |it| it.vocab_size), LARGEST_SIZE),
            ("embedding.position_offset", self.embedding.position_offset.max(1), MOST_POSITIONS),
        ] {
            if value == 0 {
                return fail(setting, "is 0, expected at least 1".into());
            }
            if value > largest {
                return fail(setting, format!("is {value}, expected at most {largest}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail("kv_heads", format!("is {}, expected a divisor of heads = {}", self.kv_heads, self.heads));
        }
        self.validate_shapes(MOST_HEADS, LARGEST_SIZE)?;
        self.validate_latent()?;
        self.validate_recurrent()?;
        if let Some(inputs) = self.embedding.per_layer {
            if inputs.vocab_size < self.vocab_size {
                let problem = format!("is {}, expected at least vocab_size = {}", inputs.vocab_size, self.vocab_size);
                return fail("embedding.per_layer.vocab_size", problem);
            }
            if self.activation == Activation::Xielu {
                return fail("embedding.per_layer", "is set, but the activation xielu is of one MLP".into());
            }
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return fail("norm_eps", format!("is {}, expected a positive number", self.norm_eps));
        }
        if !(self.attention_scale.is_finite() && self.attention_scale > 0.0) {
            return fail("attention_scale", format!("is {}, expected a positive number", self.attention_scale));
        }
        if let Some(cap) = self.attention_softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return fail("attention_softcap", format!("is {cap}, expected a positive number"));
        }
        if !self.windows.is_empty() && self.windows.len() != self.layers {
            let problem = format!("has {} entries, expected one per layer = {}", self.windows.len(), self.layers);
            return fail("windows", problem);
        }
        if self.windows.contains(&Some(0)) {
            return fail("windows", "has a window of 0 tokens, expected at least 1 (the token itself)".into());
        }
        for (setting, value) in [
            ("block.residual_multiplier", self.block.residual_multiplier),
            ("embedding.scale", self.embedding.scale),
            ("head.scale", self.head.scale),
            ("head.softcap", self.head.softcap),
        ] {
            if let Some(value) = value
                && !(value.is_finite() && value > 0.0)
            {
                return fail(setting, format!("is {value}, expected a positive number"));
            }
        }
        if self.block.head_norm.is_some() && self.norm == Norm::LayerPlusOne {
            return fail("block.head_norm", "has no form with a mean and `1 + weight`".into());
        }
        if self.block.head_norm_after_rotary
            && !matches!(self.block.head_norm, Some(HeadNorm::Head | HeadNorm::EachHead))
        {
            let problem = "is set, expected a norm of each head in block.head_norm";
            return fail("block.head_norm_after_rotary", problem.into());
        }
        if let Some(experts) = &self.experts {
            experts.validate(self.layers)?;
            if self.activation == Activation::Xielu {
                return fail("experts", "are set, but the activation xielu is of one MLP".into());
            }
        }
        if let Some(ClampedGate { limit, alpha }) = self.clamped_gate {
            if self.activation != Activation::Silu || !self.gated_mlp {
                return fail("clamped_gate", "is set, expected an MLP with a gate and the activation silu".into());
            }
            for (setting, value) in [("clamped_gate.limit", limit), ("clamped_gate.alpha", alpha)] {
                if !(value.is_finite() && value > 0.0) {
                    return fail(setting, format!("is {value}, expected a positive number"));
                }
            }
        }
        if self.activation == Activation::Xielu && self.gated_mlp {
            return fail("gated_mlp", "is true, but the activation xielu is of an MLP without a gate".into());
        }
        self.validate_positions()
    }

    fn validate_positions(&self) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        let positive = |setting: &'static str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            fail(setting, format!("is {value}, expected a positive number"))
        };
        if !self.layer_rotary.is_empty() && self.layer_rotary.len() != self.layers {
            let problem = format!("has {} entries, expected one per layer = {}", self.layer_rotary.len(), self.layers);
            return fail("layer_rotary", problem);
        }
        for layer in &self.layer_rotary {
            if let LayerRotary::Local { theta } | LayerRotary::Whole { theta } = layer {
                positive("layer_rotary.theta", *theta)?;
            }
        }
        for (layer, rotary) in self.layer_rotary.iter().enumerate() {
            let width = self.shape(layer).head_dim;
            if matches!(rotary, LayerRotary::Whole { .. }) && !width.is_multiple_of(2) {
                let problem = format!("rotates whole heads of width {width} in layer {layer}, expected an even number");
                return fail("layer_rotary", problem);
            }
        }
        if let Some(QueryTemperature { beta, length }) = self.query_temperature {
            positive("query_temperature.beta", beta)?;
            positive("query_temperature.length", length as f64)?;
        }
        match &self.positions {
            Positions::Rotary { theta, rotary_dim, scaling } => {
                // Of the narrowest of the layers that rotate by it.
                let by_it =
                    |layer: &usize| matches!(self.rotary(*layer), LayerRotary::Global | LayerRotary::Local { .. });
                let widths = (0..self.layers).filter(by_it).map(|layer| self.shape(layer).head_dim);
                let width = widths.min().unwrap_or(self.head_dim);
                if *rotary_dim == 0 || rotary_dim % 2 != 0 || *rotary_dim > width {
                    let problem = format!("is {rotary_dim}, expected an even number up to head_dim = {width}");
                    return fail("positions.rotary_dim", problem);
                }
                if let Some(RotaryScaling::Proportional { rotating, .. }) = scaling
                    && (rotating % 2 != 0 || rotating > rotary_dim)
                {
                    let problem = format!("is {rotating}, expected an even number up to rotary_dim = {rotary_dim}");
                    return fail("positions.scaling.rotating", problem);
                }
                positive("positions.theta", *theta)?;
                for (setting, value) in scaling.iter().flat_map(RotaryScaling::positive_numbers) {
                    positive(setting, value)?;
                }
                if let Some(RotaryScaling::Longrope { short_factor, long_factor, .. }) = scaling {
                    for (setting, factors) in [
                        ("positions.scaling.short_factor", short_factor),
                        ("positions.scaling.long_factor", long_factor),
                    ] {
                        if factors.len() != rotary_dim / 2 {
                            let problem =
                                format!("has {} entries, expected rotary_dim / 2 = {}", factors.len(), rotary_dim / 2);
                            return fail(setting, problem);
                        }
                    }
                }
            }
            _ if !self.layer_rotary.is_empty() => {
                return fail("layer_rotary", "is set, but the positions are not rotary".into());
            }
            Positions::Alibi { factor } => positive("positions.factor", *factor)?,
            Positions::Learned => {}
        }
        Ok(())
    }

    /// The experts of layer `layer`, if it has some.
    pub fn layer_experts(&self, layer: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|experts| experts.dense_layers.binary_search(&layer).is_err())
    }

    /// Sliding window of layer `layer`, if it has one.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Factor on `q . k` in layer `layer`.
    pub fn layer_scale(&self, layer: usize) -> f64 {
        if self.scale_by_layer { self.attention_scale / (layer + 1) as f64 } else { self.attention_scale }
    }

    /// Width of the embedding table.
    pub fn embedding_width(&self) -> usize {
        self.embedding.width.unwrap_or(self.hidden_size)
    }

    /// What layer `layer` does with rotary positions.
    pub fn rotary(&self, layer: usize) -> LayerRotary {
        self.layer_rotary.get(layer).copied().unwrap_or(LayerRotary::Global)
    }
}
