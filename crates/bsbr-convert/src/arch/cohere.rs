//! Cohere's Command R, R7B, A and Aya: Llama's names, one norm for attention and MLP side by side, rotary positions that pair
//! neighbours, scaled logits.

use bsbr_model::{BlockForm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_OUTPUT, LLAMA_OUTPUT_BIAS, NEIGHBOURS_QKV,
    NEIGHBOURS_QKV_BIASES, copy, table,
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
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[Reject {
        key: "use_qk_norm",
        why: "there is no rule for norms of queries and keys whose positions pair neighbours",
    }],
    rules: table![
        LLAMA_EMBED,
        NORM,
        NEIGHBOURS_QKV,
        NEIGHBOURS_QKV_BIASES,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        LLAMA_MLP,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

/// Later: windows in most layers, and no rotation in the others.
pub(super) const COHERE2: Architecture =
    Architecture { id: "cohere2", model_types: &["cohere2"], read_config: read_cohere2, ..COHERE };

const NORM: &[Rule] = &[copy("{p}layers.{i}.input_layernorm.weight", &["layers.{i}.attention_norm.weight"])];

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
    read(config, &DEFAULTS)
}

fn read_cohere2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = RopeKeys { theta: ("rope_theta", 1e4), ..RopeKeys::LLAMA };
    // What a file says about the width of a head nothing reads.
    let mut model = read(&config.without("head_dim"), &Defaults { rope, ..DEFAULTS })?;
    keys::read_pattern_windows(config, &mut model, keys::window(config, 4096)?, 4)?;
    keys::rotate_within_windows_only(&mut model);
    Ok(model)
}

fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    let bias = config.bool_or("attention_bias", false)?;
    keys::set_attention_biases(&mut model, bias, bias);
    model.flags.insert("attention_bias", bias);
    model.decoder.block.form = BlockForm::ParallelSharedNorm;
    model.decoder.head.scale = Some(config.optional_f64("logit_scale")?.unwrap_or(0.0625));
    Ok(model)
}
