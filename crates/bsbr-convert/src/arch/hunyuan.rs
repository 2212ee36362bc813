//! Hunyuan: Llama's names, heads normalised after they are rotated, and a rotary base that one key raises.

use bsbr_model::HeadNorm;

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV,
    copy, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Reject, Rule, SourceModel};

pub(super) const HUNYUAN: Architecture = Architecture {
    id: "hunyuan_v1_dense",
    version: 1,
    model_types: &["hunyuan_v1_dense"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[Reject { key: "use_cla", why: "no layer reads keys and values of another" }],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read,
};

pub(super) const HEAD_NORMS: &[Rule] = &[
    copy("{p}layers.{i}.self_attn.query_layernorm.weight", &["layers.{i}.attention.query_norm.weight"]),
    copy("{p}layers.{i}.self_attn.key_layernorm.weight", &["layers.{i}.attention.key_norm.weight"]),
];

const DEFAULTS: Defaults =
    Defaults { eps: ("rms_norm_eps", 1e-5), rope: RopeKeys { alpha: true, ..RopeKeys::LLAMA }, ..Defaults::LLAMA };

/// What Hunyuan and its mixtures of experts have in common.
pub(super) fn read(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    if !config.bool_or("use_qk_norm", true)? {
        return Err(config.error("use_qk_norm", "true or absent: heads are always normalised"));
    }
    let width = keys::optional_usize_of(config, &["head_dim", "attention_head_dim"])?;
    let config = &width.map_or_else(|| config.clone(), |width| config.with("head_dim", width.into()));
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.block.head_norm = Some(HeadNorm::Head);
    model.decoder.block.head_norm_after_rotary = true;
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
