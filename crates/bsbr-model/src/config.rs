//! The decoder as data: every switch a checkpoint can set.

use bsbr_attn::BlockAttentionConfig;
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// The normalisation of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    /// Mean and variance, with weight and bias.
    Layer,
    /// Root mean square, with weight.
    Rms,
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
}

/// How rotary frequencies are stretched beyond the trained length.
///
/// Formulas as in Hugging Face transformers' `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum RotaryScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times longer.
        factor: f64,
    },
    /// NTK-aware: the base grows with the text once it is longer than `original_max_positions`.
    Dynamic {
        /// How many times longer.
        factor: f64,
        /// Length up to which the frequencies are unchanged.
        original_max_positions: usize,
    },
    /// YaRN: low frequencies interpolated, high ones kept, a ramp between, and a temperature.
    Yarn {
        /// How many times longer.
        factor: f64,
        /// Trained length.
        original_max_positions: usize,
        /// Rotations above which a frequency is kept (default 32).
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated (default 1).
        beta_slow: f64,
        /// Factor on cos and sin; `0.1 ln(factor) + 1` unless the checkpoint says otherwise.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded to whole dimensions (default true).
        truncate: bool,
    },
    /// Llama 3: three bands of wavelengths, smoothed between.
    Llama3 {
        /// How many times longer.
        factor: f64,
        /// Lower end of the smoothed band, in trained lengths per wavelength.
        low_freq_factor: f64,
        /// Upper end of the smoothed band.
        high_freq_factor: f64,
        /// Trained length.
        original_max_positions: usize,
    },
    /// LongRoPE: one divisor per dimension, another set once the text is longer than trained.
    Longrope {
        /// Divisors for texts up to `original_max_positions`, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors beyond, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// Trained length.
        original_max_positions: usize,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
}

/// Where a token is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum Positions {
    /// One learned vector per position, added to the embedding.
    Learned,
    /// Queries and keys rotated by their position, the two halves of `rotary_dim` paired.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// Dimensions of a head that rotate; even, at most `head_dim`.
        rotary_dim: usize,
        /// Stretching beyond the trained length.
        scaling: Option<RotaryScaling>,
    },
}

/// What happens past the last learned position.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PositionPolicy {
    /// A text longer than the learned positions is an error.
    #[default]
    Error,
    /// Every later token takes the last position.
    Clamp,
    /// The positions are stretched over the expected length of the text, in between interpolated linearly.
    Interpolate,
}

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
    /// Factor on `q . k`.
    pub attention_scale: f64,
    /// Divide `attention_scale` by `layer index + 1` as well.
    pub scale_by_layer: bool,
    /// `cap tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f64>,
    /// Sliding window of each layer in tokens, the current one included; empty when no layer has one.
    pub windows: Vec<Option<usize>>,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub attention_output_bias: bool,
    /// MLP projections have biases.
    pub mlp_bias: bool,
    /// The output head is the embedding table.
    pub tied_head: bool,
}

impl DecoderConfig {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] naming the first setting that cannot be.
    pub fn validate(&self) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        for (setting, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_positions", self.max_positions),
        ] {
            if value == 0 {
                return fail(setting, "is 0, expected at least 1".into());
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail("kv_heads", format!("is {}, expected a divisor of heads = {}", self.kv_heads, self.heads));
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
        if let Positions::Rotary { theta, rotary_dim, scaling } = &self.positions {
            if *rotary_dim == 0 || rotary_dim % 2 != 0 || *rotary_dim > self.head_dim {
                let problem = format!("is {rotary_dim}, expected an even number up to head_dim = {}", self.head_dim);
                return fail("positions.rotary_dim", problem);
            }
            if !(theta.is_finite() && *theta > 0.0) {
                return fail("positions.theta", format!("is {theta}, expected a positive number"));
            }
            if let Some(RotaryScaling::Longrope { short_factor, long_factor, .. }) = scaling {
                for (setting, factors) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                    if factors.len() != rotary_dim / 2 {
                        let problem =
                            format!("has {} entries, expected rotary_dim / 2 = {}", factors.len(), rotary_dim / 2);
                        return fail(setting, problem);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sliding window of layer `layer`, if it has one.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Factor on `q . k` in layer `layer`.
    pub fn layer_scale(&self, layer: usize) -> f64 {
        if self.scale_by_layer { self.attention_scale / (layer + 1) as f64 } else { self.attention_scale }
    }
}

/// A decoder together with how its attention is computed: the content of a converted model's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Version of this format; see [`ModelConfig::FORMAT_VERSION`].
    pub format_version: u32,
    /// The decoder.
    pub decoder: DecoderConfig,
    /// BSBR attention, or the original's full attention when absent.
    pub attention: Option<BlockAttentionConfig>,
    /// Layers that keep the original attention although `attention` is set.
    #[serde(default)]
    pub original_layers: Vec<usize>,
    /// What happens past the last learned position.
    #[serde(default)]
    pub position_policy: PositionPolicy,
    /// Tokens that end a text.
    #[serde(default)]
    pub stop_tokens: Vec<u32>,
}

impl ModelConfig {
    /// The only version this code reads and writes.
    pub const FORMAT_VERSION: u32 = 1;

    /// The decoder with its original attention.
    pub fn original(decoder: DecoderConfig) -> Self {
        Self {
            format_version: Self::FORMAT_VERSION,
            decoder,
            attention: None,
            original_layers: Vec::new(),
            position_policy: PositionPolicy::default(),
            stop_tokens: Vec::new(),
        }
    }

    /// Checks both parts and how they fit.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] or [`ModelError::Attention`].
    pub fn validate(&self) -> Result<(), ModelError> {
        if self.format_version != Self::FORMAT_VERSION {
            let problem = format!("is {}, this version reads {}", self.format_version, Self::FORMAT_VERSION);
            return Err(ModelError::Config { setting: "format_version", problem });
        }
        self.decoder.validate()?;
        if let Some(attention) = &self.attention {
            attention.validate()?;
        }
        if let Some(&layer) = self.original_layers.iter().find(|&&l| l >= self.decoder.layers) {
            let problem = format!("names layer {layer}, the model has layers 0 to {}", self.decoder.layers - 1);
            return Err(ModelError::Config { setting: "original_layers", problem });
        }
        Ok(())
    }

    /// BSBR settings of layer `layer`; `None` where the original attention runs.
    pub fn layer_attention(&self, layer: usize) -> Option<&BlockAttentionConfig> {
        self.attention.as_ref().filter(|_| !self.original_layers.contains(&layer))
    }
}
