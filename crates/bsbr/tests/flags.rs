//! One vocabulary of flags: what means the same is called the same in every command, and older names say so.

mod common;

use common::{Place, bsbr, check_refusal, run};
use serde_json::Value;

#[test]
fn an_older_name_says_the_new_one() {
    let place = Place::with("builtin");
    for (arguments, now) in [
        ("calibrate -m model --text x --window 512", "this flag is called --seq-len now"),
        ("split compress -m model -o out --length 512", "this flag is called --seq-len now"),
        ("split calibrate -m model --output out --samples 8", "this flag is called --windows now"),
    ] {
        place.refused(arguments, 2, &[now]);
    }
    for arguments in ["bench --seq-len 64 --json report.json", "split report -m model --json report.json"] {
        place.refused(arguments, 2, &["--json takes no file: --format json --output report.json"]);
    }
    place.refused("convert -m model -o out --top-k 4", 2, &["--top-k is gone"]);
}

#[test]
fn a_misspelt_value_gets_a_suggestion() {
    let place = Place::empty();
    place.refused("eval --retrieval blcoks", 2, &["did you mean `blocks`?"]);
    place.refused("eval --preset fst", 2, &["'fast'"]);
    place.refused("convert --weights f61", 2, &["did you mean `f16`?"]);
    place.refused("convert --dtype f16", 2, &["this flag is called --weights now"]);
    place.refused("split compress --dtype f16 -o out", 2, &["this flag is called --weights now"]);
    place.refused("generate --prompt x --device cpuu", 2, &["'cpu'"]);
}

#[test]
fn a_path_that_is_not_there_is_said_to_be_no_directory() {
    let place = Place::empty();
    for model in ["/some/wrong/path", "./model", "../model", "models/llama/7b", "model/"] {
        let run = place.run(&format!("inspect -m {model}"));
        check_refusal(&run, 2, &[&format!("there is no directory or file {model}")]);
        assert!(!run.stderr.contains("hub"), "{}", run.stderr);
    }
}

#[test]
fn lengths_are_written_alike_in_every_command() {
    let place = Place::empty();
    let json: Value = serde_json::from_str(&place.done("eval --seq-len 64..256,128 --windows 1 --json")).expect("JSON");
    let windows: Vec<u64> =
        json["lengths"].as_array().expect("a list").iter().filter_map(|length| length["window"].as_u64()).collect();
    assert_eq!(windows, [64, 128, 256]);
    let one = place.done("eval --seq-len 1k --windows 1 --format csv");
    assert!(one.lines().nth(1).is_some_and(|line| line.contains(",1024,")), "{one}");
    place.refused("tune -m x --text y -o z --seq-len 1.5k", 2, &["length `1.5k`"]);
}

#[test]
fn a_report_is_a_table_json_or_lines_for_spreadsheets_here_or_in_a_file() {
    let place = Place::empty();
    let eval = "eval --seq-len 128 --windows 1";
    let table = place.done(eval);
    let json: Value = serde_json::from_str(&place.done(&format!("{eval} --format json"))).expect("JSON");
    for name in ["versions", "machine"] {
        assert!(json["about"][name].is_object(), "{json}");
    }
    assert_eq!(json["about"]["model"], json["model"]);
    // Of the built-in text, by another program.
    let heldout = common::checkpoint_dir("builtin").join("heldout.txt");
    if let Ok(sum) = std::process::Command::new("sha256sum").arg(heldout).output() {
        let sum = String::from_utf8_lossy(&sum.stdout).into_owned();
        assert_eq!(json["about"]["text_sha256"].as_str(), sum.split(' ').next());
    }
    let csv = place.done(&format!("{eval} --format csv"));
    let lines: Vec<&str> = csv.lines().collect();
    assert!(lines[0].starts_with("model,name,perplexity.all,") && lines[0].contains(",tokens,windows,"), "{csv}");
    assert_eq!(lines.len(), 4, "{csv}");
    let kl = lines[0].split(',').position(|name| name == "agreement.kl").expect("a column");
    let variant = &json["lengths"][0]["variants"][0];
    let row = lines.iter().find(|line| line.contains(",converted,")).expect("a row");
    let cell: f64 =
        row.rsplit(',').nth(lines[0].split(',').count() - 1 - kl).expect("a cell").parse().expect("a number");
    assert_eq!(Some(cell), variant["agreement"]["kl"].as_f64());

    let shown = place.done(&format!("{eval} --format csv --output report.csv"));
    let without_seconds = |text: &str| text.lines().next().map(str::to_owned);
    assert_eq!(without_seconds(&shown), without_seconds(&table));
    assert_eq!(place.read("report.csv").lines().next(), Some(lines[0]));
    place.refused(
        &format!("{eval} --output nowhere/report.csv"),
        2,
        &["--output: nowhere/report.csv cannot be written"],
    );
    place.refused(&format!("{eval} --format json --json"), 2, &["cannot be used with"]);
}

#[test]
fn a_model_and_a_check_can_be_read_by_programs() {
    let place = Place::with("llama");
    let json: Value = serde_json::from_str(&place.done("inspect -m model --json")).expect("JSON");
    let tensors = json["tensors"].as_array().expect("a list").len();
    assert!(tensors > 10 && json["config"]["decoder"]["layers"].as_u64().is_some(), "{json}");
    assert_eq!(place.done("inspect -m model --format csv").lines().count(), tensors + 1);
    let verify = "verify -m model -e model/expected.safetensors --json";
    let json: Value = serde_json::from_str(&place.done(verify)).expect("JSON");
    assert!(json["passed"] == true && json["max"].as_f64().is_some_and(|max| max <= 1e-4), "{json}");
    let failed = place.run(&format!("{verify} --atol 0"));
    let json: Value = serde_json::from_str(&failed.stdout).expect("JSON");
    assert!(
        failed.code == 1 && json["passed"] == false && failed.stderr.contains("logits differ"),
        "{}",
        failed.stderr
    );
}

#[test]
fn completions_know_commands_and_flags() {
    let place = Place::empty();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.done(&format!("completions {shell}"));
        for word in ["bsbr", "chat", "generate", "repeat-penalty", "max-keys"] {
            assert!(script.contains(word), "no {word} for {shell}");
        }
    }
    let script = place.done("completions bash");
    let checked = std::process::Command::new("bash").args(["-n", "-c", &script]).status();
    assert!(checked.map_or(true, |status| status.success()));
    place.refused("completions bsh", 2, &["'bash'"]);
}

#[test]
fn the_program_names_its_version() {
    let output = run(bsbr().arg("--version"));
    assert_eq!(output.stdout, format!("bsbr {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn presets_are_the_settings_files_of_their_names() {
    let place = Place::with("builtin");
    for name in ["default", "fast", "bounded", "published", "meta"] {
        let file = common::checkpoint_dir("builtin").join(format!("../configs/{name}.toml"));
        place.done(&format!("convert -m model -o by-name --force --preset {name}"));
        place.done(&format!("convert -m model -o by-file --force --config {}", file.display()));
        assert_eq!(place.read("by-name/config.json"), place.read("by-file/config.json"));
    }
    place.refused("convert -m model -o out --preset fast --config x.toml", 2, &["cannot be used with"]);
}

#[cfg(unix)]
#[test]
fn the_built_in_model_is_there_from_any_directory_and_without_a_home() {
    let place = Place::empty();
    for (home, cache) in [("home", ""), ("home", "cache"), ("", "")] {
        let mut command = bsbr();
        command.current_dir("/").arg("inspect").env_remove("HOME").env_remove("XDG_CACHE_HOME");
        command.env("TMPDIR", place.path(""));
        if !home.is_empty() {
            command.env("HOME", place.path(home));
        }
        if !cache.is_empty() {
            command.env("XDG_CACHE_HOME", place.path(cache));
        }
        let found = run(&mut command);
        assert_eq!(found.code, 0, "{}", found.stderr);
        assert!(found.stdout.starts_with("Hugging Face checkpoint `builtin` (gpt2)"), "{}", found.stdout);
    }
    for place in [place.path("home/.cache/bsbr"), place.path("cache/bsbr"), place.path("bsbr")] {
        let hash = std::fs::read_dir(&place).expect("it was made").next().expect("an entry").expect("readable").path();
        assert!(hash.join("builtin/model.safetensors").is_file(), "{}", hash.display());
    }
}
