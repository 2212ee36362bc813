//! Checkpoints in PyTorch's formats convert, run and come back like any other.

mod common;

use std::fs;
use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{
    ConversionReport, ConvertError, ConvertOptions, FileFormat, HeadForm, ModelSource, convert, export, plan_checkpoint,
};
use bsbr_model::weight_specs;
use common::pytorch::StateDict;
use common::{PYTORCH, Tensor, checkout, convert_plain, message, read_dir_tensors, read_tensors, refused, snapshot};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The weights of the fixture `gpt2`, which those in PyTorch's formats hold as well.
fn weights() -> Vec<Tensor> {
    read_tensors(&common::fixtures().join("gpt2/model.safetensors"))
}

fn weight(name: &str) -> Tensor {
    weights().into_iter().find(|tensor| tensor.name == name).expect("a weight of this name")
}

/// A checkpoint with the configuration of the fixture `gpt2` and other weights.
fn checkpoint(files: &[(&str, Vec<u8>)]) -> (TempDir, std::path::PathBuf) {
    let (temp, dir) = checkout("gpt2", "config.json");
    fs::remove_file(dir.join("model.safetensors")).expect("it was there");
    files.iter().for_each(|(name, content)| fs::write(dir.join(name), content).expect("room"));
    (temp, dir)
}

fn convert_meta(dir: &Path, output: &Path) -> ConversionReport {
    let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    let options = ConvertOptions { attention: Some(attention), source_name: Some("gpt2".into()), ..Default::default() };
    convert(dir, output, &options, &mut |_| {}).expect("a sound checkpoint")
}

#[test]
fn both_formats_come_back_as_safetensors_with_every_tensor_bit_for_bit() {
    for name in PYTORCH {
        let (temp, dir) = checkout(name, "config.json");
        let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
        let record = convert_meta(&dir, &converted).record;
        assert_eq!((record.files[0].name.as_str(), record.files[0].format), ("pytorch_model.bin", FileFormat::Pytorch));
        let report = export(&converted, &back, false, &mut |_| {}).expect("sound");
        assert!(report.is_original());
        assert_eq!(report.files[0].name, "model.safetensors");
        assert_eq!(report.files[0].instead_of.as_deref(), Some("pytorch_model.bin"));
        let files = snapshot(&back);
        assert_eq!(files.keys().collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
        assert_eq!(files["config.json"], fs::read(dir.join("config.json")).expect("a file"));

        let mut found = read_dir_tensors(&back);
        for (name, tensor) in weights().into_iter().map(|tensor| (tensor.name.clone(), tensor)) {
            let name = if found.contains_key(&name) { name } else { name.replace("transformer.", "") };
            let other = found.remove(&name).expect(&name);
            assert_eq!((other.shape, other.dtype, other.bytes), (tensor.shape, tensor.dtype, tensor.bytes), "{name}");
        }
        let rest: Vec<&str> = found.keys().map(String::as_str).collect();
        if name == "gpt2_bin_tied" {
            assert_eq!(rest, ["lm_head.weight"]);
            assert_eq!(found["lm_head.weight"].bytes, weight("transformer.wte.weight").bytes);
        } else {
            assert_eq!(rest, ["h.0.attn.bias", "h.0.attn.masked_bias", "h.1.attn.bias", "h.1.attn.masked_bias"]);
            let mask = &found["h.1.attn.bias"];
            assert_eq!((mask.shape.as_slice(), mask.dtype.as_str()), ([1, 1, 64, 64].as_slice(), "F32"));
            let triangle = (0..64 * 64).map(|n| if n % 64 <= n / 64 { 1.0 } else { 0.0 });
            assert_eq!(mask.values(), triangle.collect::<Vec<f32>>());
            assert_eq!(found["h.0.attn.masked_bias"].values(), [-10_000.0]);
        }
    }
}

#[test]
fn a_checkpoint_its_conversion_and_its_export_hold_the_same_weights() {
    let (_temp, safetensors) = checkout("gpt2", "config.json");
    let expected = ModelSource::open(&safetensors).expect("sound");
    for name in PYTORCH {
        let (temp, dir) = checkout(name, "config.json");
        let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
        convert_meta(&dir, &converted);
        export(&converted, &back, false, &mut |_| {}).expect("sound");
        for dir in [dir, converted, back] {
            let source = ModelSource::open(&dir).expect("sound");
            for spec in weight_specs(expected.model_config()) {
                let [a, b] = [&expected, &source].map(|source| source.read_weight(&spec).expect("a weight"));
                assert_eq!(a, b, "{} in {}", spec.name, dir.display());
            }
        }
    }
}

#[test]
fn a_head_that_shares_the_bytes_of_the_embedding_is_tied() {
    let (_temp, dir) = checkout("gpt2_bin_tied", "config.json");
    let planned = plan_checkpoint(&dir).expect("sound");
    assert_eq!(planned.plan.head, HeadForm::TiedCopy);
    let mut dict = StateDict::of(&weights());
    let mut head = dict.view("transformer.wte.weight").clone();
    head.name = "lm_head.weight".into();
    // The second row first: other numbers of the same storage.
    (head.shape, head.stride, head.offset) = (vec![97, 48], vec![0, 1], 48);
    dict.views.push(head);
    for bytes in [dict.zip(), dict.legacy()] {
        let (_temp, dir) = checkpoint(&[("pytorch_model.bin", bytes)]);
        assert_eq!(plan_checkpoint(&dir).expect("sound").plan.head, HeadForm::Own);
    }
}

#[test]
fn views_with_strides_and_offsets_are_gathered() {
    let tensors = weights();
    let mut dict = StateDict::of(&tensors);
    for tensor in tensors.iter().filter(|tensor| tensor.shape.len() == 2) {
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        // Column by column behind three foreign numbers.
        let number = |n: usize| &tensor.bytes[4 * n..4 * n + 4];
        let mut bytes = vec![0xff; 12];
        (0..rows * cols).for_each(|n| bytes.extend(number(n % rows * cols + n / rows)));
        let view = dict.view(&tensor.name);
        (view.stride, view.offset) = (vec![1, rows], 3);
        let storage = view.storage;
        dict.storages[storage].bytes = bytes;
    }
    let (_plain, plain) = checkout("gpt2", "config.json");
    convert_meta(&plain, &plain.with_file_name("out"));
    let expected = read_dir_tensors(&plain.with_file_name("out"));
    for bytes in [dict.zip(), dict.legacy()] {
        let (temp, dir) = checkpoint(&[("pytorch_model.bin", bytes)]);
        convert_meta(&dir, &temp.path().join("out"));
        assert_eq!(read_dir_tensors(&temp.path().join("out")), expected);
    }
}

#[test]
fn buffers_of_other_dtypes_are_kept_aside_and_come_back() {
    let mut tensors = weights();
    let buffer = |name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| Tensor {
        name: format!("transformer.h.{name}"),
        dtype: dtype.into(),
        shape: shape.to_vec(),
        bytes,
    };
    tensors.push(buffer("0.attn.bias", "BOOL", &[1, 1, 2, 2], vec![1, 0, 1, 1]));
    tensors.push(buffer("1.attn.bias", "U8", &[2, 2], vec![1, 0, 1, 7]));
    tensors.push(buffer("1.attn.masked_bias", "I64", &[], (-10_000_i64).to_le_bytes().into()));
    let dict = StateDict::of(&tensors);
    for bytes in [dict.zip(), dict.legacy()] {
        let (temp, dir) = checkpoint(&[("pytorch_model.bin", bytes)]);
        let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
        convert_plain(&dir, &converted).expect("sound");
        assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
        let found = read_dir_tensors(&back);
        assert_eq!(found.len(), tensors.len());
        tensors.iter().for_each(|tensor| assert_eq!(found[&tensor.name], *tensor));
    }
}

#[test]
fn half_precision_weights_keep_their_bits_and_double_precision_is_refused_by_name() {
    let mut tensors = weights();
    for (n, tensor) in tensors.iter_mut().enumerate() {
        tensor.dtype = ["F16", "BF16"][n % 2].into();
        tensor.bytes = tensor.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
    }
    let (temp, dir) = checkpoint(&[("pytorch_model.bin", StateDict::of(&tensors).zip())]);
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    export(&converted, &back, false, &mut |_| {}).expect("sound");
    let found = read_dir_tensors(&back);
    tensors.iter().for_each(|tensor| assert_eq!(found[&tensor.name], *tensor));

    let mut tensors = weights();
    let norm = tensors.iter_mut().find(|tensor| tensor.name == "transformer.ln_f.bias").expect("a norm");
    norm.bytes = norm.values().into_iter().flat_map(|x| f64::from(x).to_le_bytes()).collect();
    norm.dtype = "F64".into();
    // The last number is none of 32 bits: it is rounded, and comes back as it was.
    let last = norm.bytes.len() - 8;
    norm.bytes[last..].copy_from_slice(&0.1_f64.to_le_bytes());
    let (temp, dir) = checkpoint(&[("pytorch_model.bin", StateDict::of(&tensors).legacy())]);
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    let kept = &read_dir_tensors(&converted)["final_norm.bias"];
    assert_eq!((kept.values().last(), kept.dtype.as_str()), (Some(&0.1_f32), "F32"));
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    let found = read_dir_tensors(&back);
    tensors.iter().for_each(|tensor| assert_eq!(found[&tensor.name], *tensor));

    let norm = tensors.iter_mut().find(|tensor| tensor.name == "transformer.ln_f.bias").expect("a norm");
    norm.dtype = "I64".into();
    let (_temp, dir) = checkpoint(&[("pytorch_model.bin", StateDict::of(&tensors).legacy())]);
    let text = message(&refused(&dir));
    assert!(text.contains("dtype: `transformer.ln_f.bias` is I64, expected F32, F16 or BF16"), "{text}");
}

/// The weights in three files, the second in the older format, and the index that names them.
fn shards() -> Vec<(&'static str, Vec<u8>)> {
    let tensors = weights();
    let names = ["pytorch_model-00001-of-00003.bin", "pytorch_model-00002-of-00003.bin", "last.bin"];
    let mut files = Vec::new();
    let mut map = serde_json::Map::new();
    for (n, name) in names.into_iter().enumerate() {
        let part: Vec<Tensor> = tensors.iter().skip(n).step_by(3).cloned().collect();
        part.iter().for_each(|tensor| drop(map.insert(tensor.name.clone(), name.into())));
        let dict = StateDict::of(&part);
        files.push((name, if n == 1 { dict.legacy() } else { dict.zip() }));
    }
    let index = json!({"metadata": {"total_size": 1, "note": "kept"}, "weight_map": map});
    files.push(("pytorch_model.bin.index.json", serde_json::to_vec(&index).expect("JSON")));
    files
}

#[test]
fn a_sharded_checkpoint_comes_back_in_as_many_safetensors_files_with_an_index_of_their_names() {
    let (temp, dir) = checkpoint(&shards());
    let (converted, back) = (temp.path().join("converted"), temp.path().join("back"));
    convert_plain(&dir, &converted).expect("sound");
    assert!(export(&converted, &back, false, &mut |_| {}).expect("sound").is_original());
    let files = snapshot(&back);
    let shards = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"];
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["config.json", "last.safetensors", shards[0], shards[1], "model.safetensors.index.json"]);
    let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).expect("JSON");
    assert_eq!(index["metadata"], json!({"total_size": 1, "note": "kept"}));
    plan_checkpoint(&back).expect("what is exported is a checkpoint");
    let found = read_dir_tensors(&back);
    assert_eq!(found.len(), weights().len());
    weights().iter().for_each(|tensor| assert_eq!(found[&tensor.name], *tensor));
    // A forced export knows its own files.
    export(&converted, &back, true, &mut |_| {}).expect("the same again");
}

#[test]
fn a_shard_that_is_missing_or_holds_other_tensors_is_named() {
    let (_temp, dir) = checkpoint(&shards()[..2]);
    fs::write(dir.join("pytorch_model.bin.index.json"), &shards()[3].1).expect("room");
    let text = message(&refused(&dir));
    assert!(text.contains("pytorch_model.bin.index.json: `last.bin` is missing, it holds `"), "{text}");

    let (_temp, dir) = checkpoint(&shards());
    fs::write(dir.join("last.bin"), &shards()[0].1).expect("room");
    let text = message(&refused(&dir));
    assert!(text.contains("should be in `last.bin` and is not: index and files do not match"), "{text}");

    let (_temp, dir) = checkpoint(&shards());
    fs::write(dir.join("pytorch_model.bin"), &shards()[0].1).expect("room");
    assert!(matches!(refused(&dir), ConvertError::TwoCheckpoints { single: "pytorch_model.bin", .. }));
}

#[test]
fn safetensors_come_first_and_the_other_file_is_mentioned() {
    let (temp, dir) = checkout("gpt2", "config.json");
    fs::write(dir.join("pytorch_model.bin"), "not even a pickle").expect("room");
    let report = convert_plain(&dir, &temp.path().join("out")).expect("the file is not read");
    assert_eq!(report.notes, ["`pytorch_model.bin` is there as well and was not read: safetensors come first"]);
}

#[test]
fn converting_twice_gives_the_same_bytes() {
    for name in PYTORCH {
        let (temp, dir) = checkout(name, "config.json");
        let [first, second] = ["first", "second"].map(|output| {
            convert_meta(&dir, &temp.path().join(output));
            snapshot(&temp.path().join(output))
        });
        assert_eq!(first, second);
    }
}

#[test]
fn the_model_card_promises_tensors_and_not_files() {
    let (temp, dir) = checkout("gpt2_bin_tied", "config.json");
    convert_plain(&dir, &temp.path().join("out")).expect("sound");
    let card = fs::read_to_string(temp.path().join("out/README.md")).expect("a card");
    assert!(card.contains("exporting gives the original tensors back bit for bit, in safetensors files"), "{card}");
    assert!(!card.contains("original files"), "{card}");
}

#[test]
fn a_tensor_damaged_after_planning_leaves_nothing_behind() {
    let (_temp, dir) = checkout("gpt2_bin_tied", "config.json");
    let path = dir.join("pytorch_model.bin");
    let mut bytes = fs::read(&path).expect("a file");
    let weight = weight("transformer.h.1.mlp.c_proj.weight").bytes;
    let at = bytes.windows(64).position(|window| *window == weight[..64]).expect("its bytes");
    bytes[at] ^= 1;
    fs::write(&path, bytes).expect("room");
    let text = message(&refused(&dir));
    assert!(text.contains("the numbers of tensor `transformer.h.1.mlp.c_proj.weight` cannot be read"), "{text}");
    assert!(text.contains("checksum"), "{text}");
}
