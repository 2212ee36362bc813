//! Keys of `config.json` that choose a variant: what they mean, and which are refused.

mod common;

use std::path::Path;

use bsbr_convert::rules::SourceModel;
use bsbr_convert::{ConfigFile, ConvertError, find_rules};
use bsbr_model::{Activation, BlockForm, DecoderConfig, LayerRotary, Positions, RotaryScaling};
use serde_json::{Value, json};

fn read_source(config: &Value) -> Result<SourceModel, ConvertError> {
    let file = ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?;
    find_rules(&file)?.read()
}

/// The decoder of a fixture with other keys; `absent` takes a key away.
fn with(name: &str, file: &str, changes: Value) -> Result<DecoderConfig, ConvertError> {
    let path = common::fixtures().join(name).join(file);
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

#[test]
fn variants_that_no_rule_covers_are_refused_by_name() {
    for (name, changes, message) in [
        ("phi", json!({"qk_layernorm": true}), "`qk_layernorm` = true is not supported"),
        ("cohere", json!({"use_qk_norm": true}), "`use_qk_norm` = true"),
        ("olmo", json!({"clip_qkv": 8.0}), "`clip_qkv` = 8.0"),
        ("bloom", json!({"apply_residual_connection_post_layernorm": true}), "`apply_residual_connection_post"),
        ("opt", json!({"_remove_final_layer_norm": true}), "`_remove_final_layer_norm` = true"),
        ("opt", json!({"layer_norm_elementwise_affine": false}), "`layer_norm_elementwise_affine` = false"),
        ("gemma", json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention` = true"),
        ("mpt", json!({"no_bias": false}), "`no_bias` = false"),
        ("mpt", json!({"attn_config": {"alibi": false}}), "`attn_config.alibi` = false"),
        ("mpt", json!({"attn_config": {"qk_ln": true}}), "`attn_config.qk_ln` = true"),
        ("mpt", json!({"attn_config": {"clip_qkv": 6}}), "`attn_config.clip_qkv` = 6"),
        ("mpt", json!({"attn_config": {"attn_type": "multiquery_attention"}}), "`attn_config.attn_type`"),
        ("mpt", json!({"logit_scale": "inv_sqrt_d_model"}), "`logit_scale`"),
        ("llama", json!({"rope_parameters": {"rope_type": "yarn"}}), "`rope_parameters.factor` must be a number"),
        ("falcon_40b", json!({"parallel_attn": false, "num_ln_in_parallel_attn": 1}), "`parallel_attn` = false"),
        ("gptj", json!({"rotary_dim": null}), "`rotary_dim` must be a number"),
        (
            "cohere",
            json!({"rope_parameters": null}),
            "`rope_theta` must be a number, as releases of transformers differ",
        ),
        ("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "`attn_logit_softcapping` = 50.0"),
        ("gemma2", json!({"layer_types": ["chunked_attention", "full_attention"]}), "`layer_types` must be"),
        ("qwen2", json!({"layer_types": ["sliding_attention", "full_attention"]}), "`sliding_window` must be"),
        ("gpt_neo", json!({"attention_layers": ["global"]}), "`attention_layers` = [\"global\"]"),
        ("mistral", json!({"model_type": "deepseek_v32"}), "model type `deepseek_v32` is not supported"),
    ] {
        let error = with(name, "config.json", changes).expect_err(message).to_string();
        assert!(error.contains(message), "{message}\n{error}");
    }
}

#[test]
fn windows_stand_where_each_architecture_puts_them() {
    let windows = |name, changes| with(name, "config_v4.json", changes).expect(name).windows;
    assert_eq!(windows("mistral", json!({})), [Some(8), Some(8)]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), []);
    assert_eq!(windows("mistral", json!({"sliding_window": "absent"})), [Some(4096), Some(4096)]);
    assert_eq!(windows("phi3", json!({"sliding_window": 5})), [Some(5), Some(5)]);
    let qwen =
        json!({"layer_types": "absent", "use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
    assert_eq!(windows("qwen2", qwen.clone()), [None, Some(5)]);
    assert_eq!(windows("qwen3", qwen), [None, Some(5)]);
    assert_eq!(windows("qwen2", json!({"layer_types": "absent", "sliding_window": 5})), []);
    assert_eq!(windows("gemma2", json!({"layer_types": "absent"})), [Some(8), None]);
    let neo = json!({"attention_layers": "absent", "attention_types": [[["local"], 1], [["global"], 1]]});
    assert_eq!(windows("gpt_neo", neo), [Some(8), None]);
    let every_third = with("gemma3_text", "config_v4.json", json!({"sliding_window_pattern": 3})).expect("a decoder");
    let local = LayerRotary::Local { theta: 1e4 };
    assert_eq!(every_third.windows, [Some(8), Some(8), None, Some(8), Some(8), None]);
    assert_eq!(every_third.layer_rotary, [local, local, LayerRotary::Global, local, local, LayerRotary::Global]);
}

#[test]
fn rotary_settings_are_read_where_each_architecture_keeps_them() {
    let rotary = |name, changes| match with(name, "config_v4.json", changes).expect(name).positions {
        Positions::Rotary { theta, rotary_dim, scaling } => (theta, rotary_dim, scaling),
        other => panic!("{other:?}"),
    };
    assert_eq!(rotary("gpt_neox", json!({"rotary_pct": 0.34, "rotary_emb_base": 5e4})), (5e4, 4, None));
    assert_eq!(rotary("phi", json!({"partial_rotary_factor": 1.0})).1, 12);
    assert_eq!(rotary("gptj", json!({"rotary_dim": 4})), (1e4, 4, None));
    let scaling = json!({"rope_type": "linear", "factor": 8.0});
    let (theta, _, scaling) = rotary("gemma3_text", json!({"rope_scaling": scaling}));
    assert_eq!((theta, scaling), (1e6, Some(RotaryScaling::Linear { factor: 8.0 })));
    // Phi-3's first files call it yarn.
    for kind in ["su", "yarn", "longrope"] {
        let scaling = json!({"type": kind, "short_factor": vec![1.0; 6], "long_factor": vec![2.0; 6]});
        let (_, _, scaling) = rotary("phi3", json!({"rope_scaling": scaling}));
        assert!(matches!(scaling, Some(RotaryScaling::Longrope { .. })), "{kind}: {scaling:?}");
    }
    let layers = with("smollm3", "config_v4.json", json!({"no_rope_layers": null, "no_rope_layer_interval": 2}));
    let (on, off) = (LayerRotary::Global, LayerRotary::Off);
    assert_eq!(layers.expect("a decoder").layer_rotary, [on, off, on, off]);
}

#[test]
fn the_forms_of_an_architecture_are_told_apart() {
    let form = |name, changes| with(name, "config.json", changes).expect(name).block.form;
    assert_eq!(form("gpt_neox", json!({"use_parallel_residual": false})), BlockForm::Sequential);
    assert_eq!(form("falcon_40b", json!({})), BlockForm::Parallel);
    assert_eq!(form("falcon_40b", json!({"num_ln_in_parallel_attn": null})), BlockForm::Parallel);
    assert_eq!(form("falcon_40b", json!({"num_ln_in_parallel_attn": 1})), BlockForm::ParallelSharedNorm);
    assert_eq!(form("falcon_7b", json!({})), BlockForm::ParallelSharedNorm);
    assert_eq!(form("falcon_rw", json!({})), BlockForm::Sequential);
    // A number of KV heads that the older forms do not read.
    assert_eq!(with("falcon_7b", "config.json", json!({"num_kv_heads": 4})).expect("a decoder").kv_heads, 1);
    let bloom = json!({"n_head": "absent", "num_attention_heads": 4, "hidden_size": "absent", "n_embed": 48});
    assert_eq!(with("bloom", "config.json", bloom).expect("aliases").heads, 4);
    for (act, hidden, expected) in [
        ("gelu", Value::Null, Activation::GeluTanh),
        ("gelu_pytorch_tanh", Value::Null, Activation::GeluTanh),
        ("silu", Value::Null, Activation::Silu),
    ] {
        let gemma = with("gemma", "config.json", json!({"hidden_act": act, "hidden_activation": hidden}));
        assert_eq!(gemma.expect("a decoder").activation, expected, "{act}");
    }
    let uncapped = json!({"attn_logit_softcapping": null, "final_logit_softcapping": "absent"});
    let gemma2 = with("gemma2", "config.json", uncapped).expect("a decoder");
    assert_eq!((gemma2.attention_softcap, gemma2.head.softcap), (None, Some(30.0)));
}

#[test]
fn a_file_that_does_not_say_ties_the_head_as_its_class_does() {
    for (name, tied) in [
        ("mistral", false),
        ("qwen2", false),
        ("qwen3", false),
        ("phi3", false),
        ("gpt_neox", false),
        ("starcoder2", true),
        ("gemma", true),
        ("gemma2", true),
        ("gemma3_text", true),
        ("smollm3", true),
        ("olmo2", false),
        ("olmo", false),
        ("granite", false),
        ("phi", false),
        ("stablelm", false),
        ("cohere", true),
        ("gptj", false),
        ("gpt_neo", true),
        ("falcon_7b", true),
        ("opt", true),
        ("bloom", true),
        ("mpt", true),
    ] {
        let decoder = with(name, "config.json", json!({"tie_word_embeddings": "absent"})).expect(name);
        assert_eq!(decoder.tied_head, tied, "{name}");
    }
}
