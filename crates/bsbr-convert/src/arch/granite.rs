//! Granite: Llama's names and four multipliers.

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES, LLAMA_NORMS,
    LLAMA_OUTPUT, LLAMA_QKV, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const GRANITE: Architecture = Architecture {
    id: "granite",
    version: 1,
    model_types: &["granite"],
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

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &Defaults::LLAMA)?;
    keys::read_attention_bias(config, &mut model)?;
    keys::read_mlp_bias(config, &mut model)?;
    let factor = |key: &str| Ok::<_, ConvertError>(config.optional_f64(key)?.filter(|&factor| factor != 1.0));
    let decoder = &mut model.decoder;
    decoder.attention_scale = config.optional_f64("attention_multiplier")?.unwrap_or(1.0);
    decoder.embedding.scale = factor("embedding_multiplier")?;
    decoder.block.residual_multiplier = factor("residual_multiplier")?;
    // The one that divides.
    decoder.head.scale = factor("logits_scaling")?.map(|divisor| 1.0 / divisor);
    Ok(model)
}
