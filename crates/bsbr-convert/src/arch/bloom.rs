//! BLOOM: ALiBi, normed embeddings, queries, keys and values interleaved head by head.

use bsbr_model::{Activation, Norm, Positions};

use super::keys::{self, Sizes};
use super::names::{QKV_BIAS, QKV_PER_HEAD, QKV_WEIGHT, copy, map};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::Tie;
use crate::rules::{Architecture, Reject, SourceModel};

pub(super) const BLOOM: Architecture = Architecture {
    id: "bloom",
    version: 1,
    model_types: &["bloom"],
    prefixes: &["transformer.", ""],
    anchor: "{p}word_embeddings.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[Reject {
        key: "apply_residual_connection_post_layernorm",
        why: "the decoder adds to the stream before a norm",
    }],
    rules: &[
        copy("{p}word_embeddings.weight", &["embed.weight"]),
        copy("{p}word_embeddings_layernorm.weight", &["embed_norm.weight"]),
        copy("{p}word_embeddings_layernorm.bias", &["embed_norm.bias"]),
        copy("{p}h.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
        copy("{p}h.{i}.input_layernorm.bias", &["layers.{i}.attention_norm.bias"]),
        map("{p}h.{i}.self_attention.query_key_value.weight", QKV_WEIGHT, &[QKV_PER_HEAD]),
        map("{p}h.{i}.self_attention.query_key_value.bias", QKV_BIAS, &[QKV_PER_HEAD]),
        copy("{p}h.{i}.self_attention.dense.weight", &["layers.{i}.attention.output.weight"]),
        copy("{p}h.{i}.self_attention.dense.bias", &["layers.{i}.attention.output.bias"]),
        copy("{p}h.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
        copy("{p}h.{i}.post_attention_layernorm.bias", &["layers.{i}.mlp_norm.bias"]),
        copy("{p}h.{i}.mlp.dense_h_to_4h.weight", &["layers.{i}.mlp.up.weight"]),
        copy("{p}h.{i}.mlp.dense_h_to_4h.bias", &["layers.{i}.mlp.up.bias"]),
        copy("{p}h.{i}.mlp.dense_4h_to_h.weight", &["layers.{i}.mlp.down.weight"]),
        copy("{p}h.{i}.mlp.dense_4h_to_h.bias", &["layers.{i}.mlp.down.bias"]),
        copy("{p}ln_f.weight", &["final_norm.weight"]),
        copy("{p}ln_f.bias", &["final_norm.bias"]),
        Tie { head: "lm_head.weight", embed: "{p}word_embeddings.weight", target: "head.weight" },
    ],
    read_config,
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = keys::usize_of(config, &["hidden_size", "n_embed"])?;
    let heads = keys::usize_of(config, &["n_head", "num_attention_heads"])?;
    let layers = keys::usize_of(config, &["n_layer", "num_hidden_layers"])?;
    let max_positions = config.optional_usize("seq_length")?.unwrap_or(2048);
    let sizes = Sizes::plain(config, hidden_size, layers, ("n_head", heads), max_positions)?;
    let norm = (Norm::Layer, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    // The activation is no setting of this architecture.
    let positions = Positions::Alibi { factor: 1.0 };
    let mut model = keys::decoder(config, sizes, norm, positions, Activation::GeluTanh, true)?;
    let decoder = &mut model.decoder;
    decoder.embedding.norm = true;
    (decoder.qkv_bias, decoder.attention_output_bias, decoder.mlp_bias) = (true, true, true);
    Ok(model)
}
