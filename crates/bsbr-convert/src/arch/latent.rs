//! Decoders with latent attention: DeepSeek-V2 and V3 (Kimi K2), GLM-4.7-Flash and the text model of Mistral Small 4. Keys and
//! values are made of one narrow vector; the router and the experts are those of DeepSeek.

use bsbr_model::{ExpertGroups, LatentAttention, Norm, QueryTemperature, RouterConfig, RouterKind};

use super::deepseek::{GATE_CORRECTION, NEXT_TOKENS};
use super::experts::{self, DEEPSEEK_SHARED, DENSE_MLP, EXPERTS, ExpertKeys, LAYOUTS, MLP_GATE};
use super::keys::{self, Defaults};
use super::names::{
    LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_NORMS, LLAMA_OUTPUT, LLAMA_OUTPUT_BIAS, copy, copy_if, map,
    map_if, table,
};
use super::rope::RopeKeys;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{Heads, LatentRank, N, Rotary, Still, ValueDim};
use crate::rules::Op::{Each, RopePermute, Split};
use crate::rules::When::{self, All, Flag, Not};
use crate::rules::{Architecture, Op, Rule, SourceModel};

pub(super) const DEEPSEEK_V3: Architecture = Architecture {
    id: "deepseek_v3",
    version: 1,
    // Kimi K2 runs the code of DeepSeek-V3 under a name of its own.
    model_types: &["deepseek_v3", "kimi_k2"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: LAYOUTS,
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LATENT,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        DENSE_MLP,
        MLP_GATE,
        GATE_CORRECTION,
        EXPERTS,
        DEEPSEEK_SHARED,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_deepseek_v3,
};

pub(super) const GLM4_MOE_LITE: Architecture = Architecture {
    id: "glm4_moe_lite",
    model_types: &["glm4_moe_lite"],
    read_config: read_glm4_moe_lite,
    ..DEEPSEEK_V3
};

/// Those whose routers add nothing for the choice.
pub(super) const DEEPSEEK_V2: Architecture = Architecture {
    id: "deepseek_v2",
    model_types: &["deepseek_v2"],
    rules: table![
        LLAMA_EMBED,
        LLAMA_NORMS,
        LATENT,
        LLAMA_OUTPUT,
        LLAMA_OUTPUT_BIAS,
        DENSE_MLP,
        MLP_GATE,
        EXPERTS,
        DEEPSEEK_SHARED,
        NEXT_TOKENS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read_deepseek_v2,
    ..DEEPSEEK_V3
};

pub(super) const MISTRAL4: Architecture =
    Architecture { id: "mistral4", model_types: &["mistral4"], read_config: read_mistral4, ..DEEPSEEK_V2 };

/// For each head what does not rotate of a query, then what does.
const QUERY: Op = Split { groups: Heads, parts: &[Still, Rotary] };
const QUERY_NEIGHBOURS: Op = Each(&[&[], &[RopePermute { heads: Heads, head_dim: Rotary, rotary: Rotary }]]);
/// The vector, then what rotates of a key.
const LATENT_KEY: Op = Split { groups: N(1), parts: &[LatentRank, Rotary] };
const KEY_NEIGHBOURS: Op = Each(&[&[], &[RopePermute { heads: N(1), head_dim: Rotary, rotary: Rotary }]]);
/// For each head what does not rotate of a key, then its value.
const KEY_VALUE: Op = Split { groups: Heads, parts: &[Still, ValueDim] };

/// The flag of models whose queries are made of a narrow vector too.
const NARROW: &str = "query_latent";
/// The flag of those whose rotary positions pair neighbours.
const NEIGHBOURS: &str = "rope_interleave";
const BIASED: &str = "attention_bias";

const Q: &str = "{p}layers.{i}.self_attn.q_proj.weight";
const Q_B: &str = "{p}layers.{i}.self_attn.q_b_proj.weight";
const KV_A: &str = "{p}layers.{i}.self_attn.kv_a_proj_with_mqa.weight";
const KV_A_BIAS: &str = "{p}layers.{i}.self_attn.kv_a_proj_with_mqa.bias";
const OF_STREAM: &[&str] = &["layers.{i}.attention.query.weight", "layers.{i}.attention.query_rotary.weight"];
const OF_VECTOR: &[&str] =
    &["layers.{i}.attention.from_latent.query.weight", "layers.{i}.attention.from_latent.query_rotary.weight"];
const VECTOR: &[&str] = &["layers.{i}.attention.latent.weight", "layers.{i}.attention.key_rotary.weight"];
const VECTOR_BIAS: &[&str] = &["layers.{i}.attention.latent.bias", "layers.{i}.attention.key_rotary.bias"];
const NARROW_NEIGHBOURS: When = All(&[Flag(NARROW), Flag(NEIGHBOURS)]);

const LATENT: &[Rule] = &[
    map_if(Q, OF_STREAM, &[QUERY, QUERY_NEIGHBOURS], All(&[Not(NARROW), Flag(NEIGHBOURS)])),
    map_if(Q, OF_STREAM, &[QUERY], All(&[Not(NARROW), Not(NEIGHBOURS)])),
    copy_if("{p}layers.{i}.self_attn.q_a_proj.weight", &["layers.{i}.attention.query_latent.weight"], Flag(NARROW)),
    copy_if(
        "{p}layers.{i}.self_attn.q_a_proj.bias",
        &["layers.{i}.attention.query_latent.bias"],
        All(&[Flag(NARROW), Flag(BIASED)]),
    ),
    copy_if(
        "{p}layers.{i}.self_attn.q_a_layernorm.weight",
        &["layers.{i}.attention.query_latent_norm.weight"],
        Flag(NARROW),
    ),
    map_if(Q_B, OF_VECTOR, &[QUERY, QUERY_NEIGHBOURS], NARROW_NEIGHBOURS),
    map_if(Q_B, OF_VECTOR, &[QUERY], All(&[Flag(NARROW), Not(NEIGHBOURS)])),
    map_if(KV_A, VECTOR, &[LATENT_KEY, KEY_NEIGHBOURS], Flag(NEIGHBOURS)),
    map_if(KV_A, VECTOR, &[LATENT_KEY], Not(NEIGHBOURS)),
    map_if(KV_A_BIAS, VECTOR_BIAS, &[LATENT_KEY, KEY_NEIGHBOURS], All(&[Flag(BIASED), Flag(NEIGHBOURS)])),
    map_if(KV_A_BIAS, VECTOR_BIAS, &[LATENT_KEY], All(&[Flag(BIASED), Not(NEIGHBOURS)])),
    copy("{p}layers.{i}.self_attn.kv_a_layernorm.weight", &["layers.{i}.attention.latent_norm.weight"]),
    map(
        "{p}layers.{i}.self_attn.kv_b_proj.weight",
        &["layers.{i}.attention.from_latent.key.weight", "layers.{i}.attention.from_latent.value.weight"],
        &[KEY_VALUE],
    ),
];

/// Of the norms of the two vectors, whatever the file says of the others.
const VECTOR_EPS: f64 = 1e-6;

const DEFAULTS: Defaults = Defaults { norm: Norm::Rms, max_positions: 4096, ..Defaults::LLAMA };

const PART: &str = "partial_rotary_factor";
const ROPE: [&str; 2] = ["rope_parameters", "rope_scaling"];

/// A key that must be stated, null being no number.
fn stated(config: &ConfigFile, key: &str) -> Result<Option<usize>, ConvertError> {
    if !config.contains(key) {
        return Err(config.error(key, "a number or null: releases of transformers differ in its default"));
    }
    config.optional_usize(key)
}

/// The settings without the share of a head that rotates, which has to be that of `rotary` of `whole` dimensions.
fn without_part(config: &ConfigFile, rotary: usize, whole: usize) -> Result<ConfigFile, ConvertError> {
    let agrees = |object: &ConfigFile| match object.optional_f64(PART)? {
        Some(part) if part != 1.0 && (part * whole as f64).round() != rotary as f64 => {
            Err(object.error(PART, &format!("{rotary} of {whole}, as qk_rope_head_dim says")))
        }
        _ => Ok(()),
    };
    agrees(config)?;
    let mut config = config.without(PART);
    for key in ROPE {
        if let Some(object) = config.object(key)? {
            agrees(&object)?;
            let bare = object.without(PART).entries().clone();
            config = config.with(key, bare.into());
        }
    }
    Ok(config)
}

/// Attention and everything but the experts.
fn read(config: &ConfigFile, defaults: &Defaults, neighbours: bool) -> Result<SourceModel, ConvertError> {
    let (still, rotary) = (config.usize("qk_nope_head_dim")?, config.usize("qk_rope_head_dim")?);
    let width = still.saturating_add(rotary);
    // Several files write other numbers under these keys, which nothing reads.
    let heads = config.usize("num_attention_heads")?;
    let plain = without_part(config, rotary, width)?;
    let plain = plain.with("head_dim", rotary.into()).with("num_key_value_heads", heads.into());
    let mut model = keys::read(&plain, defaults)?;
    let decoder = &mut model.decoder;
    decoder.head_dim = width;
    decoder.attention_scale = (width as f64).powf(-0.5) * score_factor(config)?;
    let query_rank = stated(config, "q_lora_rank")?;
    let bias = config.bool_or("attention_bias", false)?;
    decoder.latent = Some(LatentAttention {
        rank: config.usize("kv_lora_rank")?,
        query_rank,
        value_dim: config.usize("v_head_dim")?,
        bias,
        norm_eps: VECTOR_EPS,
    });
    decoder.attention_output_bias = bias;
    let flags = [(NARROW, query_rank.is_some()), (NEIGHBOURS, neighbours), (BIASED, bias), ("output_bias", bias)];
    model.flags.extend(flags);
    Ok(model)
}

/// The square of the temperature that stretched positions bring, which these models put on the scores as well.
fn score_factor(config: &ConfigFile) -> Result<f64, ConvertError> {
    let [parameters, scaling] = ROPE.map(|key| config.object(key));
    let Some(rope) = scaling?.or(parameters?) else { return Ok(1.0) };
    let kind = rope.optional_str("rope_type")?.or(rope.optional_str("type")?);
    let weight = rope.optional_f64("mscale_all_dim")?.unwrap_or(0.0);
    if kind.is_none_or(|kind| kind == "default") || weight == 0.0 {
        return Ok(1.0);
    }
    let factor = rope.f64("factor")?;
    let temperature = if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    Ok(temperature * temperature)
}

const KEYS: ExpertKeys = ExpertKeys {
    count: (&["n_routed_experts", "num_experts", "num_local_experts"], None),
    chosen: (&["num_experts_per_tok"], None),
    size: (&["moe_intermediate_size"], None),
};

/// Experts in the layers that `has` says, and one shared by all tokens, as many times as wide as there are shared ones.
fn read_experts(
    config: &ConfigFile,
    model: &mut SourceModel,
    router: RouterConfig,
    has: &dyn Fn(usize) -> bool,
) -> Result<(), ConvertError> {
    experts::read(config, model, &KEYS, router)?;
    let shared = stated(config, "n_shared_experts")?.unwrap_or(0);
    let size = model.decoder.experts.as_ref().map_or(0, |experts| experts.intermediate_size);
    experts::share(model, shared.saturating_mul(size), false);
    experts::keep_in(model, has);
    model.next_token_layers =
        keys::optional_usize_of(config, &["num_nextn_predict_layers", "num_mtp_layers"])?.unwrap_or(0);
    Ok(())
}

fn router(config: &ConfigFile, kind: RouterKind, correction: bool) -> Result<RouterConfig, ConvertError> {
    let count = stated(config, "n_group")?.unwrap_or(1);
    let kept = stated(config, "topk_group")?.unwrap_or(1);
    let groups = ExpertGroups { count, kept, by_highest: false };
    Ok(RouterConfig {
        kind,
        bias: false,
        correction,
        groups: Some(groups).filter(|groups| groups.count != 1),
        normalised: experts::read_normalised(config, true)?,
        scale: Some(config.optional_f64("routed_scaling_factor")?.unwrap_or(1.0)).filter(|&scale| scale != 1.0),
        expert_scale: false,
        own_norm: false,
    })
}

fn first_dense(config: &ConfigFile) -> Result<usize, ConvertError> {
    Ok(stated(config, "first_k_dense_replace")?.unwrap_or(0))
}

fn read_deepseek_v3(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read(config, &DEFAULTS, config.bool_or(NEIGHBOURS, true)?)?;
    let (router, dense) = (router(config, RouterKind::Sigmoid, true)?, first_dense(config)?);
    read_experts(config, &mut model, router, &|layer| layer >= dense)?;
    Ok(model)
}

fn read_glm4_moe_lite(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    config.usize("max_position_embeddings")?;
    let defaults = Defaults { eps: ("rms_norm_eps", 1e-5), ..DEFAULTS };
    let mut model = read(config, &defaults, config.bool_or(NEIGHBOURS, true)?)?;
    let router = router(config, RouterKind::Sigmoid, true)?;
    // `first_k_dense_replace` is in its files, and nothing reads it.
    let kinds = config.optional_str_list("mlp_layer_types")?;
    let sparse: Vec<bool> = match kinds {
        None => (0..model.decoder.layers).map(|layer| layer > 0).collect(),
        Some(kinds) => {
            keys::one_for_each_layer(config, "mlp_layer_types", kinds.len(), model.decoder.layers)?;
            let of = |kind: &String| match kind.as_str() {
                "sparse" => Ok(true),
                "dense" => Ok(false),
                _ => Err(config.error("mlp_layer_types", "a list of dense and sparse")),
            };
            kinds.iter().map(of).collect::<Result<_, _>>()?
        }
    };
    read_experts(config, &mut model, router, &|layer| sparse.get(layer).copied().unwrap_or_default())?;
    Ok(model)
}

fn read_deepseek_v2(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let mut model = read(config, &Defaults { max_positions: 2048, ..DEFAULTS }, true)?;
    if config.optional_str("scoring_func")?.is_some_and(|kind| kind != "softmax") {
        return Err(keys::rejected(config, "scoring_func", "the router of this architecture is a softmax"));
    }
    let method = config.optional_str("topk_method")?.unwrap_or_else(|| "greedy".to_owned());
    let groups = match method.as_str() {
        "greedy" => None,
        "group_limited_greedy" => {
            let (count, kept) = (config.usize("n_group")?, config.usize("topk_group")?);
            Some(ExpertGroups { count, kept, by_highest: true }).filter(|groups| groups.count != 1)
        }
        _ => return Err(config.error("topk_method", "greedy or group_limited_greedy")),
    };
    // The weights are never normalised, whatever `norm_topk_prob` says.
    let router = RouterConfig {
        kind: RouterKind::Softmax,
        bias: false,
        correction: false,
        groups,
        normalised: None,
        scale: Some(config.optional_f64("routed_scaling_factor")?.unwrap_or(1.0)).filter(|&scale| scale != 1.0),
        expert_scale: false,
        own_norm: false,
    };
    let dense = first_dense(config)?;
    read_experts(config, &mut model, router, &|layer| layer >= dense)?;
    Ok(model)
}

fn read_mistral4(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    let rope = keys::stated_rope(config)?;
    config.usize("max_position_embeddings")?;
    let defaults = Defaults { rope: RopeKeys { theta_is_needed: true, ..RopeKeys::LLAMA }, ..DEFAULTS };
    let mut model = read(config, &defaults, config.bool_or(NEIGHBOURS, true)?)?;
    if let Some(beta) = rope.optional_f64("llama_4_scaling_beta")?.filter(|&beta| beta != 0.0) {
        let length = rope.usize("original_max_position_embeddings")?;
        model.decoder.query_temperature = Some(QueryTemperature { beta, length });
    }
    let (router, dense) = (router(config, RouterKind::Softmax, false)?, first_dense(config)?);
    read_experts(config, &mut model, router, &|layer| layer >= dense)?;
    Ok(model)
}
