//! `generate`, `eval` and `inspect` on the built-in checkpoint: what they print, and where.

mod common;

use std::{fs::OpenOptions, process::Stdio};

use common::{Place, Run, checkpoint_dir};
use serde_json::Value;

const PROMPT: &str = "And the king said unto";

/// Continues a prompt with the model in `model`, or the built-in one.
fn generate(place: &Place, flags: &str) -> Run {
    place.write("prompt.txt", PROMPT);
    let run = place.run(&format!("generate --prompt-file prompt.txt {flags}"));
    assert_eq!(run.code, 0, "{}", run.stderr);
    run
}

#[test]
fn greedy_text_is_the_same_every_time() {
    let place = Place::empty();
    let [first, second] = [(); 2].map(|()| generate(&place, "-n 40").stdout);
    assert_eq!(first, second);
    assert!(first.trim().len() > 40, "{first:?}");
}

#[test]
fn text_goes_to_standard_output_and_statistics_to_standard_error() {
    let run = generate(&Place::empty(), "-n 24");
    assert!(!run.stdout.contains("tokens in") && run.stdout.ends_with('\n'), "{:?}", run.stdout);
    assert!(run.stderr.starts_with("prompt ") && run.stderr.contains("24 new tokens in"), "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
}

#[test]
fn a_prompt_can_be_a_flag_or_a_file() {
    let place = Place::empty();
    let mut command = common::bsbr();
    let flag = common::run(command.args(["generate", "--prompt", PROMPT, "-n", "16"]));
    assert_eq!(flag.stdout, generate(&place, "-n 16").stdout);
    place.refused("generate --prompt a --prompt-file prompt.txt", 2, &["--prompt <TEXT>", "--prompt-file <FILE>"]);
}

#[test]
fn the_seed_decides_what_is_drawn() {
    let place = Place::empty();
    let text = |seed: &str| generate(&place, &format!("-n 30 --temperature 1 --top-k 50 --seed {seed}")).stdout;
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    assert_eq!(generate(&place, "-n 30 --temperature 1 --top-k 1").stdout, generate(&place, "-n 30").stdout);
}

#[test]
fn a_converted_model_continues_a_short_prompt_like_the_original() {
    let place = Place::with("builtin");
    place.done("convert -m model -o converted");
    let original = generate(&place, "-n 60 -m model").stdout;
    assert_eq!(generate(&place, "-n 60").stdout, original);
    assert_eq!(generate(&place, "-n 60 -m converted").stdout, original);
}

#[test]
fn full_attention_undoes_the_conversion() {
    let place = Place::with("builtin");
    place.done("convert -m model -o converted --retrieval none --chunk-size 16 --block-size 16 --local-chunks 0 --sink-tokens 0");
    let original = generate(&place, "-n 60").stdout;
    assert_eq!(generate(&place, "-n 60 -m converted --full-attention").stdout, original);
    assert_ne!(generate(&place, "-n 60 -m converted").stdout, original, "windows of 16 tokens change nothing");
}

fn evaluation(place: &Place, flags: &str) -> Value {
    serde_json::from_str(&place.done(&format!("eval --format json --windows 1 {flags}"))).expect("JSON")
}

/// Checks that every number is there: one that is not finite would be written as null.
fn check_numbers(value: &Value) {
    match value {
        Value::Array(values) => values.iter().for_each(check_numbers),
        Value::Object(values) => values.values().for_each(check_numbers),
        Value::Number(number) => assert!(number.as_f64().is_some_and(f64::is_finite)),
        other => assert!(other.is_string(), "{other} among the numbers"),
    }
}

#[test]
fn an_evaluation_as_json_holds_every_length_with_the_control() {
    let report = evaluation(&Place::empty(), "--seq-len 256,512 --max-keys 3");
    assert_eq!(report["schema"], "bsbr-eval/2");
    assert_eq!(report["attention"]["max_keys"], 3);
    let lengths = report["lengths"].as_array().expect("a list");
    let windows: Vec<_> = lengths.iter().map(|length| length["window"].as_u64().expect("a length")).collect();
    assert_eq!(windows, [256, 512]);
    for length in lengths {
        check_numbers(length);
        let names: Vec<_> = length["variants"].as_array().expect("a list").iter().map(|v| &v["name"]).collect();
        assert_eq!(names, ["converted", "control: none"]);
    }
}

#[test]
fn an_evaluation_where_nothing_is_far_changes_nothing() {
    let report = evaluation(&Place::empty(), "--seq-len 256 --chunk-size 128 --local-chunks 1");
    let length = &report["lengths"][0];
    assert_eq!(length["variants"][0]["agreement"]["top1"], 1.0);
    let perplexity = |report: &Value| report["all"].as_f64().expect("a number");
    let (original, converted) = (perplexity(&length["original"]), perplexity(&length["variants"][0]["perplexity"]));
    assert!((original - converted).abs() < 1e-3 * original && original > 1.0, "{original} {converted}");
}

#[test]
fn retrieval_beats_the_control() {
    let report = evaluation(&Place::empty(), "--seq-len 1024 --chunk-size 64");
    let kl = |variant: usize| report["lengths"][0]["variants"][variant]["agreement"]["kl"].as_f64().expect("a number");
    assert!(kl(0) < kl(1), "{report:#}");
}

#[test]
fn an_evaluation_uses_the_settings_of_a_converted_model_and_flags_override_them() {
    let place = Place::with("builtin");
    place.done("convert -m model -o converted --chunk-size 64 --block-size 8");
    let report = evaluation(&place, "-m converted --seq-len 128 --max-keys 2");
    let found = ["chunk_size", "block_size", "max_keys"].map(|key| report["attention"][key].as_u64());
    assert_eq!(found, [Some(64), Some(8), Some(2)]);
}

#[test]
fn an_evaluation_prints_tables_to_standard_output_alone() {
    let run = Place::empty().run("eval --seq-len 256 --windows 2");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    for part in ["2 windows of 256 tokens", "| original ", "| converted ", "| control: none |", "| perplexity at |"] {
        assert!(run.stdout.contains(part), "no {part:?} in: {}", run.stdout);
    }
}

#[test]
fn inspecting_shows_parameters_and_settings() {
    let place = Place::with("llama");
    place.done("convert -m model -o converted --chunk-size 64");
    let original = place.done("inspect -m model");
    assert!(original.contains("parameters: 46,416 of the original, 0 added"), "{original}");
    assert!(original.contains("F32: 21 tensors, 185.7 kB"), "{original}");
    assert!(original.contains("[decoder]") && !original.contains("[attention]"), "{original}");
    let converted = place.done("inspect -m converted");
    let (_, attention) = converted.split_once("[attention]").expect("settings");
    assert!(attention.contains("chunk_size = 64"), "{converted}");
    let tensors = place.done("inspect -m converted --tensors");
    let row = tensors.lines().find(|line| line.starts_with("| layers.0.attention.query.weight"));
    assert!(row.is_some_and(|row| row.contains("[48, 48]") && row.contains("F32")), "{tensors}");
}

#[test]
fn without_a_model_the_built_in_one_is_inspected() {
    let stdout = Place::empty().done("inspect");
    assert!(stdout.starts_with("Hugging Face checkpoint `builtin` (gpt2)"), "{stdout}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for arguments in ["inspect --tensors", "generate -p Abraham -n 8", "convert --dry-run", "--help"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("bsbr"));
        let output = command.args(arguments.split(' ')).stdout(writer).stderr(Stdio::piped()).output();
        let output = output.expect("the program starts");
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_an_error_that_says_so() {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("bsbr"));
    let output = command.arg("inspect").stdout(full).output().expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.starts_with("error: cannot write to standard output: No space left"), "{stderr}");
}

#[test]
fn the_built_in_checkpoint_computes_what_another_implementation_does() {
    let place = Place::with("builtin");
    assert!(checkpoint_dir("builtin").join("expected.safetensors").is_file());
    let stdout = place.done("verify -m model -e model/expected.safetensors");
    assert!(stdout.contains("top-1 100.00 %"), "{stdout}");
}

#[test]
fn the_rules_of_an_architecture_are_printed_without_a_model() {
    let place = Place::empty();
    insta::assert_snapshot!("rules_gpt2", place.done("inspect --rules gpt2"));
    insta::assert_snapshot!("rules_list", place.done("inspect --rules list"));
    let words = ["no rules are called `lama`", "the nearest name is `llama`", "`gpt_neox`"];
    place.refused("inspect --rules lama", 2, &words);
    place.refused("inspect --rules gpt2 --tensors", 2, &["--rules", "--tensors"]);
}

#[test]
fn every_device_is_listed_and_the_default_marked() {
    let shown = Place::empty().done("inspect --devices");
    for name in ["cpu", "ndarray", "wgpu", "cuda"] {
        assert!(
            shown.lines().any(|line| line.trim_start_matches(['|', '│', ' ']).starts_with(name)),
            "{name}: {shown}"
        );
    }
    assert_eq!(shown.matches("(default)").count(), 1, "{shown}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_is_not_compiled_in_is_named_with_its_feature() {
    Place::empty().refused("inspect --device cuda", 2, &["`cuda`", "--features cuda"]);
}
