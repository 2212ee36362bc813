//! `calibrate`: from a converted model and a text to a model that is read with.

mod common;

use std::fs;

use common::{Place, checkpoint_dir, files};
use serde_json::{Value, json as value};

/// The built-in checkpoint converted with meta projections under `converted`, and its held-out text in two halves.
fn place() -> Place {
    let place = Place::with("builtin");
    place.done(
        "convert -m model -o converted --selector meta --chunk-size 32 --block-size 8 --meta-blocks 8 --exact-tokens 0",
    );
    let text = fs::read_to_string(checkpoint_dir("builtin").join("heldout.txt")).expect("a text");
    let middle = text.char_indices().map(|(at, _)| at).find(|&at| at >= text.len() / 2).expect("a middle");
    place.write("first.txt", &text[..middle]);
    place.write("second.txt", &text[middle..]);
    place
}

fn json(stdout: &str) -> Value {
    serde_json::from_str(stdout).expect("JSON")
}

const FLAGS: &str = "calibrate -m converted --text first.txt --tokens 2048 --seq-len 512";

#[test]
fn a_calibrated_model_is_nearer_to_the_original_on_other_text_and_exports_the_same_bytes() {
    let place = place();
    let report = json(&place.done(&format!("{FLAGS} -o calibrated --format json")));
    assert_eq!(report["schema"], "bsbr-calibrate/1");
    let calibration = &report["calibration"];
    assert_eq!((calibration["tokens"].as_u64(), calibration["held_out"].as_u64()), (Some(2048), Some(1)));
    assert_eq!(place.json("calibrated/conversion.json")["calibration"], *calibration);
    let layers = calibration["meta"].as_array().expect("layers");
    assert!(layers.iter().any(|layer| layer["accepted"] == true), "{layers:?}");

    let kl = |model: &str| {
        let report =
            json(&place.done(&format!("eval -m {model} --text second.txt --seq-len 512 --windows 4 --format json")));
        report["lengths"][0]["variants"][0]["agreement"]["kl"].as_f64().expect("a number")
    };
    let (before, after) = (kl("converted"), kl("calibrated"));
    assert!(after < 0.95 * before, "{before} became {after}");

    place.done("export -m converted -o first");
    assert!(place.done("export -m calibrated -o second").contains("the original, byte for byte"));
    assert!(files(&place.path("first")) == files(&place.path("second")));
}

#[test]
fn calibrating_twice_or_in_place_gives_the_same_bytes() {
    let place = place();
    let table = place.done(&format!("{FLAGS} -o first"));
    assert!(table.contains("calibrated to first in ") && table.contains(" of 4 fitted"), "{table}");
    place.done(&format!("{FLAGS} -o second"));
    let calibrated = files(&place.path("first"));
    assert!(calibrated == files(&place.path("second")));
    place.done(FLAGS);
    assert!(calibrated == files(&place.path("converted")));
    assert!(place.read("converted/README.md").contains("## Calibration"));
}

#[test]
fn what_cannot_be_calibrated_is_refused_with_what_to_do() {
    let place = place();
    place.done("convert -m model -o plain --far none");
    place.refused("calibrate -m plain --text first.txt", 2, &["nothing to calibrate", "--selector meta"]);
    place.refused("calibrate -m model --text first.txt", 2, &["not a converted model", "convert it first"]);
    place.refused("calibrate -m converted --text nowhere.txt", 2, &["cannot read", "nowhere.txt"]);
    place.refused("calibrate -m converted --text first.txt --seq-len 64", 2, &["leaves no block to choose"]);
    place.refused("calibrate -m converted --text first.txt --tokens 512 --seq-len 512", 2, &["at least 2"]);
    place.refused("calibrate -m converted --text first.txt -o plain", 2, &["--force"]);
    place.refused("calibrate -m converted", 2, &["--text <FILE>"]);
}

#[test]
fn the_far_part_of_the_default_settings_is_calibrated_without_touching_a_weight() {
    let place = place();
    place.done("convert -m model -o default --chunk-size 64 --local-chunks 0 --max-keys 32 --exact-tokens 0");
    let flags = "calibrate -m default --text first.txt --seq-len 1024";
    let report = json(&place.done(&format!("{flags} -o calibrated --format json")));
    let layers = report["calibration"]["far"].as_array().expect("layers").clone();
    let number = |layer: &Value, key: &str| layer[key].as_f64().expect("a number");
    for layer in &layers {
        let (shift, before, after) = (number(layer, "shift"), number(layer, "before"), number(layer, "after"));
        assert!(if shift == 0.0 { after == before } else { after < 0.95 * before }, "{layer}");
    }
    let shifts: Vec<f64> = layers.iter().map(|layer| number(layer, "shift")).collect();
    let stored = place.json("calibrated/config.json")["far_shifts"].clone();
    assert_eq!(stored, value!(shifts));
    assert_eq!(
        fs::read(place.path("default/model.safetensors")).ok(),
        fs::read(place.path("calibrated/model.safetensors")).ok()
    );
    assert!(place.done(flags).contains("far shift"));
    assert!(files(&place.path("calibrated")) == files(&place.path("default")));
}

#[test]
fn the_index_is_searched_for_the_cheapest_settings_within_a_target() {
    let place = place();
    place.done("convert -m model -o default --chunk-size 64 --exact-tokens 128");
    let flags = "calibrate -m default --text first.txt --seq-len 512 --tokens 1536 --target-kl 0.01";
    let report = json(&place.done(&format!("{flags} -o calibrated --format json")));
    let index = &report["calibration"]["index"];
    assert_eq!(
        (index["windows"].as_u64(), index["held_out"].as_u64(), &index["met"]),
        (Some(2), Some(1), &value!(true))
    );
    let config = place.json("calibrated/config.json");
    for setting in ["threshold", "max_keys", "index_channels"] {
        assert_eq!(config["attention"][setting], index["found"]["settings"][setting], "{setting}");
    }
    let factors = config.get("threshold_factors").cloned().unwrap_or_else(|| value!([]));
    assert_eq!(factors, index["threshold_factors"]);
    assert!(place.read("calibrated/README.md").contains("the cheapest found within a KL of 0.01"));
    // On text that nobody calibrated on, it is about as near, and reads less than the default settings do.
    let measured = |model: &str| {
        let flags = format!("eval -m {model} --text second.txt --seq-len 512 --windows 3 --format json");
        let variant = json(&place.done(&flags))["lengths"][0]["variants"][0].clone();
        (
            variant["agreement"]["kl"].as_f64().expect("a number"),
            variant["perplexity"]["keys_share"].as_f64().expect("one"),
        )
    };
    let ((kl, keys), (_, before)) = (measured("calibrated"), measured("default"));
    assert!(kl < 0.02 && keys < before, "{kl} with {keys} of the keys, {before} before");
    let table = place.done(&format!("{flags} -o again"));
    assert!(table.contains("| threshold | most keys | channels |") && table.contains("found: threshold "), "{table}");
    assert!(files(&place.path("calibrated")) == files(&place.path("again")), "the same every time");
}

#[test]
fn a_target_that_cannot_be_met_or_makes_no_sense_writes_nothing() {
    let place = place();
    place.done("convert -m model -o default --chunk-size 64 --local-chunks 0 --exact-tokens 0 --far none");
    let from = "calibrate -m default --text first.txt --tokens 1024 -o calibrated";
    let flags = format!("{from} --seq-len 512");
    place.refused(&format!("{flags} --target-kl 1e-9"), 1, &["no settings of the index", "nothing was written"]);
    place.refused(&format!("{flags} --target-kl 0"), 2, &["`target_kl` is 0", "positive"]);
    place.refused(&format!("{from} --target-kl 0.1 --seq-len 64"), 2, &["two windows of at least"]);
    place.refused("calibrate -m converted --text first.txt --target-kl 0.1", 2, &["--target-kl", "--selector index"]);
    assert!(!place.path("calibrated").exists());
}
