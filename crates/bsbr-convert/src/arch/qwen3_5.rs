//! Qwen 3.5, its mixtures and Qwen3-Next before them: three of four layers keep a state by the gated delta rule in place of keys and values, the others have attention whose
//! reading is multiplied by a gate. Norms multiply by `1 + weight`, but for the one on what recurrent layers read.

use bsbr_model::{Activation, GatedDelta, HeadNorm, Norm, RouterConfig};

use super::experts::{
    self, DENSE_MLP, EXPERTS, ExpertKeys, LAYOUTS, MLP_GATE, NORMALISED_SOFTMAX, QWEN_SHARED, QWEN_SHARED_GATE,
};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_NORMS, QKV_WEIGHT, copy_if, map_if, table,
};
use super::qwen_moe::keep_by_step;
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{
    self, Div, HeadDim, Heads, N, RecurrentKeyHeads, RecurrentKeys, RecurrentValueHeads, RecurrentValues,
};
use crate::rules::Op::Split;
use crate::rules::Rule::IgnorePart;
use crate::rules::When::{Attention, Recurrent};
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const QWEN3_5: Architecture = Architecture {
    id: "qwen3_5_text",
    version: 1,
    model_types: &["qwen3_5_text"],
    prefixes: &["model.language_model.", "model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &[],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        ATTENTION,
        PROJECTIONS,
        RECURRENT,
        LLAMA_MLP,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_dense,
};

pub(super) const QWEN3_5_MOE: Architecture = Architecture {
    id: "qwen3_5_moe_text",
    model_types: &["qwen3_5_moe_text"],
    layouts: LAYOUTS,
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        ATTENTION,
        PROJECTIONS,
        RECURRENT,
        MLP_GATE,
        EXPERTS,
        QWEN_SHARED,
        QWEN_SHARED_GATE,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_moe,
    ..QWEN3_5
};

pub(super) const QWEN3_NEXT: Architecture = Architecture {
    id: "qwen3_next",
    model_types: &["qwen3_next"],
    prefixes: &["model.", ""],
    layouts: LAYOUTS,
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        ATTENTION,
        PROJECTIONS_BY_HEAD,
        RECURRENT,
        DENSE_MLP,
        MLP_GATE,
        EXPERTS,
        QWEN_SHARED,
        QWEN_SHARED_GATE,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_next,
    ..QWEN3_5
};

/// Rows of a head: its queries, then its gate.
const ATTENTION: &[Rule] = &[
    map_if(
        "{p}layers.{i}.self_attn.q_proj.weight",
        &["layers.{i}.attention.query.weight", "layers.{i}.attention.gate.weight"],
        &[Split { groups: Heads, parts: &[HeadDim, HeadDim] }],
        Attention,
    ),
    copy_if("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], Attention),
    copy_if("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"], Attention),
    copy_if("{p}layers.{i}.self_attn.q_norm.weight", &["layers.{i}.attention.query_norm.weight"], Attention),
    copy_if("{p}layers.{i}.self_attn.k_norm.weight", &["layers.{i}.attention.key_norm.weight"], Attention),
    copy_if("{p}layers.{i}.self_attn.o_proj.weight", &["layers.{i}.attention.output.weight"], Attention),
];

const PROJECTIONS: &[Rule] = &[
    map_if(
        "{p}layers.{i}.linear_attn.in_proj_qkv.weight",
        QKV_WEIGHT,
        &[Split { groups: N(1), parts: &[RecurrentKeys, RecurrentKeys, RecurrentValues] }],
        Recurrent,
    ),
    copy_if("{p}layers.{i}.linear_attn.in_proj_z.weight", &["layers.{i}.attention.gate.weight"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.in_proj_a.weight", &["layers.{i}.attention.decay.weight"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.in_proj_b.weight", &["layers.{i}.attention.rate.weight"], Recurrent),
];

/// For each key head: its query, its key, values and gates of the value heads that share it; rates and decays of these.
const PROJECTIONS_BY_HEAD: &[Rule] = &[
    map_if(
        "{p}layers.{i}.linear_attn.in_proj_qkvz.weight",
        &[
            "layers.{i}.attention.query.weight",
            "layers.{i}.attention.key.weight",
            "layers.{i}.attention.value.weight",
            "layers.{i}.attention.gate.weight",
        ],
        &[Split { groups: RecurrentKeyHeads, parts: &[OF_KEY, OF_KEY, OF_VALUES, OF_VALUES] }],
        Recurrent,
    ),
    map_if(
        "{p}layers.{i}.linear_attn.in_proj_ba.weight",
        &["layers.{i}.attention.rate.weight", "layers.{i}.attention.decay.weight"],
        &[Split { groups: RecurrentKeyHeads, parts: &[SHARING, SHARING] }],
        Recurrent,
    ),
];
const OF_KEY: Dim = Div(&RecurrentKeys, &RecurrentKeyHeads);
const OF_VALUES: Dim = Div(&RecurrentValues, &RecurrentKeyHeads);
const SHARING: Dim = Div(&RecurrentValueHeads, &RecurrentKeyHeads);

const RECURRENT: &[Rule] = &[
    copy_if("{p}layers.{i}.linear_attn.dt_bias", &["layers.{i}.attention.decay.bias"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.A_log", &["layers.{i}.attention.decay_log"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.conv1d.weight", &["layers.{i}.attention.conv.weight"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.norm.weight", &["layers.{i}.attention.read_norm.weight"], Recurrent),
    copy_if("{p}layers.{i}.linear_attn.out_proj.weight", &["layers.{i}.attention.output.weight"], Recurrent),
];

const NEXT_TOKENS: &[Rule] = &[IgnorePart { start: "mtp.", why: "layers that predict the token after next" }];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::RmsPlusOne,
    head_dim: Some(256),
    kv_heads: Some(4),
    max_positions: 32_768,
    rope: RopeKeys { part: Some(("partial_rotary_factor", 0.25)), mrope: true, ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["num_experts", "num_local_experts"], Some(256)),
    chosen: (&["num_experts_per_tok"], Some(8)),
    size: (&["moe_intermediate_size"], Some(512)),
};

fn read_dense(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    read(config, &DEFAULTS)
}

fn read_moe(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    // No layer has an MLP by itself, and the class no width of one.
    let config = match config.get("intermediate_size") {
        Some(_) => config.clone(),
        None => {
            let size = config.optional_usize("moe_intermediate_size")?.unwrap_or(512);
            config.with("intermediate_size", size.into())
        }
    };
    let mut model = read(&config, &Defaults { kv_heads: Some(2), ..DEFAULTS })?;
    experts::read(&config, &mut model, &KEYS, NORMALISED_SOFTMAX)?;
    let shared = config.optional_usize("shared_expert_intermediate_size")?.unwrap_or(512);
    experts::share(&mut model, shared, true);
    Ok(model)
}

fn read_next(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = RopeKeys { mrope: false, ..DEFAULTS.rope };
    let mut model = read(config, &Defaults { kv_heads: Some(2), rope, ..DEFAULTS })?;
    let keys = ExpertKeys { count: (KEYS.count.0, Some(512)), chosen: (KEYS.chosen.0, Some(10)), ..KEYS };
    let normalised = experts::read_normalised(config, true)?;
    experts::read(config, &mut model, &keys, RouterConfig { normalised, ..NORMALISED_SOFTMAX })?;
    let shared = config.optional_usize("shared_expert_intermediate_size")?.unwrap_or(512);
    experts::share(&mut model, shared, true);
    keep_by_step(config, &mut model)?;
    Ok(model)
}

/// What all of them have but for their MLPs.
fn read(config: &ConfigFile, defaults: &Defaults) -> Result<SourceModel, ConvertError> {
    let mut model = keys::read(config, defaults)?;
    if config.bool_or("attention_bias", false)? {
        return Err(keys::rejected(config, "attention_bias", "the decoder has no biases beside recurrent layers"));
    }
    let decoder = &mut model.decoder;
    if decoder.activation != Activation::Silu {
        return Err(config.error("hidden_act", "silu, which recurrent layers have in any case"));
    }
    decoder.block.head_norm = Some(HeadNorm::Head);
    decoder.attention_gate = true;
    let layers = recurrent_layers(config, decoder.layers)?;
    if !layers.is_empty() {
        let number = |key: &str, default: usize| Ok::<_, ConvertError>(config.optional_usize(key)?.unwrap_or(default));
        decoder.recurrent = Some(GatedDelta {
            layers,
            key_heads: number("linear_num_key_heads", 16)?,
            value_heads: number("linear_num_value_heads", 32)?,
            key_dim: number("linear_key_head_dim", 128)?,
            value_dim: number("linear_value_head_dim", 128)?,
            kernel: number("linear_conv_kernel_dim", 4)?,
        });
    }
    Ok(model)
}

/// The layers without attention: by `layer_types` where it is there, else all but every so manyth.
fn recurrent_layers(config: &ConfigFile, layers: usize) -> Result<Vec<usize>, ConvertError> {
    let Some(kinds) = config.optional_str_list("layer_types")? else {
        let interval = config.optional_usize("full_attention_interval")?.unwrap_or(4);
        if interval == 0 {
            return Err(config.error("full_attention_interval", "1 or more"));
        }
        // More than a decoder can have is refused later.
        return Ok((0..layers.min(1 << 16)).filter(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    keys::one_for_each_layer(config, "layer_types", kinds.len(), layers)?;
    let mut recurrent = Vec::new();
    for (layer, kind) in kinds.iter().enumerate() {
        match kind.as_str() {
            "linear_attention" => recurrent.push(layer),
            "full_attention" => {}
            _ => return Err(config.error("layer_types", "a list of linear_attention and full_attention")),
        }
    }
    Ok(recurrent)
}
