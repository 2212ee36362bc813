//! Keys and values that are made of one narrow vector, as data.

use serde::{Deserialize, Serialize};

use super::{DecoderConfig, Norm, Positions};
use crate::ModelError;

const LARGEST_SIZE: usize = 1 << 30;

/// Multi-head latent attention (DeepSeek-AI 2024, `arXiv:2405.04434`): the keys and values of all heads are made of one narrow
/// vector of the token, normalised; what rotates of a key is one vector for all heads, made of the stream.
///
/// A head has [`DecoderConfig::head_dim`] numbers, of which those of `rotary_dim` come first and rotate. Every head has its own
/// keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentAttention {
    /// Width of the vector that keys and values are made of.
    pub rank: usize,
    /// Width of a vector that queries are made of; they are made of the stream where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_rank: Option<usize>,
    /// Width of a value, at most that of a head.
    pub value_dim: usize,
    /// The maps that make these vectors, and what rotates of keys, have biases.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
    /// Added to the mean square where these vectors are normalised.
    pub norm_eps: f64,
}

impl DecoderConfig {
    /// Dimensions of a head that rotate and those that do not, of latent attention.
    pub fn latent_parts(&self) -> Option<(usize, usize)> {
        self.latent?;
        match self.positions {
            Positions::Rotary { rotary_dim, .. } => Some((rotary_dim, self.head_dim.saturating_sub(rotary_dim))),
            Positions::Learned | Positions::Alibi { .. } => None,
        }
    }

    /// Width of what a head reads, before the output projection.
    pub fn value_dim(&self, layer: usize) -> usize {
        if let Some(recurrent) = self.layer_recurrent(layer) {
            return recurrent.value_dim;
        }
        self.latent.map_or_else(|| self.shape(layer).head_dim, |latent| latent.value_dim)
    }

    pub(super) fn validate_latent(&self) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        let Some(latent) = self.latent else { return Ok(()) };
        for (setting, value, most) in [
            ("latent.rank", latent.rank, LARGEST_SIZE),
            ("latent.query_rank", latent.query_rank.unwrap_or(1), LARGEST_SIZE),
            ("latent.value_dim", latent.value_dim, self.head_dim),
        ] {
            if value == 0 || value > most {
                return fail(setting, format!("is {value}, expected 1 to {most}"));
            }
        }
        if !(latent.norm_eps.is_finite() && latent.norm_eps > 0.0) {
            return fail("latent.norm_eps", format!("is {}, expected a positive number", latent.norm_eps));
        }
        if self.kv_heads != self.heads {
            let problem = format!("is {}, expected heads = {}, as latent is set", self.kv_heads, self.heads);
            return fail("kv_heads", problem);
        }
        if self.latent_parts().is_none_or(|(_, still)| still == 0) {
            return fail("positions", "are not rotary in a part of a head alone, as latent needs it".into());
        }
        let plain = self.layer_shapes.is_empty()
            && self.layer_rotary.is_empty()
            && self.block.head_norm.is_none()
            && !self.block.value_norm
            && !self.qkv_bias
            && self.norm == Norm::Rms;
        if !plain {
            let problem =
                "is set, expected no layer_shapes, layer_rotary, head_norm, value_norm or qkv_bias, and norm = rms";
            return fail("latent", problem.into());
        }
        Ok(())
    }
}
