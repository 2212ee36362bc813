//! OLMo, OLMo 2 and OLMo 3: Llama's names. OLMo's norms have no parameters; from OLMo 2 on there are norms after attention
//! and MLP only, and norms of all queries and all keys, in OLMo 3 windows in three of four layers.

use bsbr_model::{BlockForm, HeadNorm, Norm};

use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_HEAD_NORMS, LLAMA_MLP, LLAMA_OUTPUT,
    LLAMA_QKV, NORMS_AFTER, table,
};
use super::rope::{self, RopeKeys};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::{Architecture, SourceModel};

pub(super) const OLMO: Architecture = Architecture {
    id: "olmo",
    version: 1,
    model_types: &["olmo"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
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
    layouts: &[],
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

/// OLMo 2's rules.
pub(super) const OLMO3: Architecture =
    Architecture { id: "olmo3", model_types: &["olmo3"], read_config: read_olmo3, ..OLMO2 };

fn read_olmo(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    keys::reject_any(config, "clip_qkv", "the decoder does not clip queries, keys and values")?;
    let mut model = keys::read(config, &Defaults { norm: Norm::LayerPlain, ..Defaults::LLAMA })?;
    // Not a setting: no key says it.
    model.decoder.norm_eps = 1e-5;
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}

fn read_olmo2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read_normed_branches(config, &OLMO2_DEFAULTS)
}

fn read_olmo3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    const THETA: f64 = 5e5;
    let rope = RopeKeys { theta: ("rope_theta", THETA), ..RopeKeys::LLAMA };
    let beside = config.optional_f64("rope_theta")?;
    if config.get("rope_parameters").is_none() && beside.is_some_and(|theta| theta != THETA) {
        let expected = "500000, or the base of each kind of layer in `rope_parameters`, as releases of transformers differ \
                        in what it holds for";
        return Err(config.error("rope_theta", expected));
    }
    // Two kinds of rotary positions, which only what follows knows: those of layers with a window are not scaled.
    let without = config.without("rope_parameters").without("rope_scaling");
    let mut model = read_normed_branches(&without, &Defaults { rope, ..OLMO2_DEFAULTS })?;
    let (head_dim, max_positions) = (model.decoder.head_dim, model.decoder.max_positions);
    let (positions, theta) = rope::read_two_kinds(config, [&rope, &rope], head_dim, max_positions)?;
    keys::read_pattern_windows(&config.without("sliding_window_pattern"), &mut model, keys::window(config, 4096)?, 4)?;
    keys::rotate_locally_within_windows(&mut model, theta);
    model.decoder.positions = positions;
    Ok(model)
}

const OLMO2_DEFAULTS: Defaults = Defaults { eps: ("rms_norm_eps", 1e-5), ..Defaults::LLAMA };

fn read_normed_branches(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    model.decoder.block.form = BlockForm::NormedBranches;
    model.decoder.block.head_norm = Some(HeadNorm::AllHeads);
    keys::read_attention_bias(config, &mut model)?;
    Ok(model)
}
