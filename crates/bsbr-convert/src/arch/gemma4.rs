//! The text models of Gemma 4: Gemma 3's names and form of a block, norms that multiply by their weight alone, scores without a
//! scale. Layers differ: those without a window have heads of another width, and may have fewer KV heads or one projection for
//! keys and values; the last layers may read the keys and values of an earlier one of their kind. Besides there may be inputs of
//! a token for each layer, and experts beside the MLP.

use std::collections::BTreeMap;

use bsbr_model::{
    Activation, BlockForm, HeadNorm, LayerKeys, LayerRotary, LayerShape, Norm, PerLayerInputs, RouterConfig,
};

use super::experts::{self, ExpertKeys, NORMALISED_SOFTMAX};
use super::gemma::SANDWICH_NORMS;
use super::keys::{self, Defaults};
use super::names::{LLAMA_EMBED, LLAMA_FINAL_NORM, LLAMA_HEAD, LLAMA_MLP, LLAMA_OUTPUT, copy, copy_if, map_if, table};
use super::rope::{self, RopeKeys};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::When::{self, All, Flag, OwnKeys, OwnValues, SharedKeys};
use crate::rules::{Architecture, Rule, SourceModel};

pub(super) const GEMMA4: Architecture = Architecture {
    id: "gemma4_text",
    version: 1,
    model_types: &["gemma4_text"],
    prefixes: &["model.", ""],
    anchor: "{p}embed_tokens.weight",
    alternatives: &["attention_bias"],
    layouts: &[],
    rejects: &[],
    rules: table![
        LLAMA_EMBED,
        PER_LAYER_INPUTS,
        SANDWICH_NORMS,
        ATTENTION,
        LLAMA_OUTPUT,
        BIASES,
        LLAMA_MLP,
        EXPERTS,
        LAYER_INPUTS,
        LLAMA_FINAL_NORM,
        LLAMA_HEAD
    ],
    read_config: read,
};

const ATTENTION: &[Rule] = &[
    copy("{p}layers.{i}.self_attn.q_proj.weight", &["layers.{i}.attention.query.weight"]),
    copy_if("{p}layers.{i}.self_attn.k_proj.weight", &["layers.{i}.attention.key.weight"], OwnKeys),
    copy_if("{p}layers.{i}.self_attn.v_proj.weight", &["layers.{i}.attention.value.weight"], OwnValues),
    copy("{p}layers.{i}.self_attn.q_norm.weight", &["layers.{i}.attention.query_norm.weight"]),
    copy_if("{p}layers.{i}.self_attn.k_norm.weight", &["layers.{i}.attention.key_norm.weight"], OwnKeys),
    unread("{p}layers.{i}.self_attn.k_proj.weight"),
    unread("{p}layers.{i}.self_attn.v_proj.weight"),
    unread("{p}layers.{i}.self_attn.k_norm.weight"),
];

/// What files hold of layers that have no keys of their own.
const fn unread(name: &'static str) -> Rule {
    Rule::IgnoreIn { name, when: SharedKeys, why: "the layer reads the keys and values of an earlier one" }
}

const BIAS: When = Flag("attention_bias");
const BIASES: &[Rule] = &[
    copy_if("{p}layers.{i}.self_attn.q_proj.bias", &["layers.{i}.attention.query.bias"], BIAS),
    copy_if("{p}layers.{i}.self_attn.k_proj.bias", &["layers.{i}.attention.key.bias"], All(&[BIAS, OwnKeys])),
    copy_if("{p}layers.{i}.self_attn.v_proj.bias", &["layers.{i}.attention.value.bias"], All(&[BIAS, OwnValues])),
    copy_if("{p}layers.{i}.self_attn.o_proj.bias", &["layers.{i}.attention.output.bias"], BIAS),
];

const EXPERTS: &[Rule] = &[
    copy_if("{p}layers.{i}.router.proj.weight", &["layers.{i}.mlp.router.weight"], When::Experts),
    copy_if("{p}layers.{i}.router.scale", &["layers.{i}.mlp.router.norm.weight"], When::Experts),
    copy_if("{p}layers.{i}.router.per_expert_scale", &["layers.{i}.mlp.router.expert_scale"], When::Experts),
    map_if(
        "{p}layers.{i}.experts.gate_up_proj",
        &[experts::GATE, experts::UP],
        &[experts::UNSTACK, experts::GATE_UP],
        When::Experts,
    ),
    map_if("{p}layers.{i}.experts.down_proj", &[experts::DOWN], &[experts::UNSTACK], When::Experts),
    copy_if(
        "{p}layers.{i}.post_feedforward_layernorm_1.weight",
        &["layers.{i}.mlp.dense_post_norm.weight"],
        When::Experts,
    ),
    copy_if("{p}layers.{i}.pre_feedforward_layernorm_2.weight", &["layers.{i}.mlp.experts_norm.weight"], When::Experts),
    copy_if(
        "{p}layers.{i}.post_feedforward_layernorm_2.weight",
        &["layers.{i}.mlp.experts_post_norm.weight"],
        When::Experts,
    ),
];

const INPUTS: When = Flag("per_layer_inputs");
const PER_LAYER_INPUTS: &[Rule] = &[
    copy_if("{p}embed_tokens_per_layer.weight", &["per_layer.embed.weight"], INPUTS),
    copy_if("{p}per_layer_model_projection.weight", &["per_layer.project.weight"], INPUTS),
    copy_if("{p}per_layer_projection_norm.weight", &["per_layer.norm.weight"], INPUTS),
];
const LAYER_INPUTS: &[Rule] = &[
    copy_if("{p}layers.{i}.per_layer_input_gate.weight", &["layers.{i}.per_layer.gate.weight"], INPUTS),
    copy_if("{p}layers.{i}.per_layer_projection.weight", &["layers.{i}.per_layer.down.weight"], INPUTS),
    copy_if("{p}layers.{i}.post_per_layer_input_norm.weight", &["layers.{i}.per_layer.norm.weight"], INPUTS),
    copy("{p}layers.{i}.layer_scalar", &["layers.{i}.scalar"]),
];

const DEFAULTS: Defaults = Defaults {
    norm: Norm::Rms,
    activation: ("hidden_activation", Activation::GeluTanh),
    head_dim: Some(256),
    kv_heads: Some(4),
    max_positions: 131_072,
    tied: true,
    ..Defaults::LLAMA
};

fn read(config: &ConfigFile) -> Result<SourceModel, ConvertError> {
    match config.get("use_bidirectional_attention") {
        None => {}
        Some(value) if value == "vision" || value == false => {}
        Some(_) => {
            return Err(keys::rejected(config, "use_bidirectional_attention", "a decoder reads backwards only"));
        }
    }
    // Two kinds of rotary positions, which only what follows knows.
    let without = config.without("rope_parameters").without("rope_scaling");
    let mut model = keys::read(&without, &DEFAULTS)?;
    keys::read_attention_bias(config, &mut model)?;
    read_windows(config, &mut model)?;
    read_shapes(config, &mut model)?;
    read_positions(config, &mut model)?;
    let decoder = &mut model.decoder;
    decoder.embedding.scale = Some((decoder.hidden_size as f64).sqrt());
    decoder.block.form = BlockForm::Sandwich;
    decoder.block.head_norm = Some(HeadNorm::Head);
    decoder.block.value_norm = true;
    decoder.block.scalar = true;
    decoder.attention_scale = 1.0;
    decoder.head.softcap = config.optional_f64("final_logit_softcapping")?;
    read_inputs(config, &mut model)?;
    if config.bool_or("enable_moe_block", false)? {
        let keys = ExpertKeys {
            count: (&["num_experts"], None),
            chosen: (&["top_k_experts"], None),
            size: (&["moe_intermediate_size"], None),
        };
        let router = RouterConfig { expert_scale: true, own_norm: true, ..NORMALISED_SOFTMAX };
        experts::read(config, &mut model, &keys, router)?;
        if let Some(experts) = &mut model.decoder.experts {
            experts.beside_mlp = true;
        }
    }
    Ok(model)
}

/// A window in five of six layers unless `layer_types` says which; the last layer never has one.
fn read_windows(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    let window = config.optional_usize("sliding_window")?;
    let decoder = &mut model.decoder;
    let slides = |layer: usize| !(layer + 1).is_multiple_of(6);
    if window.is_none() && config.get("layer_types").is_none() {
        return Err(config.error("sliding_window", "a number: five of six layers have a window of so many tokens"));
    }
    decoder.windows = keys::layer_windows(config, decoder.layers, window, slides)?;
    if let Some(last) = decoder.windows.last_mut() {
        *last = None;
    }
    Ok(())
}

/// Heads, MLP, and where keys and values come from, layer by layer.
fn read_shapes(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    let decoder = &mut model.decoder;
    let layers = decoder.layers;
    let one_projection = config.bool_or("attention_k_eq_v", false)?;
    let own = read_heads(config, (decoder.kv_heads, decoder.head_dim), one_projection, &|layer| {
        decoder.window(layer).is_none()
    })?;
    let count = config.optional_usize("num_kv_shared_layers")?.unwrap_or(0);
    if count > 0 && count >= layers {
        let expected = format!("a number below the {layers} layers: the first of them has keys to share");
        return Err(config.error("num_kv_shared_layers", &expected));
    }
    let wide = config.bool_or("use_double_wide_mlp", false)?;
    let mut shapes = Vec::with_capacity(layers);
    for layer in 0..layers {
        let full = decoder.window(layer).is_none();
        let (kv_heads, head_dim) = own.of(layer, full);
        let shared = layer >= layers - count;
        let keys = if shared {
            let alike = |other: &usize| decoder.window(*other).is_none() == full;
            let Some(owner) = (0..layers - count).rev().find(alike) else {
                let kind = if full { "full_attention" } else { "sliding_attention" };
                let expected = format!("a number that leaves a layer of kind {kind} whose keys layer {layer} reads");
                return Err(config.error("num_kv_shared_layers", &expected));
            };
            LayerKeys::Of { layer: owner }
        } else if one_projection && full {
            LayerKeys::AlsoValues
        } else {
            LayerKeys::Own
        };
        let intermediate_size = decoder.intermediate_size.saturating_mul(if shared && wide { 2 } else { 1 });
        shapes.push(LayerShape { kv_heads, head_dim, intermediate_size, keys });
    }
    // The usual width is one that occurs.
    if let Some(first) = shapes.first().filter(|_| shapes.iter().all(|shape| shape.head_dim != decoder.head_dim)) {
        (decoder.kv_heads, decoder.head_dim) = (first.kv_heads, first.head_dim);
    }
    let alike = |shape: &LayerShape| {
        let LayerShape { kv_heads, head_dim, intermediate_size, keys } = *shape;
        (kv_heads, head_dim, intermediate_size) == (decoder.kv_heads, decoder.head_dim, decoder.intermediate_size)
            && keys == LayerKeys::Own
    };
    if !shapes.iter().all(alike) {
        decoder.layer_shapes = shapes;
    }
    Ok(())
}

/// KV heads and their width.
struct Heads {
    sliding: (usize, usize),
    full: (usize, usize),
    /// Layers that are listed.
    listed: BTreeMap<usize, (usize, usize)>,
}

impl Heads {
    fn of(&self, layer: usize, full: bool) -> (usize, usize) {
        let of_kind = if full { self.full } else { self.sliding };
        self.listed.get(&layer).copied().unwrap_or(of_kind)
    }
}

const LISTED: &str = "per_layer_config";

/// Heads of layers: those of layers without a window under keys of their own, or, in files of version 5, in a list of what
/// differs from the others.
fn read_heads(
    config: &ConfigFile,
    (kv_heads, head_dim): (usize, usize),
    one_projection: bool,
    full: &dyn Fn(usize) -> bool,
) -> Result<Heads, ConvertError> {
    let sliding = (kv_heads, head_dim);
    let stated = config.optional_usize("global_head_dim")?;
    let global_kv = config.optional_usize("num_global_key_value_heads")?.filter(|_| one_projection);
    // Absent it is the number of the class, null switches it off.
    let wide = if config.contains("global_head_dim") { stated.unwrap_or(head_dim) } else { 512 };
    let by_kind = (global_kv.unwrap_or(kv_heads), wide);
    let Some(list) = config.object(LISTED)? else {
        return Ok(Heads { sliding, full: by_kind, listed: BTreeMap::new() });
    };
    let mut listed = BTreeMap::new();
    for name in list.entries().keys() {
        let layer: usize = name.parse().map_err(|_| list.error(name, "under the number of a layer"))?;
        let entry = list.object(name)?.ok_or_else(|| list.error(name, "an object"))?;
        if let Some(other) = entry.entries().keys().find(|key| !["head_dim", "num_key_value_heads"].contains(&&***key))
        {
            return Err(keys::rejected(&entry, other, "layers differ in their heads alone"));
        }
        let heads = entry.optional_usize("num_key_value_heads")?.unwrap_or(kv_heads);
        let own = (heads, entry.optional_usize("head_dim")?.unwrap_or(head_dim));
        if stated.is_some() && full(layer) && own != by_kind {
            let names = (format!("{LISTED}.{name}"), format!("{own:?}"), format!("{by_kind:?}"));
            let globals = "global_head_dim` and `num_global_key_value_heads";
            return Err(keys::contradiction(config, (&names.0, &names.1), (globals, &names.2)));
        }
        listed.insert(layer, own);
    }
    Ok(Heads { sliding, full: sliding, listed })
}

fn read_positions(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    let decoder = &mut model.decoder;
    let full = (0..decoder.layers).filter(|&layer| decoder.window(layer).is_none());
    let mut widths: Vec<usize> = full.map(|layer| decoder.shape(layer).head_dim).collect();
    widths.dedup();
    let [width] = widths[..] else {
        return Err(keys::rejected(config, LISTED, "all layers without a window have heads of one width"));
    };
    if config.object("rope_parameters")?.and_then(|object| object.object("full_attention").transpose()).is_none() {
        let expected = "an object with `full_attention` and `sliding_attention`: without it transformers rotates this \
                        architecture in a way of its own";
        return Err(config.error("rope_parameters", expected));
    }
    let rope = RopeKeys { theta: ("rope_theta", 1e6), proportional: true, ..RopeKeys::LLAMA };
    let local = RopeKeys { theta: ("rope_local_base_freq", 1e4), ..RopeKeys::LLAMA };
    let theta;
    (decoder.positions, theta) = rope::read_two_kinds(config, [&rope, &local], width, decoder.max_positions)?;
    let rotary =
        |window: &Option<usize>| if window.is_some() { LayerRotary::Whole { theta } } else { LayerRotary::Global };
    decoder.layer_rotary = decoder.windows.iter().map(rotary).collect();
    Ok(())
}

fn read_inputs(config: &ConfigFile, model: &mut SourceModel) -> Result<(), ConvertError> {
    const WIDTH: &str = "hidden_size_per_layer_input";
    if !config.contains(WIDTH) {
        return Err(config.error(WIDTH, "a number, 0 for none"));
    }
    let width = config.optional_usize(WIDTH)?.unwrap_or(0);
    model.flags.insert("per_layer_inputs", width > 0);
    if width > 0 {
        let vocab_size = config.usize("vocab_size_per_layer_input")?;
        if vocab_size < model.decoder.vocab_size {
            let expected = format!("at least the {} tokens of the vocabulary", model.decoder.vocab_size);
            return Err(config.error("vocab_size_per_layer_input", &expected));
        }
        model.decoder.embedding.per_layer = Some(PerLayerInputs { width, vocab_size });
    }
    Ok(())
}
