//! What the keys of Gemma 4 mean, layer by layer.

mod common;

use std::path::Path;

use bsbr_convert::{ConfigFile, ConvertError, ModelSource, find_rules, plan_checkpoint};
use bsbr_model::{DecoderConfig, LayerKeys, LayerRotary, LayerShape, ModelConfig, Positions, RotaryScaling};
use common::{Tensor, checkout, convert_plain, edit_config, edit_tensors, message, refused};
use serde_json::{Value, json};

/// The decoder of a fixture with other keys; `absent` takes a key away.
fn read(name: &str, file: &str, changes: &Value) -> Result<DecoderConfig, ConvertError> {
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
    let file = ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?;
    let decoder = find_rules(&file)?.read()?.decoder;
    decoder.validate()?;
    Ok(decoder)
}

#[test]
fn both_spellings_of_its_heads_say_the_same() {
    for name in ["gemma4_text", "gemma4_moe"] {
        let [new, old] = ["config.json", "config_v4.json"].map(|file| read(name, file, &json!({})).expect(name));
        assert_eq!(new, old, "{name}");
    }
    let decoder = read("gemma4_text", "config.json", &json!({})).expect("sound");
    let shape = |head_dim, intermediate_size, keys| LayerShape { kv_heads: 2, head_dim, intermediate_size, keys };
    let expected = [
        shape(8, 24, LayerKeys::Own),
        shape(16, 24, LayerKeys::Own),
        shape(8, 24, LayerKeys::Own),
        shape(8, 48, LayerKeys::Of { layer: 2 }),
        shape(16, 48, LayerKeys::Of { layer: 1 }),
    ];
    assert_eq!(decoder.layer_shapes, expected);
    let scaling = Some(RotaryScaling::Proportional { rotating: 4, factor: 1.0 });
    assert_eq!(decoder.positions, Positions::Rotary { theta: 1e6, rotary_dim: 16, scaling });
    assert_eq!(decoder.layer_rotary[..2], [LayerRotary::Whole { theta: 1e4 }, LayerRotary::Global]);
    // Layers can be listed with leading zeros.
    let padded = json!({"per_layer_config": {"01": {"head_dim": 16}, "04": {"head_dim": 16}}});
    assert_eq!(read("gemma4_text", "config.json", &padded).expect("sound"), decoder);
}

#[test]
fn absent_keys_mean_what_its_class_says() {
    let widths = |changes| {
        let decoder = read("gemma4_text", "config_v4.json", &changes).expect("sound");
        (0..5).map(|layer| decoder.shape(layer).head_dim).collect::<Vec<_>>()
    };
    assert_eq!(widths(json!({"global_head_dim": "absent"})), [8, 512, 8, 8, 512]);
    assert_eq!(widths(json!({"global_head_dim": null})), [8; 5]);
    assert_eq!(widths(json!({"head_dim": "absent"})), [256, 16, 256, 256, 16]);
    // Heads of their own are read where keys are values alone.
    let heads = |changes| {
        let decoder = read("gemma4_moe", "config_v4.json", &changes).expect("sound");
        (decoder.shape(2).kv_heads, decoder.shape(2).keys)
    };
    assert_eq!(heads(json!({})), (1, LayerKeys::AlsoValues));
    assert_eq!(heads(json!({"attention_k_eq_v": false})), (2, LayerKeys::Own));
    assert_eq!(heads(json!({"num_global_key_value_heads": null})), (2, LayerKeys::AlsoValues));
    // A window in five of six layers, and never in the last.
    let windows = |layers: usize| {
        let changes = json!({"layer_types": "absent", "num_hidden_layers": layers, "num_kv_shared_layers": 0});
        let windows = read("gemma4_text", "config_v4.json", &changes).expect("sound").windows;
        windows.iter().enumerate().filter(|(_, window)| window.is_none()).map(|(layer, _)| layer).collect::<Vec<_>>()
    };
    assert_eq!((windows(6), windows(8), windows(13)), (vec![5], vec![5, 7], vec![5, 11, 12]));
    assert_eq!(
        read("gemma4_text", "config.json", &json!({"use_bidirectional_attention": "vision"})).expect("so").layers,
        5
    );
}

#[test]
fn variants_without_a_meaning_are_refused_by_name() {
    for (name, changes, wanted) in [
        ("gemma4_text", json!({"use_bidirectional_attention": "all"}), "`use_bidirectional_attention` = \"all\""),
        ("gemma4_text", json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention` = true"),
        ("gemma4_text", json!({"num_kv_shared_layers": 5}), "`num_kv_shared_layers` must be a number below the 5"),
        ("gemma4_text", json!({"num_kv_shared_layers": 4}), "leaves a layer of kind full_attention whose keys layer 1"),
        ("gemma4_text", json!({"hidden_size_per_layer_input": "absent"}), "`hidden_size_per_layer_input` must be"),
        ("gemma4_text", json!({"vocab_size_per_layer_input": 96}), "at least the 97 tokens"),
        ("gemma4_text", json!({"rope_parameters": "absent"}), "`rope_parameters` must be an object with"),
        ("gemma4_text", json!({"per_layer_config": {"one": {}}}), "under the number of a layer"),
        ("gemma4_text", json!({"per_layer_config": {"1": {"rope": 3}}}), "layers differ in their heads alone"),
        ("gemma4_text", json!({"per_layer_config": {"1": {"head_dim": 16}}}), "heads of one width"),
        ("gemma4_text", json!({"global_head_dim": 32}), "they are two names of one setting"),
        ("gemma4_text", json!({"layer_types": "absent", "sliding_window": null}), "`sliding_window` must be a number"),
        ("gemma4_moe", json!({"num_experts": null}), "`num_experts` must be"),
        ("gemma4_moe", json!({"top_k_experts": 6}), "experts.chosen"),
        ("gemma4_moe", json!({"num_attention_heads": 3}), "expected a divisor of heads"),
    ] {
        let error = read(name, "config.json", &changes).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{wanted}\n{error}");
    }
}

#[test]
fn keys_of_layers_that_read_others_are_kept_aside_and_missing_ones_named() {
    let (_temp, dir) = checkout("gemma4_text_hub", "config.json");
    let plan = plan_checkpoint(&dir).expect("sound").plan;
    let aside: Vec<&str> = plan.ignored.iter().map(|it| it.tensor.name.as_str()).collect();
    let of = |layer| ["k_proj", "v_proj", "k_norm"].map(|part| format!("model.layers.{layer}.self_attn.{part}.weight"));
    assert_eq!(aside.len(), 6);
    assert!([of(3), of(4)].iter().flatten().all(|name| aside.contains(&name.as_str())), "{aside:?}");
    let text = plan.to_string();
    assert!(text.contains("the layer reads the keys and values of an earlier one"), "{text}");

    let (_temp, dir) = checkout("gemma4_text", "config.json");
    edit_config(&dir, |config| config["num_kv_shared_layers"] = json!(0));
    let error = message(&refused(&dir));
    assert!(error.contains("missing: `model.layers.3.self_attn.k_proj.weight`"), "{error}");
    let (_temp, dir) = checkout("gemma4_text", "config.json");
    edit_tensors(&dir, |tensors| tensors.retain(|tensor| tensor.name != "model.layers.2.layer_scalar"));
    let error = message(&refused(&dir));
    assert!(error.contains("missing: `model.layers.2.layer_scalar`"), "{error}");
    let (_temp, dir) = checkout("gemma4_moe", "config.json");
    edit_tensors(&dir, |tensors| {
        tensors.push(Tensor::f32("model.layers.2.self_attn.v_proj.weight", &[16, 32], (0..512).map(|n| n as f32)));
    });
    let error = message(&refused(&dir));
    assert!(error.contains("unused: no rule reads `model.layers.2.self_attn.v_proj.weight`"), "{error}");
}

#[test]
fn layers_without_keys_of_their_own_take_no_room_for_them() {
    // Two layers of two heads of width 8 and one of width 16, keys and values in f32.
    for name in ["gemma4_text", "gemma4_text_hub"] {
        let (temp, dir) = checkout(name, "config.json");
        let source = ModelSource::open(&dir).expect("sound");
        assert_eq!(source.cache_bytes_per_token(), 4 * 2 * (2 * 8 + 2 * 16 + 2 * 8), "{name}");
        let converted = temp.path().join("converted");
        convert_plain(&dir, &converted).expect("sound");
        assert_eq!(ModelSource::open(&converted).expect("sound").cache_bytes_per_token(), 4 * 2 * 64, "{name}");
    }
    let (_temp, dir) = checkout("gemma4_moe", "config.json");
    assert_eq!(ModelSource::open(&dir).expect("sound").cache_bytes_per_token(), 4 * 2 * (16 + 16 + 16));
}

#[test]
fn a_converted_description_comes_back_as_it_was() {
    for name in ["gemma4", "gemma4_moe", "gemma4_text"] {
        let (temp, dir) = checkout(name, "config.json");
        let converted = temp.path().join("converted");
        convert_plain(&dir, &converted).expect("sound");
        let bytes = std::fs::read(converted.join("config.json")).expect("a file");
        let config: ModelConfig = serde_json::from_slice(&bytes).expect("a description");
        assert_eq!(config.decoder, plan_checkpoint(&dir).expect("sound").plan.model.decoder, "{name}");
    }
}
