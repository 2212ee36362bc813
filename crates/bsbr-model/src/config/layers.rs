//! What single layers have besides what all have, as data.

use serde::{Deserialize, Serialize};

use super::DecoderConfig;
use crate::ModelError;

/// Sizes of one layer, and where its keys and values come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerShape {
    /// Key and value heads; divides [`DecoderConfig::heads`].
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Where keys and values come from.
    #[serde(default, skip_serializing_if = "LayerKeys::is_own")]
    pub keys: LayerKeys,
}

/// Where the keys and values of a layer come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "kind")]
pub enum LayerKeys {
    /// A projection each.
    #[default]
    Own,
    /// One projection for both: values are what it gives before that is normalised and rotated to keys.
    AlsoValues,
    /// An earlier layer, as it has them: normalised and rotated. The layer has queries only.
    Of {
        /// Number of that layer, which has keys of its own.
        layer: usize,
    },
}

impl LayerKeys {
    fn is_own(&self) -> bool {
        *self == Self::Own
    }
}

impl DecoderConfig {
    /// Sizes of layer `layer`.
    pub fn shape(&self, layer: usize) -> LayerShape {
        let Self { kv_heads, head_dim, intermediate_size, .. } = *self;
        let alike = LayerShape { kv_heads, head_dim, intermediate_size, keys: LayerKeys::Own };
        self.layer_shapes.get(layer).copied().unwrap_or(alike)
    }

    /// The layer whose keys and values layer `layer` reads, where it has none of its own.
    pub fn key_owner(&self, layer: usize) -> Option<usize> {
        match self.shape(layer).keys {
            LayerKeys::Of { layer } => Some(layer),
            LayerKeys::Own | LayerKeys::AlsoValues => None,
        }
    }

    /// Width of the widest heads.
    pub fn widest_head(&self) -> usize {
        (0..self.layers).map(|layer| self.shape(layer).head_dim).max().unwrap_or(self.head_dim)
    }

    /// Keys and values of one token in all layers that have some of their own, in numbers.
    pub fn kv_width(&self) -> usize {
        let keeps = |&layer: &usize| self.key_owner(layer).is_none() && self.layer_recurrent(layer).is_none();
        let own = (0..self.layers).filter(keeps).map(|layer| self.shape(layer));
        own.map(|shape| 2 * shape.kv_heads * shape.head_dim).sum()
    }

    pub(super) fn validate_shapes(&self, most_heads: usize, largest: usize) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        if self.layer_shapes.is_empty() {
            return Ok(());
        }
        if self.layer_shapes.len() != self.layers {
            let problem = format!("has {} entries, expected one per layer = {}", self.layer_shapes.len(), self.layers);
            return fail("layer_shapes", problem);
        }
        for (layer, shape) in self.layer_shapes.iter().enumerate() {
            for (setting, value, most) in [
                ("layer_shapes.kv_heads", shape.kv_heads, most_heads),
                ("layer_shapes.head_dim", shape.head_dim, most_heads),
                ("layer_shapes.intermediate_size", shape.intermediate_size, largest),
            ] {
                if value == 0 || value > most {
                    return fail(setting, format!("is {value} in layer {layer}, expected 1 to {most}"));
                }
            }
            if !self.heads.is_multiple_of(shape.kv_heads) {
                let (found, heads) = (shape.kv_heads, self.heads);
                let problem = format!("is {found} in layer {layer}, expected a divisor of heads = {heads}");
                return fail("layer_shapes.kv_heads", problem);
            }
            let LayerKeys::Of { layer: owner } = shape.keys else { continue };
            if owner >= layer {
                let problem = format!("of layer {layer} are those of layer {owner}, expected an earlier layer");
                return fail("layer_shapes.keys", problem);
            }
            let of = self.layer_shapes[owner];
            if matches!(of.keys, LayerKeys::Of { .. }) || (of.kv_heads, of.head_dim) != (shape.kv_heads, shape.head_dim)
            {
                let problem = format!(
                    "of layer {layer} are those of layer {owner}, expected a layer with keys of its own and {} KV heads of \
                     width {}",
                    shape.kv_heads, shape.head_dim
                );
                return fail("layer_shapes.keys", problem);
            }
        }
        Ok(())
    }
}
