//! OLMo and OLMo 2: Llama's names. OLMo's norms have no parameters; OLMo 2 has norms after attention and MLP only, and
//! norms of all queries and all keys.

use bsbr_model::{BlockForm, HeadNorm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_OUTPUT,
    LLAMA_QKV, copy, table,
};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const OLMO: Architecture = Architecture {
    id: "olmo",
    version: 1,
    model_types: &["olmo"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    rejects: &[],
    rules: table![LLAMA_EMBED, LLAMA_QKV, LLAMA_OUTPUT, LLAMA_ATTENTION_BIASES, LLAMA_MLP, LLAMA_HEAD],
    read_config: read_olmo,
};

pub(super) const OLMO2: Architecture = Architecture {
    id: "olmo2",
    version: 1,
    model_types: &["olmo2"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_QKV,
        LLAMA_HEAD_NORMS,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        LLAMA_MLP,
        NORMS_AFTER,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_olmo2,
};

const NORMS_AFTER: &[Rule] = &[
    copy("{p}layers.{i}.post_attention_layernorm.weight", &["layers.{i}.attention_post_norm.weight"]),
    copy("{p}layers.{i}.post_feedforward_layernorm.weight", &["layers.{i}.mlp_post_norm.weight"]),
];

fn read_olmo(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    keys::reject_any(config, "clip_qkv", "the decoder does not clip queries, keys and values")?;
    let mut model = keys::read(config, &Defaults { norm: Norm::LayerPlain, ..Defaults::LLAMA })?;
    // Not a setting: no key says it.
    model.decoder.norm_eps = 1e-5;
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}

fn read_olmo2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &Defaults { eps: ("rms_norm_eps", 1e-5), ..Defaults::LLAMA })?;
    model.decoder.block.form = BlockForm::NormedBranches;
    model.decoder.block.head_norm = Some(HeadNorm::AllHeads);
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
