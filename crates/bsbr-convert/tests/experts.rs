//! Mixtures of experts in every layout their files have.

mod common;

use std::path::Path;

use bsbr_convert::rules::SourceModel;
use bsbr_convert::{ConfigFile, ConvertError, ModelSource, find_rules, plan_checkpoint};
use bsbr_model::{active_parameters, parameter_counts, weight_specs};
use common::{checkout, edit_config, edit_tensors, fixtures, message, refused};
use serde_json::{Value, json};

fn read(name: &str, changes: &Value) -> Result<SourceModel, ConvertError> {
    let text = std::fs::read_to_string(fixtures().join(name).join("config.json")).expect("a fixture");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let inner = if config.get("text_config").is_some() { &mut config["text_config"] } else { &mut config };
    for (key, value) in changes.as_object().expect("an object") {
        inner[key] = value.clone();
    }
    find_rules(&ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?)?.read()
}

#[test]
fn every_layout_gives_the_same_weights() {
    for (one, other) in
        [("mixtral", "mixtral_fused"), ("qwen3_moe", "qwen3_moe_fused"), ("qwen3_vl_moe", "qwen3_vl_moe_hub")]
    {
        let [(_a, one), (_b, other)] = [one, other].map(|name| checkout(name, "config.json"));
        let [one, other] = [one, other].map(|dir| ModelSource::open(&dir).expect("a fixture"));
        assert_eq!(one.model_config(), other.model_config());
        for spec in weight_specs(one.model_config()) {
            let [a, b] = [&one, &other].map(|source| source.read_weight(&spec).expect("a weight"));
            assert!(a == b, "{} of {}", spec.name, one.description());
        }
    }
}

#[test]
fn a_layer_in_the_other_layout_is_named() {
    let (_temp, dir) = checkout("mixtral_fused", "config.json");
    edit_tensors(&dir, |tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name.ends_with("1.mlp.experts.down_proj")).expect("there");
        tensor.name = "model.layers.1.block_sparse_moe.experts.0.w2.weight".into();
    });
    let text = message(&refused(&dir));
    assert!(text.contains("missing: `model.layers.1.mlp.experts.down_proj`"), "{text}");
    assert!(text.contains("unused: no rule reads `model.layers.1.block_sparse_moe.experts.0.w2.weight`"), "{text}");
}

#[test]
fn layers_that_predict_further_tokens_are_kept_aside_as_many_as_are_declared() {
    let (_temp, dir) = checkout("glm4_moe_hub", "config.json");
    let plan = plan_checkpoint(&dir).expect("a fixture").plan;
    assert!(!plan.ignored.is_empty());
    assert!(plan.ignored.iter().all(|ignored| ignored.tensor.name.starts_with("model.layers.3.")));
    assert!(plan.to_string().contains("model.layers.{i}.*, beyond the last layer"), "{plan}");
    edit_config(&dir, |config| config["num_nextn_predict_layers"] = json!(0));
    let text = message(&refused(&dir));
    assert!(text.contains("unused: no rule reads `model.layers.3.eh_proj.weight`"), "{text}");
    // A layer that the configuration forgets is none of them.
    edit_config(&dir, |config| {
        (config["num_nextn_predict_layers"], config["num_hidden_layers"]) = (json!(1), json!(2));
    });
    let text = message(&refused(&dir));
    assert!(text.contains("unused: no rule reads `model.layers.3.enorm.weight`"), "{text}");
}

#[test]
fn orders_that_shapes_do_not_tell_apart_are_refused() {
    let error = read("qwen3_vl_moe", &json!({"moe_intermediate_size": 8})).expect_err("16 = 2 x 8").to_string();
    assert!(error.contains("`text_config.moe_intermediate_size` must be not half of `hidden_size`"), "{error}");
}

#[test]
fn lists_with_one_number_a_layer_are_read_where_they_say_the_same() {
    let one = read("hunyuan_v1_moe", &json!({})).expect("a fixture").decoder;
    let lists = json!({"moe_topk": [2, 2], "num_shared_expert": [1, 1], "moe_intermediate_size": [16, 16]});
    assert_eq!(read("hunyuan_v1_moe", &lists).expect("the same").decoder, one);
    for (changes, words) in [
        (json!({"moe_topk": [2, 1]}), "`moe_topk` must be one number, or the same for every layer"),
        (json!({"num_shared_expert": 2}), "`num_shared_expert` must be 1"),
        (json!({"moe_intermediate_size": 8}), "`moe_intermediate_size` must be 16"),
    ] {
        let error = read("hunyuan_v1_moe", &changes).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn layers_without_experts_are_those_that_the_keys_say() {
    let dense = |name: &str, changes: Value| {
        let decoder = read(name, &changes).expect(name).decoder;
        (0..decoder.layers).filter(|&layer| decoder.layer_experts(layer).is_none()).collect::<Vec<_>>()
    };
    assert_eq!(dense("qwen2_moe", json!({})), [1]);
    assert_eq!(dense("qwen2_moe", json!({"mlp_only_layers": [], "decoder_sparse_step": 2})), [0, 2]);
    assert_eq!(dense("glm4_moe", json!({"first_k_dense_replace": 2})), [0, 1]);
    assert_eq!(dense("glm4_moe", json!({"first_k_dense_replace": 3})), [0, 1, 2]);
    assert_eq!(dense("ernie4_5_moe", json!({})), [0]);
    assert_eq!(dense("ernie4_5_moe", json!({"moe_layer_end_index": -1})), [0]);
    assert_eq!(dense("ernie4_5_moe", json!({"moe_layer_end_index": 1})), [0, 2]);
    assert_eq!(dense("ernie4_5_moe", json!({"moe_layer_interval": 2, "moe_layer_start_index": 0})), [0, 2]);
    assert_eq!(dense("mixtral", json!({})), Vec::<usize>::new());
}

#[test]
fn impossible_mixtures_are_refused_by_name() {
    for (name, changes, words) in [
        ("mixtral", json!({"num_experts_per_tok": 7}), "experts.chosen"),
        ("mixtral", json!({"num_local_experts": 0}), "experts.count"),
        ("dots1_groups", json!({"n_group": 4}), "experts.router.groups.count"),
        ("dots1_groups", json!({"topk_group": 0}), "experts.router.groups.kept"),
        ("phimoe", json!({"num_experts_per_tok": 3}), "experts.router.kind"),
        ("phimoe", json!({"router_jitter_noise": -0.1}), "experts.router.kind.jitter"),
        ("glm4_moe", json!({"routed_scaling_factor": -1.0}), "experts.router.scale"),
    ] {
        let decoder = read(name, &changes).expect("read").decoder;
        let error = decoder.validate().expect_err(words).to_string();
        assert!(error.contains(words), "{name} {changes}: {error}");
    }
    for (name, changes, words) in [
        ("olmoe", json!({"clip_qkv": 8.0}), "does not clip"),
        ("minimax_m2", json!({"qk_norm_type": "per_head"}), "per_layer"),
        ("qwen3_moe", json!({"decoder_sparse_step": 0}), "1 or more"),
    ] {
        let error = read(name, &changes).expect_err(words).to_string();
        assert!(error.contains(words), "{name} {changes}: {error}");
    }
}

#[test]
fn a_token_goes_through_the_experts_chosen_for_it_and_everything_else() {
    let (_temp, dir) = checkout("mixtral", "config.json");
    let source = ModelSource::open(&dir).expect("a fixture");
    let config = source.model_config();
    // Two layers of six experts of three matrices, of which two are chosen.
    let idle = 2 * 4 * 3 * 24 * 32;
    assert_eq!(active_parameters(config), parameter_counts(config).0 - idle);
    let (_temp, dir) = checkout("llama", "config.json");
    let source = ModelSource::open(&dir).expect("a fixture");
    assert_eq!(active_parameters(source.model_config()), source.parameter_counts().0);
}
