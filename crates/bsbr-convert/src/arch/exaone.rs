//! EXAONE 4: Llama's names, norms after attention and MLP only, norms of the heads; windows in three of four layers, and then
//! no rotation in the others.

use bsbr_model::{BlockForm, HeadNorm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_OUTPUT, LLAMA_QKV, NORMS_AFTER, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const EXAONE4: Architecture = Architecture {
    id: "exaone4",
    version: 1,
    model_types: &["exaone4"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_MLP,
        NORMS_AFTER,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const DEFAULTS: Defaults = Defaults { eps: ("rms_norm_eps", 1e-5), kv_heads: Some(32), ..Defaults::LLAMA };

const PATTERN: &str = "sliding_window_pattern";

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.block.form = BlockForm::NormedBranches;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    // Small ones have no window and say so with a null; then all layers rotate.
    let Some(window) = keys::window(config, 4096)? else { return Ok(model) };
    match config.get(PATTERN).and_then(serde_json::Value::as_str) {
        None => keys::read_pattern_windows(config, &mut model, Some(window), 4)?,
        Some(pattern) => {
            if pattern.is_empty() || !pattern.chars().all(|kind| "LG".contains(kind)) {
                return Err(config.error(PATTERN, "a number, or L (a window) and G (none) in the order of the layers"));
            }
            let kinds: Vec<char> = pattern.chars().collect();
            let slides = |layer: usize| kinds[layer % kinds.len()] == 'L';
            model.decoder.windows = keys::layer_windows(config, model.decoder.layers, Some(window), slides)?;
        }
    }
    keys::rotate_within_windows_only(&mut model);
    Ok(model)
}
