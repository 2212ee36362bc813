//! Llama 1 to 3 and the many models in its form: TinyLlama, Vicuna, SmolLM, SmolLM2, ...

use std::collections::BTreeMap;

use bsbr_model::{Activation, DecoderConfig, Norm, Positions};

use super::{activation, head_dim, rope};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Rule::{Ignore, Map, Tie};
use crate::rules::When::{Always, Flag};
use crate::rules::{Architecture, Rule, SourceModel, When};

pub(super) const LLAMA: Architecture = Architecture {
    id: "llama",
    version: 1,
    model_types: &["llama"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "mlp_bias"],
    rejects: &[],
    rules: &[
        copy("{p}embed_tokens.weight", &["embed.weight"], Always),
        copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"], Always),
        copy("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"], Always),
        copy("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], ATTENTION_BIAS),
        copy("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], Always),
        copy("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], ATTENTION_BIAS),
        copy("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"], Always),
        copy("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], ATTENTION_BIAS),
        copy("{p}layers.{i}.self_attn.o_proj.weight", &["layers.{i}.attention.output.weight"], Always),
        copy("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], ATTENTION_BIAS),
        copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.mlp_norm.weight"], Always),
        copy("{p}layers.{i}.mlp.gate_proj.weight", &["layers.{i}.mlp.gate.weight"], Always),
        copy("{p}layers.{i}.mlp.gate_proj.bias", &["layers.{i}.mlp.gate.bias"], MLP_BIAS),
        copy("{p}layers.{i}.mlp.up_proj.weight", &["layers.{i}.mlp.up.weight"], Always),
        copy("{p}layers.{i}.mlp.up_proj.bias", &["layers.{i}.mlp.up.bias"], MLP_BIAS),
        copy("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"], Always),
        copy("{p}layers.{i}.mlp.down_proj.bias", &["layers.{i}.mlp.down.bias"], MLP_BIAS),
        copy("{p}norm.weight", &["final_norm.weight"], Always),
        Tie { head: "lm_head.weight", embed: "{p}embed_tokens.weight", target: "head.weight" },
        Ignore { name: "{p}layers.{i}.self_attn.rotary_emb.inv_freq", why: "rotary frequencies, computed anew" },
    ],
    read_config,
};

const ATTENTION_BIAS: When = Flag("attention_bias");
const MLP_BIAS: When = Flag("mlp_bias");

const fn copy(source: &'static str, targets: &'static [&'static str], when: When) -> Rule {
    Map { source, targets, ops: &[], when }
}

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let hidden_size = config.usize("hidden_size")?;
    let heads = config.usize("num_attention_heads")?;
    let head_dim = match config.optional_usize("head_dim")? {
        Some(head_dim) => head_dim,
        None => head_dim(config, "num_attention_heads", hidden_size, heads)?,
    };
    let max_positions = config.optional_usize("max_position_embeddings")?.unwrap_or(2048);
    let attention_bias = config.bool_or("attention_bias", false)?;
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let tied = config.optional_bool("tie_word_embeddings")?;
    let (theta, scaling) = rope::read(config, max_positions)?;
    let decoder = DecoderConfig {
        vocab_size: config.usize("vocab_size")?,
        hidden_size,
        layers: config.usize("num_hidden_layers")?,
        heads,
        kv_heads: config.optional_usize("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        intermediate_size: config.usize("intermediate_size")?,
        max_positions,
        norm: Norm::Rms,
        norm_eps: config.optional_f64("rms_norm_eps")?.unwrap_or(1e-6),
        positions: Positions::Rotary { theta, rotary_dim: head_dim, scaling },
        activation: activation(config, "hidden_act", Activation::Silu)?,
        gated_mlp: true,
        attention_scale: (head_dim as f64).powf(-0.5),
        scale_by_layer: false,
        attention_softcap: None,
        windows: Vec::new(),
        qkv_bias: attention_bias,
        attention_output_bias: attention_bias,
        mlp_bias,
        tied_head: tied.unwrap_or(false),
    };
    let flags = BTreeMap::from([("attention_bias", attention_bias), ("mlp_bias", mlp_bias)]);
    Ok(SourceModel { decoder, flags, tie_declared: tied.is_some() })
}
