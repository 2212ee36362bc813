//! The rule tables and the readers of `config.json`.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use bsbr_convert::rules::{Dim, Op, Rule, When};
use bsbr_convert::{ARCHITECTURES, ConfigFile, ConvertError, WRAPPERS, find_rules, lint};
use bsbr_model::{Activation, DecoderConfig, Positions, rotary_frequencies};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<DecoderConfig, ConvertError> {
    let file = ConfigFile::parse(Path::new("config.json"), config.to_string().as_bytes())?;
    Ok(find_rules(&file)?.read()?.decoder)
}

fn fixture(name: &str, file: &str) -> Value {
    let path = common::fixtures().join(name).join(file);
    serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON")
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn every_rule_table_is_sound() {
    for architecture in ARCHITECTURES {
        assert_eq!(lint(architecture), Vec::<String>::new(), "{}", architecture.id);
    }
}

#[test]
fn no_two_tables_serve_the_same_model_type() {
    let types = ARCHITECTURES.iter().map(|arch| arch.model_types).chain(WRAPPERS.iter().map(|it| it.model_types));
    let mut types: Vec<&str> = types.flatten().copied().collect();
    types.sort_unstable();
    let count = types.len();
    types.dedup();
    assert_eq!(types.len(), count);
}

#[test]
fn an_unsound_rule_table_is_found_out() {
    const fn map(source: &'static str, targets: &'static [&'static str], ops: &'static [Op]) -> Rule {
        Rule::Map { source, targets, ops, when: When::Always }
    }
    const ANCHOR: Rule = map("{p}wte.weight", &["embed.weight"], &[]);
    const UNSOUND: [(&[Rule], &str); 9] = [
        (&[ANCHOR, map("{p}h.{i}.x", &["layers.0.x"], &[])], "must both name `{i}`"),
        (&[ANCHOR, map("{p}x", &["x", "y"], &[])], "the ops give 1 tensors"),
        (&[ANCHOR, map("{p}x", &["x"], &[Op::Split { groups: Dim::N(1), parts: &[Dim::N(1), Dim::N(1)] }])], "give 2"),
        (&[ANCHOR, map("{p}x", &["embed.weight"], &[])], "target `embed.weight` is used by two"),
        (&[ANCHOR, map("{p}wte.weight", &["x"], &[])], "source `{p}wte.weight` is used by two"),
        (&[ANCHOR, Rule::Ignore { name: "{p}wte.weight", why: "" }], "shadows"),
        (&[ANCHOR, map("{p}x.{j}", &["x"], &[])], "`{j}` and one stack op"),
        (&[map("{p}x", &["x"], &[])], "no rule reads the anchor"),
        (
            &[ANCHOR, map("{p}x.{j}", &["x"], &[Op::Stack { count: Dim::N(2) }, Op::Transpose])],
            "transpose must be the first",
        ),
    ];
    for (rules, problem) in UNSOUND {
        let mut architecture = ARCHITECTURES[0];
        architecture.rules = rules;
        let problems = lint(&architecture);
        assert!(problems.iter().any(|found| found.contains(problem)), "{problem}: {problems:?}");
    }
}

#[test]
fn a_rule_for_each_case_of_a_flag_may_name_the_same_tensors() {
    const ANCHOR: &str = "{p}wte.weight";
    const RULES: [Rule; 2] = [
        Rule::Map { source: ANCHOR, targets: &["embed.weight"], ops: &[], when: When::Flag("a") },
        Rule::Map { source: ANCHOR, targets: &["embed.weight"], ops: &[Op::Transpose], when: When::Not("a") },
    ];
    let mut architecture = ARCHITECTURES[0];
    architecture.rules = &RULES;
    assert_eq!(lint(&architecture), Vec::<String>::new());
}

#[test]
fn every_flag_a_rule_asks_for_is_one_that_its_configuration_sets() {
    for name in common::BOTH_STYLES.into_iter().chain(common::VARIANTS) {
        let path = common::fixtures().join(name).join("config.json");
        let config = ConfigFile::open(&path).expect("a fixture");
        let found = find_rules(&config).expect("supported");
        let (architecture, model) = (found.architecture, found.read().expect("sound"));
        for rule in architecture.rules {
            if let Rule::Map { source, when, .. } = rule {
                assert!(when.holds(&model).is_some(), "{source}");
            }
        }
        for key in architecture.alternatives {
            assert!(model.flag(key).is_some(), "{key}");
        }
    }
}

#[test]
fn both_configuration_styles_of_every_fixture_mean_the_same_decoder() {
    for name in common::BOTH_STYLES.into_iter().chain(common::VARIANTS) {
        let new = read(&fixture(name, "config.json")).expect(name);
        let old = read(&fixture(name, "config_v4.json")).expect(name);
        assert_eq!(new, old, "{name}");
        new.validate().expect(name);
    }
}

#[test]
fn the_decoders_of_the_fixtures_have_the_switches_of_their_architecture() {
    let gpt2 = read(&fixture("gpt2", "config.json")).expect("a decoder");
    assert_eq!((gpt2.intermediate_size, gpt2.activation, gpt2.tied_head), (192, Activation::GeluTanh, true));
    assert!((gpt2.attention_scale - 12_f64.powf(-0.5)).abs() < 1e-12);
    let mqa = read(&fixture("gpt_bigcode_mqa", "config.json")).expect("a decoder");
    assert_eq!((mqa.heads, mqa.kv_heads), (4, 1));
    let llama = read(&fixture("llama", "config.json")).expect("a decoder");
    assert_eq!((llama.kv_heads, llama.gated_mlp, llama.tied_head), (2, true, false));
    assert_eq!(llama.positions, Positions::Rotary { theta: 10_000.0, rotary_dim: 12, scaling: None });
}

#[test]
fn absent_and_null_keys_take_the_defaults_of_their_class() {
    let config = json!({"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "num_key_value_heads": null, "head_dim": null,
        "rope_scaling": null, "unheard_of": {"x": 1}});
    let decoder = read(&config).expect("defaults");
    assert_eq!((decoder.kv_heads, decoder.head_dim, decoder.max_positions), (2, 4, 2048));
    assert!(!decoder.tied_head && !decoder.qkv_bias && !decoder.mlp_bias);
    let config = json!({"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1, "n_head": 2,
        "n_positions": 4});
    let decoder = read(&config).expect("defaults");
    assert!(decoder.tied_head && decoder.norm_eps == 1e-5 && decoder.intermediate_size == 32);
}

#[test]
fn the_attention_scale_follows_its_two_switches() {
    let config = fixture("gpt2", "config.json");
    let plain = read(&with(config.clone(), json!({"scale_attn_weights": false}))).expect("a decoder");
    assert_eq!((plain.attention_scale, plain.scale_by_layer), (1.0, false));
    let by_layer = read(&with(config, json!({"scale_attn_by_inverse_layer_idx": true}))).expect("a decoder");
    assert!(by_layer.scale_by_layer);
}

#[test]
fn every_rotary_golden_read_from_a_configuration_has_the_frequencies_of_transformers() {
    let goldens = std::fs::read(common::fixtures().join("rope_golden.json")).expect("a fixture");
    let goldens: Vec<Value> = serde_json::from_slice(&goldens).expect("JSON");
    let close = |found: f64, expected: &Value| {
        let expected = expected.as_f64().expect("a number");
        (found - expected).abs() <= 1e-6 * expected.abs()
    };
    let mut kinds = BTreeSet::new();
    for golden in goldens {
        let (name, parameters) = (&golden["name"], &golden["rope_parameters"]);
        let sizes =
            json!({"head_dim": golden["head_dim"], "max_position_embeddings": golden["max_position_embeddings"]});
        let newer = with(fixture("llama", "config.json"), json!({"rope_parameters": parameters}));
        // Older files keep the base outside.
        let mut scaling = parameters.clone();
        let theta = scaling.as_object_mut().expect("an object").remove("rope_theta");
        let older = with(fixture("llama", "config_v4.json"), json!({"rope_theta": theta, "rope_scaling": scaling}));
        for config in [newer, older] {
            let decoder = read(&with(config, sizes.clone())).expect("a supported kind");
            decoder.validate().expect("a sound decoder");
            let Positions::Rotary { theta, rotary_dim, scaling } = decoder.positions else { panic!("rotary") };
            // Where the file says no length, nothing depends on it.
            let length = golden["seq_len"].as_u64().unwrap_or(77) as usize;
            let (found, factor) = rotary_frequencies(theta, rotary_dim, scaling.as_ref(), length);
            let expected = golden["inv_freq"].as_array().expect("a list");
            assert_eq!(found.len(), expected.len(), "{name}");
            assert!(found.iter().zip(expected).all(|(&found, expected)| close(found, expected)), "{name}: {found:?}");
            assert!(close(factor, &golden["attention_factor"]), "{name}: {factor}");
        }
        kinds.insert(parameters["rope_type"].as_str().expect("a text").to_owned());
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["default", "dynamic", "linear", "llama3", "longrope", "yarn"]);
}

#[test]
fn the_older_rotary_keys_mean_the_same_as_the_newer_ones() {
    let base = fixture("llama", "config_v4.json");
    let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
    let newer = json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}});
    let newest =
        json!({"rope_theta": null, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
    let read = |change| read(&with(base.clone(), change)).expect("a decoder").positions;
    assert_eq!(read(old.clone()), read(newer));
    assert_eq!(read(old), read(newest));
}

#[test]
fn a_configuration_error_names_the_file_the_key_what_was_expected_and_what_was_found() {
    let llama = fixture("llama", "config.json");
    let cases = [
        (with(llama.clone(), json!({"hidden_size": "big"})), "config.json: key `hidden_size` must be a whole number"),
        (
            with(llama.clone(), json!({"vocab_size": null})),
            "key `vocab_size` must be a whole number, 0 or more, found null",
        ),
        (with(llama.clone(), json!({"hidden_act": "mish"})), "`hidden_act` must be one of gelu_new"),
        (with(llama.clone(), json!({"head_dim": null, "num_attention_heads": 5})), "a divisor of the hidden size 48"),
        (
            with(llama.clone(), json!({"rope_parameters": {"rope_type": "mrope"}})),
            "`rope_parameters.rope_type` must be one of default, linear, dynamic, yarn, llama3, longrope, found \"mrope\"",
        ),
        (
            with(llama.clone(), json!({"rope_parameters": {"rope_type": "linear"}})),
            "`rope_parameters.factor` must be a number",
        ),
        (with(llama.clone(), json!({"rope_parameters": {"partial_rotary_factor": 0.5}})), "1 or absent"),
        (with(llama.clone(), json!({"model_type": "mamba"})), "`mamba` is not supported; supported are `gpt2`"),
        (with(llama, json!({"model_type": null})), "key `model_type` must be one of `gpt2`"),
        (
            with(fixture("gpt2", "config.json"), json!({"add_cross_attention": true})),
            "`add_cross_attention` = true is not supported: the decoder has no cross-attention",
        ),
    ];
    for (config, message) in cases {
        let error = read(&config).expect_err(message).to_string();
        assert!(error.contains(message), "{message}\n{error}");
    }
}
