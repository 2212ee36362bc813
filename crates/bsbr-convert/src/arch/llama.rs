//! Llama 1 to 3 and the many models in its form: TinyLlama, Vicuna, SmolLM, SmolLM2, ...

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const LLAMA: Architecture = Architecture {
    id: "llama",
    version: 1,
    model_types: &["llama"],
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
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read(config, &Defaults::LLAMA)
}

/// Reads the keys of Llama and of those that share its rules, with other defaults.
pub(super) fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    keys::read_attention_bias(config, &mut model)?;
    keys::read_mlp_bias(config, &mut model)?;
    Ok(model)
}
