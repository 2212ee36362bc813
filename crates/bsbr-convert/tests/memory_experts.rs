//! A tensor that holds all experts of a layer is read and written an expert at a time.

mod common;

use std::fs;
use std::path::Path;

use bsbr_convert::{ConvertOptions, convert, export};
use serde_json::json;

const HIDDEN: usize = 1024;
const EXPERTS: usize = 32;

/// A mixture in transformers' own layout whose weights are zeros: a sparse file, which takes no space.
fn sparse_mixture(dir: &Path) -> usize {
    let config = json!({"model_type": "mixtral", "vocab_size": 10, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": HIDDEN,
        "num_local_experts": EXPERTS, "tie_word_embeddings": true});
    fs::write(dir.join("config.json"), config.to_string()).expect("room");
    let mut shapes =
        vec![("embed_tokens.weight".to_owned(), vec![10, HIDDEN]), ("norm.weight".to_owned(), vec![HIDDEN])];
    for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        shapes.push((format!("layers.0.self_attn.{part}.weight"), vec![HIDDEN, HIDDEN]));
    }
    for (part, shape) in [
        ("input_layernorm.weight", vec![HIDDEN]),
        ("post_attention_layernorm.weight", vec![HIDDEN]),
        ("mlp.gate.weight", vec![EXPERTS, HIDDEN]),
        ("mlp.experts.gate_up_proj", vec![EXPERTS, 2 * HIDDEN, HIDDEN]),
        ("mlp.experts.down_proj", vec![EXPERTS, HIDDEN, HIDDEN]),
    ] {
        shapes.push((format!("layers.0.{part}"), shape));
    }
    let mut end = 0;
    let entries = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        format!("{}:{entry}", json!(format!("model.{name}")))
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let path = dir.join("model.safetensors");
    common::write_raw(&path, &header, &[]);
    let file = fs::OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len((8 + header.len() + end) as u64).expect("a sparse file");
    4 * EXPERTS * 2 * HIDDEN * HIDDEN
}

/// Most memory this process ever had, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    1024 * line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number")
}

#[cfg(target_os = "linux")]
#[test]
fn peak_memory_is_far_below_the_tensor_of_all_experts() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let [dir, converted, back] = ["model", "converted", "back"].map(|name| temp.path().join(name));
    fs::create_dir(&dir).expect("room");
    let largest = sparse_mixture(&dir);
    convert(&dir, &converted, &ConvertOptions::default(), &mut |_| {}).expect("sound");
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    let peak = peak();
    assert!(peak < largest / 2, "peak {peak}, largest tensor {largest}");
}
