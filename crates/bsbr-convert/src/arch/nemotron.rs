//! Nemotron and Minitron: Llama's names, an MLP without a gate, LayerNorm that multiplies by `1 + weight`, half of each head
//! rotates. Jais 2: the same with plain LayerNorm, whole heads and biases everywhere.

use bsbr_model::{Activation, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV,
    NORM_BIASES, UNGATED_MLP, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const NEMOTRON: Architecture = Architecture {
    id: "nemotron",
    version: 1,
    model_types: &["nemotron"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "mlp_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        NORM_BIASES,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        UNGATED_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_nemotron,
};

pub(super) const JAIS2: Architecture =
    Architecture { id: "jais2", model_types: &["jais2"], read_config: read_jais2, ..NEMOTRON };

const DEFAULTS: Defaults = Defaults {
    norm: Norm::LayerPlusOne,
    eps: ("norm_eps", 1e-5),
    activation: ("hidden_act", Activation::Relu2),
    max_positions: 4096,
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.5)), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

fn read_nemotron(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read(config, &DEFAULTS, false)
}

fn read_jais2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let defaults = Defaults {
        norm: Norm::Layer,
        eps: ("layer_norm_eps", 1e-5),
        max_positions: 8192,
        rope: RopeKeys::LLAMA,
        ..DEFAULTS
    };
    read(config, &defaults, true)
}

/// `biases` is the default of both keys.
fn read(config: &ConfigFile, defaults: &Defaults, biases: bool) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    model.decoder.gated_mlp = false;
    keys::read_attention_bias_or(config, &mut model, biases)?;
    keys::read_mlp_bias_or(config, &mut model, biases)?;
    Ok(model)
}
