//! The decoder as data: every switch a checkpoint can set.

mod adapters;
mod decoder;
mod experts;
mod latent;
mod layers;
mod parts;
mod positions;
mod recurrent;

pub use adapters::{AdapterConfig, AdapterTarget};
use bsbr_attn::BlockAttentionConfig;
use bsbr_splitlinear::SavedSplit;
pub use decoder::DecoderConfig;
pub use experts::{ExpertGroups, ExpertsConfig, RouterConfig, RouterKind, SharedExpert};
pub use latent::LatentAttention;
pub use layers::{LayerKeys, LayerShape};
pub use parts::{
    Activation, BlockConfig, BlockForm, ClampedGate, EmbeddingConfig, HeadConfig, HeadNorm, Norm, PerLayerInputs,
};
pub use positions::{LayerRotary, PositionPolicy, Positions, QueryTemperature, RotaryScaling};
pub use recurrent::GatedDelta;
use serde::{Deserialize, Serialize};

use crate::{LinearPlace, ModelError};

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
    /// What calibration adds to `far_shift`, for each layer; none where it did not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub far_shifts: Vec<f64>,
    /// What calibration multiplies `threshold` by, for each layer; none where it did not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub threshold_factors: Vec<f64>,
    /// What happens past the last learned position.
    #[serde(default)]
    pub position_policy: PositionPolicy,
    /// Low-rank adapters that tuning added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<AdapterConfig>,
    /// Tokens that end a text.
    #[serde(default)]
    pub stop_tokens: Vec<u32>,
    /// Parts of linear layers that are compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<SavedSplit>,
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
            far_shifts: Vec::new(),
            threshold_factors: Vec::new(),
            position_policy: PositionPolicy::default(),
            adapters: None,
            stop_tokens: Vec::new(),
            split: None,
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
        if let Some(adapters) = &self.adapters {
            adapters.validate()?;
        }
        if let Some(&layer) = self.original_layers.iter().find(|&&l| l >= self.decoder.layers) {
            let problem = format!("names layer {layer}, the model has layers 0 to {}", self.decoder.layers - 1);
            return Err(ModelError::Config { setting: "original_layers", problem });
        }
        for (setting, numbers) in [("far_shifts", &self.far_shifts), ("threshold_factors", &self.threshold_factors)] {
            if !numbers.is_empty() && numbers.len() != self.decoder.layers {
                let (found, expected) = (numbers.len(), self.decoder.layers);
                let problem =
                    format!("has {found} numbers, the model has {expected} layers: calibrate the model again");
                return Err(ModelError::Config { setting, problem });
            }
        }
        if let Some(factor) = self.threshold_factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            let problem = format!("holds {factor}, expected numbers above 0: calibrate the model again");
            return Err(ModelError::Config { setting: "threshold_factors", problem });
        }
        for layer in 0..self.decoder.layers {
            if let Some(attention) = self.calibrated_attention(layer) {
                attention.validate()?;
                if attention.needs_meta() && self.decoder.latent.is_some() {
                    let problem = "is meta, which begins with queries and keys that are made of the stream: latent attention \
                                   has none";
                    return Err(ModelError::Config { setting: "selector", problem: problem.into() });
                }
            }
        }
        if let Some(split) = &self.split {
            let shape = |name: &str| self.decoder.linear_shape(name.parse::<LinearPlace>().ok()?);
            split.validate(shape).map_err(|problem| ModelError::Config { setting: "split", problem })?;
        }
        self.validate_policy()
    }

    /// Whether the position policy is one for these positions.
    fn validate_policy(&self) -> Result<(), ModelError> {
        let fail = |problem: String| Err(ModelError::Config { setting: "position_policy", problem });
        let positions = &self.decoder.positions;
        match self.position_policy {
            PositionPolicy::Slide if *positions != Positions::Learned => {
                fail("is slide, which is for learned positions: rotary ones have grouped, ALiBi needs nothing".into())
            }
            PositionPolicy::Grouped => {
                if !matches!(positions, Positions::Rotary { .. }) {
                    return fail(
                        "is grouped, which is for rotary positions: learned ones have slide, ALiBi needs nothing"
                            .into(),
                    );
                }
                let trained = self.decoder.max_positions;
                for layer in 0..self.decoder.layers {
                    let inside = self.decoder.window(layer).is_some_and(|window| window <= trained);
                    if self.original_layers.contains(&layer) && self.rotates(layer) && !inside {
                        return fail(format!(
                            "is grouped, but layer {layer} keeps full attention, which reads at every distance: take it out of \
                             original_layers"
                        ));
                    }
                }
                match &self.attention {
                    Some(attention) => Ok(attention.validate_trained_length(trained)?),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// BSBR settings of layer `layer`; `None` where the original attention runs, or none, as in recurrent layers.
    pub fn layer_attention(&self, layer: usize) -> Option<&BlockAttentionConfig> {
        self.attention
            .as_ref()
            .filter(|_| !self.original_layers.contains(&layer) && self.decoder.layer_recurrent(layer).is_none())
    }

    /// [`ModelConfig::layer_attention`] with what calibration found for that layer.
    pub fn calibrated_attention(&self, layer: usize) -> Option<BlockAttentionConfig> {
        let attention = self.layer_attention(layer)?.clone();
        let shift = self.far_shifts.get(layer).copied().unwrap_or(0.0);
        let factor = self.threshold_factors.get(layer).copied().unwrap_or(1.0);
        let (far_shift, threshold) = (attention.far_shift + shift, attention.threshold * factor);
        Some(BlockAttentionConfig { far_shift, threshold, ..attention })
    }

    /// The length past which layer `layer` reads far tokens at other positions than their own; `None` where it never does.
    pub(crate) fn trained_length(&self, layer: usize) -> Option<usize> {
        let groups = self.position_policy == PositionPolicy::Grouped && self.rotates(layer);
        (groups && self.layer_attention(layer).is_some()).then_some(self.decoder.max_positions)
    }

    /// The layer whose cache layer `layer` reads, having none of its own: where it shares keys and values that both read whole
    /// or by an index of them. Statistics that hang on queries, and keys that are
    /// moved, are of each layer by itself.
    pub fn cache_owner(&self, layer: usize) -> Option<usize> {
        self.shared_with(layer).filter(|&owner| {
            // Keys that are moved have moved on by the time another layer reads them.
            self.trained_length(layer).is_none() && self.trained_length(owner).is_none()
        })
    }

    /// The layer whose queries found the index of layer `layer`, which is an index of that layer's keys.
    pub(crate) fn index_founder(&self, layer: usize) -> Option<usize> {
        self.shared_with(layer)
    }

    /// The layer whose keys layer `layer` reads whole, or by the same index.
    fn shared_with(&self, layer: usize) -> Option<usize> {
        let owner = self.decoder.key_owner(layer)?;
        let indexed = |layer: usize| self.layer_attention(layer).map(BlockAttentionConfig::uses_index);
        let pair = (indexed(layer), indexed(owner));
        let kept = matches!(pair, (None, None | Some(true)) | (Some(true), Some(true)));
        let alike = self.decoder.window(layer) == self.decoder.window(owner);
        (kept && alike).then_some(owner)
    }

    fn rotates(&self, layer: usize) -> bool {
        matches!(self.decoder.positions, Positions::Rotary { .. })
            && self.decoder.rotary(layer) != LayerRotary::Off
            && self.decoder.layer_recurrent(layer).is_none()
    }
}
