//! `tune`: a converted model in, one with adapters out, and what the other commands make of it.
#![cfg(feature = "flex")]

mod common;

use std::fs;

use common::{Place, checkpoint_dir, files};

const CONVERT: &str = "convert -m model -o converted --retrieval state --max-chunks 8 --chunk-size 16 --block-size 8";
const TUNE: &str = "tune -m converted --text text.txt --seq-len 128 --held-out 2 --evaluate-every 4";

/// A converted model, and a text of about two thousand tokens.
fn place() -> Place {
    let place = Place::with("builtin");
    let text = fs::read_to_string(checkpoint_dir("builtin").join("heldout.txt")).expect("a text");
    place.write("text.txt", &text.chars().take(6000).collect::<String>());
    place.done(CONVERT);
    place
}

#[test]
fn a_tuned_model_is_evaluated_exported_and_tuned_again() {
    let place = place();
    let stdout = place.done(&format!(
        "{TUNE} -o tuned --rank 4 --steps 12 --learning-rate 0.001 --logits-steps 2 --logits-seq-len 64"
    ));
    assert!(stdout.contains("tuned to tuned") && stdout.contains("layers: 12 steps, held-out loss"), "{stdout}");
    assert!(stdout.contains("logits: 2 steps"), "{stdout}");
    assert!(!place.path("tuned-checkpoint").exists());
    let log = place.json("tuned/tune.json");
    assert_eq!((log["schema"].as_str(), log["log"]["steps"].as_array().map(Vec::len)), (Some("bsbr-tune/1"), Some(14)));
    assert!(place.read("tuned/tune.svg").starts_with("<svg"));
    let card = place.read("tuned/README.md");
    assert!(card.contains("## Tuning") && card.contains("rank 4") && card.contains("original files back"), "{card}");
    assert_eq!(place.json("tuned/config.json")["adapters"]["rank"], 4);

    // The original is what it was: an export gives it back, and a measurement compares with it.
    place.done("export -m tuned -o back");
    assert!(files(&place.path("back"))["model.safetensors"] == files(&place.path("model"))["model.safetensors"]);
    let report = |model: &str| {
        let stdout = place.done(&format!("eval -m {model} --text text.txt --seq-len 128 --windows 12 --format json"));
        serde_json::from_str::<serde_json::Value>(&stdout).expect("JSON")["lengths"][0].clone()
    };
    let (before, after) = (report("converted"), report("tuned"));
    assert_eq!(before["original"]["all"], after["original"]["all"]);
    let kl = |report: &serde_json::Value| report["variants"][0]["agreement"]["kl"].as_f64().expect("a number");
    assert!(kl(&after) < kl(&before), "{} then {}", kl(&before), kl(&after));

    // Again, from there, with the adapters it has; and merged.
    let tune = TUNE.replace("-m converted", "-m tuned");
    place.done(&format!("{tune} -o again --steps 2"));
    assert_eq!(place.read("again/README.md").matches("## Tuning").count(), 1);
    place.done(&format!("{tune} -o merged --steps 2 --merge"));
    assert!(place.json("merged/config.json").get("adapters").is_none());
    assert!(place.read("merged/README.md").contains("were changed after converting"));
    let (apart, merged) = (report("again"), report("merged"));
    // Not the divergence: what a merged model is compared with has the adapters too.
    let perplexity =
        |report: &serde_json::Value| report["variants"][0]["perplexity"]["all"].as_f64().expect("a number");
    let (apart, merged) = (perplexity(&apart), perplexity(&merged));
    assert!((apart - merged).abs() < 1e-5 * apart, "{apart} and {merged}");
    assert!(place.done("export -m merged -o changed").contains("changed since it was converted"));
}

#[test]
fn gates_of_heads_are_weights_of_their_own() {
    let place = place();
    place.done(&format!("{TUNE} -o gated --rank 0 --gates --steps 4"));
    assert_eq!(place.json("gated/config.json")["attention"]["head_gates"], true);
    assert!(place.read("gated/README.md").contains("- a gate for each head"));
    let inspected = place.done("inspect -m gated");
    assert!(inspected.contains("head_gates"), "{inspected}");
    place.done("eval -m gated --text text.txt --seq-len 128 --windows 1");
    place.done("export -m gated -o back");
    assert!(files(&place.path("back"))["model.safetensors"] == files(&place.path("model"))["model.safetensors"]);
    // What has gates goes on training them.
    place.done(&format!("{} -o again --rank 0 --steps 2", TUNE.replace("-m converted", "-m gated")));
    place.done("convert -m model -o blocks --chunk-size 64");
    let blocks = TUNE.replace("-m converted", "-m blocks");
    place.refused(&format!("{blocks} -o none --gates --steps 2"), 2, &["head_gates", "state and additive"]);
}

#[test]
fn an_interrupted_run_goes_on() {
    let place = place();
    // The time is over at once: nothing is trained, all is kept.
    let stdout = place.done(&format!("{TUNE} -o tuned --minutes 0.00001"));
    assert!(stdout.contains("tuned-checkpoint goes on with --resume"), "{stdout}");
    place.refused(&format!("{TUNE} -o other --checkpoint-dir tuned-checkpoint --steps 2"), 2, &["--resume", "--force"]);
    place.refused(
        &format!("{TUNE} -o other --checkpoint-dir tuned-checkpoint --resume --steps 2"),
        2,
        &["its settings differs"],
    );
    let stdout = place.done(&format!("{TUNE} -o tuned --force --resume --minutes 0.05"));
    assert!(stdout.contains("held-out loss"), "{stdout}");
}

#[test]
fn what_cannot_be_tuned_is_refused_before_anything_is_written() {
    let place = place();
    place.refused("tune -m model --text text.txt -o out", 2, &["no converted model", "convert it first"]);
    place.refused("tune -m converted --text text.txt -o out", 2, &["the text has", "need 6144"]);
    place.refused("tune -m converted --text nowhere.txt -o out", 2, &["nowhere.txt"]);
    place.refused(&format!("{TUNE} -o out --rank 0"), 2, &["nothing to train"]);
    place.refused(&format!("{TUNE} -o out --minutes=-1"), 2, &["--minutes -1"]);
    place.refused(&format!("{TUNE} -o out --devices 0"), 2, &["--devices 0"]);
    place.refused(&format!("{TUNE} -o out --targets query,query"), 2, &["adapters.targets"]);
    place.refused(&format!("{TUNE} -o converted"), 2, &["--force"]);
}
