//! Granite: Llama's rules and four multipliers.

use super::keys::Defaults;
use super::llama::{self, LLAMA};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const GRANITE: Architecture =
    Architecture { id: "granite", model_types: &["granite"], read_config, ..LLAMA };

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = llama::read(config, &Defaults::LLAMA)?;
    let factor = |key: &str| Ok::<_, ConvertError>(config.optional_f64(key)?.filter(|&factor| factor != 1.0));
    let decoder = &mut model.decoder;
    decoder.attention_scale = config.optional_f64("attention_multiplier")?.unwrap_or(1.0);
    decoder.embedding.scale = factor("embedding_multiplier")?;
    decoder.block.residual_multiplier = factor("residual_multiplier")?;
    // The one that divides.
    decoder.head.scale = factor("logits_scaling")?.map(|divisor| 1.0 / divisor);
    Ok(model)
}
