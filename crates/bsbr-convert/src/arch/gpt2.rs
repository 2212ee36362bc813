//! GPT-2. Linear weights are stored `[in, out]` (the `Conv1D` layout), the square attention output included.

use bsbr_model::{Activation, Norm, Positions};

use super::keys::{self, Sizes};
use super::names::{QKV, QKV_BIAS, QKV_WEIGHT, map};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Op::Transpose;
use crate::rules::Rule::{Ignore, Tie};
use crate::rules::{Architecture, Reject, SourceModel};

pub(super) const GPT2: Architecture = Architecture {
    id: "gpt2",
    version: 1,
    model_types: &["gpt2"],
    prefixes: &["transformer.", ""],
    anchor: "{p}wte.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[Reject { key: "add_cross_attention", why: "the decoder has no cross-attention" }],
    rules: &[
        map("{p}wte.weight", &["embed.weight"], &[]),
        map("{p}wpe.weight", &["position.weight"], &[]),
        map("{p}h.{i}.ln_1.weight", &["layers.{i}.attention_norm.weight"], &[]),
        map("{p}h.{i}.ln_1.bias", &["layers.{i}.attention_norm.bias"], &[]),
        map("{p}h.{i}.attn.c_attn.weight", QKV_WEIGHT, &[Transpose, QKV]),
        map("{p}h.{i}.attn.c_attn.bias", QKV_BIAS, &[QKV]),
        map("{p}h.{i}.attn.c_proj.weight", &["layers.{i}.attention.output.weight"], &[Transpose]),
        map("{p}h.{i}.attn.c_proj.bias", &["layers.{i}.attention.output.bias"], &[]),
        map("{p}h.{i}.ln_2.weight", &["layers.{i}.mlp_norm.weight"], &[]),
        map("{p}h.{i}.ln_2.bias", &["layers.{i}.mlp_norm.bias"], &[]),
        map("{p}h.{i}.mlp.c_fc.weight", &["layers.{i}.mlp.up.weight"], &[Transpose]),
        map("{p}h.{i}.mlp.c_fc.bias", &["layers.{i}.mlp.up.bias"], &[]),
        map("{p}h.{i}.mlp.c_proj.weight", &["layers.{i}.mlp.down.weight"], &[Transpose]),
        map("{p}h.{i}.mlp.c_proj.bias", &["layers.{i}.mlp.down.bias"], &[]),
        map("{p}ln_f.weight", &["final_norm.weight"], &[]),
        map("{p}ln_f.bias", &["final_norm.bias"], &[]),
        Tie { head: "lm_head.weight", embed: "{p}wte.weight", target: "head.weight" },
        Ignore { name: "{p}h.{i}.attn.bias", why: "the causal mask" },
        Ignore { name: "{p}h.{i}.attn.masked_bias", why: "the score of a masked position" },
    ],
    read_config,
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let heads = keys::usize_of(config, HEADS)?;
    let mut model = read_gpt2_keys(config, heads, Activation::GeluTanh)?;
    model.decoder.scale_by_layer = config.bool_or("scale_attn_by_inverse_layer_idx", false)?;
    Ok(model)
}

/// The names of these keys, with those all models have in transformers.
pub(super) const HEADS: &[&str] = &["n_head", "num_attention_heads"];
pub(super) const POSITIONS: &[&str] = &["n_positions", "max_position_embeddings"];

/// Width, layers and heads.
pub(super) fn read_sizes(config: &ConfigFile) -> Result<[usize; 3], ConvertError> {
    let hidden_size = keys::usize_of(config, &["n_embd", "hidden_size"])?;
    let layers = keys::usize_of(config, &["n_layer", "num_hidden_layers"])?;
    Ok([hidden_size, layers, keys::usize_of(config, HEADS)?])
}

/// The keys GPT-2 and its descendant GPT-BigCode share.
pub(super) fn read_gpt2_keys(
    config: &ConfigFile,
    kv_heads: usize,
    default: Activation,
) -> Result<SourceModel, ConvertError> {
    let [hidden_size, layers, heads] = read_sizes(config)?;
    let max_positions = keys::usize_of(config, POSITIONS)?;
    let mut sizes = Sizes::plain(config, hidden_size, layers, ("n_head", heads), max_positions)?;
    sizes.kv_heads = kv_heads;
    sizes.intermediate_size = config.optional_usize("n_inner")?.unwrap_or(sizes.intermediate_size);
    let norm = (Norm::Layer, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    let activation = keys::activation(config, "activation_function", default)?;
    let mut model = keys::decoder(config, sizes, norm, Positions::Learned, activation, true)?;
    let decoder = &mut model.decoder;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (true, true, true);
    if !config.bool_or("scale_attn_weights", true)? {
        decoder.attention_scale = 1.0;
    }
    Ok(model)
}
