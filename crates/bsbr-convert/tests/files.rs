//! Files and directories that are refused, with which words, and that nothing is left behind.

mod common;

use std::fs;
use std::path::Path;

use bsbr_convert::ConvertError;
use common::{Tensor, checkout, edit_config, edit_tensors, message, refused, write_raw};
use serde_json::json;

#[test]
fn hostile_and_damaged_safetensors_files_are_refused_by_name() {
    let one = |dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}}}"#)
    };
    let two = |first: (u64, u64), second: (u64, u64)| {
        let entry = |n: &str, (s, e): (u64, u64)| {
            format!(r#""{n}":{{"dtype":"F32","shape":[{}],"data_offsets":[{s},{e}]}}"#, e.saturating_sub(s) / 4)
        };
        format!("{{{},{}}}", entry("a", first), entry("b", second))
    };
    let cases: Vec<(String, usize, &str)> = vec![
        (one("F32", "[2]", 0, 8), 7, "is cut off: the tensors need 8 bytes after the header, 7 are there"),
        (one("F32", "[2]", 0, 8), 9, "9 bytes follow the header, the tensors account for 8"),
        (one("F32", "[3]", 0, 8), 8, "`a` of shape [3] and dtype F32 needs 12 bytes, the header gives it 8"),
        (one("F32", "[18446744073709551615,2]", 0, 8), 8, "needs too many or uneven bytes"),
        (one("F4", "[3]", 0, 2), 2, "needs too many or uneven bytes"),
        (one("F31", "[2]", 0, 8), 8, "`a` has the unknown dtype `F31`"),
        (one("F32", "[0]", 8, 0), 8, "`a` ends at byte 0, before its start at byte 8"),
        (one("F32", "[-1]", 0, 8), 8, "the header is not valid: tensor `a`"),
        (two((0, 8), (4, 12)), 12, "`b` starts at byte 4, inside tensor `a`, which ends at byte 8"),
        (two((0, 4), (8, 12)), 12, "bytes 4 to 8 before tensor `b` belong to no tensor"),
        (two((4, 8), (8, 12)), 12, "bytes 0 to 4 before tensor `a` belong to no tensor"),
        (
            one("F32", "[1]", 0, 4).replacen('{', r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#, 1),
            4,
            "`a` is listed twice",
        ),
        ("{".into(), 0, "the header is not valid"),
        ("[]".into(), 0, "the header is not valid"),
    ];
    for (header, data, expected) in cases {
        let (_temp, dir) = checkout("llama", "config.json");
        write_raw(&dir.join("model.safetensors"), &header, &vec![0; data]);
        let text = message(&refused(&dir));
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{expected}\n{text}");
        assert!(text.contains("download or save it again"), "{text}");
    }
}

#[test]
fn a_header_longer_than_its_file_or_than_any_header_is_refused_before_it_is_read() {
    let (_temp, dir) = checkout("llama", "config.json");
    let path = dir.join("model.safetensors");
    for (content, expected) in [
        (vec![1, 2, 3], "the file has 3 bytes, expected at least the 8"),
        (1000_u64.to_le_bytes().to_vec(), "the header claims 1000 bytes, only 0 follow"),
        (u64::MAX.to_le_bytes().to_vec(), "only 0 follow"),
    ] {
        fs::write(&path, content).expect("room");
        let text = message(&refused(&dir));
        assert!(text.contains(expected), "{text}");
    }
    // A sparse file: nothing of this size is written or read.
    let file = fs::File::create(&path).expect("room");
    std::io::Write::write_all(&mut &file, &100_000_001_u64.to_le_bytes()).expect("room");
    file.set_len(100_000_100).expect("a sparse file");
    assert!(message(&refused(&dir)).contains("the header claims 100000001 bytes, expected at most 100000000"));
}

#[test]
fn a_truncated_copy_of_a_sound_file_is_refused() {
    let (_temp, dir) = checkout("gpt2", "config.json");
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).expect("a file");
    for len in [5, 100, 3000, bytes.len() - 1] {
        fs::write(&path, &bytes[..len]).expect("room");
        assert!(matches!(refused(&dir), ConvertError::Format { .. }), "{len}");
    }
}

#[test]
fn directories_that_are_no_checkpoint_say_what_they_are_instead() {
    let (_temp, dir) = checkout("llama", "config.json");
    let weights = dir.join("model.safetensors");
    for (other, expected) in [
        ("pytorch_model.bin", "not a PyTorch checkpoint"),
        ("weights.pth", "rename it to `pytorch_model.bin`"),
        ("model.gguf", "name the file itself"),
        ("weights.safetensors", "rename it"),
    ] {
        fs::rename(&weights, dir.join(other)).expect("a rename");
        let text = message(&refused(&dir));
        assert!(text.contains(expected) && text.contains(other), "{text}");
        fs::rename(dir.join(other), &weights).expect("a rename");
    }
    fs::remove_file(&weights).expect("a file");
    assert!(
        message(&refused(&dir))
            .contains("holds no weights and none of the files a checkpoint has its weights in: expected `model.safet")
    );
    fs::remove_file(dir.join("config.json")).expect("a file");
    assert!(matches!(refused(&dir), ConvertError::NoConfig { .. }));
}

#[test]
fn adapters_and_quantised_checkpoints_are_refused_by_what_they_are() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| tensors.push(Tensor::f32("base_model.model.x.lora_A.weight", &[1], [0.0])));
    assert!(message(&refused(&dir)).contains("merge it into its base model first"));
    let (_temp, dir) = checkout("llama", "config.json");
    fs::write(dir.join("adapter_config.json"), "{}").expect("room");
    assert!(matches!(refused(&dir), ConvertError::Adapter { .. }));
    for name in ["weight_scale_inv", "qweight", "weight.absmax"] {
        let (_temp, dir) = checkout("llama", "config.json");
        let name = format!("model.layers.0.mlp.up_proj.{name}");
        edit_tensors(&dir, |tensors| tensors.push(Tensor::f32(&name, &[1], [0.0])));
        assert!(message(&refused(&dir)).contains(&format!("is quantised (tensor `{name}`)")));
    }
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4}));
    assert!(message(&refused(&dir)).contains("is quantised (config.json has a `quantization_config`: gptq, 4 bits)"));
}

#[test]
fn an_index_and_its_shards_must_agree() {
    let edit_index = |dir: &Path, edit: &dyn Fn(&mut serde_json::Value)| {
        let path = dir.join("model.safetensors.index.json");
        let mut index: serde_json::Value = serde_json::from_slice(&fs::read(&path).expect("an index")).expect("JSON");
        edit(&mut index["weight_map"]);
        fs::write(path, index.to_string()).expect("room");
    };
    const WTE: &str = "transformer.wte.weight";
    type Break<'a> = &'a dyn Fn(&Path);
    let cases: [(Break<'_>, &str); 6] = [
        (
            &|dir| fs::remove_file(dir.join("model-00004-of-00006.safetensors")).expect("a file"),
            "`model-00004-of-00006.safetensors` is missing",
        ),
        (
            &|dir| {
                edit_index(dir, &|map| {
                    map.as_object_mut().expect("a map").remove(WTE);
                })
            },
            "holds `transformer.wte.weight`, which the index does not list",
        ),
        (
            &|dir| edit_index(dir, &|map| map["absent"] = json!("model-00001-of-00006.safetensors")),
            "tensor `absent` should be in `model-00001-of-00006.safetensors` and is not",
        ),
        (
            &|dir| edit_index(dir, &|map| map[WTE] = json!("../model-00001-of-00006.safetensors")),
            "must be the plain name of a file",
        ),
        (
            &|dir| {
                let path = dir.join("model-00002-of-00006.safetensors");
                let mut tensors = common::read_tensors(&path);
                tensors.push(Tensor::f32(WTE, &[1], [0.0]));
                common::write_tensors(&path, &tensors);
            },
            "tensor `transformer.wte.weight` is in both `model-00001-of-00006.safetensors` and",
        ),
        (
            &|dir| {
                fs::copy(dir.join("model-00001-of-00006.safetensors"), dir.join("model.safetensors")).expect("room");
            },
            "which weights are meant is not clear",
        ),
    ];
    for (damage, expected) in cases {
        let (_temp, dir) = checkout("gpt2_sharded", "config.json");
        damage(&dir);
        let text = message(&refused(&dir));
        assert!(text.contains(expected), "{expected}\n{text}");
    }
}
