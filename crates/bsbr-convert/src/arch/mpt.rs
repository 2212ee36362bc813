//! MPT: ALiBi and no bias anywhere.

use bsbr_model::{Activation, Norm, Positions};

use super::keys::{self, Sizes};
use super::names::{QKV, QKV_WEIGHT, copy, map};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::Tie;
use crate::rules::{Architecture, SourceModel};

pub(super) const MPT: Architecture = Architecture {
    id: "mpt",
    version: 1,
    model_types: &["mpt"],
    prefixes: &["transformer.", ""],
    anchor: "{p}wte.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: &[
        copy("{p}wte.weight", &["embed.weight"]),
        copy("{p}blocks.{i}.norm_1.weight", &["layers.{i}.attention_norm.weight"]),
        map("{p}blocks.{i}.attn.Wqkv.weight", QKV_WEIGHT, &[QKV]),
        copy("{p}blocks.{i}.attn.out_proj.weight", &["layers.{i}.attention.output.weight"]),
        copy("{p}blocks.{i}.norm_2.weight", &["layers.{i}.mlp_norm.weight"]),
        copy("{p}blocks.{i}.ffn.up_proj.weight", &["layers.{i}.mlp.up.weight"]),
        copy("{p}blocks.{i}.ffn.down_proj.weight", &["layers.{i}.mlp.down.weight"]),
        copy("{p}norm_f.weight", &["final_norm.weight"]),
        Tie { head: "lm_head.weight", embed: "{p}wte.weight", target: "head.weight" },
    ],
    read_config,
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = keys::usize_of(config, &["d_model", "hidden_size"])?;
    let layers = keys::usize_of(config, &["n_layers", "num_hidden_layers"])?;
    let heads = keys::usize_of(config, &["n_heads", "num_attention_heads"])?;
    let max_positions = config.optional_usize("max_seq_len")?.unwrap_or(2048);
    let sizes = Sizes::plain(config, hidden_size, layers, ("n_heads", heads), max_positions)?;
    keys::reject_any(config, "logit_scale", "transformers does not scale the logits of MPT")?;
    if !config.bool_or("no_bias", true)? {
        return Err(keys::rejected(config, "no_bias", "there is no rule for biases"));
    }
    if config.optional_usize("expansion_ratio")?.is_some_and(|ratio| ratio != 4) {
        return Err(keys::rejected(config, "expansion_ratio", "the MLP of MPT in transformers is 4 times as wide"));
    }
    let norm = (Norm::LayerWeight, config.optional_f64("layer_norm_epsilon")?.unwrap_or(1e-5));
    let positions = Positions::Alibi { factor: 1.0 };
    let mut model = keys::decoder(config, sizes, norm, positions, Activation::GeluErf, true)?;
    if let Some(attention) = config.object("attn_config")? {
        if let Some(scale) = attention.optional_f64("softmax_scale")? {
            model.decoder.attention_scale = scale;
        }
        check_attention(&attention)?;
    }
    Ok(model)
}

/// Refuses what only the model's own code computes, not transformers.
fn check_attention(attention: &ConfigFile) -> Result<(), ConvertError> {
    keys::reject_any(attention, "clip_qkv", "the decoder does not clip queries, keys and values")?;
    if !attention.bool_or("alibi", true)? {
        return Err(keys::rejected(attention, "alibi", "there is no rule for learned positions"));
    }
    if attention.optional_f64("alibi_bias_max")?.is_some_and(|most| most != 8.0) {
        return Err(keys::rejected(attention, "alibi_bias_max", "the slopes are those for 8"));
    }
    for (key, why) in
        [("qk_ln", "there is no rule for norms of queries and keys"), ("prefix_lm", "a decoder reads backwards only")]
    {
        if attention.bool_or(key, false)? {
            return Err(keys::rejected(attention, key, why));
        }
    }
    let kind = attention.optional_str("attn_type")?;
    if kind.is_some_and(|kind| kind != "multihead_attention") {
        return Err(keys::rejected(attention, "attn_type", "there is a rule for multihead_attention only"));
    }
    Ok(())
}
