//! Mistral, Mistral Nemo and Ministral 3: Llama's names, a window in every layer of the first version, heads of a width of
//! their own; in the last queries that grow with their position.

use bsbr_model::QueryTemperature;

use super::keys::{self, Defaults};
use super::names::{LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, table};
use super::rope::RopeKeys;
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
    layouts: &[],
    rejects: &[],
    rules: table![LLAMA_EMBED, LLAMA_NORMS, LLAMA_QKV, LLAMA_OUTPUT, LLAMA_MLP, LLAMA_FINAL_NORM, LLAMA_HEAD],
    read_config,
};

/// Mistral's rules.
pub(super) const MINISTRAL3: Architecture =
    Architecture { id: "ministral3", model_types: &["ministral3"], read_config: read_ministral3, ..MISTRAL };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), max_positions: 4096 * 32, ..Defaults::LLAMA };

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    // Later versions have no window and say so with a null.
    let window = keys::window(config, 4096)?;
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    Ok(model)
}

fn read_ministral3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = keys::stated_rope(config)?;
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-5),
        head_dim: Some(128),
        max_positions: 262_144,
        rope: RopeKeys { theta: ("rope_theta", 1e4), theta_is_needed: true, ..RopeKeys::LLAMA },
        ..DEFAULTS
    };
    let mut model = keys::read(config, &defaults)?;
    let window = config.optional_usize("sliding_window")?;
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    if let Some(beta) = rope.optional_f64("llama_4_scaling_beta")?.filter(|&beta| beta != 0.0) {
        let length = rope.usize("original_max_position_embeddings")?;
        model.decoder.query_temperature = Some(QueryTemperature { beta, length });
    }
    Ok(model)
}
