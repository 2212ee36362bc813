//! Converting and exporting hold one tensor at a time, whatever the size of the model.

mod common;

use std::fs;
use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{ConvertOptions, convert, export};
use common::pytorch::{StateDict, Storage, View, contiguous};
use serde_json::json;

const HIDDEN: usize = 2048;
const LAYERS: usize = 2;

/// The configuration of a GPT-2, and the names and shapes of its weights.
fn gpt2(dir: &Path) -> Vec<(String, Vec<usize>)> {
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
    shapes
}

/// A GPT-2 whose weights are zeros: a sparse file, which takes no space.
fn sparse_gpt2(dir: &Path) {
    let mut end = 0;
    let shapes = gpt2(dir);
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

/// The same as a PyTorch file. Some of its largest tensors lie column by column: they are read whole and put in order.
fn sparse_pytorch_gpt2(dir: &Path) {
    let mut dict = StateDict::default();
    for (storage, (name, shape)) in gpt2(dir).into_iter().enumerate() {
        let zeros = 4 * shape.iter().product::<usize>();
        dict.storages.push(Storage { kind: "FloatStorage", bytes: Vec::new(), zeros });
        let by_columns = name.ends_with("mlp.c_fc.weight");
        let stride = if by_columns { vec![1, shape[0]] } else { contiguous(&shape) };
        dict.views.push(View { name, storage, offset: 0, shape, stride });
    }
    dict.write_legacy(&mut fs::File::create(dir.join("pytorch_model.bin")).expect("a file"));
}

/// Converts, exports and returns the bytes of the weights.
fn there_and_back(temp: &Path, write: fn(&Path)) -> usize {
    let (dir, converted, back) = (temp.join("model"), temp.join("converted"), temp.join("back"));
    fs::create_dir(&dir).expect("room");
    write(&dir);
    let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    let options = ConvertOptions { attention: Some(attention), ..Default::default() };
    let report = convert(&dir, &converted, &options, &mut |_| {}).expect("sound");
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    report.source_bytes as usize
}

#[cfg(target_os = "linux")]
#[test]
fn peak_memory_is_bounded_by_the_largest_tensor() {
    let largest = 4 * HIDDEN * 4 * HIDDEN;
    let limit = largest * 6 / 5 + (200 << 20);
    for write in [sparse_gpt2, sparse_pytorch_gpt2] {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let size = there_and_back(temp.path(), write);
        assert!(size > limit, "the model must be larger than the limit to show anything");
        let peak = peak();
        assert!(peak < limit, "peak {peak}, limit {limit}");
    }
}
