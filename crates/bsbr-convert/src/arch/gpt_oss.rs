//! gpt-oss: Llama's names with biases and sinks, a window in every other layer, experts whose gate and up are rows in turn of one
//! tensor, in files of the hub as codes of 4 bits.

use bsbr_model::{ClampedGate, RouterConfig};
use serde_json::json;

use super::experts::{self, ExpertKeys, NORMALISED_SOFTMAX, UNSTACK};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_ATTENTION_BIASES, LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_QKV, SINKS,
    copy_if, map_if, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{ExpertSize, N};
use crate::rules::Op::{Split, Transpose};
use crate::rules::When::{self, All, Flag, Not};
use crate::rules::{Architecture, Layout, Op, Rule, SourceModel};

pub(super) const GPT_OSS: Architecture = Architecture {
    id: "gpt_oss",
    version: 1,
    model_types: &["gpt_oss"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[Layout { flag: MXFP4, tensor: GATE_UP_BLOCKS, shape: None }],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LLAMA_QKV,
        LLAMA_OUTPUT,
        LLAMA_ATTENTION_BIASES,
        SINKS,
        ROUTER,
        EXPERTS,
        BIASES,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config,
};

const ROUTER: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.router.weight", &["layers.{i}.mlp.router.weight"], When::Experts),
    copy_if("{p}layers.{i}.mlp.router.bias", &["layers.{i}.mlp.router.bias"], When::Experts),
];

/// The flag of files whose experts are codes.
const MXFP4: &str = "mxfp4_experts";
const GATE_UP_BLOCKS: &str = "{p}layers.{i}.mlp.experts.gate_up_proj_blocks";
const NUMBERS: When = All(&[When::Experts, Not(MXFP4)]);
const CODES: When = All(&[When::Experts, Flag(MXFP4)]);

const GATE_UP: &[&str] = &["layers.{i}.mlp.experts.{e}.gate.weight", "layers.{i}.mlp.experts.{e}.up.weight"];

/// Rows of gate and up in turn. Shapes do not tell them from halves.
const IN_TURN: Op = Split { groups: ExpertSize, parts: &[N(1), N(1)] };

const DOWN: &[&str] = &["layers.{i}.mlp.experts.{e}.down.weight"];

/// `[experts, hidden, gate and up]` and `[experts, inner, hidden]` of numbers; codes stand row by row.
const EXPERTS: &[Rule] = &[
    map_if("{p}layers.{i}.mlp.experts.gate_up_proj", GATE_UP, &[Transpose, UNSTACK, IN_TURN], NUMBERS),
    map_if("{p}layers.{i}.mlp.experts.down_proj", DOWN, &[Transpose, UNSTACK], NUMBERS),
    map_if(GATE_UP_BLOCKS, GATE_UP, &[UNSTACK, IN_TURN], CODES),
    map_if("{p}layers.{i}.mlp.experts.down_proj_blocks", DOWN, &[UNSTACK], CODES),
];

const BIASES: &[Rule] = &[
    map_if(
        "{p}layers.{i}.mlp.experts.gate_up_proj_bias",
        &["layers.{i}.mlp.experts.{e}.gate.bias", "layers.{i}.mlp.experts.{e}.up.bias"],
        &[UNSTACK, IN_TURN],
        When::Experts,
    ),
    map_if(
        "{p}layers.{i}.mlp.experts.down_proj_bias",
        &["layers.{i}.mlp.experts.{e}.down.bias"],
        &[UNSTACK],
        When::Experts,
    ),
];

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    head_dim: Some(64),
    kv_heads: Some(8),
    max_positions: 131_072,
    rope: RopeKeys { theta: ("rope_theta", 150_000.0), ..RopeKeys::LLAMA },
    ..Defaults::LLAMA
};

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["num_local_experts", "num_experts"], Some(128)),
    chosen: (&["num_experts_per_tok", "experts_per_token"], Some(4)),
    size: (&["intermediate_size"], None),
};

fn read_config(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    // Without an object of its own the class scales. The base stays that of the file.
    let scaled = !["rope_scaling", "rope_parameters"].iter().any(|key| config.get(key).is_some());
    let default = json!({
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096,
    });
    let config = &if scaled { config.with("rope_scaling", default) } else { config.clone() };
    let mut model = keys::read(config, &DEFAULTS)?;
    keys::read_attention_bias_or(config, &mut model, true)?;
    model.decoder.sink_logits = true;
    let window = keys::window(config, 128)?;
    let slides = |layer: usize| layer.is_multiple_of(2);
    model.decoder.windows = keys::layer_windows(config, model.decoder.layers, window, slides)?;
    let number = |key: &str, default: f64| Ok::<_, ConvertError>(config.optional_f64(key)?.unwrap_or(default));
    model.decoder.clamped_gate =
        Some(ClampedGate { limit: number("swiglu_limit", 7.0)?, alpha: number("swiglu_alpha", 1.702)? });
    experts::read(config, &mut model, &KEYS, RouterConfig { bias: true, ..NORMALISED_SOFTMAX })?;
    if let Some(experts) = &mut model.decoder.experts {
        experts.bias = true;
    }
    Ok(model)
}
