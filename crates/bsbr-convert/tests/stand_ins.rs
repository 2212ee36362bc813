//! Files that stand for others, weights that are codes, names inside another object: each refused by what it is.

mod common;

use std::fs;
use std::path::Path;

use bsbr_convert::{ConvertError, ModelSource, Placeholder, export, is_gguf, plan_checkpoint};
use common::gguf::gguf_checkout;
use common::{Tensor, checkout, convert_plain, edit_config, edit_tensors, message, refused, write_tensors};
use serde_json::json;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:0000000000000000000000000000000000000000000000000000000000000000\nsize 269060280\n";

fn problem(error: ConvertError) -> Placeholder {
    match error {
        ConvertError::Placeholder { problem, .. } => problem,
        other => panic!("expected a placeholder, found: {other}"),
    }
}

/// A checkpoint of every layout, with the files that can stand for others.
const LAYOUTS: [(&str, &[&str]); 4] = [
    ("llama", &["config.json", "model.safetensors"]),
    ("gpt2_sharded", &["config.json", "model.safetensors.index.json", "model-00001-of-00006.safetensors"]),
    ("gpt2_bin_tied", &["config.json", "pytorch_model.bin"]),
    ("gpt2_legacy_bin", &["pytorch_model.bin"]),
];

#[test]
fn a_git_lfs_pointer_is_named_as_one_whatever_the_file() {
    for (fixture, files) in LAYOUTS {
        for file in files {
            let (_temp, dir) = checkout(fixture, "config.json");
            assert!(dir.join(file).is_file(), "{fixture}: {file}");
            fs::write(dir.join(file), POINTER).expect("room");
            let error = refused(&dir);
            let text = message(&error);
            assert!(text.contains(file) && text.contains("git-lfs pointer") && text.contains("git lfs pull"), "{text}");
            assert_eq!(problem(error), Placeholder::LfsPointer, "{fixture}: {file}");
        }
    }
    let (_temp, dir) = checkout("llama", "config.json");
    fs::write(dir.join("generation_config.json"), POINTER).expect("room");
    assert_eq!(problem(plan_checkpoint(&dir).expect_err("a pointer")), Placeholder::LfsPointer);
    let (_temp, file) = gguf_checkout("llama.gguf");
    fs::write(&file, POINTER).expect("room");
    assert_eq!(problem(ModelSource::open(&file).expect_err("a pointer")), Placeholder::LfsPointer);
}

#[test]
fn files_that_a_conversion_would_copy_are_looked_at_too() {
    for file in ["tokenizer.json", "tokenizer_config.json", "vocab.json", "chat_template.jinja"] {
        let (_temp, dir) = checkout("llama", "config.json");
        fs::write(dir.join(file), POINTER).expect("room");
        assert!(message(&refused(&dir)).contains(file), "{file}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_without_a_target_is_named_with_it() {
    for (fixture, files) in LAYOUTS {
        for file in files {
            let (_temp, dir) = checkout(fixture, "config.json");
            fs::remove_file(dir.join(file)).expect("a file");
            std::os::unix::fs::symlink("../../blobs/gone", dir.join(file)).expect("a link");
            let error = refused(&dir);
            assert!(message(&error).contains(&format!("{file} is a link to `../../blobs/gone`")), "{error}");
        }
    }
    let (_temp, dir) = checkout("llama", "config.json");
    std::os::unix::fs::symlink("gone", dir.join("tokenizer.json")).expect("a link");
    assert!(message(&refused(&dir)).contains("tokenizer.json is a link to `gone`"));
    let temp = tempfile::tempdir().expect("a directory");
    let link = temp.path().join("model");
    std::os::unix::fs::symlink("gone", &link).expect("a link");
    let found = problem(ModelSource::open(&link).expect_err("a dead link"));
    assert_eq!(found, Placeholder::DanglingLink { target: "gone".to_owned() });
}

#[cfg(unix)]
#[test]
fn links_with_a_target_are_followed() {
    let (temp, dir) = checkout("llama", "config.json");
    let blob = temp.path().join("blob");
    fs::rename(dir.join("model.safetensors"), &blob).expect("a file");
    std::os::unix::fs::symlink(&blob, dir.join("model.safetensors")).expect("a link");
    assert!(ModelSource::open(&dir).is_ok());
}

#[test]
fn a_link_that_was_copied_as_a_text_is_told_from_a_damaged_file() {
    for (fixture, files) in LAYOUTS {
        for file in files {
            let (_temp, dir) = checkout(fixture, "config.json");
            fs::write(dir.join(file), "../../blobs/0123").expect("room");
            let found = problem(refused(&dir));
            assert_eq!(found, Placeholder::WrittenLink { target: "../../blobs/0123".to_owned() }, "{fixture}: {file}");
        }
    }
}

#[test]
fn a_gguf_file_is_known_by_its_first_bytes() {
    let (temp, file) = gguf_checkout("llama.gguf");
    let expected = ModelSource::open(&file).expect("a sound file").model_config().clone();
    for name in ["blob", "sha256-00ff", "MODEL.GGUF"] {
        let other = temp.path().join(name);
        fs::rename(&file, &other).expect("a file");
        assert!(is_gguf(&other));
        // By itself, and as the only one in a directory.
        for path in [&other, temp.path()] {
            assert_eq!(*ModelSource::open(path).expect("a sound file").model_config(), expected, "{name}");
        }
        fs::rename(&other, &file).expect("a file");
    }
    assert!(!is_gguf(temp.path()) && !is_gguf(Path::new("nowhere")));
}

#[test]
fn what_the_configuration_says_about_codes_is_a_refusal() {
    for (key, value, words) in [
        ("quantization", json!({"group_size": 64, "bits": 4}), "`quantization`: 4 bits"),
        ("quantization_config", json!({"quant_method": "hqq", "quant_config": {}}), "`quantization_config`: hqq"),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq, 4 bits"),
        ("quantization_config", json!({"load_in_4bit": true}), "unknown method"),
        ("compression_config", json!({"format": "int-quantized"}), "`compression_config`: int-quantized"),
    ] {
        let (_temp, dir) = checkout("llama", "config.json");
        edit_config(&dir, |config| config[key] = value);
        let error = refused(&dir);
        assert!(matches!(error, ConvertError::Quantised { .. }), "{error}");
        let text = message(&error);
        assert!(text.contains("is quantised") && text.contains(words) && !text.contains('\n'), "{text}");
    }
    let (_temp, dir) = checkout("llama", "config.json");
    edit_config(&dir, |config| config["quantization_config"] = json!(null));
    assert!(plan_checkpoint(&dir).is_ok(), "null says nothing");
}

#[test]
fn names_of_codes_are_a_refusal_in_every_layout_there_is() {
    let projection = "model.layers.0.self_attn.q_proj";
    for end in [
        // GPTQ and AWQ, bitsandbytes, HQQ, MLX, Quanto, FP8, compressed-tensors, ExLlama, AQLM.
        "qweight",
        "qzeros",
        "g_idx",
        "scales",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "SCB",
        "W_q",
        "biases",
        "weight._data",
        "weight._scale",
        "weight_scale",
        "weight_scale_inv",
        "weight_packed",
        "input_scale",
        "q_weight",
        "trellis",
        "codes",
        "codebooks",
    ] {
        let (_temp, dir) = checkout("llama", "config.json");
        let name = format!("{projection}.{end}");
        edit_tensors(&dir, |tensors| tensors.push(Tensor::f32(&name, &[1], [1.0])));
        let error = refused(&dir);
        assert!(matches!(error, ConvertError::Quantised { .. }), "{end}: {error}");
        assert!(message(&error).contains(&name), "{error}");
    }
}

#[test]
fn what_a_wrapper_put_into_the_names_is_named_with_a_way_out() {
    for (wrapper, middle, left_by) in [
        ("_orig_mod.", false, "torch.compile"),
        ("_orig_mod.", true, "torch.compile"),
        ("module.", false, "DataParallel"),
        ("_fsdp_wrapped_module.", true, "FullyShardedDataParallel"),
        ("_checkpoint_wrapped_module.", true, "activation checkpointing"),
    ] {
        let (_temp, dir) = checkout("llama", "config.json");
        edit_tensors(&dir, |tensors| {
            for tensor in tensors {
                tensor.name = if middle {
                    tensor.name.replacen("layers.", &format!("layers.{wrapper}"), 1)
                } else {
                    format!("{wrapper}{}", tensor.name)
                };
            }
        });
        let error = refused(&dir);
        let text = message(&error);
        for word in [wrapper, left_by, ".replace("] {
            assert!(text.contains(word), "no {word} in: {text}");
        }
        assert!(matches!(error, ConvertError::Wrapped { .. }), "{error}");
    }
}

#[test]
fn a_shard_in_a_folder_of_its_own_is_told_what_to_do_with_it() {
    let (_temp, dir) = checkout("gpt2_sharded", "config.json");
    let index = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).expect("a text");
    fs::write(&index, text.replace("\"model-", "\"shards/model-")).expect("room");
    let text = message(&refused(&dir));
    assert!(text.contains("`shards/model-00001-of-00006.safetensors` is in a folder of its own"), "{text}");
    assert!(text.contains("move the file beside the index"), "{text}");
    // What could lie anywhere is another matter.
    fs::write(&index, r#"{"weight_map": {"a": "../model.safetensors"}}"#).expect("room");
    assert!(message(&refused(&dir)).contains("must be the plain name"));
}

#[test]
fn rotary_buffers_of_older_files_are_kept_aside_and_come_back() {
    for (fixture, layer_buffers, buffers) in [
        ("falcon_7b", &["self_attention.rotary_emb.inv_freq", "self_attention.maybe_rotary.inv_freq"][..], &[][..]),
        ("falcon_40b", &["self_attention.rotary_emb.inv_freq"], &[]),
        ("gptj", &["attn.embed_positions", "attn.bias", "attn.masked_bias"], &[]),
        ("llama", &["self_attn.rotary_emb.inv_freq"], &["rotary_emb.inv_freq"]),
        ("cohere", &["self_attn.rotary_emb.inv_freq"], &["rotary_emb.inv_freq"]),
        ("gpt_neox", &["attention.rotary_emb.inv_freq"], &["rotary_emb.inv_freq"]),
    ] {
        let (temp, dir) = checkout(fixture, "config.json");
        edit_tensors(&dir, |tensors| {
            let of_layer = tensors.iter().find(|tensor| tensor.name.contains(".0."));
            let name = of_layer.expect("a tensor of the first layer").name.clone();
            let (prefix, _) = name.split_once("0.").expect("a layer");
            let model = prefix.trim_end_matches("layers.").trim_end_matches("h.").to_owned();
            let names = layer_buffers.iter().map(|end| format!("{prefix}0.{end}"));
            for name in names.chain(buffers.iter().map(|end| format!("{model}{end}"))) {
                tensors.push(Tensor::f32(&name, &[6], [0.5; 6]));
            }
        });
        let planned = plan_checkpoint(&dir).unwrap_or_else(|error| panic!("{fixture}: {error}"));
        assert_eq!(planned.plan.ignored.len(), layer_buffers.len() + buffers.len(), "{fixture}");
        let (converted, exported) = (temp.path().join("converted"), temp.path().join("exported"));
        convert_plain(&dir, &converted).expect(fixture);
        let report = export(&converted, &exported, false, &mut |_| {}).expect(fixture);
        assert!(report.is_original(), "{fixture}");
    }
}

#[test]
fn no_error_prints_a_cause_twice() {
    let mut errors = Vec::new();
    let (_temp, dir) = checkout("llama", "config.json");
    let whole = fs::read(dir.join("model.safetensors")).expect("a file");
    for (file, content) in [
        ("model.safetensors", &whole[..whole.len() - 9]),
        ("model.safetensors", &whole[..5]),
        ("model.safetensors", &[0xff; 64]),
        ("config.json", b"{"),
        ("config.json", b"{\"model_type\": 7}"),
    ] {
        let (_temp, dir) = checkout("llama", "config.json");
        fs::write(dir.join(file), content).expect("room");
        errors.push(refused(&dir));
    }
    for content in [&b"PK"[..], b"\x80\x02}q\x00."] {
        let (_temp, dir) = checkout("gpt2_bin_tied", "config.json");
        fs::write(dir.join("pytorch_model.bin"), content).expect("room");
        errors.push(refused(&dir));
    }
    let (_temp, file) = gguf_checkout("llama.gguf");
    fs::write(&file, b"GGUFxxxxxxxxxxxxxxxxxxxxxxxx").expect("room");
    errors.push(ModelSource::open(&file).expect_err("damaged"));
    let (temp, dir) = checkout("llama", "config.json");
    let out = temp.path().join("out");
    convert_plain(&dir, &out).expect("sound");
    write_tensors(&out.join("model.safetensors"), &[]);
    errors.push(ModelSource::open(&out).expect_err("no weights"));
    for error in &errors {
        let mut shown = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let text = cause.to_string();
            assert!(!shown.contains(&text), "twice: {text}\nin: {shown}");
            shown += &text;
            source = cause.source();
        }
    }
}
