//! `convert`, `export` and `verify`: what goes in comes out.

mod common;

use std::fs;

use common::{Place, checkpoint_dir, edit_tensors, files};
use serde_json::{Value, json};

const FIXTURES: [&str; 6] = ["gpt2", "gpt2_sharded", "gpt_bigcode_mha", "gpt_bigcode_mqa", "llama", "llama_bf16"];

#[test]
fn a_conversion_writes_five_files_and_says_what_it_did() {
    let place = Place::with("llama");
    let stdout = place.done("convert -m model -o out");
    assert!(stdout.contains("converted to out"), "{stdout}");
    assert!(stdout.contains("parameters: 46,416 before, 46,416 after"), "{stdout}");
    let written: Vec<String> = files(&place.path("out")).into_keys().collect();
    assert_eq!(written, ["README.md", "config.json", "conversion.json", "model.safetensors", "source_config.json"]);
    assert_eq!(place.read("out/source_config.json"), place.read("model/config.json"));
    assert!(place.read("out/README.md").contains("# model with BSBR attention"));
    assert_eq!(place.json("out/conversion.json")["source"], "model");
}

#[test]
fn a_tokenizer_goes_along() {
    let place = Place::with("builtin");
    place.done("convert -m model -o out");
    assert_eq!(place.read("out/tokenizer.json"), place.read("model/tokenizer.json"));
}

#[test]
fn converting_twice_gives_the_same_bytes() {
    for fixture in FIXTURES {
        let place = Place::with(fixture);
        place.done("convert -m model -o first");
        place.done("convert -m model -o second");
        assert!(files(&place.path("first")) == files(&place.path("second")), "{fixture}");
    }
}

#[test]
fn a_dry_run_prints_the_mapping_and_writes_nothing() {
    let place = Place::with("llama");
    for output in ["", "-o out"] {
        let stdout = place.done(&format!("convert -m model --dry-run {output}"));
        assert!(stdout.contains("rules `llama`"), "{stdout}");
        let row = stdout.lines().find(|line| line.starts_with("model.layers.{i}.self_attn.q_proj.weight"));
        assert!(row.is_some_and(|row| row.ends_with("layers.{i}.attention.query.weight")), "{stdout}");
        assert!(!place.path("out").exists());
    }
}

#[test]
fn a_dry_run_tells_every_size_and_they_are_those_of_the_conversion() {
    let place = Place::with("gpt2_bin_tied");
    let flags = "-m model --weights bf16 --selector meta";
    let stdout = place.done(&format!("convert {flags} --dry-run"));
    insta::assert_snapshot!("dry_run", stdout);
    place.done(&format!("convert {flags} -o out"));
    let written = fs::metadata(place.path("out/model.safetensors")).expect("a file").len();
    assert!(stdout.contains(&format!("{},{} bytes written", written / 1000, written % 1000)), "{written}: {stdout}");
}

#[test]
fn a_cast_that_loses_is_told_and_the_export_is_refused() {
    let place = Place::with("llama");
    let stdout = place.done("convert -m model -o out --weights f16");
    assert!(stdout.contains("weights were cast to F16; in ") && stdout.contains("an export is refused"), "{stdout}");
    place.refused("export -m out -o back", 2, &["original bits are gone", "from F32 to F16"]);
    assert!(place.done("inspect -m out").contains("weights were cast to F16; in "));
    place.refused("convert -m model -o other --weights f8", 2, &["`keep`, `f32`, `f16`, `bf16`, `int8`, `int4`"]);
    let place = Place::with("llama_bf16");
    let stdout = place.done("convert -m model -o out --weights f32");
    assert!(stdout.contains("without loss"), "{stdout}");
    assert!(place.done("export -m out -o back").contains("the original, byte for byte"));
}

#[test]
fn a_directory_in_use_is_replaced_only_when_forced() {
    let place = Place::with("llama");
    place.done("convert -m model -o out");
    place.refused("convert -m model -o out --chunk-size 64", 2, &["out exists and is not empty", "--force"]);
    place.done("convert -m model -o out --chunk-size 64 --force");
    assert_eq!(place.json("out/config.json")["attention"]["chunk_size"], 64);
    let entries = fs::read_dir(place.path("")).expect("a directory").count();
    assert_eq!(entries, 2, "only `model` and `out` remain");
}

#[test]
fn force_replaces_nothing_that_was_not_written_here() {
    let place = Place::with("llama");
    place.refused("convert -m model -o model --force", 2, &["model cannot be written", "not written here"]);
    place.write("file", "mine");
    place.refused("convert -m model -o file --force", 2, &["file cannot be written", "not a directory"]);
}

#[test]
fn settings_come_from_the_file_and_flags_override_it() {
    let place = Place::with("llama");
    place.write("settings.toml", "chunk_size = 64\nblock_size = 4\nmax_keys = 5\n");
    place.done("convert -m model -o out --config settings.toml --max-keys 7 --sink-tokens 2 --original-layers 1");
    let config = place.json("out/config.json");
    let attention = &config["attention"];
    let found = ["chunk_size", "block_size", "max_keys", "sink_tokens"].map(|key| &attention[key]);
    assert_eq!(found, [&json!(64), &json!(4), &json!(7), &json!(2)]);
    assert_eq!(config["original_layers"], json!([1]));
}

#[test]
fn an_unknown_setting_in_a_file_is_named() {
    let place = Place::with("llama");
    place.write("settings.toml", "chunk_size = 64\nblocksize = 8\n");
    let words = ["settings.toml", "line 2", "unknown field `blocksize`", "`block_size`"];
    place.refused("convert -m model -o out --config settings.toml", 2, &words);
}

#[test]
fn every_settings_file_of_the_repository_is_converted_with() {
    let place = Place::with("llama");
    let configs = checkpoint_dir("builtin").join("../configs");
    let configs = files(&configs);
    assert!(configs.contains_key("default.toml"));
    // Settings of other commands are read by theirs.
    for (name, text) in configs.into_iter().filter(|(name, _)| name != "split.toml") {
        let text = String::from_utf8(text).expect("UTF-8");
        place.write(&name, &text);
        place.done(&format!("convert -m model -o {name}.out --config {name}"));
        let settings: toml::Table = toml::from_str(&text).expect("TOML");
        let written = place.json(&format!("{name}.out/config.json"));
        for (key, value) in settings {
            assert_eq!(json!(value), written["attention"][&key], "{name}: {key}");
        }
    }
}

#[test]
fn the_default_settings_file_is_the_default() {
    let place = Place::with("llama");
    place.write(
        "default.toml",
        &fs::read_to_string(checkpoint_dir("builtin").join("../configs/default.toml")).expect("a file"),
    );
    place.done("convert -m model -o plain");
    place.done("convert -m model -o named --config default.toml");
    assert_eq!(place.json("plain/config.json"), place.json("named/config.json"));
}

#[test]
fn an_export_gives_every_original_byte_back() {
    for fixture in FIXTURES {
        let place = Place::with(fixture);
        place.done("convert -m model -o converted --selector meta");
        let stdout = place.done("export -m converted -o back");
        let mut original = files(&place.path("model"));
        original.remove("expected.safetensors");
        assert!(files(&place.path("back")) == original, "{fixture}");
        let weights = original.keys().filter(|name| name.ends_with(".safetensors")).count();
        assert_eq!(stdout.matches("the original, byte for byte").count(), weights, "{stdout}");
    }
}

#[test]
fn a_pytorch_checkpoint_is_converted_checked_and_exported_as_safetensors() {
    for fixture in ["gpt2_bin_tied", "gpt2_legacy_bin"] {
        let place = Place::with(fixture);
        let expected = checkpoint_dir("gpt2").join("expected.safetensors");
        fs::copy(expected, place.path("expected.safetensors")).expect("a file");
        place.done("convert -m model -o converted");
        for model in ["model", "converted"] {
            assert!(place.done(&format!("inspect -m {model} --tensors")).contains("F32: "));
            place.done(&format!("verify -m {model} -e expected.safetensors"));
        }
        let stdout = place.done("export -m converted -o back");
        assert!(
            stdout.contains("model.safetensors") && stdout.contains("the tensors of pytorch_model.bin, bit for bit")
        );
        place.done("verify -m back -e expected.safetensors");
    }
}

#[test]
fn an_export_replaces_an_earlier_one_only_when_forced() {
    let place = Place::with("llama");
    place.done("convert -m model -o converted");
    place.done("export -m converted -o back");
    place.refused("export -m converted -o back", 2, &["back exists and is not empty", "--force"]);
    place.done("export -m converted -o back --force");
    place.refused("export -m model -o other", 2, &["model is not a converted model", "conversion.json"]);
}

#[test]
fn a_converted_model_computes_the_expected_logits() {
    for fixture in ["gpt2", "gpt_bigcode_mha", "gpt_bigcode_mqa", "llama"] {
        let place = Place::with(fixture);
        place.done("convert -m model -o out");
        for model in ["model", "out"] {
            let stdout = place.done(&format!("verify -m {model} -e model/expected.safetensors"));
            assert!(stdout.contains("max |difference|") && stdout.contains("over 58 tokens"), "{stdout}");
        }
    }
}

#[test]
fn wrong_logits_are_a_failed_check_that_says_by_how_much() {
    let place = Place::with("llama");
    edit_tensors(&place.path("model/expected.safetensors"), |tensors| {
        let logits = tensors.iter_mut().find(|tensor| tensor.name == "logits").expect("logits");
        let first = f32::from_le_bytes(*logits.bytes.first_chunk().expect("a number"));
        logits.bytes[..4].copy_from_slice(&(first + 2.5).to_le_bytes());
    });
    let words = ["logits differ by more than 1e-4", "max |difference| 2.50e0", "over 58 tokens"];
    place.refused("verify -m model -e model/expected.safetensors", 1, &words);
    place.done("verify -m model -e model/expected.safetensors --atol 3");
}

#[test]
fn meta_projections_are_counted_as_added() {
    let place = Place::with("llama");
    let stdout = place.done("convert -m model -o out --selector meta");
    assert!(stdout.contains("parameters: 46,416 before, 55,632 after"), "{stdout}");
    let record = place.json("out/conversion.json");
    assert_eq!([&record["parameters_before"], &record["parameters_after"]], [&json!(46_416), &json!(55_632)]);
    assert!(place.done("inspect -m out").contains("46,416 of the original, 9,216 added"));
}

#[test]
fn without_a_model_the_built_in_one_is_converted_with_a_full_report() {
    let place = Place::empty();
    let stdout = place.done("convert -o out --seq-len 512 --windows 1");
    for part in ["rules `gpt2`", "converted to out", "parity, original:", "parity, converted:", "| control: none |"] {
        assert!(stdout.contains(part), "no {part:?} in: {stdout}");
    }
    assert!(place.read("out/README.md").contains("| perplexity, converted |"));
    assert_eq!(place.json("out/conversion.json")["source"], "the built-in GPT-2");
}

#[test]
fn an_output_in_use_is_noticed_before_anything_is_measured() {
    let place = Place::with("llama");
    place.done("convert -m model -o out");
    place.refused("convert -m model -o out --eval-text none.txt", 2, &["out exists and is not empty"]);
    place.refused("convert -m model -o other --eval-text none.txt", 2, &["tokenizer.json: not found"]);
}

#[test]
fn measured_numbers_are_put_on_the_model_card() {
    let place = Place::with("builtin");
    let text = checkpoint_dir("builtin").join("heldout.txt");
    fs::copy(text, place.path("text.txt")).expect("a text");
    let stdout = place.done("convert -m model -o out --eval-text text.txt --seq-len 256 --windows 1 --chunk-size 64");
    assert!(stdout.contains("1 windows of 256 tokens"), "{stdout}");
    let card = place.read("out/README.md");
    assert!(card.contains("| windows | 1 of 256 tokens |") && card.contains("| KL, converted |"), "{card}");
    let settings: Value = place.json("out/config.json");
    assert_eq!(settings["attention"]["chunk_size"], 64);
}
