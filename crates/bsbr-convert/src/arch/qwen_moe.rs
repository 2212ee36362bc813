//! Qwen's mixtures of experts, and OLMoE, which shares their layout.

use bsbr_model::{HeadNorm, RouterConfig};

use super::experts::{
    self, DENSE_MLP, EXPERTS, EXPERTS_OF_EITHER_ORDER, ExpertKeys, LAYOUTS, LAYOUTS_OF_EITHER_ORDER, MLP_GATE,
    NORMALISED_SOFTMAX, QWEN_SHARED, QWEN_SHARED_GATE,
};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_NORMS, LLAMA_OUTPUT,
    LLAMA_QKV, LLAMA_QKV_BIASES, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const QWEN2_MOE: Architecture = Architecture {
    id: "qwen2_moe",
    version: 1,
    model_types: &["qwen2_moe"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["qkv_bias"],
    layouts: LAYOUTS,
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_QKV_BIASES,
        LLAMA_OUTPUT,
        DENSE_MLP,
        MLP_GATE,
        EXPERTS,
        QWEN_SHARED,
        QWEN_SHARED_GATE,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_qwen2_moe,
};

pub(super) const QWEN3_MOE: Architecture = Architecture {
    id: "qwen3_moe",
    model_types: &["qwen3_moe"],
    alternatives: &["attention_bias"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        DENSE_MLP,
        MLP_GATE,
        EXPERTS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_qwen3_moe,
    ..QWEN2_MOE
};

/// The decoder of Qwen3-VL's mixtures.
pub(super) const QWEN3_VL_MOE: Architecture = Architecture {
    id: "qwen3_vl_moe_text",
    model_types: &["qwen3_vl_moe_text"],
    layouts: LAYOUTS_OF_EITHER_ORDER,
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        DENSE_MLP,
        MLP_GATE,
        EXPERTS_OF_EITHER_ORDER,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_qwen3_vl_moe,
    ..QWEN3_MOE
};

/// Qwen 3's rules.
pub(super) const OLMOE: Architecture =
    Architecture { id: "olmoe", model_types: &["olmoe"], read_config: read_olmoe, ..QWEN3_MOE };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(16), max_positions: 32_768, ..Defaults::LLAMA };

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["num_experts", "num_local_experts"], Some(60)),
    chosen: (&["num_experts_per_tok"], Some(4)),
    size: (&["moe_intermediate_size"], Some(1408)),
};

fn read_qwen2_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    let bias = config.bool_or("qkv_bias", true)?;
    model.decoder.qkv_bias = bias;
    model.flags.insert("qkv_bias", bias);
    let on = config.bool_or("use_sliding_window", false)?;
    let first = config.optional_usize("max_window_layers")?.unwrap_or(28);
    let slides = |layer: usize| layer.is_multiple_of(2) && layer < first;
    let window = keys::window(config, 4096)?.filter(|_| on);
    model.decoder.windows = keys::layer_windows(config, model.decoder.layers, window, slides)?;
    experts::read(config, &mut model, &KEYS, router(config)?)?;
    let shared = config.optional_usize("shared_expert_intermediate_size")?.unwrap_or(5632);
    experts::share(&mut model, shared, true);
    keep_by_step(config, &mut model)?;
    Ok(model)
}

fn read_qwen3_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &Defaults { kv_heads: Some(4), ..DEFAULTS })?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    let on = config.bool_or("use_sliding_window", false)?;
    let window = keys::window(config, 4096)?.filter(|_| on);
    model.decoder.windows = window.map_or(Vec::new(), |window| vec![Some(window); model.decoder.layers]);
    let keys = ExpertKeys {
        count: (KEYS.count.0, Some(128)),
        chosen: (KEYS.chosen.0, Some(8)),
        size: (KEYS.size.0, Some(768)),
    };
    experts::read(config, &mut model, &keys, router(config)?)?;
    keep_by_step(config, &mut model)?;
    Ok(model)
}

fn read_qwen3_vl_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = RopeKeys { theta: ("rope_theta", 5e5), mrope: true, ..RopeKeys::LLAMA };
    let mut model = keys::read(config, &Defaults { max_positions: 128_000, rope, ..DEFAULTS })?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    keys::read_attention_bias(config, &mut model)?;
    experts::read(config, &mut model, &KEYS, NORMALISED_SOFTMAX)?;
    if model.decoder.experts.as_ref().is_some_and(|it| 2 * it.intermediate_size == model.decoder.hidden_size) {
        let expected =
            "not half of `hidden_size`: matrices of experts come in two orders, which their shapes tell apart";
        return Err(config.error("moe_intermediate_size", expected));
    }
    keep_by_step(config, &mut model)?;
    Ok(model)
}

fn read_olmoe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    keys::reject_any(config, "clip_qkv", "the decoder does not clip queries, keys and values")?;
    let defaults = Defaults { eps: ("rms_norm_eps", 1e-5), kv_heads: None, max_positions: 4096, ..DEFAULTS };
    let mut model = keys::read(config, &defaults)?;
    model.decoder.block.head_norm = Some(HeadNorm::AllHeads);
    keys::read_attention_bias(config, &mut model)?;
    let keys = ExpertKeys {
        count: (KEYS.count.0, Some(64)),
        chosen: (KEYS.chosen.0, Some(8)),
        size: (&["intermediate_size"], None),
    };
    experts::read(config, &mut model, &keys, router(config)?)?;
    Ok(model)
}

fn router(config: &ConfigFile) -> Result<RouterConfig, ConvertError> {
    Ok(RouterConfig { normalised: experts::read_normalised(config, false)?, ..NORMALISED_SOFTMAX })
}

/// Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name.
pub(super) fn keep_by_step(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    let step = config.optional_usize("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(config.error("decoder_sparse_step", "1 or more"));
    }
    let dense = config.optional_usize_list("mlp_only_layers")?.unwrap_or_default();
    experts::keep_in(model, |layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step));
    Ok(())
}
