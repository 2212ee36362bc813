//! The decoder as data: every switch a checkpoint can set.

mod adapters;
mod decoder;
mod parts;
mod positions;

pub use adapters::{AdapterConfig, AdapterTarget};
use bsbr_attn::BlockAttentionConfig;
pub use decoder::DecoderConfig;
pub use parts::{Activation, BlockConfig, BlockForm, EmbeddingConfig, HeadConfig, HeadNorm, Norm};
pub use positions::{LayerRotary, PositionPolicy, Positions, RotaryScaling};
use serde::{Deserialize, Serialize};

use crate::ModelError;

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
    /// Low-rank adapters that tuning added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<AdapterConfig>,
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
            adapters: None,
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
        if let Some(adapters) = &self.adapters {
            adapters.validate()?;
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
