//! Tensors and configurations that do not fit, with which words, and that nothing is left behind. Every single tensor of
//! every architecture is in `damage.rs`.

mod common;

use std::fs;

use bsbr_convert::{ConvertError, PlanProblem, plan_checkpoint};
use common::{Tensor, checkout, edit_config, edit_tensors, message, refused};
use serde_json::json;

fn problems(error: ConvertError) -> Vec<PlanProblem> {
    match error {
        ConvertError::Plan { problems, .. } => problems,
        other => panic!("expected a list of problems, found: {other}"),
    }
}

/// A tensor of each kind: table, norm, fused weight, its bias, plain linear weight, last norm.
const KINDS: [&str; 6] = [
    "transformer.wte.weight",
    "transformer.h.1.ln_2.bias",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.attn.c_attn.bias",
    "transformer.h.1.mlp.c_proj.weight",
    "transformer.ln_f.weight",
];

#[test]
fn a_nan_or_infinity_in_a_tensor_of_every_kind_is_named_with_its_place() {
    for (name, value) in KINDS.iter().zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::NAN, f32::NAN]) {
        let (_temp, dir) = checkout("gpt2", "config.json");
        edit_tensors(&dir, |tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.name == *name).expect("a tensor");
            let mut values = tensor.values();
            values[17] = value;
            *tensor = Tensor::f32(name, &tensor.shape, values);
        });
        let text = message(&refused(&dir));
        assert!(text.contains(&format!("tensor `{name}` holds {value} at element 17")), "{text}");
    }
}

#[test]
fn an_ignore_rule_does_not_swallow_the_bias_of_the_fused_projection() {
    // The unanchored pattern `attn.bias` would match `attn.c_attn.bias`.
    let (_temp, dir) = checkout("gpt2", "config.json");
    let plan = plan_checkpoint(&dir).expect("sound").plan;
    assert!(plan.ignored.is_empty());
    assert!(plan.steps.iter().any(|step| step.sources[0].name == "transformer.h.0.attn.c_attn.bias"));
}

#[test]
fn every_problem_is_reported_at_once() {
    let (_temp, dir) = checkout("gpt2", "config.json");
    edit_tensors(&dir, |tensors| {
        tensors.retain(|tensor| !tensor.name.contains("wpe"));
        tensors.iter_mut().find(|t| t.name.ends_with("h.0.ln_1.bias")).expect("a tensor").name = "x".into();
        tensors.iter_mut().find(|t| t.name.ends_with("ln_f.bias")).expect("a tensor").dtype = "U32".into();
        let square = tensors.iter_mut().find(|t| t.name.ends_with("h.1.mlp.c_fc.weight")).expect("a tensor");
        square.shape = vec![96, 96];
    });
    insta::assert_snapshot!(message(&refused(&dir)).replace(&*dir.to_string_lossy(), "model"));
}

#[test]
fn a_wrong_multi_query_is_pointed_out_and_never_corrected() {
    let (_temp, dir) = checkout("gpt_bigcode_mha", "config.json");
    edit_config(&dir, |config| config["multi_query"] = json!(true));
    let text = message(&refused(&dir));
    assert!(text.contains("`transformer.h.0.attn.c_attn.bias` is [144], expected [72]"), "{text}");
    assert!(text.contains("[144] fits multi_query=false"), "{text}");
}

#[test]
fn the_form_of_opt_350m_is_not_mistaken_for_that_of_its_siblings() {
    let (_temp, dir) = checkout("opt_350m_like", "config.json");
    edit_config(&dir, |config| config["do_layer_norm_before"] = json!(true));
    let text = message(&refused(&dir));
    assert!(text.contains("missing: `model.decoder.final_layer_norm.weight`"), "{text}");
    assert!(text.contains("it is not needed with do_layer_norm_before=false"), "{text}");
}

#[test]
fn biases_the_configuration_denies_are_pointed_out() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |t| t.push(Tensor::f32("model.layers.0.mlp.up_proj.bias", &[80], [0.0; 80])));
    assert!(message(&refused(&dir)).contains("`model.layers.0.mlp.up_proj.bias` [80]; it is used with mlp_bias=true"));
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["attention_bias"] = json!(true));
    assert!(message(&refused(&dir)).contains("it is not needed with attention_bias=false"));
}

#[test]
fn a_configuration_that_contradicts_the_shapes_lists_every_tensor_it_contradicts() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["intermediate_size"] = json!(81));
    let error = refused(&dir);
    assert!(error.to_string().contains("intermediate_size 81"), "{error}");
    assert_eq!(problems(error).len(), 6);
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["num_hidden_layers"] = json!(3));
    assert_eq!(problems(refused(&dir)).len(), 9);
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["num_hidden_layers"] = json!(1));
    assert_eq!(problems(refused(&dir)).len(), 9);
}

#[test]
fn sizes_beyond_all_reason_are_refused_before_anything_is_counted() {
    for (key, expected) in [
        ("num_hidden_layers", "number of layers` must be at most the 21 tensors of the checkpoint"),
        ("hidden_size", "hidden size` must be at most 2147483648"),
        ("head_dim", "width of a head` must be at most 2147483648"),
    ] {
        let (_temp, dir) = checkout("llama", "config.json");
        edit_config(&dir, |config| config[key] = json!(1_u64 << 62));
        let text = message(&refused(&dir));
        assert!(text.contains(expected), "{text}");
    }
    // Whatever the key is called, and where a list has an entry for each layer.
    for (fixture, key) in [
        ("starcoder2", "num_hidden_layers"),
        ("mistral", "num_hidden_layers"),
        ("gpt_neo", "num_layers"),
        ("gpt2", "n_layer"),
        ("mpt", "n_layers"),
        ("smollm3", "num_hidden_layers"),
    ] {
        let (_temp, dir) = checkout(fixture, "config.json");
        edit_config(&dir, |config| {
            assert!(config.get(key).is_some(), "{fixture} has no {key}");
            config[key] = json!(1_u64 << 32);
        });
        let text = message(&refused(&dir));
        assert!(text.contains("number of layers` must be at most the"), "{fixture}: {text}");
    }
}

#[test]
fn another_models_tensors_are_refused_in_one_line() {
    let (_temp, dir) = checkout("llama", "config.json");
    let gpt2 = common::fixtures().join("gpt2/model.safetensors");
    fs::write(dir.join("model.safetensors"), fs::read(gpt2).expect("a fixture")).expect("room");
    let text = message(&refused(&dir));
    assert!(text.contains("looked for `model.embed_tokens.weight`, `embed_tokens.weight`"), "{text}");
    assert!(text.contains("and 27 others"), "{text}");
}

#[test]
fn a_missing_head_is_explained_by_where_the_decision_comes_from() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| tensors.retain(|tensor| tensor.name != "lm_head.weight"));
    let text = message(&refused(&dir));
    assert!(text.contains("there is no `lm_head.weight`, and \"tie_word_embeddings\": false in config.json"), "{text}");
    edit_tensors(&dir, |tensors| tensors.push(Tensor::f32("lm_heads.weight", &[1], [0.0])));
    let text = message(&refused(&dir));
    assert!(text.contains("no `lm_head.weight` (nearest unused name: `lm_heads.weight`), and"), "{text}");
    edit_tensors(&dir, |tensors| tensors.retain(|tensor| tensor.name != "lm_heads.weight"));
    edit_config(&dir, |config| {
        config.as_object_mut().expect("an object").remove("tie_word_embeddings");
    });
    assert!(message(&refused(&dir)).contains("the default of this model type"));
    edit_config(&dir, |config| config["tie_word_embeddings"] = json!(true));
    plan_checkpoint(&dir).expect("a tied head needs no tensor");
}
