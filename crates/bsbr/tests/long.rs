//! `eval --suite long` on the built-in checkpoint.

mod common;

use common::{Place, checkpoint_dir};
use serde_json::{Value, json};

/// Settings under which texts this short have something to lose.
const FLAGS: &str =
    "eval --suite long --chunk-size 64 --local-chunks 0 --max-keys 8 --exact-tokens 0 --windows 1 --samples 1";

/// What does not depend on the processor: names, text, and which numbers there are.
fn redacted(value: &Value) -> Value {
    match value {
        Value::Number(_) => json!(0),
        Value::Array(values) => values.iter().map(redacted).collect(),
        Value::Object(values) => values.iter().map(|(key, value)| (key.clone(), redacted(value))).collect(),
        other => other.clone(),
    }
}

#[test]
fn the_json_keeps_its_form() {
    let place = Place::empty();
    let report = place.done(&format!("{FLAGS} --seq-len 320 --format json"));
    assert_eq!(report, place.done(&format!("{FLAGS} --seq-len 320 --format json")), "the same every time");
    let mut report: Value = serde_json::from_str(&report).expect("JSON");
    let shares: Vec<f64> = report["lengths"][0]["variants"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|variant| variant["keys_share"].as_f64().expect("a number"))
        .collect();
    // Without a far term layers read other states, of which the index chooses other keys, about as many.
    assert!(shares[0] == 1.0 && shares[1] < 1.0 && (shares[1] - shares[2]).abs() < 0.02, "{shares:?}");
    assert!(shares[3] < shares[1] && shares[3] < shares[2], "{shares:?}");
    for name in ["versions", "machine"] {
        assert!(report["about"][name].is_object(), "{report}");
        report["about"][name] = json!(name);
    }
    report["about"]["model"] = json!("model");
    report["model"] = json!("model");
    insta::assert_snapshot!("json", serde_json::to_string_pretty(&redacted(&report)).expect("JSON"));
}

#[test]
fn the_tables_hold_every_variant_task_and_depth() {
    let run = Place::empty().run(&format!("{FLAGS} --seq-len 256,320 --tasks perplexity,passkey"));
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    for part in [
        "256 tokens\n",
        "320 tokens\n",
        "| original ",
        "| converted ",
        "| control: far = none ",
        "| control: none ",
        "keys read",
        "last quarter",
        "passkey (5)",
        "| passkey, converted ",
        "85 %",
    ] {
        assert!(run.stdout.contains(part), "no {part:?} in: {}", run.stdout);
    }
    assert!(!run.stdout.contains("needle"), "{}", run.stdout);
}

#[test]
fn what_cannot_be_measured_is_refused_with_what_to_do() {
    let place = Place::empty();
    place.refused("eval --samples 3", 2, &["--suite long"]);
    place.refused("eval --suite long --tasks passkeys", 2, &["passkeys", "passkey"]);
    place.refused("eval --suite long --seq-len 4096", 2, &["2048 learned positions", "interpolate"]);
    place.refused("eval --suite long --seq-len 64 --tasks needle", 2, &["64 tokens have no room", "--seq-len"]);
    place.refused("eval --suite long --samples 0", 2, &["0 samples"]);
    place.write("short.txt", &"A short text. ".repeat(30));
    place.refused("eval --suite long --text short.txt --seq-len 512", 2, &["one window needs 512", "a longer text"]);
}

#[test]
fn a_model_of_bounded_memory_is_measured_beside_its_controls_and_as_another_kind() {
    let place = Place::with("builtin");
    let bounded = std::fs::read_to_string(checkpoint_dir("builtin").join("../configs/bounded.toml")).expect("a file");
    place.write("bounded.toml", &bounded);
    place.done("convert -m model -o bounded --config bounded.toml");
    let long = "eval -m bounded --suite long --seq-len 512 --windows 1 --tasks perplexity --format json";
    let names = |flags: &str| -> (Value, Vec<Value>) {
        let report: Value = serde_json::from_str(&place.done(&format!("{long} {flags}"))).expect("JSON");
        let variants = report["lengths"][0]["variants"].as_array().expect("a list");
        (report["attention"].clone(), variants.iter().map(|variant| variant["name"].clone()).collect())
    };
    let (own, variants) = names("");
    assert_eq!((&own["retrieval"], &own["kept_tokens"]), (&json!("state"), &json!(608)));
    assert_eq!(variants, ["original", "converted", "control: none"]);
    for kind in ["none", "blocks"] {
        let (other, variants) = names(&format!("--retrieval {kind}"));
        assert_eq!((&other["retrieval"], &other["kept_tokens"]), (&json!(kind), &json!(0)));
        assert_eq!(other["max_chunks"], Value::Null);
        assert_eq!(variants.len(), if kind == "none" { 2 } else { 4 });
        place.done(&format!("eval -m bounded --seq-len 256 --windows 1 --retrieval {kind}"));
        place.done(&format!("bench -m bounded --part model --seq-len 256 --runs 1 --warmup 0 --retrieval {kind}"));
    }
}
