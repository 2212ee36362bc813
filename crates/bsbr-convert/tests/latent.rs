//! What the keys of decoders with latent attention mean.

mod common;

use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{ConfigFile, ConvertError, ConvertOptions, convert, find_rules, plan_checkpoint};
use bsbr_model::{DecoderConfig, ExpertGroups, Positions};
use common::{LATENT, checkout};
use serde_json::{Value, json};

/// The decoder of a fixture with other keys, inside of the text part where there is one; `absent` takes a key away.
fn read(name: &str, file: &str, changes: &Value) -> Result<DecoderConfig, ConvertError> {
    let path = common::fixtures().join(name).join(file);
    let mut config: Value = serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON");
    let inner = if config.get("text_config").is_some() { &mut config["text_config"] } else { &mut config };
    let object = inner.as_object_mut().expect("an object");
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
fn both_spellings_say_the_same_and_keys_that_lie_are_not_read() {
    for name in ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4"] {
        let [new, old] = ["config.json", "config_v4.json"].map(|file| read(name, file, &json!({})).expect(name));
        assert_eq!(new, old, "{name}");
        let lies = json!({"head_dim": 7, "num_key_value_heads": 3});
        assert_eq!(read(name, "config.json", &lies).expect(name), new, "{name}");
        assert_eq!((new.head_dim, new.kv_heads, new.heads), (12, 4, 4), "{name}");
        let Positions::Rotary { rotary_dim, .. } = new.positions else { panic!("{name}") };
        assert_eq!(rotary_dim, 4, "{name}");
    }
}

#[test]
fn kimi_k2_is_read_as_the_class_that_it_runs() {
    for file in ["config.json", "config_v4.json"] {
        let [own, as_kimi] = ["deepseek_v3", "kimi_k2"].map(|name| {
            read("deepseek_v3", file, &json!({"model_type": name, "architectures": ["DeepseekV3ForCausalLM"]}))
                .expect(name)
        });
        assert_eq!(own, as_kimi, "{file}");
    }
}

#[test]
fn routers_and_layers_are_read_as_each_class_reads_them() {
    let groups = |changes| {
        let decoder = read("deepseek_v2", "config.json", &changes).expect("sound");
        decoder.experts.expect("a mixture").router.groups
    };
    assert_eq!(groups(json!({"n_group": 3, "topk_group": 2})), None);
    let limited = json!({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2});
    assert_eq!(groups(limited), Some(ExpertGroups { count: 3, kept: 2, by_highest: true }));
    let dense =
        |name, changes| read(name, "config.json", &changes).expect(name).experts.expect("a mixture").dense_layers;
    assert_eq!(dense("deepseek_v3", json!({"first_k_dense_replace": 2})), [0, 1]);
    assert_eq!(dense("glm4_moe_lite", json!({"first_k_dense_replace": 2})), [0]);
    assert_eq!(dense("glm4_moe_lite", json!({"mlp_layer_types": ["sparse", "dense", "sparse"]})), [1]);
    assert_eq!(dense("glm4_moe_lite", json!({"mlp_layer_types": "absent"})), [0]);
    let temperature = read("mistral4", "config.json", &json!({})).expect("sound").query_temperature.expect("one");
    assert_eq!((temperature.beta, temperature.length), (0.3, 16));
    // (0.1 ln 40 + 1)^2 / sqrt(12).
    let rope = json!({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 100.0,
        "original_max_position_embeddings": 16});
    let scale = read("deepseek_v3", "config.json", &json!({"rope_parameters": rope})).expect("sound").attention_scale;
    assert!((scale * 12f64.sqrt() - 1.873_854).abs() < 1e-5, "{scale}");
}

#[test]
fn variants_without_a_meaning_are_refused_by_name() {
    for (name, changes, wanted) in [
        ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "`topk_method` must be greedy or group_limited_greedy"),
        ("deepseek_v2", json!({"scoring_func": "sigmoid"}), "`scoring_func`"),
        ("deepseek_v3", json!({"q_lora_rank": "absent"}), "`q_lora_rank` must be a number or null"),
        ("deepseek_v3", json!({"kv_lora_rank": null}), "`kv_lora_rank` must be"),
        ("deepseek_v3", json!({"v_head_dim": 13}), "latent.value_dim"),
        ("deepseek_v3", json!({"n_group": 3}), "experts.router.groups.count"),
        ("glm4_moe_lite", json!({"mlp_layer_types": ["dense"]}), "one entry for each of the 3 layers"),
        ("glm4_moe_lite", json!({"max_position_embeddings": "absent"}), "`max_position_embeddings` must be"),
        ("mistral4", json!({"partial_rotary_factor": 0.5}), "4 of 12, as qk_rope_head_dim says"),
    ] {
        let error = read(name, "config.json", &changes).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{wanted}\n{error}");
    }
}

#[test]
fn meta_projections_have_nothing_to_start_from() {
    for name in LATENT {
        let (temp, dir) = checkout(name, "config.json");
        let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
        let options = ConvertOptions { attention: Some(attention), ..Default::default() };
        let error = convert(&dir, &temp.path().join("out"), &options, &mut |_| {}).expect_err(name).to_string();
        assert!(error.contains("latent attention has none"), "{error}");
    }
}

#[test]
fn a_layer_that_predicts_the_token_after_next_is_kept_aside() {
    let (_temp, dir) = checkout("deepseek_v3_hub", "config.json");
    let plan = plan_checkpoint(&dir).expect("sound").plan;
    assert!(!plan.ignored.is_empty());
    assert!(plan.ignored.iter().all(|it| it.tensor.name.starts_with("model.layers.3.")));
}
