//! Granite: Llama's rules and four multipliers; mixtures of experts; the dense Granite 4 with gate and up in one tensor.

use bsbr_model::{LayerRotary, Positions};

use super::experts::{self, ExpertKeys, GRANITE_EXPERTS, GRANITE_SHARED, NORMALISED_SOFTMAX};
use super::keys::{self, Defaults};
use super::llama::{self, LLAMA};
use super::names::{
    GATE_UP, LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_MLP_BIASES,
    LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, SINKS, copy, map, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const GRANITE: Architecture =
    Architecture { id: "granite", model_types: &["granite"], read_config, ..LLAMA };

pub(super) const GRANITE_MOE: Architecture = Architecture {
    id: "granitemoe",
    model_types: &["granitemoe", "granitemoeshared"],
    alternatives: &["attention_bias"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        GRANITE_EXPERTS,
        GRANITE_SHARED,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_moe,
    ..LLAMA
};

fn read_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read_config(&config.without("mlp_bias"))?;
    let keys = ExpertKeys {
        count: (&["num_local_experts"], Some(8)),
        chosen: (&["num_experts_per_tok"], Some(2)),
        size: (&["intermediate_size"], None),
    };
    experts::read(config, &mut model, &keys, NORMALISED_SOFTMAX)?;
    // Only the second kind has the key; the first has no such tensors.
    experts::share(&mut model, config.optional_usize("shared_intermediate_size")?.unwrap_or(0), false);
    Ok(model)
}

/// Granite 4 in its dense form: what its mixtures call the shared MLP is the only one.
pub(super) const GRANITE4: Architecture = Architecture {
    id: "granitemoehybrid",
    model_types: &["granitemoehybrid"],
    alternatives: &["attention_bias"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        SHARED_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_granite4,
    ..LLAMA
};

const SHARED_MLP: &[Rule] = &[
    map(
        "{p}layers.{i}.shared_mlp.input_linear.weight",
        &["layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"],
        &[GATE_UP],
    ),
    copy("{p}layers.{i}.shared_mlp.output_linear.weight", &["layers.{i}.mlp.down.weight"]),
];

fn read_granite4(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    if config.optional_usize("num_local_experts")?.unwrap_or(8) != 0 {
        return Err(config.error("num_local_experts", "0: only the dense form is supported"));
    }
    let kinds = config.optional_str_list("layer_types")?.unwrap_or_default();
    if kinds.is_empty() || kinds.iter().any(|kind| !["attention", "full_attention"].contains(&kind.as_str())) {
        return Err(config.error("layer_types", "`attention` in every layer: recurrent layers are not supported"));
    }
    let size = config.optional_usize("shared_intermediate_size")?.unwrap_or(1024);
    let mut model = read_config(&config.with("intermediate_size", size.into()).without("mlp_bias"))?;
    keys::one_for_each_layer(config, "layer_types", kinds.len(), model.decoder.layers)?;
    match config.optional_str("position_embedding_type")?.as_deref() {
        Some("rope") => {}
        Some("nope") | None => model.decoder.layer_rotary = vec![LayerRotary::Off; model.decoder.layers],
        Some(_) => return Err(config.error("position_embedding_type", "rope, nope or null")),
    }
    Ok(model)
}

/// Granite Swash: windows in three of four layers, sinks, and a rotary base for each layer.
pub(super) const GRANITE_SWA: Architecture = Architecture {
    id: "granite_swa",
    model_types: &["granite_swa"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        SINKS,
        LLAMA_MLP,
        LLAMA_MLP_BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_swa,
    ..LLAMA
};

fn read_swa(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    const DEFAULTS: Defaults =
        Defaults { eps: ("rms_norm_eps", 1e-5), kv_heads: Some(4), max_positions: 8192, tied: true, ..Defaults::LLAMA };
    let mut model = read_multiplied(config, &DEFAULTS)?;
    let decoder = &mut model.decoder;
    decoder.sink_logits = true;
    let window = keys::window(config, 128)?;
    decoder.windows = keys::layer_windows(config, decoder.layers, window, |layer| !layer.is_multiple_of(4))?;
    const BASES: &str = "layer_rope_theta";
    let Some(bases) = config.get(BASES).is_some().then(|| config.f64_list(BASES)).transpose()? else {
        return Ok(model);
    };
    keys::one_for_each_layer(config, BASES, bases.len(), decoder.layers)?;
    if !bases.iter().all(|base| base.is_finite() && *base >= 0.0) {
        return Err(config.error(BASES, "numbers above 0, or 0 for a layer that does not rotate"));
    }
    let Positions::Rotary { theta, scaling, .. } = &decoder.positions else { return Ok(model) };
    let rotary = |&base: &f64| match base {
        0.0 => LayerRotary::Off,
        base if base == *theta => LayerRotary::Global,
        theta => LayerRotary::Local { theta },
    };
    let rotary: Vec<LayerRotary> = bases.iter().map(rotary).collect();
    if scaling.is_some() && rotary.iter().any(|it| matches!(it, LayerRotary::Local { .. })) {
        let expected = "0 or `rope_theta` in every layer, as rotary positions are scaled: a base of its own is not";
        return Err(config.error(BASES, expected));
    }
    decoder.layer_rotary = rotary;
    Ok(model)
}

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read_multiplied(config, &Defaults::LLAMA)
}

/// Llama's keys and four multipliers.
fn read_multiplied(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = llama::read(config, defaults)?;
    let factor = |key: &str| Ok::<_, ConvertError>(config.optional_f64(key)?.filter(|&factor| factor != 1.0));
    let decoder = &mut model.decoder;
    decoder.attention_scale = config.optional_f64("attention_multiplier")?.unwrap_or(1.0);
    decoder.embedding.scale = factor("embedding_multiplier")?;
    decoder.block.residual_multiplier = factor("residual_multiplier")?;
    // The one that divides.
    decoder.head.scale = factor("logits_scaling")?.map(|divisor| 1.0 / divisor);
    Ok(model)
}
