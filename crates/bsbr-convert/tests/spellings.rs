//! One setting under several names: what transformers reads, or an error that names both.

mod common;

use std::path::Path;

use bsbr_convert::rules::SourceModel;
use bsbr_convert::{ConfigFile, ConvertError, find_rules};
use bsbr_model::{Activation, DecoderConfig, LayerRotary, Positions, RotaryScaling};
use serde_json::{Value, json};

fn read_source(config: &Value) -> Result<SourceModel, ConvertError> {
    let file = ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?;
    find_rules(&file)?.read()
}

/// The decoder of a fixture with other keys; `absent` takes a key away.
fn with(name: &str, changes: &Value) -> Result<DecoderConfig, ConvertError> {
    let path = common::fixtures().join(name).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON");
    let object = config.as_object_mut().expect("an object");
    for (key, value) in changes.as_object().expect("an object") {
        if value == "absent" {
            object.remove(key);
        } else {
            object.insert(key.clone(), value.clone());
        }
    }
    let decoder = read_source(&config)?.decoder;
    decoder.validate()?;
    Ok(decoder)
}

fn rotary(name: &str, changes: &Value) -> (f64, usize, Option<RotaryScaling>) {
    match with(name, changes).unwrap_or_else(|error| panic!("{name} {changes}: {error}")).positions {
        Positions::Rotary { theta, rotary_dim, scaling } => (theta, rotary_dim, scaling),
        other => panic!("{name}: {other:?}"),
    }
}

#[track_caller]
fn refused(name: &str, changes: &Value, words: &[&str]) {
    let error = with(name, changes).expect_err(name).to_string();
    for word in words {
        assert!(error.contains(word), "{name} {changes}: no {word:?} in: {error}");
    }
}

/// The fixtures with rotary positions whose `rope_parameters` repeat the defaults of their class: base and rotating part.
const ROTARY: [(&str, f64, usize); 16] = [
    ("llama", 1e4, 12),
    ("mistral", 1e4, 16),
    ("qwen2", 1e4, 12),
    ("qwen3", 1e4, 16),
    ("phi", 1e4, 6),
    ("starcoder2", 1e4, 12),
    ("gemma", 1e4, 16),
    ("gemma2", 1e4, 16),
    ("gemma3_text", 1e6, 16),
    ("smollm3", 2e6, 12),
    ("olmo", 1e4, 12),
    ("olmo2", 1e4, 12),
    ("granite", 1e4, 12),
    ("cohere", 5e5, 12),
    ("falcon_7b", 1e4, 12),
    ("falcon_40b", 1e4, 12),
];

fn yarn() -> Value {
    json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
}

fn is_yarn(scaling: &Option<RotaryScaling>) -> bool {
    matches!(scaling, Some(RotaryScaling::Yarn { factor: 4.0, original_max_positions: 16, .. }))
}

#[test]
fn a_scaling_added_beside_newer_settings_that_do_not_scale_is_read() {
    for (name, theta, rotary_dim) in ROTARY {
        let (found_theta, found_dim, scaling) = rotary(name, &json!({"rope_scaling": yarn()}));
        assert_eq!((found_theta, found_dim), (theta, rotary_dim), "{name}");
        assert!(is_yarn(&scaling), "{name}: {scaling:?}");
        // An empty object says nothing, as null does.
        for nothing in [json!({}), Value::Null] {
            assert_eq!(rotary(name, &json!({"rope_scaling": nothing})), (theta, rotary_dim, None), "{name}");
        }
    }
}

#[test]
fn a_base_inside_the_older_scaling_is_read() {
    let linear = Some(RotaryScaling::Linear { factor: 4.0 });
    let inside = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0});
    for (name, _, rotary_dim) in ROTARY {
        let changes = json!({"rope_parameters": "absent", "rope_scaling": inside});
        assert_eq!(rotary(name, &changes), (5000.0, rotary_dim, linear.clone()), "{name}");
    }
    // And the part of a head that rotates, under the name that all architectures share there.
    let inside = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5});
    for name in ["gpt_neox", "phi", "stablelm", "stablelm_12b"] {
        let changes = json!({"rope_parameters": "absent", "rope_scaling": inside});
        assert_eq!(rotary(name, &changes), (5000.0, 6, linear.clone()), "{name}");
    }
    refused(
        "llama",
        &json!({"rope_scaling": inside, "rope_parameters": "absent"}),
        &["partial_rotary_factor", "1 or absent"],
    );
}

#[test]
fn settings_that_the_older_scaling_would_drop_are_named_with_it() {
    for name in ["llama", "qwen3", "gpt_neox", "phi", "stablelm", "falcon_7b", "granite"] {
        let theta = json!({"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 1.0});
        let changes = json!({"rope_parameters": theta, "rope_scaling": yarn()});
        refused(name, &changes, &["`rope_scaling` without `rope_theta`", "`rope_parameters.rope_theta` = 700000"]);
    }
    // The fixtures rotate half of each head, their classes another part.
    for name in ["gpt_neox", "stablelm", "stablelm_12b"] {
        let words = ["`rope_scaling` without `partial_rotary_factor`", "`rope_parameters.partial_rotary_factor` = 0.5"];
        refused(name, &json!({"rope_scaling": yarn()}), &words);
    }
    let other = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0});
    let words = ["`rope_scaling` = {", "\"yarn\"", "`rope_parameters` = {", "\"linear\"", "remove one"];
    refused("llama", &json!({"rope_parameters": other, "rope_scaling": yarn()}), &words);
    refused("llama", &json!({"rope_parameters": other, "rope_scaling": {"rope_type": "default"}}), &["contradict"]);
    let two = json!({"full_attention": other, "sliding_attention": {"rope_type": "default"}});
    refused("gemma3_text", &json!({"rope_parameters": two, "rope_scaling": yarn()}), &["contradict"]);
}

#[test]
fn two_names_of_one_setting_may_agree() {
    let linear = |theta: f64| (theta, 12, Some(RotaryScaling::Linear { factor: 2.0 }));
    let scaling = json!({"rope_type": "linear", "factor": 2, "rope_theta": 7e3});
    let parameters = json!({"type": "linear", "factor": 2.0, "rope_theta": 7000});
    let changes = json!({"rope_theta": 7e3, "rope_scaling": scaling, "rope_parameters": parameters});
    assert_eq!(rotary("llama", &changes), linear(7e3));
    let both = json!({"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 7e3});
    assert_eq!(rotary("llama", &json!({"rope_parameters": both})), linear(7e3));
    // As releases in between wrote them.
    let neox = json!({"rope_parameters": "absent", "rotary_pct": 0.5, "partial_rotary_factor": 0.5,
        "rotary_emb_base": 5e3, "rope_theta": 5e3});
    assert_eq!(rotary("gpt_neox", &neox), (5e3, 6, None));
    let aliases = json!({"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2});
    for name in ["gpt2", "gpt_bigcode_mqa", "gptj", "bloom", "mpt", "gpt_neo"] {
        assert_eq!(with(name, &aliases).expect(name), with(name, &json!({})).expect(name), "{name}");
    }
}

#[test]
fn two_names_of_one_setting_that_disagree_are_both_named() {
    for (name, changes, words) in [
        ("llama", json!({"rope_theta": 5e5}), ["`rope_parameters.rope_theta` = 10000", "`rope_theta` = 500000"]),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}),
            ["`rope_parameters.rope_type` = default", "`rope_parameters.type` = linear"],
        ),
        (
            "llama",
            json!({"rope_parameters": yarn(), "original_max_position_embeddings": 32}),
            ["`original_max_position_embeddings` = 32", "`rope_parameters.original_max_position_embeddings` = 16"],
        ),
        (
            "gpt_neox",
            json!({"rotary_emb_base": 5e4}),
            ["`rope_parameters.rope_theta` = 10000", "`rotary_emb_base` = 50000"],
        ),
        ("gpt_neox", json!({"rope_theta": 5e4}), ["`rotary_emb_base` = 10000", "`rope_theta` = 50000"]),
        ("gpt_neox", json!({"partial_rotary_factor": 1.0}), ["`rotary_pct` = 0.5", "`partial_rotary_factor` = 1"]),
        ("phi", json!({"partial_rotary_factor": 1.0}), ["`rope_parameters.partial_rotary_factor` = 0.5", "= 1"]),
        (
            "phi3",
            json!({"original_max_position_embeddings": "absent", "rope_scaling": {"rope_type": "longrope",
                "original_max_position_embeddings": 32, "short_factor": vec![1.0; 6], "long_factor": vec![1.0; 6]}}),
            ["4096 for this model type", "`rope_scaling.original_max_position_embeddings` = 32"],
        ),
        (
            "gemma3_text",
            json!({"rope_local_base_freq": 5e4}),
            ["`rope_parameters.sliding_attention.rope_theta` = 10000", "`rope_local_base_freq` = 50000"],
        ),
        (
            "gemma3_text",
            json!({"rope_theta": 5e4}),
            ["`rope_parameters.full_attention.rope_theta` = 1000000", "`rope_theta` = 50000"],
        ),
        ("gemma", json!({"hidden_act": "gelu", "hidden_activation": "gelu"}), ["`hidden_act`", "`hidden_activation`"]),
        ("gpt2", json!({"hidden_size": 64}), ["`n_embd` = 48", "`hidden_size` = 64"]),
        ("gpt2", json!({"num_hidden_layers": 3}), ["`n_layer` = 2", "`num_hidden_layers` = 3"]),
        ("gpt2", json!({"max_position_embeddings": 7}), ["`n_positions` = 64", "`max_position_embeddings` = 7"]),
        ("gpt_bigcode_mqa", json!({"num_attention_heads": 2}), ["`n_head` = 4", "`num_attention_heads` = 2"]),
        ("gptj", json!({"num_attention_heads": 2}), ["`n_head` = 4", "`num_attention_heads` = 2"]),
        ("bloom", json!({"n_embed": 96}), ["`hidden_size` = 48", "`n_embed` = 96"]),
        ("falcon_7b", json!({"n_head": 2}), ["`num_attention_heads` = 4", "`n_head` = 2"]),
        ("falcon_7b", json!({"n_embed": 96}), ["`hidden_size` = 48", "`n_embed` = 96"]),
        ("gpt_neo", json!({"num_attention_heads": 2}), ["`num_heads` = 4", "`num_attention_heads` = 2"]),
        (
            "gpt_neo",
            json!({"attention_types": [[["local", "global"], 1]]}),
            ["`attention_layers` = [", "`attention_types` = ["],
        ),
        ("mpt", json!({"num_hidden_layers": 3}), ["`n_layers` = 2", "`num_hidden_layers` = 3"]),
    ] {
        refused(name, &changes, &[&words[..], &["contradict each other"]].concat());
    }
}

#[test]
fn settings_in_a_form_that_the_architecture_does_not_read_are_refused() {
    let by_kind = json!({"full_attention": {"rope_type": "default", "rope_theta": 5e5}});
    for name in ["llama", "qwen2", "smollm3", "gemma2"] {
        refused(name, &json!({"rope_parameters": by_kind}), &["`rope_parameters` must be one object"]);
    }
    let flat = json!({"rope_type": "default", "rope_theta": 5e5});
    refused("gemma3_text", &json!({"rope_parameters": flat}), &["`full_attention` and `sliding_attention`"]);
    let older = json!({"type": "linear", "factor": 8.0});
    let words = ["`rope_scaling.rope_type` must be stated, as releases of transformers differ"];
    refused("gemma3_text", &json!({"rope_parameters": "absent", "rope_scaling": older}), &words);
    refused("phi3", &json!({"rope_scaling": {"type": "linear", "factor": 8.0}}), &["default or longrope"]);
    for key in ["rope_scaling", "rope_parameters"] {
        refused("gptj", &json!({key: yarn()}), &[key, "knows no such setting"]);
    }
    refused("gptj", &json!({"rope_theta": 5e4}), &["`rope_theta` = 50000", "10000"]);
    // Three of twelve numbers of a head cannot be paired.
    let odd = ["`rotary_pct` must be a share of the 12 numbers of a head that comes to an even number"];
    refused("gpt_neox", &json!({"rope_parameters": "absent", "rotary_pct": 0.25}), &odd);
}

#[test]
fn gpt_oss_scales_its_positions_where_nothing_says_how_and_keeps_the_base_of_its_file() {
    let yarn = |theta: f64| {
        let scaling = RotaryScaling::Yarn {
            factor: 32.0,
            original_max_positions: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 32_f64.ln() + 1.0,
            truncate: false,
        };
        (theta, 8, Some(scaling))
    };
    for (changes, expected) in [
        (json!({"rope_parameters": "absent"}), yarn(150_000.0)),
        (json!({"rope_parameters": null}), yarn(150_000.0)),
        (json!({"rope_parameters": "absent", "rope_scaling": null, "rope_theta": 1e4}), yarn(1e4)),
        // One that says the default is no absence.
        (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}), (5e5, 8, None)),
    ] {
        assert_eq!(rotary("gpt_oss", &changes), expected, "{changes}");
    }
    let keys = json!({"num_experts_per_tok": "absent", "experts_per_token": 3, "swiglu_alpha": "absent"});
    let decoder = with("gpt_oss", &keys).expect("older names");
    assert_eq!(decoder.experts.expect("experts").chosen, 3);
    assert_eq!(decoder.clamped_gate, Some(bsbr_model::ClampedGate { limit: 1.5, alpha: 1.702 }));
    refused("gpt_oss", &json!({"experts_per_token": 3}), &["`num_experts_per_tok` = 2", "`experts_per_token` = 3"]);
    refused("gpt_oss", &json!({"swiglu_limit": 0.0}), &["clamped_gate.limit"]);
}

#[test]
fn each_layer_of_granite_swa_rotates_by_its_own_base() {
    let layers = |changes: Value| with("granite_swa", &changes).expect("a decoder").layer_rotary;
    let local = LayerRotary::Local { theta: 500.0 };
    assert_eq!(layers(json!({})), [LayerRotary::Off, LayerRotary::Global, local, LayerRotary::Global]);
    assert_eq!(layers(json!({"layer_rope_theta": null})), []);
    let windows = with("granite_swa", &json!({"layer_types": "absent"})).expect("the default of the class").windows;
    assert_eq!(windows, [None, Some(8), Some(8), Some(8)]);
    refused(
        "granite_swa",
        &json!({"layer_rope_theta": [0, 1.0, 1.0]}),
        &["`layer_rope_theta`", "each of the 4 layers"],
    );
    refused(
        "granite_swa",
        &json!({"layer_rope_theta": [0, 1.0, -1.0, 1.0]}),
        &["`layer_rope_theta` must be numbers above"],
    );
    let scaled = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}});
    refused("granite_swa", &scaled, &["`layer_rope_theta` must be 0 or `rope_theta` in every layer"]);
}

#[test]
fn lists_with_one_entry_a_layer_have_one_for_each() {
    let words = |key: &str| [format!("`{key}` must be a list with one entry for each of the"), "entries".to_owned()];
    for (name, key, list) in [
        ("gemma2", "layer_types", json!(["full_attention"])),
        ("gemma3_text", "layer_types", json!(["full_attention", "full_attention"])),
        ("qwen2", "layer_types", json!(vec!["full_attention"; 3])),
        ("qwen3", "layer_types", json!([])),
        ("smollm3", "layer_types", json!(vec!["full_attention"; 5])),
        ("smollm3", "no_rope_layers", json!([1, 1])),
        ("gpt_neo", "attention_layers", json!(["global"])),
    ] {
        let changes = json!({key: list, "attention_types": "absent"});
        let words = words(key);
        refused(name, &changes, &[&words[0], &words[1]]);
    }
    assert_eq!(with("qwen2", &json!({"layer_types": ["attention", "attention"]})).expect("an older name").windows, []);
}

#[test]
fn the_first_gemma_reads_one_key_of_its_activation_and_refuses_another_that_differs() {
    for (changes, expected) in [
        (json!({"hidden_act": "gelu"}), Activation::GeluTanh),
        (json!({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}), Activation::GeluTanh),
        (json!({"hidden_act": "absent", "hidden_activation": "gelu_pytorch_tanh"}), Activation::GeluTanh),
        (json!({"hidden_act": "silu"}), Activation::Silu),
    ] {
        assert_eq!(with("gemma", &changes).expect("a decoder").activation, expected, "{changes}");
    }
}

#[cfg(feature = "flex")]
mod logits {
    use bsbr_convert::{ExpectedLogits, ModelSource};
    use bsbr_model::{Decoder, compare_logits};
    use burn::tensor::Device;
    use serde_json::{Value, json};

    use super::common::{checkout, edit_config, fixtures};
    use super::yarn;

    /// Expected logits were computed by transformers with the same keys.
    fn difference(expected: &str, edit: impl FnOnce(&mut Value)) -> f64 {
        let (_temp, dir) = checkout("llama", "config.json");
        edit_config(&dir, edit);
        let expected = ExpectedLogits::open(&fixtures().join("llama_spellings").join(expected)).expect("a fixture");
        let mut source = ModelSource::open(&dir).expect("a sound model");
        let config = source.model_config().clone();
        let decoder = Decoder::load(config, &mut source, &Device::flex()).expect("sound weights");
        compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts").max
    }

    #[test]
    fn both_spellings_give_the_logits_that_transformers_gives() {
        let beside = |config: &mut Value| config["rope_scaling"] = yarn();
        assert!(difference("expected_yarn_beside.safetensors", beside) <= 1e-4);
        let inside = |config: &mut Value| {
            config.as_object_mut().expect("an object").remove("rope_parameters");
            config["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0});
        };
        assert!(difference("expected_theta_inside.safetensors", inside) <= 1e-4);
        assert!(difference("expected_theta_inside.safetensors", |_| {}) > 1e-2, "the settings matter");
    }
}
