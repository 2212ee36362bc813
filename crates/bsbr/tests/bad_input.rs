//! Input that cannot be used: a named error on standard error, the exit code, and no file written.

mod common;

use std::fs;

use common::{Place, Tensor, check_refusal, edit_tensors, read_raw, run, write_raw};
use serde_json::{Value, json};

const CONVERT: &str = "convert -m model -o out";
const WEIGHTS: &str = "model/model.safetensors";
const NORM: &str = "model.norm.weight";

/// The Llama fixture with other weights.
fn with_tensors(edit: impl FnOnce(&mut Vec<Tensor>)) -> Place {
    let place = Place::with("llama");
    edit_tensors(&place.path(WEIGHTS), edit);
    place
}

/// The Llama fixture with another final norm.
fn with_norm(edit: impl FnOnce(&mut Tensor)) -> Place {
    with_tensors(|tensors| edit(tensors.iter_mut().find(|tensor| tensor.name == NORM).expect("a norm")))
}

/// The Llama fixture with another configuration.
fn with_config(edit: impl FnOnce(&mut Value)) -> Place {
    let place = Place::with("llama");
    place.edit_json("model/config.json", edit);
    place
}

#[test]
fn a_missing_model_directory() {
    for command in ["convert -o out", "export -o out", "verify -e x", "eval", "generate -p x", "inspect", "bench"] {
        // The logits are read first: their file is there.
        let place = Place::with("llama");
        fs::rename(place.path("model/expected.safetensors"), place.path("x")).expect("a file");
        place.refused(&format!("{command} -m nowhere"), 2, &["nowhere is not a directory", "--model takes"]);
    }
}

#[cfg(not(feature = "hub"))]
#[test]
fn the_name_of_a_model_without_the_feature_that_fetches_it() {
    let words = ["`test/llama` cannot be fetched", "without the feature `hub`"];
    Place::empty().refused("inspect -m test/llama", 2, &words);
}

#[test]
fn a_directory_without_config_json() {
    let place = Place::with("llama");
    fs::remove_file(place.path("model/config.json")).expect("a file");
    place.refused(CONVERT, 2, &["model holds no `config.json`", "name the directory"]);
    place.refused("inspect -m model", 2, &["model holds no `config.json`"]);
}

#[test]
fn a_file_of_weights_under_the_name_of_another_format() {
    let place = Place::with("llama");
    fs::rename(place.path(WEIGHTS), place.path("model/pytorch_model.bin")).expect("a file");
    place.refused(
        CONVERT,
        2,
        &["pytorch_model.bin: the file cannot be read", "not a PyTorch checkpoint", "torch.save"],
    );
}

#[test]
fn a_truncated_file() {
    let place = Place::with("llama");
    let bytes = fs::read(place.path(WEIGHTS)).expect("a file");
    fs::write(place.path(WEIGHTS), &bytes[..bytes.len() - 100]).expect("room");
    let words = [WEIGHTS, "cut off", "185664 bytes", "185564 are there", "download"];
    place.refused(CONVERT, 2, &words);
    place.refused("inspect -m model", 2, &words);
    fs::write(place.path(WEIGHTS), &bytes[..5]).expect("room");
    place.refused(CONVERT, 2, &[WEIGHTS, "has 5 bytes, expected at least the 8 bytes"]);
}

#[test]
fn a_header_length_beyond_the_file() {
    let place = Place::with("llama");
    let mut bytes = fs::read(place.path(WEIGHTS)).expect("a file");
    bytes[..8].copy_from_slice(&1_000_000_u64.to_le_bytes());
    fs::write(place.path(WEIGHTS), bytes).expect("room");
    place.refused(CONVERT, 2, &[WEIGHTS, "header claims 1000000 bytes, only 187776 follow"]);
}

#[test]
fn overlapping_tensors() {
    let place = Place::empty();
    fs::create_dir(place.path("model")).expect("room");
    place.write("model/config.json", r#"{"model_type": "llama"}"#);
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    write_raw(&place.path(WEIGHTS), header, &[0; 12]);
    place.refused(CONVERT, 2, &[WEIGHTS, "`b` starts at byte 4, inside tensor `a`, which ends at byte 8"]);
}

#[test]
fn a_tensor_listed_twice() {
    let place = Place::with("llama");
    let (header, data) = read_raw(&place.path(WEIGHTS));
    let header = header.trim_end().strip_suffix('}').expect("an object").to_owned();
    let again = format!(r#"{header},"{NORM}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}"#);
    write_raw(&place.path(WEIGHTS), &again, &data);
    place.refused(CONVERT, 2, &[WEIGHTS, "`model.norm.weight` is listed twice"]);
}

#[test]
fn a_tensor_in_two_files() {
    let place = Place::with("gpt2_sharded");
    let [first, last] = ["model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"];
    let name = "transformer.h.0.attn.c_attn.bias";
    edit_tensors(&place.path(&format!("model/{last}")), |tensors| tensors.push(Tensor::f32(name, &[144], 0.0)));
    place.refused(CONVERT, 2, &[name, first, last, "must be in one file"]);
}

#[test]
fn a_missing_file_of_several() {
    let place = Place::with("gpt2_sharded");
    fs::remove_file(place.path("model/model-00003-of-00006.safetensors")).expect("a file");
    place.refused(CONVERT, 2, &["`model-00003-of-00006.safetensors` is missing", "download it"]);
}

#[test]
fn weights_that_are_integers() {
    let place = with_norm(|norm| norm.dtype = "I32".into());
    place.refused(CONVERT, 1, &["`model.norm.weight` is I32, expected F32, F16 or BF16"]);
}

#[test]
fn a_missing_tensor() {
    let place = with_tensors(|tensors| tensors.retain(|tensor| tensor.name != NORM));
    for command in [CONVERT, "convert -m model --dry-run", "inspect -m model"] {
        place.refused(command, 1, &["missing: `model.norm.weight`", "needed for `final_norm.weight`", "1 problem"]);
    }
}

#[test]
fn an_extra_tensor() {
    let place = with_tensors(|tensors| tensors.push(Tensor::f32("model.stray", &[3], 0.0)));
    place.refused(CONVERT, 1, &["unused: no rule reads `model.stray` [3]"]);
}

#[test]
fn a_tensor_of_another_shape() {
    let place = with_norm(|norm| *norm = Tensor::f32(NORM, &[24], 1.0));
    place.refused(CONVERT, 1, &["shape: `model.norm.weight` is [24], expected [48]", "sizes from config.json"]);
}

#[test]
fn every_misfit_is_told_at_once() {
    let place = with_tensors(|tensors| {
        tensors.retain(|tensor| tensor.name != NORM);
        tensors.push(Tensor::f32("model.stray", &[3], 0.0));
    });
    place.refused(CONVERT, 1, &["2 problems", "missing: `model.norm.weight`", "unused: no rule reads `model.stray`"]);
}

#[test]
fn weights_that_are_no_numbers() {
    let place = with_norm(|norm| norm.bytes[20..24].copy_from_slice(&f32::NAN.to_le_bytes()));
    let words = [WEIGHTS, "`model.norm.weight` holds NaN at element 5"];
    place.refused(CONVERT, 1, &words);
    place.refused("verify -m model -e model/expected.safetensors", 1, &words);
}

#[test]
fn an_unknown_kind_of_model() {
    let place = with_config(|config| config["model_type"] = json!("mamba"));
    let words = ["model/config.json", "`mamba` is not supported", "gpt2", "gpt_bigcode", "llama"];
    place.refused(CONVERT, 2, &words);
}

#[test]
fn a_quantised_model() {
    let place = with_config(|config| config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4}));
    place.refused(CONVERT, 2, &["model is quantised", "gptq", "use the original checkpoint"]);
}

#[test]
fn an_adapter() {
    let place = Place::empty();
    fs::create_dir(place.path("model")).expect("room");
    place.write("model/adapter_config.json", "{}");
    place.refused(CONVERT, 2, &["model is a LoRA/PEFT adapter", "merge_and_unload"]);
}

#[test]
fn a_converted_model_as_the_source() {
    let place = Place::with("llama");
    place.done("convert -m model -o converted");
    place.refused("convert -m converted -o out", 2, &["converted is a converted model already"]);
}

#[test]
fn impossible_settings() {
    let place = Place::with("llama");
    for (flags, words) in [
        ("--chunk-size 0", ["`chunk_size` is 0", "1 to 65536"]),
        ("--chunk-size 1000000 --block-size 1", ["`chunk_size` is 1000000", "1 to 65536"]),
        ("--chunk-size 96", ["`chunk_size` is 96", "a multiple of 64"]),
        ("--local-chunks 18446744073709551615 --max-keys 0", ["`max_keys` is 0", "at least 1"]),
        ("--chunk-size 128 --block-size 48", ["`block_size` is 48", "a divisor of chunk_size = 128"]),
        ("--chunk-size 128 --block-size 0", ["`block_size` is 0", "a divisor of chunk_size = 128"]),
        ("--retrieval blocks --meta-blocks 0", ["`meta_blocks` is 0", "retrieval = none reads no block"]),
        ("--threshold 1", ["`threshold` is 1", "a probability"]),
        ("--threshold=-0.5", ["`threshold` is -0.5", "a probability"]),
        ("--index-channels 0", ["`index_channels` is 0", "at least 1"]),
        ("--far state", ["`far` is state", "selector = index"]),
        ("--max-chunks 8", ["`max_chunks` is 8", "unset unless retrieval = state"]),
        ("--retrieval guess", ["'guess' for '--retrieval <KIND>'", "`none`, `blocks`, `state`, `additive`"]),
        ("--max-keys many", ["'many' for '--max-keys <N>'", "invalid digit"]),
        ("--original-layers 2", ["names layer 2", "layers 0 to 1"]),
        ("--config none.toml", ["cannot read none.toml", "No such file"]),
    ] {
        place.refused(&format!("{CONVERT} {flags}"), 2, &words);
    }
}

#[test]
fn settings_of_earlier_versions_are_refused_with_what_replaced_them() {
    let place = Place::with("llama");
    for (setting, value, word) in [
        ("top_k", "76", "`threshold` and `max_keys`"),
        ("reach", "0.75", "`threshold`"),
        ("section_size", "64", "`fine_tokens`"),
        ("top_sections", "32", "`max_sections`"),
        ("middle_tokens", "131072", "no pages"),
        ("page_size", "512", "no pages"),
        ("top_pages", "64", "no pages"),
    ] {
        let flag = format!("--{}", setting.replace('_', "-"));
        for command in [CONVERT, "eval", "eval --suite long", "bench --seq-len 64"] {
            place.refused(&format!("{command} {flag} {value}"), 2, &[&format!("{flag} is gone"), word]);
        }
        place.write("old.toml", &format!("{setting} = {value}\n"));
        place.refused(&format!("{CONVERT} --config old.toml"), 2, &["old.toml", &format!("`{setting}` is gone"), word]);
    }
    place.refused(&format!("{CONVERT} --selector mean-key"), 2, &["mean-key is gone", "`index` takes its place"]);
    place.write("old.toml", "selector = \"mean-key\"\n");
    let words = ["old.toml", "mean-key", "is gone", "`index` takes its place"];
    place.refused(&format!("{CONVERT} --config old.toml"), 2, &words);
}

#[test]
fn a_model_converted_by_an_earlier_version_is_refused_by_every_command() {
    let place = Place::with("llama");
    place.done("convert -m model -o converted");
    for file in ["config.json", "conversion.json"] {
        let settings = if file == "config.json" { "attention" } else { "settings" };
        let path = place.path(&format!("converted/{file}"));
        let mut content: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).expect("a file")).expect("JSON");
        content[settings]["top_k"] = 76.into();
        content[settings]["reach"] = 0.75.into();
        std::fs::write(&path, content.to_string()).expect("written");
    }
    place.write("text.txt", "A text.");
    for command in [
        "inspect -m converted",
        "generate -m converted -p x",
        "eval -m converted",
        "export -m converted -o back",
        "calibrate -m converted --text text.txt",
    ] {
        place.refused(
            command,
            2,
            &["conversion.json", "`top_k`", "earlier version", "convert its original `model` again"],
        );
    }
}

#[test]
fn a_text_longer_than_the_learned_positions() {
    let place = Place::with("builtin");
    place.done("convert -m model -o converted");
    for model in ["model", "converted"] {
        let words = ["tokens", "2048 learned positions", "shorten the text"];
        place.refused(&format!("generate -m {model} -p Abraham -n 3000"), 2, &words);
        let words = ["4096 tokens", "2048 learned"];
        place.refused(&format!("eval -m {model} --seq-len 256,4096 --windows 1"), 2, &words);
    }
    place.write("long.txt", &"And it came to pass. ".repeat(1000));
    place.refused("generate --prompt-file long.txt -n 1", 2, &["2048 learned positions", "shorten the text"]);
}

#[test]
fn a_text_that_is_empty_or_too_short() {
    let place = Place::with("builtin");
    place.write("empty.txt", "\n\n");
    place.refused("eval --text empty.txt", 2, &["empty.txt", "the text is empty"]);
    place.refused("convert -m model -o out --eval-text empty.txt", 2, &["empty.txt", "the text is empty"]);
    place.write("short.txt", "Abraham");
    place.refused("eval --text short.txt --seq-len 256", 2, &["the text has", "one window needs 256"]);
    place.refused("eval --text none.txt", 2, &["cannot read the text none.txt", "No such file"]);
    place.refused("eval --windows 0", 2, &["0 windows"]);
    place.refused("eval --seq-len 2", 2, &["a window of 2 tokens"]);
}

#[test]
fn a_prompt_that_is_empty_or_missing() {
    let place = Place::empty();
    place.write("empty.txt", "");
    place.refused("generate --prompt=", 2, &["the prompt is empty"]);
    place.refused("generate --prompt-file empty.txt", 2, &["the prompt is empty"]);
    place.refused("generate --prompt-file none.txt", 2, &["cannot read the text none.txt"]);
    place.refused("generate", 2, &["a prompt is needed", "--prompt TEXT or --prompt-file FILE"]);
}

#[test]
fn impossible_sampling() {
    let place = Place::empty();
    place.refused("generate -p x --temperature=-1", 2, &["`temperature` is -1", "0 (greedy) or more"]);
    place.refused("generate -p x --temperature 1 --top-p 1.5", 2, &["`top_p` is 1.5", "above 0, up to 1"]);
    place.refused("generate -p x --temperature 1 --top-k 0", 2, &["`top_k` is 0", "at least 1"]);
}

#[test]
fn a_token_outside_the_vocabulary() {
    let place = Place::with("llama");
    edit_tensors(&place.path("ids.safetensors"), |tensors| {
        let bytes = [5_i64, 97].into_iter().flat_map(i64::to_le_bytes).collect();
        tensors.push(Tensor { name: "input_ids".into(), dtype: "I64".into(), shape: vec![1, 2], bytes });
        tensors.push(Tensor::f32("logits", &[1, 2, 97], 0.0));
    });
    let words = ["token 97 at position 1", "vocabulary of 97 tokens"];
    place.refused("verify -m model -e ids.safetensors", 2, &words);
}

#[test]
fn expected_logits_that_are_something_else() {
    let place = Place::with("llama");
    place.refused("verify -m model -e none", 2, &["cannot read none", "No such file"]);
    place.refused("verify -m model -e model/config.json", 2, &["model/config.json is no safetensors file"]);
    place.refused(&format!("verify -m model -e {WEIGHTS}"), 2, &[WEIGHTS, "has no tensor `input_ids`"]);
}

#[test]
fn a_missing_tokenizer() {
    let place = Place::with("llama");
    place.refused("generate -m model -p x", 2, &["model/tokenizer.json: not found", "save_pretrained"]);
    place.refused("eval -m model", 2, &["model/tokenizer.json: not found"]);
}

#[test]
fn an_output_below_a_file() {
    let place = Place::with("llama");
    place.write("file", "");
    place.refused("convert -m model -o file/out", 2, &["cannot create", "file"]);
}

/// A limit on the size of files stands in for a full disk: every write past it fails.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full() {
    let place = Place::with("llama");
    let script = r#"trap "" XFSZ; ulimit -f 8; exec "$0" convert -m model -o out"#;
    let mut command = assert_cmd::Command::new("sh");
    command.current_dir(place.path("")).arg("-c").arg(script).arg(assert_cmd::cargo::cargo_bin!("bsbr"));
    check_refusal(&run(&mut command), 2, &["cannot write", "model.safetensors", "File too large"]);
    let left: Vec<_> =
        fs::read_dir(place.path("")).expect("a directory").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left, ["model"]);
}
