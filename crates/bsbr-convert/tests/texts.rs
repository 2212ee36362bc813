//! The texts people read: mapping tables, model card, record.

mod common;

use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{ConvertOptions, convert, plan_checkpoint};
use common::{Tensor, checkout, edit_tensors};

#[test]
fn the_mapping_table_of_gpt2() {
    let (_temp, dir) = checkout("gpt2", "config.json");
    edit_tensors(&dir, |tensors| {
        let embed = tensors.iter().find(|t| t.name == "transformer.wte.weight").expect("an embedding").clone();
        tensors.push(Tensor { name: "lm_head.weight".into(), ..embed });
        let mask =
            Tensor { name: "transformer.h.0.attn.bias".into(), dtype: "U8".into(), shape: vec![4], bytes: vec![0; 4] };
        tensors.push(mask);
    });
    insta::assert_snapshot!(plan_checkpoint(&dir).expect("sound").plan);
}

#[test]
fn the_mapping_table_of_gpt_bigcode_with_many_kv_heads() {
    let (_temp, dir) = checkout("gpt_bigcode_mha", "config.json");
    insta::assert_snapshot!(plan_checkpoint(&dir).expect("sound").plan);
}

#[test]
fn the_mapping_table_of_llama() {
    let (_temp, dir) = checkout("llama_bf16", "config.json");
    insta::assert_snapshot!(plan_checkpoint(&dir).expect("sound").plan);
}

#[test]
fn the_rule_tables_of_a_fused_and_of_a_conditional_architecture() {
    for name in ["gpt_bigcode", "stablelm"] {
        insta::assert_snapshot!(format!("rules_{name}"), bsbr_convert::architecture_by_name(name).expect("rules"));
    }
}

#[test]
fn every_rule_of_every_architecture_is_a_line_of_its_table() {
    for architecture in bsbr_convert::ARCHITECTURES {
        let text = architecture.to_string();
        let (_, table) = text.split_once("\n\n").expect("a table after the headlines");
        assert_eq!(table.lines().count(), 1 + architecture.rules.len(), "{}", architecture.id);
        let by_model_type = bsbr_convert::architecture_by_name(architecture.model_types[0]).expect("the same rules");
        assert_eq!(by_model_type.id, architecture.id);
    }
}

#[test]
fn the_model_card() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    let options = ConvertOptions {
        source_name: Some("someone/tiny-llama".into()),
        attention: Some(BlockAttentionConfig::default()),
        measured: Some(vec![("perplexity, 1024 tokens".into(), "21.75".into())]),
        ..Default::default()
    };
    convert(&dir, &output, &options, &mut |_| {}).expect("sound");
    insta::assert_snapshot!(std::fs::read_to_string(output.join("README.md")).expect("a card"));
}

#[test]
fn the_model_card_of_the_original_attention_names_no_base_model_it_does_not_know_and_no_measures() {
    let (temp, dir) = checkout("llama", "config.json");
    let output = temp.path().join("out");
    convert(&dir, &output, &ConvertOptions::default(), &mut |_| {}).expect("sound");
    let card = std::fs::read_to_string(output.join("README.md")).expect("a card");
    assert!(card.contains("The original attention"), "{card}");
    assert!(!card.contains("base_model") && !card.contains("Measured"), "{card}");
}
