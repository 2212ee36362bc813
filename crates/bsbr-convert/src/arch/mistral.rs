//! Mistral and Mistral Nemo: Llama's names, a window in every layer of the first version, heads of a width of their own.

use super::keys::{self, Defaults};
use super::names::{LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, table};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const MISTRAL: Architecture = Architecture {
    id: "mistral",
    version: 1,
    model_types: &["mistral"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    rejects: &[],
    rules: table![LLAMA_EMBED, LLAMA_NORMS, LLAMA_QKV, LLAMA_OUTPUT, LLAMA_MLP, LLAMA_FINAL_NORM, LLAMA_HEAD],
    read_config,
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), max_positions: 4096 * 32, ..Defaults::LLAMA };

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    // Later versions have no window and say so with a null.
    let window = if config.contains("sliding_window") { config.optional_usize("sliding_window")? } else { Some(4096) };
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    Ok(model)
}
