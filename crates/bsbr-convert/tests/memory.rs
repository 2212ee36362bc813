//! Converting and exporting hold one tensor at a time, whatever the size of the model.

mod common;

use std::fs;
use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{ConvertOptions, convert, export};
use serde_json::json;

const HIDDEN: usize = 2048;
const LAYERS: usize = 2;

/// A GPT-2 whose weights are zeros: a sparse file, which takes no space.
fn sparse_gpt2(dir: &Path) {
    let config = json!({"model_type": "gpt2", "vocab_size": 10, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 16,
        "n_positions": 4});
    fs::write(dir.join("config.json"), config.to_string()).expect("room");
    let mut shapes = vec![("wte.weight".to_owned(), vec![10, HIDDEN]), ("wpe.weight".to_owned(), vec![4, HIDDEN])];
    for layer in 0..LAYERS {
        for (part, inputs, outputs) in [
            ("attn.c_attn", HIDDEN, 3 * HIDDEN),
            ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, 4 * HIDDEN),
            ("mlp.c_proj", 4 * HIDDEN, HIDDEN),
        ] {
            shapes.push((format!("h.{layer}.{part}.weight"), vec![inputs, outputs]));
            shapes.push((format!("h.{layer}.{part}.bias"), vec![outputs]));
        }
        for norm in ["ln_1", "ln_2"] {
            shapes.push((format!("h.{layer}.{norm}.weight"), vec![HIDDEN]));
            shapes.push((format!("h.{layer}.{norm}.bias"), vec![HIDDEN]));
        }
    }
    shapes.push(("ln_f.weight".to_owned(), vec![HIDDEN]));
    shapes.push(("ln_f.bias".to_owned(), vec![HIDDEN]));
    let mut end = 0;
    let entries = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        format!("{}:{entry}", json!(name))
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let path = dir.join("model.safetensors");
    common::write_raw(&path, &header, &[]);
    let file = fs::OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len((8 + header.len() + end) as u64).expect("a sparse file");
}

/// Most memory this process ever had, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    1024 * line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number")
}

#[cfg(target_os = "linux")]
#[test]
fn peak_memory_is_bounded_by_the_largest_tensor() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let (dir, converted, back) = (temp.path().join("model"), temp.path().join("converted"), temp.path().join("back"));
    fs::create_dir(&dir).expect("room");
    sparse_gpt2(&dir);
    let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    let options = ConvertOptions { attention: Some(attention), ..Default::default() };
    let report = convert(&dir, &converted, &options, &mut |_| {}).expect("sound");
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    let largest = 4 * HIDDEN * 4 * HIDDEN;
    let (peak, limit) = (peak(), largest * 6 / 5 + (200 << 20));
    assert!(report.source_bytes as usize > limit, "the model must be larger than the limit to show anything");
    assert!(peak < limit, "peak {peak}, limit {limit}");
}
