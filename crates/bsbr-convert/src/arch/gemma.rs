//! Gemma, Gemma 2, VaultGemma and the text models of Gemma 3: Llama's names, norms that multiply by `1 + weight`, embeddings scaled by
//! `sqrt(hidden_size)`; from Gemma 2 on a norm on either side of attention and MLP.

use bsbr_model::{Activation, BlockForm, HeadNorm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, copy, table,
};
use super::rope::{self, RopeKeys};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Reject, Rule, SourceModel};

pub(super) const GEMMA: Architecture = Architecture {
    id: "gemma",
    version: 1,
    model_types: &["gemma"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[Reject { key: "use_bidirectional_attention", why: "a decoder reads backwards only" }],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_gemma,
};

pub(super) const GEMMA2: Architecture = Architecture {
    id: "gemma2",
    model_types: &["gemma2"],
    rules: table![
        LLAMA_EMBED,
        SANDWICH_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_gemma2,
    ..GEMMA
};

pub(super) const GEMMA3: Architecture = Architecture {
    id: "gemma3_text",
    model_types: &["gemma3_text"],
    rules: table![
        LLAMA_EMBED,
        SANDWICH_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_gemma3,
    ..GEMMA
};

/// Gemma 2 without the norms after attention and after the MLP.
pub(super) const VAULTGEMMA: Architecture = Architecture {
    id: "vaultgemma",
    model_types: &["vaultgemma"],
    rules: table![
        LLAMA_EMBED,
        NORMS_BEFORE,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_vaultgemma,
    ..GEMMA
};

const NORMS_BEFORE: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.pre_feedforward_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
];

/// The name that stands before the MLP in Llama stands after attention here.
pub(super) const SANDWICH_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.attention_post_norm.weight"]),
    copy("{p}layers.{i}.pre_feedforward_layernorm.weight", &["layers.{i}.mlp_norm.weight"]),
    copy("{p}layers.{i}.post_feedforward_layernorm.weight", &["layers.{i}.mlp_post_norm.weight"]),
];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::RmsPlusOne,
    activation: ("hidden_activation", Activation::GeluTanh),
    head_dim: Some(256),
    kv_heads: Some(4),
    max_positions: 8192,
    tied: true,
    ..Defaults::LLAMA
};

fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    model.decoder.embedding.scale = Some((model.decoder.hidden_size as f64).sqrt());
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}

fn read_gemma(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read(config, &Defaults { kv_heads: Some(16), ..DEFAULTS })?;
    // The first files say `gelu` and mean its tanh form. Version 4 of transformers read the other key.
    let named = config.optional_str("hidden_act")?;
    let activation = match named.as_deref() {
        Some("gelu") => Activation::GeluTanh,
        _ => keys::activation(config, "hidden_act", Activation::GeluTanh)?,
    };
    if config.get("hidden_activation").is_some() && activation != model.decoder.activation {
        let names = ["hidden_act", "hidden_activation"].map(|key| config.get(key).unwrap_or_default().to_string());
        return Err(keys::contradiction(config, ("hidden_act", &names[0]), ("hidden_activation", &names[1])));
    }
    model.decoder.activation = activation;
    Ok(model)
}

/// What Gemma 2 and 3 have in common. `softcap` is the default on logits.
fn read_sandwich(config: &ConfigFile, defaults: &Defaults, softcap: Option<f64>) -> Result<SourceModel, ConvertError> {
    let mut model = read(config, defaults)?;
    let decoder = &mut model.decoder;
    decoder.block.form = BlockForm::Sandwich;
    decoder.attention_scale = config.optional_f64("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5);
    decoder.head.softcap = read_softcap(config, "final_logit_softcapping", softcap)?;
    Ok(model)
}

/// Null switches a cap off, absence does not.
fn read_softcap(config: &ConfigFile, key: &str, default: Option<f64>) -> Result<Option<f64>, ConvertError> {
    if config.contains(key) { config.optional_f64(key) } else { Ok(default) }
}

fn read_gemma2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read_sandwich(config, &DEFAULTS, Some(30.0))?;
    model.decoder.attention_softcap = read_softcap(config, "attn_logit_softcapping", Some(50.0))?;
    let window = config.optional_usize("sliding_window")?.unwrap_or(4096);
    let even = |layer: usize| layer.is_multiple_of(2);
    model.decoder.windows = keys::layer_windows(config, model.decoder.layers, Some(window), even)?;
    Ok(model)
}

fn read_vaultgemma(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read_gemma2(config)?;
    model.decoder.block.form = BlockForm::Sequential;
    Ok(model)
}

/// What the first files of models around a Gemma 3 decoder leave out, where its class has it.
const GEMMA3_SIZES: [(&str, usize); 5] = [
    ("vocab_size", 262_208),
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 26),
    ("num_attention_heads", 8),
];

fn read_gemma3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let config = &GEMMA3_SIZES.iter().fold(config.clone(), |config, &(key, size)| {
        if config.contains(key) { config } else { config.with(key, size.into()) }
    });
    keys::reject_any(config, "attn_logit_softcapping", "transformers does not cap the scores of Gemma 3")?;
    let rope = RopeKeys { theta: ("rope_theta", 1e6), ..RopeKeys::LLAMA };
    let local = RopeKeys { theta: ("rope_local_base_freq", 1e4), ..rope };
    // Two kinds of rotary positions, which only what follows knows.
    let without = config.without("rope_parameters").without("rope_scaling");
    let mut model = read_sandwich(&without, &Defaults { max_positions: 131_072, rope, ..DEFAULTS }, None)?;
    let decoder = &mut model.decoder;
    let theta;
    (decoder.positions, theta) =
        rope::read_two_kinds(config, [&rope, &local], decoder.head_dim, decoder.max_positions)?;
    let window = config.optional_usize("sliding_window")?.unwrap_or(4096);
    // The second is what some releases write of the first, and none reads where both are there.
    let pattern = match config.optional_usize("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => config.optional_usize("_sliding_window_pattern")?.unwrap_or(6),
    };
    if pattern == 0 {
        return Err(config.error("sliding_window_pattern", "1 or more"));
    }
    let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    decoder.windows = keys::layer_windows(config, decoder.layers, Some(window), slides)?;
    decoder.block.head_norm = Some(HeadNorm::Head);
    keys::rotate_locally_within_windows(&mut model, theta);
    Ok(model)
}
