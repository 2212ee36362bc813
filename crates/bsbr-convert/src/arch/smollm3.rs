//! SmolLM3: Llama's rules; every fourth layer does without rotary positions, and has a window if any has.

use bsbr_model::LayerRotary;

use super::keys::{self, Defaults};
use super::llama::{self, LLAMA};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const SMOLLM3: Architecture =
    Architecture { id: "smollm3", model_types: &["smollm3"], read_config, ..LLAMA };

const DEFAULTS: Defaults = Defaults {
    kv_heads: Some(4),
    max_positions: 32768,
    rope: RopeKeys { theta: ("rope_theta", 2e6), ..RopeKeys::LLAMA },
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = llama::read(config, &DEFAULTS)?;
    let decoder = &mut model.decoder;
    // Despite the name of the key, 1 stands for a layer that rotates.
    let rotates: Vec<bool> = match config.optional_usize_list("no_rope_layers")? {
        Some(layers) => {
            keys::one_for_each_layer(config, "no_rope_layers", layers.len(), decoder.layers)?;
            layers.into_iter().map(|rotates| rotates != 0).collect()
        }
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
