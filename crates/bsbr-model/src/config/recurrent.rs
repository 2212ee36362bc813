//! Layers that keep a state of constant size in place of keys and values, as data.

use serde::{Deserialize, Serialize};

use super::{BlockForm, DecoderConfig, Positions};
use crate::ModelError;

const MOST_HEADS: usize = 1 << 16;
const LONGEST_KERNEL: usize = 1 << 10;

/// Layers of the gated delta rule (Yang et al. 2024, `arXiv:2412.06464`) in place of attention.
///
/// Queries, keys and values, one behind the other, go through a causal convolution of each channel by itself and a SiLU. Queries and
/// keys then have length one, queries are divided by `sqrt(key_dim)`. A value head has a matrix `S` `[key_dim, value_dim]`; key heads
/// are shared by `value_heads / key_heads` of them that follow each other. With `a_t` and `b_t`, maps of the stream for each value
/// head,
///
/// ```text
/// g_t = exp(-exp(decay_log) softplus(a_t))         r_t = sigmoid(b_t)
/// S_t = g_t S_{t-1} + r_t k_t (v_t - g_t S_{t-1}^T k_t)^T          o_t = S_t^T q_t
/// ```
///
/// What is read, `o_t`, is normalised head by head and multiplied by the SiLU of a gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatedDelta {
    /// Which layers, in ascending order.
    pub layers: Vec<usize>,
    /// Heads of queries and keys; divides `value_heads`.
    pub key_heads: usize,
    /// Heads of values.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees, the current one included; at least 2.
    pub kernel: usize,
}

impl GatedDelta {
    /// Width of the queries, and of the keys, of all heads.
    pub fn keys_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of the values of all heads.
    pub fn values_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.keys_width() + self.values_width()
    }

    /// Numbers that one layer keeps of a text, however long it is.
    pub fn state_width(&self) -> usize {
        (self.kernel - 1) * self.channels() + self.value_heads * self.key_dim * self.value_dim
    }
}

impl DecoderConfig {
    /// The gated delta rule of layer `layer`, where that stands in place of attention.
    pub fn layer_recurrent(&self, layer: usize) -> Option<&GatedDelta> {
        self.recurrent.as_ref().filter(|recurrent| recurrent.layers.binary_search(&layer).is_ok())
    }

    /// Numbers that recurrent layers keep of a text, however long it is.
    pub fn state_width(&self) -> usize {
        self.recurrent.as_ref().map_or(0, |recurrent| recurrent.layers.len() * recurrent.state_width())
    }

    pub(super) fn validate_recurrent(&self) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        if self.attention_gate && self.latent.is_some() {
            return fail("attention_gate", "is set, but latent attention has no gate".into());
        }
        let Some(recurrent) = &self.recurrent else { return Ok(()) };
        let ascending = recurrent.layers.is_sorted_by(|a, b| a < b);
        if recurrent.layers.is_empty() || !ascending || recurrent.layers.iter().any(|&layer| layer >= self.layers) {
            let problem = format!(
                "is {:?}, expected one layer or more of the {}, in ascending order",
                recurrent.layers, self.layers
            );
            return fail("recurrent.layers", problem);
        }
        if recurrent.layers.len() == self.layers {
            return fail("recurrent.layers", "names every layer, expected one at least with attention".into());
        }
        for (setting, value, least, most) in [
            ("recurrent.key_heads", recurrent.key_heads, 1, MOST_HEADS),
            ("recurrent.value_heads", recurrent.value_heads, 1, MOST_HEADS),
            ("recurrent.key_dim", recurrent.key_dim, 1, MOST_HEADS),
            ("recurrent.value_dim", recurrent.value_dim, 1, MOST_HEADS),
            ("recurrent.kernel", recurrent.kernel, 2, LONGEST_KERNEL),
        ] {
            if value < least || value > most {
                return fail(setting, format!("is {value}, expected {least} to {most}"));
            }
        }
        if !recurrent.value_heads.is_multiple_of(recurrent.key_heads) {
            let (found, heads) = (recurrent.key_heads, recurrent.value_heads);
            return fail("recurrent.key_heads", format!("is {found}, expected a divisor of value_heads = {heads}"));
        }
        if let Some(layer) = recurrent.layers.iter().find(|&&layer| self.window(layer).is_some()) {
            return fail("windows", format!("has one for layer {layer}, which is recurrent"));
        }
        let plain = self.layer_shapes.is_empty()
            && self.latent.is_none()
            && !self.sink_logits
            && !self.qkv_bias
            && !self.attention_output_bias
            && !self.block.value_norm
            && self.block.form == BlockForm::Sequential
            && matches!(self.positions, Positions::Rotary { .. });
        if !plain {
            let problem = "is set, expected rotary positions, a sequential block, and no layer_shapes, latent, sink_logits, \
                           value_norm, qkv_bias or attention_output_bias";
            return fail("recurrent", problem.into());
        }
        Ok(())
    }
}
