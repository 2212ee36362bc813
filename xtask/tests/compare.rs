//! `compare`: what it measures, trains, writes, continues and refuses. No test depends on how fast anything is.

#[path = "../../crates/bsbr/tests/common/mod.rs"]
mod common;

use common::Place;
use serde_json::{Value, json};

/// A decoder of a moment.
const DECODER: &str = "width = 16\nlayers = 1\nheads = 2\nchunk_size = 8\nwindow = 8\n";

const COST: &str = "compare --decoder decoder.toml --seq-len 32,64 --runs 2";
const TRAIN: &str =
    "compare --decoder decoder.toml --task recall,copy --seeds 2 --steps 3 --batch 2 --train-len 32 --evaluation 2";

fn place() -> Place {
    let place = Place::empty();
    place.write("decoder.toml", DECODER);
    place
}

fn report(place: &Place, arguments: &str) -> Value {
    serde_json::from_str(&place.done(&format!("{arguments} --format json"))).expect("JSON")
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key} in {value}"))
}

/// Leaves what every run on every machine has: numbers become 0, what names the machine goes, of a list the first is shown.
fn redacted(value: &Value) -> Value {
    match value {
        Value::Number(_) => json!(0),
        Value::Array(values) => values.first().map(redacted).into_iter().collect(),
        Value::Object(fields) => {
            let kept = fields.iter().map(|(key, value)| {
                let value = match key.as_str() {
                    "machine" | "versions" => value.as_object().expect("fields").keys().map(|key| json!(key)).collect(),
                    // Whether times spread is a matter of luck.
                    "notes" => json!([]),
                    // So is whether a power can be told.
                    "fits" => json!([]),
                    _ => redacted(value),
                };
                (key.clone(), value)
            });
            Value::Object(kept.collect())
        }
        other => other.clone(),
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_json_of_a_comparison_of_cost_keeps_its_form() {
    let report = report(&place(), &format!("{COST} --models bsbr --threads 2"));
    insta::assert_snapshot!("cost", serde_json::to_string_pretty(&redacted(&report)).expect("JSON"));
}

#[test]
fn the_json_of_a_comparison_of_what_is_learned_keeps_its_form() {
    let report = report(&place(), &format!("{TRAIN} --models delta --jobs 1"));
    insta::assert_snapshot!("trained", serde_json::to_string_pretty(&redacted(&report)).expect("JSON"));
}

#[test]
fn every_family_has_a_row_at_every_length_in_both_phases() {
    let report = report(&place(), COST);
    let families = ["standard", "bsbr", "linear", "delta", "window", "hopfield", "gau"];
    let named: Vec<&str> = list(&report, "families").iter().filter_map(|about| about["family"].as_str()).collect();
    assert_eq!(named, families);
    let rows = list(&report["cost"], "rows");
    assert_eq!(rows.len(), 2 * 2 * families.len());
    for (at, row) in rows.iter().enumerate() {
        assert_eq!(row["family"], families[at % 7]);
        assert_eq!(row["phase"], ["prefill", "decode"][at / 7 % 2]);
        assert_eq!(row["tokens"], [32, 64][at / 14]);
        assert_eq!(row["left_out"], Value::Null, "{row}");
        assert!(list(row, "samples").iter().all(|seconds| seconds.as_f64().is_some_and(|seconds| seconds > 0.0)));
        if row["phase"] == "decode" {
            assert!(row["state_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{row}");
        } else if cfg!(target_os = "linux") {
            assert!(row["memory"]["peak"].as_u64() >= row["memory"]["before"].as_u64(), "{row}");
        }
    }
    // Keys and values of one layer of 16 numbers in f32, and what is around them.
    let state = |tokens: u64| {
        let of = |row: &&Value| row["family"] == "standard" && row["tokens"] == tokens && row["phase"] == "decode";
        rows.iter().find(of).and_then(|row| row["state_bytes"].as_u64()).expect("bytes")
    };
    assert!(state(64) >= 64 * 2 * 16 * 4);
}

#[test]
fn families_are_configured_alike() {
    let report = report(&Place::empty(), "compare --seq-len 16 --runs 1 --warmup 0");
    for about in list(&report, "families") {
        let off = about["parameters_of_standard"].as_f64().expect("a number") - 1.0;
        assert!(off.abs() < 0.05, "{about}");
    }
}

#[test]
fn what_there_is_no_time_for_is_left_out_and_said() {
    let stdout = place().done("compare --decoder decoder.toml --models standard --seq-len 16,4m --seconds 1");
    assert!(stdout.contains("left out: standard prefill at 4194304 tokens: no time: would take about"), "{stdout}");
}

#[test]
fn a_page_holds_both_parts_and_finished_runs_are_not_done_again() {
    let place = place();
    let first = place.run(&format!("{TRAIN} --models standard,window --output-dir out"));
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert_eq!(first.stderr.lines().count(), 8, "{}", first.stderr);
    assert!(first.stderr.contains("8 of 8: "), "{}", first.stderr);
    let (runs, trained) = (place.read("out/runs.jsonl"), place.json("out/trained.json"));
    assert_eq!(runs.lines().count(), 8);
    assert_eq!(list(&trained["trained"], "runs").len(), 8);

    // Two of the runs are lost, and half of a third.
    let lines: Vec<&str> = runs.lines().collect();
    place.write("out/runs.jsonl", &format!("{}\n{}", lines[..5].join("\n"), &lines[5][..20]));
    let again = place.run(&format!("{TRAIN} --models standard,window --output-dir out"));
    assert!(again.stderr.starts_with("5 of 8 runs were done before\n"), "{}", again.stderr);
    assert_eq!(again.stderr.lines().count(), 4, "{}", again.stderr);
    let timeless = |mut report: Value| {
        for run in report["trained"]["runs"].as_array_mut().expect("a list") {
            run["seconds"] = json!(0);
        }
        report["trained"].clone()
    };
    assert_eq!(timeless(place.json("out/trained.json")), timeless(trained));

    let cost = place.done(&format!("{COST} --models standard --output-dir out"));
    let page = place.read("out/summary.md");
    assert!(page.contains(cost.trim_end()) && page.contains(again.stdout.trim_end()), "{page}");
    for part in ["![cost](cost.svg)", "![trained](trained.svg)", "by guessing", "grows with"] {
        assert!(page.contains(part), "no {part:?} in {page}");
    }
    assert!(place.read("out/trained.svg").contains("recall: by pairs"));
    assert!(place.read("out/cost.svg").contains("time to read a text"));
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_runs() {
    let place = place();
    place.write("wrong.toml", "widht = 16\n");
    place.write("odd.toml", "heads = 7\n");
    place.write("short.txt", "too short");
    for (flags, words) in [
        ("--models sparse", &["`sparse`", "hopfield"][..]),
        ("--task sorting", &["`sorting`", "passkey"]),
        ("--seq-len 1024..512", &["1024..512 is empty"]),
        ("--runs 0", &["--runs is 0"]),
        ("--threads 0", &["--threads is 0"]),
        ("--seconds 0", &["--seconds is 0"]),
        ("--task recall --seeds 0", &["--seeds is 0"]),
        ("--task recall --jobs 0", &["--jobs is 0"]),
        ("--task recall --steps 0", &["--steps is 0"]),
        ("--task recall --learning-rate 0", &["learning_rate is 0"]),
        ("--task copy --train-len 8", &["copy needs sequences of at least 25 tokens, found 8"]),
        ("--task text --text short.txt", &["9 characters"]),
        ("--task text --text nowhere.txt", &["cannot read the text nowhere.txt"]),
        ("--decoder nowhere.toml", &["cannot read nowhere.toml"]),
        ("--decoder wrong.toml", &["wrong.toml", "widht"]),
        ("--decoder odd.toml", &["`heads` is 7", "a divisor of width = 64"]),
        ("--output nowhere/report.json", &["--output: nowhere/report.json cannot be written"]),
        ("--plot plot.png", &["--plot: plot.png is no name of an SVG file"]),
        ("--plot nowhere/plot.svg", &["--plot: nowhere/plot.svg cannot be written"]),
        ("--task recall --output-dir short.txt", &["--output-dir: cannot make short.txt"]),
    ] {
        place.refused(&format!("compare {flags}"), 2, words);
    }
}
