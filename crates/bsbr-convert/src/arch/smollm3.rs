//! SmolLM3: Llama's names; every fourth layer does without rotary positions, and has a window if any has.

use bsbr_model::LayerRotary;

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const SMOLLM3: Architecture = Architecture {
    id: "smollm3",
    version: 1,
    model_types: &["smollm3"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias", "mlp_bias"],
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

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(4),
    max_positions: 32768,
    rope: RopeKeys { theta: ("rope_theta", Some(2e6)), ..RopeKeys::LLAMA },
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    keys::read_attention_bias(config, &mut model)?;
    keys::read_mlp_bias(config, &mut model)?;
    let decoder = &mut model.decoder;
    // Despite the name of the key, 1 stands for a layer that rotates.
    let rotates: Vec<bool> = match config.optional_usize_list("no_rope_layers")? {
        Some(layers) => layers.into_iter().map(|rotates| rotates != 0).collect(),
        None => {
            let interval = config.optional_usize("no_rope_layer_interval")?.unwrap_or(4);
            (1..=decoder.layers).map(|layer| !layer.is_multiple_of(interval)).collect()
        }
    };
    let on = config.bool_or("use_sliding_window", false)?;
    let window = config.optional_usize("sliding_window")?.filter(|_| on);
    let slides = |layer| rotates.get(layer) == Some(&false);
    decoder.windows = keys::layer_windows(config, decoder.layers, window, slides)?;
    if rotates.contains(&false) {
        let rotary = |rotates: bool| if rotates { LayerRotary::Global } else { LayerRotary::Off };
        decoder.layer_rotary = rotates.into_iter().map(rotary).collect();
    }
    Ok(model)
}
