//! Arcee AFM: Llama's names, an MLP without a gate.

use bsbr_model::Activation;

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV,
    UNGATED_MLP, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const ARCEE: Architecture = Architecture {
    id: "arcee",
    version: 1,
    model_types: &["arcee"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "mlp_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        UNGATED_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    activation: ("hidden_act", Activation::Relu2),
    max_positions: 4096,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.gated_mlp = false;
    keys::read_attention_bias(config, &mut model)?;
    keys::read_mlp_bias(config, &mut model)?;
    Ok(model)
}
