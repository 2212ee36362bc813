//! Seed-OSS: Llama's names, biases on queries, keys and values unless a key denies them, and on the output if one asks for it.

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS, LLAMA_OUTPUT,
    LLAMA_OUTPUT_BIAS, LLAMA_QKV, LLAMA_QKV_BIASES, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const SEED_OSS: Architecture = Architecture {
    id: "seed_oss",
    version: 1,
    model_types: &["seed_oss"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "attention_out_bias", "mlp_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const DEFAULTS: Defaults =
    Defaults { head_dim: Some(128), kv_heads: Some(8), max_positions: 524_288, ..Defaults::LLAMA };

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let (qkv, output) = (config.bool_or("attention_bias", true)?, config.bool_or("attention_out_bias", false)?);
    keys::set_attention_biases(&mut model, qkv, output);
    model.flags.extend([("attention_bias", qkv), ("attention_out_bias", output)]);
    keys::read_mlp_bias(config, &mut model)?;
    Ok(model)
}
