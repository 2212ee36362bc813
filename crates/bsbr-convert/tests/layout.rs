//! The numbers of fused and transposed weights land where an independent reading of the layouts puts them.

mod common;

use bsbr_convert::ModelSource;
use bsbr_model::weight_specs;
use common::{checkout, read_dir_tensors};
use std::collections::BTreeMap;

const HIDDEN: usize = 48;
const HEADS: usize = 4;
const WIDTH: usize = 12;

/// Every weight as running reads it.
fn read_all(source: &ModelSource) -> BTreeMap<String, Vec<f32>> {
    let specs = weight_specs(source.model_config());
    specs.into_iter().map(|spec| (spec.name.clone(), source.read_weight(&spec).expect("a weight"))).collect()
}

fn weights(name: &str) -> (BTreeMap<String, Vec<f32>>, BTreeMap<String, Vec<f32>>) {
    let (_temp, dir) = checkout(name, "config.json");
    let source = read_dir_tensors(&dir).into_iter().map(|(name, tensor)| (name, tensor.values())).collect();
    (source, read_all(&ModelSource::open(&dir).expect("sound")))
}

#[test]
fn gpt2_queries_keys_and_values_are_the_columns_of_the_fused_weight() {
    let (source, ours) = weights("gpt2");
    let fused = &source["transformer.h.1.attn.c_attn.weight"];
    let bias = &source["transformer.h.1.attn.c_attn.bias"];
    for (part, name) in ["query", "key", "value"].iter().enumerate() {
        for out in 0..HIDDEN {
            for input in 0..HIDDEN {
                let expected = fused[input * 3 * HIDDEN + part * HIDDEN + out];
                assert_eq!(ours[&format!("layers.1.attention.{name}.weight")][out * HIDDEN + input], expected);
            }
            assert_eq!(ours[&format!("layers.1.attention.{name}.bias")][out], bias[part * HIDDEN + out]);
        }
    }
}

#[test]
fn gpt2_square_and_oblong_linear_weights_are_transposed() {
    let (source, ours) = weights("gpt2");
    let cases = [
        ("transformer.h.0.attn.c_proj.weight", "layers.0.attention.output.weight", 48, 48),
        ("transformer.h.0.mlp.c_fc.weight", "layers.0.mlp.up.weight", 48, 192),
        ("transformer.h.0.mlp.c_proj.weight", "layers.0.mlp.down.weight", 192, 48),
    ];
    for (from, to, inputs, outputs) in cases {
        for out in 0..outputs {
            for input in 0..inputs {
                assert_eq!(ours[to][out * inputs + input], source[from][input * outputs + out], "{to}");
            }
        }
    }
}

#[test]
fn gpt_bigcode_with_many_kv_heads_interleaves_queries_keys_and_values_head_by_head() {
    let (source, ours) = weights("gpt_bigcode_mha");
    let fused = &source["transformer.h.0.attn.c_attn.weight"];
    let bias = &source["transformer.h.0.attn.c_attn.bias"];
    for (part, name) in ["query", "key", "value"].iter().enumerate() {
        for head in 0..HEADS {
            for row in 0..WIDTH {
                let (to, from) = (head * WIDTH + row, head * 3 * WIDTH + part * WIDTH + row);
                let got = &ours[&format!("layers.0.attention.{name}.weight")][to * HIDDEN..(to + 1) * HIDDEN];
                assert_eq!(got, &fused[from * HIDDEN..(from + 1) * HIDDEN], "{name} head {head} row {row}");
                assert_eq!(ours[&format!("layers.0.attention.{name}.bias")][to], bias[from]);
            }
        }
    }
}

#[test]
fn gpt_bigcode_with_one_kv_head_has_all_queries_then_one_key_and_one_value() {
    let (source, ours) = weights("gpt_bigcode_mqa");
    let fused = &source["transformer.h.0.attn.c_attn.weight"];
    assert_eq!(ours["layers.0.attention.query.weight"], fused[..HIDDEN * HIDDEN]);
    assert_eq!(ours["layers.0.attention.key.weight"], fused[HIDDEN * HIDDEN..(HIDDEN + WIDTH) * HIDDEN]);
    assert_eq!(ours["layers.0.attention.value.weight"], fused[(HIDDEN + WIDTH) * HIDDEN..]);
}

#[test]
fn llama_weights_are_taken_as_they_are() {
    let (source, ours) = weights("llama");
    assert_eq!(ours["layers.1.attention.key.weight"], source["model.layers.1.self_attn.k_proj.weight"]);
    assert_eq!(ours["layers.1.mlp.gate.weight"], source["model.layers.1.mlp.gate_proj.weight"]);
    assert_eq!(ours["head.weight"], source["lm_head.weight"]);
}
