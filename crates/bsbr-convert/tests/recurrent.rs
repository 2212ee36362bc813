//! What the keys of decoders with recurrent layers mean.

mod common;

use std::path::Path;

use bsbr_convert::rules::SourceModel;
use bsbr_convert::{ConfigFile, ConvertError, ModelSource, find_rules};
use bsbr_model::{DecoderConfig, GatedDelta};
use common::{checkout, fixtures};
use serde_json::{Value, json};

fn read_source(config: &Value) -> Result<SourceModel, ConvertError> {
    find_rules(&ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?)?.read()
}

/// The decoder of a fixture with other keys; `absent` takes a key away.
fn read(name: &str, file: &str, changes: &Value) -> Result<DecoderConfig, String> {
    let path = fixtures().join(name).join(file);
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON");
    let nested = config.get("text_config").is_some();
    let object = if nested { &mut config["text_config"] } else { &mut config };
    let object = object.as_object_mut().expect("an object");
    for (key, value) in changes.as_object().expect("an object") {
        if value == "absent" {
            object.remove(key);
        } else {
            object.insert(key.clone(), value.clone());
        }
    }
    let decoder = read_source(&config).map_err(|error| error.to_string())?.decoder;
    decoder.validate().map_err(|error| error.to_string())?;
    Ok(decoder)
}

const BOTH: [&str; 4] = ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"];

#[test]
fn both_spellings_say_the_same() {
    for name in BOTH {
        let read = |file| read(name, file, &json!({})).expect(name);
        assert_eq!(read("config.json"), read("config_v4.json"), "{name}");
    }
}

#[test]
fn kinds_of_layers_follow_from_either_key() {
    let layers = |name: &str, changes: Value| {
        read(name, "config.json", &changes).map(|decoder| decoder.recurrent.map(|it| it.layers).unwrap_or_default())
    };
    for name in ["qwen3_5", "qwen3_5_moe", "qwen3_next"] {
        assert_eq!(layers(name, json!({})), Ok(vec![0, 1, 2]), "{name}");
        assert_eq!(layers(name, json!({"layer_types": "absent"})), Ok(vec![0, 1, 2]), "{name}");
        let every_other = json!({"layer_types": "absent", "full_attention_interval": 2});
        assert_eq!(layers(name, every_other), Ok(vec![0, 2]), "{name}");
        // What stands for each layer counts.
        let both = json!({"full_attention_interval": 2});
        assert_eq!(layers(name, both), Ok(vec![0, 1, 2]), "{name}");
        let none = json!({"layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"]});
        assert_eq!(layers(name, none), Ok(vec![]), "{name}");
    }
}

#[test]
fn sizes_that_are_absent_are_those_of_the_class() {
    let keys = [
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ];
    let absent: serde_json::Map<String, Value> = keys.iter().map(|key| ((*key).to_owned(), json!("absent"))).collect();
    let decoder = read("qwen3_5", "config.json", &Value::Object(absent)).expect("sound");
    let expected =
        GatedDelta { layers: vec![0, 1, 2], key_heads: 16, value_heads: 32, key_dim: 128, value_dim: 128, kernel: 4 };
    assert_eq!(decoder.recurrent, Some(expected));
}

#[test]
fn what_the_decoder_does_not_compute_is_refused_by_its_key() {
    let kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"];
    let with = |at: usize, kind: &str| {
        let mut kinds = kinds;
        kinds[at] = kind;
        json!({"layer_types": kinds})
    };
    for name in ["qwen3_5", "qwen3_5_moe", "qwen3_next"] {
        for (changes, expected) in [
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"hidden_act": "gelu"}), "hidden_act` must be silu"),
            (
                json!({"layer_types": "absent", "full_attention_interval": 0}),
                "full_attention_interval` must be 1 or more",
            ),
            (json!({"layer_types": ["full_attention"]}), "one entry for each of the 4 layers"),
            (with(1, "sliding_attention"), "layer_types` must be a list of linear_attention and full_attention"),
            (with(1, "mamba"), "layer_types` must be a list of linear_attention and full_attention"),
            (json!({"layer_types": vec!["linear_attention"; 4]}), "recurrent.layers"),
            (json!({"linear_num_key_heads": 3}), "recurrent.key_heads"),
            (json!({"linear_key_head_dim": 0}), "recurrent.key_dim"),
            (json!({"linear_conv_kernel_dim": 1}), "recurrent.kernel"),
            (json!({"linear_conv_kernel_dim": "four"}), "linear_conv_kernel_dim"),
        ] {
            let error = read(name, "config.json", &changes).expect_err(name);
            assert!(error.contains(expected), "{name} {changes}: {error}");
        }
    }
    for name in ["qwen3_5", "qwen3_5_moe"] {
        let endless = json!({"num_hidden_layers": 1u64 << 60, "layer_types": "absent"});
        assert!(read(name, "config.json", &endless).expect_err(name).contains("layers"));
    }
}

#[test]
fn bytes_of_states_are_part_of_what_a_model_needs() {
    let (_temp, dir) = checkout("qwen3_5", "config.json");
    let source = ModelSource::open(&dir).expect("a fixture");
    // One layer of two KV heads of width 16, three of 56 channels and four matrices.
    assert_eq!(source.cache_bytes_per_token(), 4 * 2 * 2 * 16);
    let states = 4 * 3 * (3 * 56 + 4 * 8 * 6) as u64;
    assert_eq!(source.memory_need(0).expect("sound").cache, states);
    assert_eq!(source.memory_need(10).expect("sound").cache, states + 10 * source.cache_bytes_per_token() as u64);
}
