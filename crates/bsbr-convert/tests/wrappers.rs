//! Decoders inside models that read images too: which settings are theirs, what ties their head, and what is kept aside.

mod common;

use std::path::Path;

use bsbr_convert::rules::SourceModel;
use bsbr_convert::{ConfigFile, ConvertError, HeadForm, WRAPPERS, export, find_rules, plan_checkpoint};
use common::{Tensor, checkout, convert_plain, edit_config, edit_tensors, fixtures, message, refused, snapshot};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<SourceModel, ConvertError> {
    find_rules(&ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?)?.read()
}

fn fixture(name: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(name).join(file)).expect("a fixture")).expect("JSON")
}

fn set(object: &mut Value, key: &str, value: Option<bool>) {
    let object = object.as_object_mut().expect("an object");
    match value {
        Some(value) => drop(object.insert(key.to_owned(), value.into())),
        None => drop(object.remove(key)),
    }
}

/// What ties the head with the flags outside and inside, each stated or not.
fn tied(name: &str, outer: Option<bool>, inner: Option<bool>) -> bool {
    let mut config = fixture(name, "config.json");
    set(&mut config, "tie_word_embeddings", outer);
    set(&mut config["text_config"], "tie_word_embeddings", inner);
    read(&config).expect(name).decoder.tied_head
}

#[test]
fn the_outer_flag_ties_the_head_and_the_inner_one_only_where_either_counts() {
    let flags = [None, Some(false), Some(true)];
    for outer in flags {
        for inner in flags {
            assert_eq!(tied("gemma3", outer, inner), outer.unwrap_or(true), "gemma3 {outer:?} {inner:?}");
            assert_eq!(tied("gemma4", outer, inner), outer.unwrap_or(true), "gemma4 {outer:?} {inner:?}");
            assert_eq!(tied("qwen3_vl", outer, inner), outer.unwrap_or(false), "qwen3_vl {outer:?} {inner:?}");
            let either = outer == Some(true) || inner == Some(true);
            assert_eq!(tied("qwen2_5_vl", outer, inner), either, "qwen2_5_vl {outer:?} {inner:?}");
            assert_eq!(tied("glm4v", outer, inner), either, "glm4v {outer:?} {inner:?}");
        }
    }
}

#[test]
fn other_parts_are_kept_aside_under_either_names_and_given_back() {
    for (name, aside, parts) in [
        ("gemma3", 34, ["vision_tower.", "multi_modal_projector."]),
        ("gemma3_new", 34, ["model.vision_tower.", "model.multi_modal_projector."]),
        ("qwen2_5_vl", 18, ["visual.", "visual."]),
        ("qwen2_5_vl_new", 18, ["model.visual.", "model.visual."]),
        ("qwen3_vl", 27, ["model.visual.", "model.visual."]),
        ("glm4v", 20, ["model.visual.", "model.visual."]),
        ("gemma4", 16, ["model.vision_tower.", "model.embed_vision."]),
        ("qwen3_5", 21, ["model.visual.", "model.visual."]),
        ("qwen3_5_hub", 24, ["model.visual.", "mtp."]),
    ] {
        let (temp, dir) = checkout(name, "config.json");
        // Of a format that no weight has.
        let odd =
            Tensor { name: format!("{}odd", parts[0]), dtype: "U8".into(), shape: vec![3], bytes: vec![1, 2, 255] };
        edit_tensors(&dir, |tensors| tensors.push(odd));
        let plan = plan_checkpoint(&dir).unwrap_or_else(|error| panic!("{name}: {error}")).plan;
        assert_eq!(plan.ignored.len(), aside + 1, "{name}");
        assert!(plan.ignored.iter().all(|it| parts.iter().any(|part| it.tensor.name.starts_with(part))), "{name}");
        assert!(plan.to_string().contains(&format!("{}*", parts[0])), "{name}: {plan}");
        let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
        convert_plain(&dir, &converted).expect(name);
        assert!(export(&converted, &back, false, &mut |_| {}).expect(name).is_original(), "{name}");
        assert_eq!(snapshot(&back), snapshot(&dir), "{name}");
    }
}

#[test]
fn a_tensor_of_no_part_is_named() {
    let (_temp, dir) = checkout("gemma3", "config.json");
    edit_tensors(&dir, |tensors| tensors.push(Tensor::f32("audio_tower.weight", &[1], [0.0])));
    assert!(message(&refused(&dir)).contains("unused: no rule reads `audio_tower.weight`"));
}

#[test]
fn the_head_beside_the_decoder_is_found_where_it_is_not_tied() {
    for (name, head) in [("gemma3", "language_model.lm_head.weight"), ("gemma3_new", "lm_head.weight")] {
        let (_temp, dir) = checkout(name, "config.json");
        edit_tensors(&dir, |tensors| tensors.push(Tensor::f32(head, &[97, 32], (0..97 * 32).map(|n| n as f32))));
        let plan = plan_checkpoint(&dir).expect(name).plan;
        assert_eq!(plan.head, HeadForm::Own, "{name}");
        assert!(plan.steps.iter().any(|step| step.sources[0].name == head), "{name}");
    }
}

#[test]
fn settings_beside_those_of_other_parts_are_read_as_inside() {
    for name in ["qwen2_5_vl", "qwen2_5_vl_new"] {
        let nested = fixture(name, "config.json");
        let mut flat = nested.clone();
        let inner = flat.as_object_mut().expect("an object").remove("text_config").expect("a text part");
        for (key, value) in inner.as_object().expect("an object").iter().filter(|(key, _)| *key != "model_type") {
            flat[key] = value.clone();
        }
        assert_eq!(read(&flat).expect(name).decoder, read(&nested).expect(name).decoder);
        // As the hub has it.
        let section = json!({"type": "mrope", "mrope_section": [2, 1, 1]});
        flat.as_object_mut().expect("an object").remove("rope_parameters");
        (flat["rope_theta"], flat["rope_scaling"]) = (json!(1e6), section);
        assert_eq!(read(&flat).expect(name).decoder, read(&nested).expect(name).decoder);
    }
}

#[test]
fn what_the_first_files_of_gemma_3_leave_out_is_that_of_its_class() {
    let config = json!({"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {}, "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}});
    let decoder = read(&config).expect("sound").decoder;
    assert_eq!((decoder.vocab_size, decoder.heads, decoder.kv_heads, decoder.head_dim), (262_208, 8, 4, 256));
    assert_eq!((decoder.max_positions, decoder.tied_head, decoder.attention_scale), (131_072, true, 1.0 / 16.0));
    assert_eq!(decoder.windows.iter().filter(|window| window.is_none()).count(), 5);
    // A decoder that does not say what it is.
    let mut unnamed = config.clone();
    unnamed["text_config"].as_object_mut().expect("an object").remove("model_type");
    assert_eq!(read(&unnamed).expect("sound").decoder, decoder);
}

#[test]
fn a_cap_on_logits_that_the_whole_model_does_not_read_is_not_read() {
    let mut config = fixture("gemma3", "config.json");
    config["text_config"]["final_logit_softcapping"] = json!(3.0);
    assert_eq!(read(&config).expect("sound").decoder.head.softcap, None);
    assert_eq!(read(&config["text_config"]).expect("sound").decoder.head.softcap, Some(3.0));
}

#[test]
fn stop_tokens_of_the_whole_come_before_those_of_the_decoder() {
    let stops = |outer: Value, inner: Value| {
        let (_temp, dir) = checkout("qwen3_vl", "config.json");
        edit_config(&dir, |config| {
            config["eos_token_id"] = outer;
            config["text_config"]["eos_token_id"] = inner;
        });
        plan_checkpoint(&dir).expect("sound").config.stop_tokens
    };
    assert_eq!(stops(json!([5, 3]), json!(7)), [3, 5]);
    assert_eq!(stops(Value::Null, json!(7)), [7]);
    assert_eq!(stops(Value::Null, Value::Null), Vec::<u32>::new());
}

#[test]
fn errors_name_the_object_a_key_is_in() {
    let mut config = fixture("gemma3", "config.json");
    config["text_config"]["hidden_size"] = json!("wide");
    let error = read(&config).expect_err("no number").to_string();
    assert!(error.contains("`text_config.hidden_size` must be a whole number"), "{error}");
    config["text_config"]["model_type"] = json!("mamba");
    assert!(read(&config).expect_err("no decoder").to_string().contains("`mamba` is not supported"));
    config.as_object_mut().expect("an object").remove("text_config");
    assert!(read(&config).expect_err("no part").to_string().contains("`text_config` must be an object"));
    // One inside the other.
    let mut config = fixture("qwen3_vl", "config.json");
    config["text_config"]["model_type"] = json!("gemma3");
    assert!(read(&config).expect_err("no decoder").to_string().contains("`gemma3` is not supported"));
}

#[test]
fn every_wrapper_names_a_decoder_there_are_rules_for() {
    for wrapper in WRAPPERS {
        assert!(bsbr_convert::architecture_by_name(wrapper.text_type).is_ok(), "{}", wrapper.text_type);
    }
}
