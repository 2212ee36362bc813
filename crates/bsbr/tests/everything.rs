//! Every command on every kind of checkpoint, and on what was made of it.
#![allow(clippy::print_stderr)] // what a failure belongs to, and what was not tested

mod common;

use std::{fs, path::PathBuf};

use common::{Place, checkpoint_dir, files};
use serde_json::json;

/// What all fixtures have tokens for: the smallest vocabulary has 31.
const LETTERS: &str = "0123456789 etaoinshrdlcumwfgyp";

/// Attention under which texts this short have something far.
const SMALL: &str = "--block-size 8 --exact-tokens 0 --max-keys 24 --meta-blocks 2";

/// The directories of fixtures, and the GGUF files.
fn fixtures() -> Vec<PathBuf> {
    let listed = |dir: PathBuf| {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(dir).expect("fixtures").map(|entry| entry.expect("one").path()).collect();
        paths.sort();
        paths
    };
    let all = listed(checkpoint_dir("")).into_iter().filter(|path| path.join("config.json").is_file());
    let gguf =
        listed(checkpoint_dir("gguf")).into_iter().filter(|path| path.extension().is_some_and(|end| end == "gguf"));
    // Files that hold a tokenizer or formats of numbers hold no model.
    all.chain(gguf.filter(|path| !["tokenizer", "formats"].iter().any(|kind| path.to_string_lossy().contains(kind))))
        .collect()
}

/// A place with the checkpoint under `model`, a tokenizer beside it, and a text.
fn place(fixture: &PathBuf) -> Place {
    let place = Place::empty();
    fs::create_dir(place.path("model")).expect("a fresh directory");
    if fixture.is_dir() {
        for (name, content) in files(fixture) {
            fs::write(place.path("model").join(name), content).expect("room");
        }
        place.write("model/tokenizer.json", &tokenizer());
    } else {
        fs::copy(fixture, place.path("model/model.gguf")).expect("room");
    }
    let letter = |n: usize| LETTERS.as_bytes()[n * n * 7 % LETTERS.len()] as char;
    place.write("text.txt", &(0..3000).map(|n| letter(n + n / 30)).collect::<String>());
    place
}

/// A token for each letter.
fn tokenizer() -> String {
    let vocabulary: serde_json::Map<_, _> =
        LETTERS.chars().zip(0..).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    let model = json!({"type": "BPE", "vocab": vocabulary, "merges": []});
    let tokenizer = json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Fuse"}, "model": model});
    tokenizer.to_string()
}

/// What runs on a model of any kind, with a tokenizer beside it or without.
fn runs(place: &Place, model: &str) {
    place.done(&format!("inspect -m {model}"));
    place.done(&format!("inspect -m {model} --tensors"));
    if place.path(&format!("{model}/tokenizer.json")).is_file() {
        place.done(&format!("generate -m {model} -n 3 --prompt ten1"));
        place.done(&format!("eval -m {model} --text text.txt --seq-len 24 --windows 1"));
    }
}

/// The logits are those of the original, where nothing is far.
fn verify(place: &Place, model: &str) {
    if place.path("model/expected.safetensors").is_file() {
        place.done(&format!("verify -m {model} -e model/expected.safetensors"));
    }
}

/// Every command that takes a checkpoint, on some of the fixtures.
fn each_command_on(fixtures: &[PathBuf]) {
    for fixture in fixtures {
        eprintln!("{}", fixture.display());
        let place = place(fixture);
        runs(&place, "model");
        verify(&place, "model");
        place.done("convert -m model --dry-run");
        for (name, settings) in [("default", ""), ("state", "--retrieval state --max-chunks 2 --kept-tokens 8")] {
            place.done(&format!("convert -m model -o {name} {settings}"));
            // What a file without a tokenizer asks for.
            place.write(&format!("{name}/tokenizer.json"), &tokenizer());
            runs(&place, name);
            verify(&place, name);
            place.done(&format!("export -m {name} -o back --force"));
        }
        runs(&place, "back");
        verify(&place, "back");
        place.done("split plan -m model");
    }
}

#[test]
fn every_command_runs_on_every_fixture_and_on_its_conversions() {
    let all = fixtures();
    assert!(all.len() > 60, "only {} fixtures", all.len());
    let (first, second) = all.split_at(all.len() / 2);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| each_command_on(first));
        each_command_on(second);
        first.join().expect("the first half runs too");
    });
}

/// Kinds of positions, windows, head norms and biases.
const DIFFERENT: [&str; 6] = ["llama", "gpt2", "bloom", "gemma3_text", "phi3_long", "qwen2_windows"];

#[test]
fn every_command_runs_on_a_conversion_with_each_of_the_settings_at_hand() {
    let configs = checkpoint_dir("builtin").join("../configs");
    let mut names = files(&configs).into_keys().filter(|name| name != "split.toml").collect::<Vec<_>>();
    names.sort();
    assert!(names.contains(&"bounded.toml".to_owned()), "{names:?}");
    for fixture in DIFFERENT {
        let place = place(&checkpoint_dir(fixture));
        let positions = if fixture == "gpt2" { "--positions clamp" } else { "" };
        for (name, content) in files(&configs) {
            fs::write(place.path(&name), content).expect("room");
        }
        for name in &names {
            eprintln!("{fixture} {name}");
            // An index has whole sections in a chunk; the others find blocks in short texts.
            let chunk = if ["default.toml", "fast.toml"].contains(&name.as_str()) { 64 } else { 16 };
            let small = format!("--chunk-size {chunk} {SMALL}");
            place.done(&format!("convert -m model -o converted --force --config {name} {small} {positions}"));
            runs(&place, "converted");
            let long = "eval --suite long -m converted --text text.txt --seq-len 512 --windows 1 --samples 1";
            place.done(long);
            place.done(&format!("{long} --format json"));
            let calibrated = "calibrate -m converted --text text.txt --tokens 1280 --seq-len 320 -o calibrated --force";
            let run = place.run(calibrated);
            let nothing = run.code == 2 && run.stderr.contains("has nothing to calibrate");
            assert!(run.code == 0 || nothing, "{calibrated}\n{}", run.stderr);
            place.done("tune -m converted --text text.txt --steps 2 --seq-len 64 --rank 2 -o tuned --force");
            for changed in ["calibrated", "tuned"].into_iter().filter(|name| place.path(name).is_dir()) {
                place.done(&format!("inspect -m {changed}"));
                place.done(&format!("generate -m {changed} -n 3 --prompt ten1"));
                place.done(&format!("export -m {changed} -o back --force"));
                fs::remove_dir_all(place.path(changed)).expect("it is there");
            }
        }
    }
}

#[test]
fn every_command_runs_on_compressed_layers() {
    for fixture in DIFFERENT {
        let place = place(&checkpoint_dir(fixture));
        place.done("convert -m model -o converted");
        place.done("split verify -m model");
        place.done("split calibrate -m model --text text.txt --seq-len 24 -o moments.safetensors");
        for base in ["model", "converted"] {
            eprintln!("{fixture} {base}");
            place.done(&format!("split compress -m {base} --text text.txt --seq-len 24 -o compressed --force"));
            place.done("split report -m compressed");
            place.done("inspect -m compressed --tensors");
            place.done("generate -m compressed -n 3 --prompt ten1");
            place.done("eval -m compressed --text text.txt --seq-len 24 --windows 1");
            place.done("split fold -m compressed -o folded --force");
            place.done("inspect -m folded");
            place.done("generate -m folded -n 3 --prompt ten1");
        }
    }
}
