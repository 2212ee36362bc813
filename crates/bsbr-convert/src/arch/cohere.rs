//! Cohere's Command R and Aya: Llama's names, one norm for attention and MLP side by side, rotary positions that pair
//! neighbours, scaled logits.

use bsbr_model::{BlockForm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_OUTPUT, ROPE_KEY, ROPE_QUERY, copy, map, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, Reject, Rule, SourceModel};

pub(super) const COHERE: Architecture = Architecture {
    id: "cohere",
    version: 1,
    model_types: &["cohere"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    rejects: &[
        Reject {
            key: "use_qk_norm",
            why: "there is no rule for norms of queries and keys whose positions pair neighbours",
        },
        Reject { key: "attention_bias", why: "there is no rule for biases whose positions pair neighbours" },
    ],
    rules: table![LLAMA_EMBED, ATTENTION, LLAMA_OUTPUT, LLAMA_MLP, LLAMA_FINAL_NORM, LLAMA_HEAD],
    read_config,
};

const ATTENTION: &[Rule] = &[
    copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"]),
    map("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"], &[ROPE_QUERY]),
    map("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], &[ROPE_KEY]),
    copy("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"]),
];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::LayerWeight,
    eps: ("layer_norm_eps", 1e-5),
    max_positions: 8192,
    // The default of the class differs between the generations of transformers.
    rope: RopeKeys { theta: ("rope_theta", 5e5), theta_is_needed: true, ..RopeKeys::LLAMA },
    tied: true,
    ..Defaults::LLAMA
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, &DEFAULTS)?;
    model.decoder.block.form = BlockForm::ParallelSharedNorm;
    model.decoder.head.scale = Some(config.optional_f64("logit_scale")?.unwrap_or(0.0625));
    Ok(model)
}
