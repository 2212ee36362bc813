//! Each feature of a decoder that is easily lost, and each rule that is easily mistaken, shows in the logits: without it
//! they leave the tolerance that the parity tests and `verify` hold them to. Several of these mistakes change no shape and
//! hardly any best token.

#![cfg(feature = "flex")]

mod common;

use std::collections::BTreeMap;

use bsbr_convert::{ExpectedLogits, ModelSource};
use bsbr_model::{
    Activation, BlockForm, Decoder, DecoderConfig, ExpertsConfig, LayerKeys, LayerRotary, Norm, Positions,
    RotaryScaling, RouterKind, WeightSource, WeightSpec, compare_logits,
};
use burn::tensor::Device;
use common::{Tensor, checkout, edit_config, fixtures, read_dir_tensors};
use serde_json::json;

const TOLERANCE: f64 = 1e-4;

/// The weights of a fixture, under the names it had before a mutation.
struct Known(ModelSource, Vec<String>);

impl WeightSource for Known {
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        assert!(self.1.contains(&spec.name), "a mutation must not need another weight: {}", spec.name);
        self.0.read(spec)
    }
}

/// Largest difference of the logits after a change of the decoder that needs no other weights.
fn changed(name: &str, change: impl FnOnce(&mut DecoderConfig)) -> f64 {
    let (_temp, dir) = checkout(name, "config.json");
    let source = ModelSource::open(&dir).expect("a fixture");
    let mut config = source.model_config().clone();
    let known = bsbr_model::weight_specs(&config).into_iter().map(|spec| spec.name).collect();
    change(&mut config.decoder);
    let decoder = Decoder::load(config, &mut Known(source, known), &Device::flex()).expect("the same weights");
    difference(&decoder, name)
}

/// Largest difference of the logits after a change of `config.json`.
fn misread(name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> f64 {
    let (_temp, dir) = checkout(name, "config.json");
    edit_config(&dir, edit);
    let mut source = ModelSource::open(&dir).expect("shapes that still fit");
    let config = source.model_config().clone();
    difference(&Decoder::load(config, &mut source, &Device::flex()).expect("sound weights"), name)
}

/// The tensors of a checkpoint by their names.
type Checkpoint = BTreeMap<String, Tensor>;

/// The weights of a fixture, some of them made by a wrong rule.
struct Misruled<F> {
    right: ModelSource,
    checkpoint: Checkpoint,
    wrong: F,
}

impl<F: Fn(&Checkpoint, &WeightSpec) -> Option<Vec<f32>>> WeightSource for Misruled<F> {
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        match (self.wrong)(&self.checkpoint, spec) {
            Some(weight) => Ok(weight),
            None => self.right.read(spec),
        }
    }
}

/// Largest difference of the logits when `wrong` makes the weights it knows, which it gets as asked for.
fn misruled(name: &str, wrong: impl Fn(&Checkpoint, &WeightSpec) -> Option<Vec<f32>>) -> f64 {
    misruled_and_changed(name, |_| (), wrong)
}

/// The same after a change of the decoder.
fn misruled_and_changed(
    name: &str,
    change: impl FnOnce(&mut DecoderConfig),
    wrong: impl Fn(&Checkpoint, &WeightSpec) -> Option<Vec<f32>>,
) -> f64 {
    let (_temp, dir) = checkout(name, "config.json");
    let right = ModelSource::open(&dir).expect("a fixture");
    let mut config = right.model_config().clone();
    change(&mut config.decoder);
    let mut weights = Misruled { right, checkpoint: read_dir_tensors(&dir), wrong };
    difference(&Decoder::load(config, &mut weights, &Device::flex()).expect("weights of the right shapes"), name)
}

/// Layer, part and kind of a weight of attention: `layers.1.attention.query.bias` is `("1", "query", "bias")`.
fn attention_weight(spec: &WeightSpec) -> Option<(&str, &str, &str)> {
    let (layer, rest) = spec.name.strip_prefix("layers.")?.split_once(".attention.")?;
    let (part, kind) = rest.split_once('.')?;
    Some((layer, part, kind))
}

/// Layer and first letter of a weight of queries or keys.
fn rotated_weight(spec: &WeightSpec) -> Option<(&str, char)> {
    match attention_weight(spec)? {
        (layer, "query", _) => Some((layer, 'q')),
        (layer, "key", _) => Some((layer, 'k')),
        _ => None,
    }
}

/// The rows of a weight as wide as `spec` from `starts`, `height` of them each time.
fn rows(tensor: &Tensor, spec: &WeightSpec, starts: impl Iterator<Item = usize>, height: usize) -> Vec<f32> {
    let (width, values) = (spec.shape[1..].iter().product::<usize>(), tensor.values());
    starts.flat_map(|start| values[start * width..(start + height) * width].to_vec()).collect()
}

/// Queries, keys and values read as `[Q; K; V]` from the tensor whose name `fused` gives for a layer.
fn contiguous(name: &str, fused: impl Fn(&str) -> String) -> f64 {
    misruled(name, |checkpoint, spec| {
        let (layer, part, kind) = attention_weight(spec)?;
        let tensor = &checkpoint[&format!("{}.{kind}", fused(layer))];
        let (all, mine) = (tensor.shape[0], spec.shape[0]);
        match part {
            "query" => Some(rows(tensor, spec, [0].into_iter(), mine)),
            "key" => Some(rows(tensor, spec, [all - 2 * mine].into_iter(), mine)),
            "value" => Some(rows(tensor, spec, [all - mine].into_iter(), mine)),
            _ => None,
        }
    })
}

/// Queries, keys and values read head by head from a tensor that holds `[Q; K; V]`, `queries` query heads a group.
fn per_head(name: &str, width: usize, queries: usize, fused: impl Fn(&str) -> String) -> f64 {
    misruled(name, |checkpoint, spec| {
        let (layer, part, kind) = attention_weight(spec)?;
        let tensor = &checkpoint[&format!("{}.{kind}", fused(layer))];
        let (offset, height) = match part {
            "query" => (0, queries * width),
            "key" => (queries * width, width),
            "value" => ((queries + 1) * width, width),
            _ => return None,
        };
        let starts = (0..tensor.shape[0]).step_by((queries + 2) * width).map(|start| start + offset);
        Some(rows(tensor, spec, starts, height))
    })
}

/// Queries and keys as they stand in the file.
fn unpermuted(name: &str, tensor: impl Fn(&str, char) -> String) -> f64 {
    misruled(name, |checkpoint, spec| {
        let (layer, letter) = rotated_weight(spec)?;
        // Biases of another order are not what is looked at.
        spec.name.ends_with(".weight").then(|| checkpoint[&tensor(layer, letter)].values())
    })
}

fn difference(decoder: &Decoder, name: &str) -> f64 {
    let expected = ExpectedLogits::open(&fixtures().join(name).join("expected.safetensors")).expect("a sound file");
    compare_logits(decoder, &expected.tokens, &expected.logits).expect("sound texts").max
}

fn assert_shows(what: &str, difference: f64, at_least: f64) {
    assert!(difference > at_least.max(TOLERANCE), "{what}: {difference}");
}

fn rotate(decoder: &mut DecoderConfig, dimensions: usize) {
    if let Positions::Rotary { rotary_dim, .. } = &mut decoder.positions {
        *rotary_dim = dimensions;
    }
}

#[test]
fn without_any_change_nothing_shows() {
    for name in ["gpt2", "gemma2", "stablelm_12b"] {
        assert!(changed(name, |_| ()) <= TOLERANCE);
    }
}

#[test]
fn norms_and_activations_show() {
    assert_shows("gemma without the 1 in its norms", changed("gemma", |d| d.norm = Norm::Rms), 1.0);
    assert_shows("gemma2 without the 1 in its norms", changed("gemma2", |d| d.norm = Norm::Rms), 1.0);
    assert_shows("qwen3 without normed heads", changed("qwen3", |d| d.block.head_norm = None), 1.0);
    assert_shows("olmo2 without normed heads", changed("olmo2", |d| d.block.head_norm = None), 0.01);
    assert_shows("stablelm 12b without normed heads", changed("stablelm_12b", |d| d.block.head_norm = None), 0.01);
    // The smallest of all: half a thousandth.
    assert_shows("gpt2 with the exact gelu", changed("gpt2", |d| d.activation = Activation::GeluErf), 0.0);
    assert_shows("neox with the tanh gelu", changed("gpt_neox", |d| d.activation = Activation::GeluTanh), 0.0);
    assert_shows("bloom without normed embeddings", changed("bloom", |d| d.embedding.norm = false), 0.1);
}

#[test]
fn scales_and_caps_show() {
    assert_shows("gemma without scaled embeddings", changed("gemma", |d| d.embedding.scale = None), 1.0);
    assert_shows("gemma2 without capped scores", changed("gemma2", |d| d.attention_softcap = None), 0.01);
    assert_shows("gemma2 without capped logits", changed("gemma2", |d| d.head.softcap = None), 0.0);
    assert_shows("gemma2 scaled by its heads", changed("gemma2", |d| d.attention_scale = 0.25), 0.1);
    assert_shows("neo scaled by its heads", changed("gpt_neo", |d| d.attention_scale = 12f64.powf(-0.5)), 0.1);
    assert_shows("cohere without scaled logits", changed("cohere", |d| d.head.scale = None), 0.1);
    assert_shows("gptj without the bias of its head", changed("gptj", |d| d.head.bias = false), 0.0);
    for (key, factor) in [
        ("embedding_multiplier", 2.0),
        ("residual_multiplier", 0.5),
        ("logits_scaling", 2.0),
        ("attention_multiplier", 0.5),
    ] {
        let difference = misread("granite", |config| config[key] = factor.into());
        assert_shows(&format!("granite with another {key}"), difference, 0.1);
    }
}

#[test]
fn positions_and_windows_show() {
    assert_shows("mistral without windows", changed("mistral", |d| d.windows.clear()), 1.0);
    assert_shows("neo without windows", changed("gpt_neo", |d| d.windows.clear()), 0.1);
    assert_shows("gemma2 with the windows of the other layers", changed("gemma2", |d| d.windows.reverse()), 0.01);
    assert_shows("neox with whole heads rotating", changed("gpt_neox", |d| rotate(d, 12)), 0.1);
    assert_shows("phi with whole heads rotating", changed("phi", |d| rotate(d, 12)), 0.1);
    assert_shows("smollm3 rotating everywhere", changed("smollm3", |d| d.layer_rotary.clear()), 0.1);
    let one_base = |d: &mut DecoderConfig| d.layer_rotary = vec![LayerRotary::Global; 6];
    assert_shows("gemma3 with one base for all", changed("gemma3_text", one_base), 0.01);
    let from_row_0 = |d: &mut DecoderConfig| (d.embedding.position_offset, d.max_positions) = (0, d.max_positions + 2);
    assert_shows("opt with its first position in row 0", changed("opt", from_row_0), 1.0);
    let unscaled = |d: &mut DecoderConfig| d.positions = Positions::Alibi { factor: 1.0 };
    assert_shows("falcon with the slopes of bloom", changed("falcon_rw", unscaled), 0.1);
    let scaled = |d: &mut DecoderConfig| d.positions = Positions::Alibi { factor: 12f64.powf(-0.5) };
    assert_shows("bloom with the slopes of falcon", changed("bloom", scaled), 0.1);
}

#[test]
fn the_form_of_a_block_shows() {
    let sequential = |d: &mut DecoderConfig| d.block.form = BlockForm::Sequential;
    assert_shows("neox one after the other", changed("gpt_neox", sequential), 1.0);
    assert_shows("falcon 40b one after the other", changed("falcon_40b", sequential), 0.1);
    assert_shows("starcoder2 side by side", changed("starcoder2", |d| d.block.form = BlockForm::Parallel), 0.1);
    assert_shows("gemma2 without norms after", changed("gemma2", sequential), 0.1);
    let after = |d: &mut DecoderConfig| d.block.form = BlockForm::NormAfter;
    assert_shows("olmo2 with norms after the sum", changed("olmo2", after), 0.1);
    let branches = |config: &mut serde_json::Value| config["use_parallel_residual"] = false.into();
    assert_shows("neox misread as sequential", misread("gpt_neox", branches), 1.0);
}

#[test]
fn a_wrong_order_of_a_fused_projection_shows() {
    let attention = |layer: &str| format!("transformer.h.{layer}.self_attention.query_key_value");
    assert_shows(
        "neox one after the other",
        contiguous("gpt_neox", |layer| format!("gpt_neox.layers.{layer}.attention.query_key_value")),
        1.0,
    );
    assert_shows("bloom one after the other", contiguous("bloom", attention), 1.0);
    assert_shows("falcon 40b one after the other", contiguous("falcon_40b", attention), 1.0);
    assert_shows("falcon rw one after the other", contiguous("falcon_rw", attention), 1.0);
    assert_shows(
        "bigcode with all heads one after the other",
        contiguous("gpt_bigcode_mha", |layer| format!("transformer.h.{layer}.attn.c_attn")),
        1.0,
    );
    let mpt = |layer: &str| format!("transformer.blocks.{layer}.attn.Wqkv");
    assert_shows("mpt head by head", per_head("mpt", 12, 1, mpt), 1.0);
    let phi3 = |layer: &str| format!("model.layers.{layer}.self_attn.qkv_proj");
    assert_shows("phi3 head by head", per_head("phi3", 12, 2, phi3), 1.0);
    let up_first = misruled("phi3", |checkpoint, spec| {
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once(".mlp.")?;
        let start = ["up.weight", "gate.weight"].iter().position(|&name| name == part)? * spec.shape[0];
        let tensor = &checkpoint[&format!("model.layers.{layer}.mlp.gate_up_proj.weight")];
        Some(rows(tensor, spec, [start].into_iter(), spec.shape[0]))
    });
    assert_shows("phi3 with up before gate", up_first, 1.0);
}

#[test]
fn a_wrong_layout_of_a_weight_shows() {
    let square = misruled("gpt2", |checkpoint, spec| {
        let (layer, part, kind) = attention_weight(spec)?;
        let name = format!("transformer.h.{layer}.attn.c_proj.weight");
        (part == "output" && kind == "weight").then(|| checkpoint[&name].values())
    });
    assert_shows("gpt2 with its square weight not transposed", square, 1.0);
    let gptj = unpermuted("gptj", |layer, part| format!("transformer.h.{layer}.attn.{part}_proj.weight"));
    assert_shows("gptj without its rotary permutation", gptj, 1.0);
    let cohere = unpermuted("cohere", |layer, part| format!("model.layers.{layer}.self_attn.{part}_proj.weight"));
    assert_shows("cohere without its rotary permutation", cohere, 0.1);
    // Llama's own files and GGUF pair neighbours, files of transformers pair halves.
    let llama = misruled("llama", |checkpoint, spec| {
        let (layer, letter) = rotated_weight(spec)?;
        let tensor = &checkpoint[&format!("model.layers.{layer}.self_attn.{letter}_proj.weight")];
        let (width, half) = (12, 6);
        let starts = (0..spec.shape[0]).map(|row| row / width * width + row % half * 2 + row % width / half);
        Some(rows(tensor, spec, starts, 1))
    });
    assert_shows("llama with a rotary permutation", llama, 1.0);
    let reversed = misruled("stablelm_12b", |checkpoint, spec| {
        let (layer, part, _) = attention_weight(spec)?;
        let letter = part.strip_suffix("_norm")?.chars().next()?;
        let name = |head: usize| format!("model.layers.{layer}.self_attn.{letter}_layernorm.norms.{head}.weight");
        Some((0..spec.shape[0]).rev().flat_map(|head| checkpoint[&name(head)].values()).collect())
    });
    assert_shows("stablelm 12b with the norms of its heads in reverse", reversed, 0.1);
}

#[test]
fn what_newer_decoders_do_besides_shows() {
    assert_shows("arcee without the square", changed("arcee", |d| d.activation = Activation::Relu), 0.1);
    assert_shows("nemotron without the 1 in its norms", changed("nemotron", |d| d.norm = Norm::Layer), 1.0);
    assert_shows("nemotron with whole heads rotating", changed("nemotron", |d| rotate(d, 12)), 0.1);
    assert_shows("nanochat without normed embeddings", changed("nanochat", |d| d.embedding.norm = false), 0.1);
    assert_shows("nanochat without normed heads", changed("nanochat", |d| d.block.head_norm = None), 0.1);
    assert_shows("nanochat without capped logits", changed("nanochat", |d| d.head.softcap = None), 0.1);
    let before = |d: &mut DecoderConfig| d.block.head_norm_after_rotary = false;
    assert_shows("hunyuan with heads normed first", changed("hunyuan_v1_dense", before), 1.0);
    assert_shows("ministral3 without temperature", changed("ministral3", |d| d.query_temperature = None), 0.1);
    let one_late = |d: &mut DecoderConfig| {
        d.query_temperature.iter_mut().for_each(|temperature| temperature.length += 1);
    };
    assert_shows("ministral3 with its temperature a token late", changed("ministral3", one_late), 0.001);
    assert_shows("vaultgemma without capped scores", changed("vaultgemma", |d| d.attention_softcap = None), 0.1);
    assert_shows(
        "vaultgemma scaled by its heads",
        changed("vaultgemma", |d| d.attention_scale = 12f64.powf(-0.5)),
        0.1,
    );
    for name in ["cohere2", "exaone4"] {
        let everywhere = changed(name, |d| d.layer_rotary.clear());
        assert_shows(&format!("{name} rotating everywhere"), everywhere, 0.1);
        assert_shows(&format!("{name} without windows"), changed(name, |d| d.windows.clear()), 0.1);
    }
    let scaled_everywhere = |d: &mut DecoderConfig| d.layer_rotary.clear();
    assert_shows("olmo3 scaled in layers with a window", changed("olmo3", scaled_everywhere), 0.1);
    assert_shows(
        "granite4 without rotation",
        changed("granite4_rope", |d| d.layer_rotary = vec![LayerRotary::Off; 2]),
        0.1,
    );
    assert_shows("granite4 with rotation", changed("granite4_nope", |d| d.layer_rotary.clear()), 0.1);
    let base = without("hunyuan_v1_dense", "/rope_parameters/alpha", json!(null));
    assert_shows("hunyuan without its raised base", base, 0.1);
    let xielu = misruled("apertus", |checkpoint, spec| {
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once(".mlp.xielu.")?;
        let other = match part {
            "alpha_p" => "alpha_n",
            "alpha_n" => "alpha_p",
            _ => return None,
        };
        Some(checkpoint[&format!("model.layers.{layer}.mlp.act_fn.{other}")].values())
    });
    assert_shows("apertus with its two factors exchanged", xielu, 0.1);
}

#[test]
fn a_wrong_order_of_rows_in_newer_checkpoints_shows() {
    for name in ["glm4", "helium_biases", "ernie4_5", "cohere2", "nanochat"] {
        let plain = unpermuted(name, |layer, part| format!("model.layers.{layer}.self_attn.{part}_proj.weight"));
        assert_shows(&format!("{name} as its file has it"), plain, 0.1);
    }
    let within =
        unpermuted("glm4v", |layer, part| format!("model.language_model.layers.{layer}.self_attn.{part}_proj.weight"));
    assert_shows("glm4v as its file has it", within, 0.1);
    // Query, key and value in their usual order.
    let usual = misruled("codegen", |checkpoint, spec| {
        let (layer, part, _) = attention_weight(spec)?;
        let at = ["query", "key", "value"].iter().position(|&known| known == part)?;
        let tensor = &checkpoint[&format!("transformer.h.{layer}.attn.qkv_proj.weight")];
        let starts = (0..4).map(|group| (3 * group + at) * 8);
        Some(rows(tensor, spec, starts, 8))
    });
    assert_shows("codegen with keys where its values are", usual, 1.0);
    let norms = misruled("glm4", |checkpoint, spec| {
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once('.')?;
        let other = match part {
            "attention_post_norm.weight" => "post_attention_layernorm",
            "mlp_norm.weight" => "post_self_attn_layernorm",
            _ => return None,
        };
        Some(checkpoint[&format!("model.layers.{layer}.{other}.weight")].values())
    });
    assert_shows("glm4 with the norms of gemma", norms, 0.1);
}

/// The same with other experts.
fn changed_experts(name: &str, change: impl FnOnce(&mut ExpertsConfig)) -> f64 {
    changed(name, |d| change(d.experts.as_mut().expect("a mixture")))
}

#[test]
fn what_a_router_does_shows() {
    for name in ["mixtral", "qwen3_moe", "granitemoeshared", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "minimax_m2"]
    {
        let loose = changed_experts(name, |it| it.router.normalised = None);
        assert_shows(&format!("{name} without normalised weights"), loose, 0.1);
    }
    for name in ["olmoe", "qwen2_moe"] {
        let normalised = changed_experts(name, |it| it.router.normalised = Some(1e-20));
        assert_shows(&format!("{name} with normalised weights"), normalised, 0.1);
    }
    for name in ["ernie4_5_moe", "glm4_moe", "dots1_groups", "minimax_m2"] {
        let uncorrected = changed_experts(name, |it| it.router.correction = false);
        assert_shows(&format!("{name} without its correction"), uncorrected, 0.1);
    }
    for name in ["mixtral", "olmoe", "phimoe", "glm4_moe", "hunyuan_v1_moe"] {
        let fewer = changed_experts(name, |it| {
            it.chosen -= 1;
            if matches!(it.router.kind, RouterKind::Sparsemixer { .. }) {
                (it.chosen, it.router.kind) = (2, RouterKind::Softmax);
            }
        });
        assert_shows(&format!("{name} with other experts"), fewer, 0.1);
    }
    for name in ["glm4_moe", "minimax_m2", "dots1_groups"] {
        let softmax = changed_experts(name, |it| it.router.kind = RouterKind::Softmax);
        assert_shows(&format!("{name} with a softmax"), softmax, 0.01);
    }
    assert_shows("dots1 without groups", changed_experts("dots1_groups", |it| it.router.groups = None), 0.1);
    assert_shows("glm4_moe without its scale", changed_experts("glm4_moe", |it| it.router.scale = None), 0.1);
    let ungated = |it: &mut ExpertsConfig| it.shared.iter_mut().for_each(|shared| shared.gate = false);
    assert_shows("qwen2_moe without the gate of its shared expert", changed_experts("qwen2_moe", ungated), 0.1);
    for name in ["qwen2_moe", "granitemoeshared", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe"] {
        let alone = changed_experts(name, |it| it.shared = None);
        assert_shows(&format!("{name} without its shared expert"), alone, 0.1);
    }
    let long = |d: &mut DecoderConfig| {
        if let Positions::Rotary { scaling: Some(RotaryScaling::Longrope { attention_factor, .. }), .. } =
            &mut d.positions
        {
            *attention_factor = 1.0;
        }
    };
    assert_shows("phimoe without its temperature", changed("phimoe", long), 0.1);
}

/// Layer, expert and part of a weight of an expert.
fn expert_weight(spec: &WeightSpec) -> Option<(&str, usize, &str)> {
    let (layer, rest) = spec.name.strip_prefix("layers.")?.split_once(".mlp.experts.")?;
    let (expert, part) = rest.split_once('.')?;
    Some((layer, expert.parse().ok()?, part.strip_suffix(".weight")?))
}

#[test]
fn experts_in_another_order_and_their_matrices_exchanged_show() {
    let name = |layer: &str, expert: usize, part: &str| {
        let part = match part {
            "gate" => "w1",
            "up" => "w3",
            _ => "w2",
        };
        format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight")
    };
    let reversed = misruled("mixtral", |checkpoint, spec| {
        let (layer, expert, part) = expert_weight(spec)?;
        Some(checkpoint[&name(layer, 5 - expert, part)].values())
    });
    assert_shows("mixtral with its experts in reverse", reversed, 0.1);
    let exchanged = misruled("mixtral", |checkpoint, spec| {
        let (layer, expert, part) = expert_weight(spec)?;
        let other = ["up", "gate"].into_iter().zip(["gate", "up"]).find(|(_, own)| *own == part)?.0;
        Some(checkpoint[&name(layer, expert, other)].values())
    });
    assert_shows("mixtral with gate and up exchanged", exchanged, 0.1);
    for (fixture, tensor) in
        [("qwen3_moe_fused", "mlp.experts.gate_up_proj"), ("granitemoeshared", "block_sparse_moe.input_linear.weight")]
    {
        // Rows of the gate and of the way up in turn, as some files have them.
        let interleaved = misruled(fixture, |checkpoint, spec| {
            let (layer, expert, part) = expert_weight(spec)?;
            let at = ["gate", "up"].iter().position(|&known| known == part)?;
            let tensor = &checkpoint[&format!("model.layers.{layer}.{tensor}")];
            let starts = (0..spec.shape[0]).map(|row| expert * tensor.shape[1] + 2 * row + at);
            Some(rows(tensor, spec, starts, 1))
        });
        assert_shows(&format!("{fixture} with its rows in turn"), interleaved, 0.1);
    }
}

#[test]
fn sinks_and_what_stands_beside_them_show() {
    for name in ["gpt_oss", "granite_swa"] {
        assert_shows(&format!("{name} without sinks"), changed(name, |d| d.sink_logits = false), 0.1);
        assert_shows(&format!("{name} without windows"), changed(name, |d| d.windows.clear()), 0.1);
    }
    assert_shows("gpt_oss with the windows of the other layers", changed("gpt_oss", |d| d.windows.reverse()), 0.1);
    let other_head = misruled("gpt_oss", |checkpoint, spec| {
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once(".attention.")?;
        let sinks = (part == "sink_logits").then(|| &checkpoint[&format!("model.layers.{layer}.self_attn.sinks")])?;
        Some(sinks.values().into_iter().rev().collect())
    });
    assert_shows("gpt_oss with the sinks of other heads", other_head, 0.1);
    let plain = |d: &mut DecoderConfig| {
        if let Positions::Rotary { scaling, .. } = &mut d.positions {
            *scaling = None;
        }
    };
    assert_shows("gpt_oss without its scaling", changed("gpt_oss", plain), 0.1);
    let everywhere = |d: &mut DecoderConfig| d.layer_rotary[0] = LayerRotary::Global;
    assert_shows("granite_swa rotating everywhere", changed("granite_swa", everywhere), 0.1);
    let one_base = |d: &mut DecoderConfig| d.layer_rotary[2] = LayerRotary::Global;
    assert_shows("granite_swa with one base for all", changed("granite_swa", one_base), 0.1);
    for key in ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"] {
        assert_shows(
            &format!("granite_swa without {key}"),
            without("granite_swa", &format!("/{key}"), json!(null)),
            0.1,
        );
    }
}

#[test]
fn what_latent_attention_does_besides_shows() {
    for name in ["deepseek_v2", "deepseek_v3", "deepseek_v3_hub", "glm4_moe_lite", "mistral4", "mistral4_new"] {
        let other_eps = changed(name, |d| d.latent.iter_mut().for_each(|latent| latent.norm_eps = 0.1));
        assert_shows(&format!("{name} with another epsilon"), other_eps, 0.01);
        let uncut = changed(name, |d| d.attention_scale = (d.head_dim as f64).powf(-0.5) * 1.2);
        assert_shows(&format!("{name} with another scale"), uncut, 0.01);
        let loose = changed_experts(name, |it| {
            it.router.normalised = if it.router.normalised.is_none() { Some(1e-20) } else { None };
        });
        assert_shows(&format!("{name} with weights normalised otherwise"), loose, 0.1);
        let unscaled = changed_experts(name, |it| it.router.scale = None);
        assert_shows(&format!("{name} without its scale"), unscaled, 0.1);
        // Rotary positions that pair halves: the rows as the file has them.
        let prefix = match name {
            "mistral4" => "language_model.model.",
            "mistral4_new" => "model.language_model.",
            _ => "model.",
        };
        let halves = misruled(name, |checkpoint, spec| {
            let layer = spec.name.strip_prefix("layers.")?.strip_suffix(".attention.key_rotary.weight")?;
            let tensor = &checkpoint[&format!("{prefix}layers.{layer}.self_attn.kv_a_proj_with_mqa.weight")];
            Some(rows(tensor, spec, [12].into_iter(), 4))
        });
        assert_shows(&format!("{name} with keys whose halves are paired"), halves, 0.01);
        // Keys of all heads, then values of all.
        let blocks = misruled(name, |checkpoint, spec| {
            let (layer, part) = spec.name.strip_prefix("layers.")?.split_once(".attention.from_latent.")?;
            let tensor = &checkpoint[&format!("{prefix}layers.{layer}.self_attn.kv_b_proj.weight")];
            match part {
                "key.weight" => Some(rows(tensor, spec, [0].into_iter(), spec.shape[0])),
                "value.weight" => {
                    Some(rows(tensor, spec, [tensor.shape[0] - spec.shape[0]].into_iter(), spec.shape[0]))
                }
                _ => None,
            }
        });
        assert_shows(&format!("{name} with keys before values"), blocks, 0.1);
    }
    let ungrouped = changed_experts("deepseek_v3", |it| it.router.groups = None);
    assert_shows("deepseek_v3 without groups", ungrouped, 0.1);
    let uncorrected = changed_experts("deepseek_v3", |it| it.router.correction = false);
    assert_shows("deepseek_v3 without its correction", uncorrected, 0.1);
    let cold = changed("mistral4", |d| d.query_temperature = None);
    assert_shows("mistral4 without its temperature", cold, 0.01);
    for name in ["deepseek_v2", "deepseek_v3", "mistral4"] {
        let plain = changed(name, |d| d.attention_scale = (d.head_dim as f64).powf(-0.5));
        assert_shows(&format!("{name} without the temperature of its scores"), plain, 0.01);
    }
}

/// The part of all heads that rotates.
fn rotating(decoder: &mut DecoderConfig, dimensions: usize) {
    if let Positions::Rotary { scaling: Some(RotaryScaling::Proportional { rotating, .. }), .. } =
        &mut decoder.positions
    {
        *rotating = dimensions;
    }
}

#[test]
fn what_the_experts_of_gpt_oss_do_shows() {
    let change = |what: &str, difference: f64| assert_shows(&format!("gpt_oss {what}"), difference, 0.1);
    change("without its bounds", changed("gpt_oss", |d| d.clamped_gate = None));
    let other = |limit: f64, alpha: f64| {
        changed("gpt_oss", |d| d.clamped_gate = Some(bsbr_model::ClampedGate { limit, alpha }))
    };
    change("with another bound", other(7.0, 1.702));
    change("with another factor", other(1.5, 1.0));
    change("without the bias of its router", changed_experts("gpt_oss", |it| it.router.bias = false));
    change("without the biases of its experts", changed_experts("gpt_oss", |it| it.bias = false));
    change("with the softmax over all", changed_experts("gpt_oss", |it| it.router.normalised = None));
    // Columns of gate and up in turn, the gate first: `[experts, hidden, 2 inner]`.
    let columns = |of: fn(usize, usize, usize) -> usize| {
        misruled("gpt_oss", move |checkpoint, spec| {
            let (layer, expert, part) = expert_weight(spec)?;
            let at = ["gate", "up"].iter().position(|&known| known == part)?;
            let tensor = &checkpoint[&format!("model.layers.{layer}.mlp.experts.gate_up_proj")];
            let (hidden, wide, values) = (tensor.shape[1], tensor.shape[2], tensor.values());
            let column = |row: usize, h: usize| values[(expert * hidden + h) * wide + of(row, at, wide / 2)];
            Some(
                (0..wide / 2)
                    .flat_map(|row| (0..hidden).map(move |h| (row, h)))
                    .map(|(row, h)| column(row, h))
                    .collect(),
            )
        })
    };
    assert!(columns(|row, at, _| 2 * row + at) <= TOLERANCE, "the layout as it is");
    change("with gate and up in halves", columns(|row, at, inner| at * inner + row));
    change("with up before gate", columns(|row, at, _| 2 * row + 1 - at));
    let square = misruled("gpt_oss", |checkpoint, spec| {
        let (layer, expert, part) = expert_weight(spec)?;
        let tensor = &checkpoint[&format!("model.layers.{layer}.mlp.experts.down_proj")];
        (part == "down").then(|| rows(tensor, spec, [expert * tensor.shape[1]].into_iter(), spec.shape[0]))
    });
    change("with its square weights not transposed", square);
}

#[test]
fn what_layers_of_gemma_4_have_of_their_own_shows() {
    for name in ["gemma4", "gemma4_text", "gemma4_text_hub", "gemma4_moe"] {
        let shows = |what: &str, change: &dyn Fn(&mut DecoderConfig)| {
            assert_shows(&format!("{name} {what}"), changed(name, change), 0.1);
        };
        shows("without the factors of its layers", &|d| d.block.scalar = false);
        shows("without normed values", &|d| d.block.value_norm = false);
        shows("without capped logits", &|d| d.head.softcap = None);
        shows("with scaled scores", &|d| d.attention_scale = 8f64.powf(-0.5));
        shows("with whole heads rotating", &|d| rotating(d, 16));
        shows("with the base of the other layers", &|d| {
            d.layer_rotary.iter_mut().filter(|it| **it != LayerRotary::Global).for_each(|it| {
                *it = LayerRotary::Whole { theta: 1e6 };
            });
        });
        shows("without windows", &|d| d.windows.clear());
        shows("without its scale of embeddings", &|d| d.embedding.scale = None);
    }
    for name in ["gemma4", "gemma4_text", "gemma4_text_hub"] {
        assert_shows(&format!("{name} without inputs"), changed(name, |d| d.embedding.per_layer = None), 0.1);
        // The inputs of the layers in another order.
        let swapped = misruled(name, |checkpoint, spec| {
            let prefix = if name == "gemma4" { "model.language_model." } else { "model." };
            let tensor = checkpoint.get(&format!("{prefix}embed_tokens_per_layer.weight"))?;
            let (rows, width) = (tensor.values(), tensor.shape[1]);
            let turned = |row: &[f32]| row.chunks_exact(6).rev().flatten().copied().collect::<Vec<_>>();
            (spec.name == "per_layer.embed.weight").then(|| rows.chunks_exact(width).flat_map(turned).collect())
        });
        assert_shows(&format!("{name} with the inputs of its layers in reverse"), swapped, 0.1);
    }
    // The first layer with a window in place of the last before the shared ones.
    let first = |d: &mut DecoderConfig| d.layer_shapes[3].keys = LayerKeys::Of { layer: 0 };
    for name in ["gemma4_text", "gemma4_text_hub"] {
        assert_shows(&format!("{name} with keys of another layer"), changed(name, first), 0.1);
    }
    let own = |d: &mut DecoderConfig| d.layer_shapes[3].keys = LayerKeys::Own;
    let keys_of_its_own = misruled_and_changed("gemma4_text_hub", own, |checkpoint, spec| {
        let part = match spec.name.strip_prefix("layers.3.attention.")? {
            "key.weight" => "k_proj",
            "value.weight" => "v_proj",
            "key_norm.weight" => "k_norm",
            _ => return None,
        };
        Some(checkpoint[&format!("model.layers.3.self_attn.{part}.weight")].values())
    });
    assert_shows("gemma4 with the keys that its file holds besides", keys_of_its_own, 0.1);
}

#[test]
fn what_the_mixture_of_gemma_4_does_besides_shows() {
    let unscaled = changed_experts("gemma4_moe", |it| it.router.expert_scale = false);
    assert_shows("gemma4_moe without the scales of its experts", unscaled, 0.1);
    // A common factor of the weights is taken out again by the norm behind the experts.
    let fewer = changed_experts("gemma4_moe", |it| it.chosen = 1);
    assert_shows("gemma4_moe with fewer experts", fewer, 0.1);
    let other_norm = changed_experts("gemma4_moe", |it| it.router.own_norm = false);
    assert_shows("gemma4_moe with a router that reads what experts read", other_norm, 0.1);
    let exchanged = misruled("gemma4_moe", |checkpoint, spec| {
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once(".mlp.")?;
        let other = match part {
            "dense_post_norm.weight" => "post_feedforward_layernorm_2",
            "experts_post_norm.weight" => "post_feedforward_layernorm_1",
            _ => return None,
        };
        Some(checkpoint[&format!("model.layers.{layer}.{other}.weight")].values())
    });
    assert_shows("gemma4_moe with the norms behind its two branches exchanged", exchanged, 0.1);
    let before = misruled("gemma4_moe", |checkpoint, spec| {
        let layer = spec.name.strip_prefix("layers.")?.strip_suffix(".mlp.experts_norm.weight")?;
        Some(checkpoint[&format!("model.layers.{layer}.pre_feedforward_layernorm.weight")].values())
    });
    assert_shows("gemma4_moe with one norm before both branches", before, 0.1);
    let interleaved = misruled("gemma4_moe", |checkpoint, spec| {
        let (layer, expert, part) = expert_weight(spec)?;
        let at = ["gate", "up"].iter().position(|&known| known == part)?;
        let tensor = &checkpoint[&format!("model.layers.{layer}.experts.gate_up_proj")];
        let starts = (0..spec.shape[0]).map(|row| expert * tensor.shape[1] + 2 * row + at);
        Some(rows(tensor, spec, starts, 1))
    });
    assert_shows("gemma4_moe with its rows in turn", interleaved, 0.1);
}

#[test]
fn opt_350m_read_as_its_larger_siblings_shows() {
    let before = |d: &mut DecoderConfig| d.block.form = BlockForm::Sequential;
    let norms = |checkpoint: &Checkpoint, spec: &WeightSpec| {
        if let Some(kind) = spec.name.strip_prefix("final_norm.") {
            // The file has none: one that changes the least.
            return Some(vec![if kind == "weight" { 1.0 } else { 0.0 }; spec.shape[0]]);
        }
        let (layer, part) = spec.name.strip_prefix("layers.")?.split_once('.')?;
        let name = match part.split_once('.')? {
            ("attention_norm", kind) => format!("self_attn_layer_norm.{kind}"),
            ("mlp_norm", kind) => format!("final_layer_norm.{kind}"),
            _ => return None,
        };
        Some(checkpoint[&format!("model.decoder.layers.{layer}.{name}")].values())
    };
    assert_shows("opt 350m with norms before", misruled_and_changed("opt_350m_like", before, norms), 1.0);
}

/// A configuration of a fixture with the value at `pointer` taken away, or another in its place.
fn without(name: &str, pointer: &str, value: serde_json::Value) -> f64 {
    misread(name, |config| {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let parent = config.pointer_mut(parent).and_then(serde_json::Value::as_object_mut).expect("an object");
        let old = if value.is_null() { parent.remove(key) } else { parent.insert(key.to_owned(), value) };
        assert!(old.is_some(), "{name} has no {pointer}");
    })
}

#[test]
fn every_unusual_value_shows() {
    let unscaled = || json!({"rope_type": "default", "rope_theta": 10000.0});
    let unscaled_1000 = || json!({"rope_type": "default", "rope_theta": 1000.0});
    let rope = "/rope_parameters";
    for (name, pointer, value) in [
        ("cohere_scaled", "/logit_scale", json!(null)),
        ("cohere_scaled", rope, unscaled()),
        ("falcon_11b", rope, unscaled()),
        ("gemma2_scales", "/query_pre_attn_scalar", json!(8)),
        ("gemma2_scales", "/attn_logit_softcapping", json!(null)),
        ("gemma2_scales", "/final_logit_softcapping", json!(null)),
        ("gemma2_scales", "/sliding_window", json!(6)),
        ("gemma3_scales", "/query_pre_attn_scalar", json!(16)),
        ("gemma3_scales", "/final_logit_softcapping", json!(null)),
        ("gemma3_scales", "/sliding_window", json!(7)),
        ("gemma3_scales", "/rope_parameters/full_attention/rope_type", json!("default")),
        ("gemma3_scales", "/rope_parameters/full_attention/rope_theta", json!(1e4)),
        ("gemma3_scales", "/rope_parameters/sliding_attention/rope_theta", json!(1e4)),
        ("gpt2_scales", "/scale_attn_weights", json!(null)),
        ("gpt2_scales", "/scale_attn_by_inverse_layer_idx", json!(null)),
        ("gpt2_scales", "/activation_function", json!(null)),
        ("gpt_bigcode_unscaled", "/scale_attn_weights", json!(null)),
        ("gpt_neox_sequential", "/use_parallel_residual", json!(null)),
        ("gpt_neox_sequential", "/rope_parameters/partial_rotary_factor", json!(null)),
        ("gpt_neox_sequential", "/rope_parameters/rope_type", json!("default")),
        ("granite_multipliers", "/embedding_multiplier", json!(null)),
        ("granite_multipliers", "/attention_multiplier", json!(null)),
        ("granite_multipliers", "/residual_multiplier", json!(null)),
        ("granite_multipliers", "/logits_scaling", json!(null)),
        ("granite_multipliers", rope, unscaled_1000()),
        ("llama_biases", rope, unscaled()),
        ("llama_dynamic", rope, unscaled()),
        ("llama_llama3", rope, unscaled()),
        ("mistral_yarn", rope, unscaled_1000()),
        ("mistral_yarn", "/rope_parameters/original_max_position_embeddings", json!(null)),
        ("mpt_6_heads", "/attn_config/softmax_scale", json!(null)),
        ("olmo_bias", rope, unscaled()),
        ("olmo2_bias", rope, unscaled_1000()),
        ("opt_plain", "/activation_function", json!(null)),
        ("phi_partial", "/rope_parameters/partial_rotary_factor", json!(null)),
        ("phi_partial", "/rope_parameters/rope_type", json!("default")),
        ("phi3_long", "/rope_parameters/rope_type", json!("default")),
        ("phi3_long", "/rope_parameters/long_factor", json!([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])),
        ("phi3_long", "/sliding_window", json!(null)),
        ("phi3_short", "/rope_parameters/rope_type", json!("default")),
        ("phi3_short", "/rope_parameters/short_factor", json!([1.5, 2.2])),
        ("qwen2_windows", rope, unscaled_1000()),
        ("qwen2_windows", "/sliding_window", json!(8)),
        ("qwen3_bias", rope, unscaled_1000()),
        ("qwen3_bias", "/sliding_window", json!(8)),
        ("smollm3_biases", rope, unscaled_1000()),
        ("smollm3_biases", "/no_rope_layers", json!([1, 1])),
        ("smollm3_biases", "/sliding_window", json!(8)),
        ("stablelm_parallel", "/rope_parameters/partial_rotary_factor", json!(0.5)),
        ("stablelm_parallel", "/rope_parameters/rope_type", json!("default")),
        ("starcoder2_plain", "/sliding_window", json!(null)),
        ("starcoder2_plain", rope, unscaled_1000()),
    ] {
        assert_shows(&format!("{name} with {pointer} = {value}"), without(name, pointer, value), 0.1);
    }
}

#[test]
fn what_recurrent_layers_and_gates_do_besides_shows() {
    for (name, prefix) in [("qwen3_5", "model.language_model."), ("qwen3_5_text", "model.")] {
        let open = changed(name, |d| d.attention_gate = false);
        assert_shows(&format!("{name} without a gate on attention"), open, 0.1);
        let plain = changed(name, |d| d.norm = Norm::Rms);
        assert_shows(&format!("{name} with norms of the weight alone"), plain, 0.1);
        let whole = changed(name, |d| rotate(d, d.head_dim));
        assert_shows(&format!("{name} with whole heads that rotate"), whole, 0.1);
        // Of the tensor that holds queries, keys and values of a recurrent layer, rows as they would lie in another order.
        for order in [["key", "query", "value"], ["value", "query", "key"], ["query", "value", "key"]] {
            let otherwise = misruled(name, |checkpoint, spec| {
                let (layer, part, _) = attention_weight(spec)?;
                let tensor = checkpoint.get(&format!("{prefix}layers.{layer}.linear_attn.in_proj_qkv.weight"))?;
                let sizes = checkpoint[&format!("{prefix}layers.{layer}.linear_attn.out_proj.weight")].shape[1];
                let width = |part: &str| if part == "value" { sizes } else { (tensor.shape[0] - sizes) / 2 };
                let at = order.iter().position(|&other| other == part)?;
                let start = order[..at].iter().map(|part| width(part)).sum::<usize>();
                Some(rows(tensor, spec, [start].into_iter(), width(part)))
            });
            assert_shows(&format!("{name} in the order {order:?}"), otherwise, 0.1);
        }
        // All queries, then all gates.
        let blocks = misruled(name, |checkpoint, spec| {
            let (layer, part, _) = attention_weight(spec)?;
            let tensor = checkpoint.get(&format!("{prefix}layers.{layer}.self_attn.q_proj.weight"))?;
            let start = ["query", "gate"].iter().position(|&other| other == part)? * spec.shape[0];
            Some(rows(tensor, spec, [start].into_iter(), spec.shape[0]))
        });
        assert_shows(&format!("{name} with queries before gates"), blocks, 0.1);
        let of_part = |wanted: &'static str, change: fn(&mut Vec<f32>, &WeightSpec)| {
            misruled(name, move |checkpoint, spec| {
                let layer = spec.name.strip_prefix("layers.")?.strip_suffix(wanted)?.strip_suffix(".attention.")?;
                let source = match wanted {
                    "conv.weight" => "conv1d.weight",
                    "decay.bias" => "dt_bias",
                    "decay_log" => "A_log",
                    _ => "norm.weight",
                };
                let mut values = checkpoint.get(&format!("{prefix}layers.{layer}.linear_attn.{source}"))?.values();
                change(&mut values, spec);
                Some(values)
            })
        };
        let backwards = of_part("conv.weight", |values, spec| {
            values.chunks_exact_mut(spec.shape[2]).for_each(<[f32]>::reverse);
        });
        assert_shows(&format!("{name} with a convolution backwards"), backwards, 0.1);
        let unmoved = of_part("decay.bias", |values, _| values.fill(0.0));
        assert_shows(&format!("{name} without the bias of decays"), unmoved, 0.01);
        let alike = of_part("decay_log", |values, _| values.fill(0.0));
        assert_shows(&format!("{name} with one rate of decay"), alike, 0.1);
        let plus_one = of_part("read_norm.weight", |values, _| values.iter_mut().for_each(|x| *x += 1.0));
        assert_shows(&format!("{name} with a norm of 1 + weight on what is read"), plus_one, 0.1);
    }
    // All queries, then all keys, values and gates; all rates, then all decays.
    let blocks = misruled("qwen3_next", |checkpoint, spec| {
        let (layer, part, _) = attention_weight(spec)?;
        let at = |name: &str| checkpoint.get(&format!("model.layers.{layer}.linear_attn.{name}.weight"));
        let [keys, values] = [16, 24];
        match part {
            "query" => Some(rows(at("in_proj_qkvz")?, spec, [0].into_iter(), keys)),
            "key" => Some(rows(at("in_proj_qkvz")?, spec, [keys].into_iter(), keys)),
            "value" => Some(rows(at("in_proj_qkvz")?, spec, [2 * keys].into_iter(), values)),
            "gate" => Some(rows(at("in_proj_qkvz")?, spec, [2 * keys + values].into_iter(), values)),
            _ => None,
        }
    });
    assert_shows("qwen3_next in blocks", blocks, 0.1);
    for (what, starts) in [("in blocks", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("the other way", [[2, 3, 6, 7], [0, 1, 4, 5]])]
    {
        let otherwise = misruled("qwen3_next", |checkpoint, spec| {
            let layer = spec.name.strip_prefix("layers.")?.split_once('.')?.0;
            let tensor = checkpoint.get(&format!("model.layers.{layer}.linear_attn.in_proj_ba.weight"))?;
            let part = ["rate.weight", "decay.weight"].iter().position(|part| spec.name.ends_with(part))?;
            Some(rows(tensor, spec, starts[part].into_iter(), 1))
        });
        assert_shows(&format!("qwen3_next with rates and decays {what}"), otherwise, 0.1);
    }
    for name in ["qwen3_5_moe", "qwen3_next"] {
        let loose = changed_experts(name, |it| it.router.normalised = None);
        assert_shows(&format!("{name} with weights as they are"), loose, 0.01);
    }
    let keys = without("qwen3_5_text", "/rope_parameters/partial_rotary_factor", json!(0.25));
    assert_shows("qwen3_5_text with a smaller part that rotates", keys, 0.1);
    let unscaled = without("qwen3_5_text", "/rope_parameters/rope_type", json!("default"));
    assert_shows("qwen3_5_text without its scaling", unscaled, 0.01);
}
