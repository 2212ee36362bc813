//! The tokens that end a text, as transformers takes them.

mod common;

use bsbr_convert::{ConvertError, plan_checkpoint};
use common::{checkout, edit_config};
use serde_json::{Value, json};

/// With these values in `config.json` and in `generation_config.json`; `None` for no such key, and for no such file.
fn stops(name: &str, config: Option<Value>, generation: Option<Value>) -> Result<Vec<u32>, ConvertError> {
    let (_temp, dir) = checkout(name, "config.json");
    edit_config(&dir, |file| {
        file.as_object_mut().expect("an object").remove("eos_token_id");
        if let Some(value) = config {
            file["eos_token_id"] = value;
        }
    });
    if let Some(value) = generation {
        std::fs::write(dir.join("generation_config.json"), value.to_string()).expect("room");
    }
    Ok(plan_checkpoint(&dir)?.config.stop_tokens)
}

#[test]
fn the_generation_config_decides_alone_where_there_is_one() {
    let generation = |value: Value| stops("llama", Some(json!(7)), Some(value)).expect("a sound file");
    assert_eq!(generation(json!({"eos_token_id": [9, 8, 9]})), [8, 9]);
    assert_eq!(generation(json!({"eos_token_id": 9})), [9]);
    for nothing in [json!({}), json!({"eos_token_id": null}), json!({"eos_token_id": -1}), json!({"eos_token_id": []})]
    {
        assert!(generation(nothing).is_empty(), "the config counts for nothing");
    }
}

#[test]
fn the_config_decides_where_there_is_no_generation_config() {
    let config = |value: Value| stops("llama", Some(value), None).expect("a sound file");
    assert_eq!(config(json!(7)), [7]);
    assert_eq!(config(json!([7, -1, 3])), [3, 7]);
    for nothing in [json!(null), json!(-1), json!([]), json!([-1])] {
        assert!(config(nothing.clone()).is_empty(), "{nothing}");
    }
}

#[test]
fn the_class_decides_where_no_file_says_anything() {
    for (name, expected) in [
        ("llama", Some(2)),
        ("gemma2", Some(1)),
        ("falcon_7b", Some(11)),
        ("stablelm", Some(0)),
        ("qwen2", None),
        ("mpt", None),
        // Beyond the 97 tokens of the fixture.
        ("gpt2", None),
    ] {
        assert_eq!(stops(name, None, None).expect(name), Vec::from_iter(expected), "{name}");
    }
}

#[test]
fn what_is_no_token_is_refused() {
    for value in [json!("</s>"), json!(1.5), json!([1, "x"]), json!(4_294_967_296_u64), json!({})] {
        let error = stops("llama", Some(value.clone()), None).expect_err("no token").to_string();
        assert!(error.contains("`eos_token_id` must be a token id or a list of token ids"), "{value}: {error}");
    }
}
