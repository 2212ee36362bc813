//! Each feature of a decoder that is easily lost shows in the logits: without it they leave the tolerance that the parity
//! tests hold them to. Several of these mistakes change no shape and hardly any best token.

#![cfg(feature = "flex")]

mod common;

use bsbr_convert::{ExpectedLogits, ModelSource};
use bsbr_model::{
    Activation, BlockForm, Decoder, DecoderConfig, LayerRotary, Norm, Positions, WeightSource, WeightSpec,
    compare_logits,
};
use burn::tensor::Device;
use common::{checkout, edit_config, fixtures};

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
