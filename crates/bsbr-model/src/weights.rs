//! The names and shapes of a decoder's weights: the one list that loading, converting and counting share.

use crate::{ModelConfig, Norm, Positions};

/// One weight of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name in `model.safetensors`.
    pub name: String,
    /// Shape. Linear weights are `[out, in]`, tables `[rows, hidden_size]`.
    pub shape: Vec<usize>,
    /// Added by BSBR: not part of the original model and never exported.
    pub extra: bool,
}

/// Prefix of the weights BSBR adds.
pub const EXTRA_PREFIX: &str = "bsbr.";

/// Every weight of the model, in file order.
///
/// Names: `embed.weight`, `position.weight`, `layers.{i}.attention_norm.{weight,bias}`,
/// `layers.{i}.attention.{query,key,value,output}.{weight,bias}`, `layers.{i}.mlp_norm.{weight,bias}`,
/// `layers.{i}.mlp.{gate,up,down}.{weight,bias}`, `final_norm.{weight,bias}`, `head.weight`, and for the `meta`
/// selector `bsbr.layers.{i}.{meta_query,meta_key}.{weight,bias}`.
pub fn weight_specs(config: &ModelConfig) -> Vec<WeightSpec> {
    let d = &config.decoder;
    let mut specs = Vec::new();
    let mut add = |name: String, shape: &[usize], extra: bool| {
        specs.push(WeightSpec { name, shape: shape.to_vec(), extra });
    };
    let query_width = d.heads * d.head_dim;
    let key_width = d.kv_heads * d.head_dim;
    add("embed.weight".into(), &[d.vocab_size, d.hidden_size], false);
    if d.positions == Positions::Learned {
        add("position.weight".into(), &[d.max_positions, d.hidden_size], false);
    }
    for layer in 0..d.layers {
        let at = |part: &str| format!("layers.{layer}.{part}");
        for norm in ["attention_norm", "mlp_norm"] {
            add(at(&format!("{norm}.weight")), &[d.hidden_size], false);
            if d.norm == Norm::Layer {
                add(at(&format!("{norm}.bias")), &[d.hidden_size], false);
            }
        }
        let mut linear = |part: &str, out: usize, input: usize, bias: bool, extra: bool| {
            let name = if extra { format!("{EXTRA_PREFIX}{}", at(part)) } else { at(part) };
            add(format!("{name}.weight"), &[out, input], extra);
            if bias {
                add(format!("{name}.bias"), &[out], extra);
            }
        };
        linear("attention.query", query_width, d.hidden_size, d.qkv_bias, false);
        linear("attention.key", key_width, d.hidden_size, d.qkv_bias, false);
        linear("attention.value", key_width, d.hidden_size, d.qkv_bias, false);
        linear("attention.output", d.hidden_size, query_width, d.attention_output_bias, false);
        if d.gated_mlp {
            linear("mlp.gate", d.intermediate_size, d.hidden_size, d.mlp_bias, false);
        }
        linear("mlp.up", d.intermediate_size, d.hidden_size, d.mlp_bias, false);
        linear("mlp.down", d.hidden_size, d.intermediate_size, d.mlp_bias, false);
        if config.layer_attention(layer).is_some_and(|a| a.needs_meta()) {
            linear("meta_query", query_width, d.hidden_size, d.qkv_bias, true);
            linear("meta_key", query_width, d.hidden_size, d.qkv_bias, true);
        }
    }
    add("final_norm.weight".into(), &[d.hidden_size], false);
    if d.norm == Norm::Layer {
        add("final_norm.bias".into(), &[d.hidden_size], false);
    }
    if !d.tied_head {
        add("head.weight".into(), &[d.vocab_size, d.hidden_size], false);
    }
    specs
}

/// Numbers in the weights of the original model and numbers BSBR adds.
pub fn parameter_counts(config: &ModelConfig) -> (usize, usize) {
    weight_specs(config).iter().fold((0, 0), |(original, extra), spec| {
        let count = spec.shape.iter().product::<usize>();
        if spec.extra { (original, extra + count) } else { (original + count, extra) }
    })
}
