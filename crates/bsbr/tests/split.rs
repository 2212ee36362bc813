//! `split` on the built-in checkpoint: what each command prints, leaves behind and refuses.

mod common;

use bsbr_convert::ModelSource;
use bsbr_model::Decoder;
use burn::tensor::Device;
use common::{Place, Tensor, checkpoint_dir, edit_tensors};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// A text of which the built-in tokenizer makes a few thousand tokens.
fn text(place: &Place, name: &str) {
    let all = std::fs::read_to_string(checkpoint_dir("builtin").join("heldout.txt")).expect("a text");
    place.write(name, &all.chars().take(20_000).collect::<String>());
}

const CALIBRATED: &str = "--text text.txt --windows 8 --seq-len 256";

#[test]
fn a_plan_shows_ranks_parameters_and_costs_without_a_text() {
    let place = Place::empty();
    insta::assert_snapshot!("plan", place.done("split plan"));
    let plan = json(&place.done("split plan --json --keep 0.5"));
    assert_eq!(plan["schema"], "bsbr-split-plan/1");
    let parameters = |key: &str| plan["parameters"][key].as_u64().expect("a number");
    assert!(parameters("after") <= parameters("before") / 2);
}

#[test]
fn the_example_configuration_is_read_and_is_the_one_made_for_the_built_in_model() {
    let place = Place::empty();
    let example = checkpoint_dir("builtin").join("../configs/split.toml");
    let example = place.done(&format!("split plan --config {}", example.display()));
    assert_eq!(example, place.done("split plan"));
    let made = place.done("split plan --print-config");
    place.write("made.toml", &made);
    assert_eq!(place.done("split plan --config made.toml"), place.done("split plan"));
}

#[test]
fn layers_in_parts_are_verified() {
    let place = Place::empty();
    let report = json(&place.done("split verify --json"));
    let checks = report["checks"].as_array().expect("a list");
    assert_eq!(checks.len(), 6);
    assert!(checks.iter().all(|check| check["passed"] == true && check["calibrating_equal"] == true), "{report:#}");
}

#[test]
fn a_compressed_model_is_evaluated_continued_inspected_reported_and_folded() {
    let place = Place::with("builtin");
    text(&place, "text.txt");
    let printed = place.done(&format!("split compress -m model -o small --keep 0.9 {CALIBRATED}"));
    assert!(printed.contains("| transformer.h.2.attn.c_attn"), "{printed}");
    assert!(printed.contains("compressed to small"), "{printed}");
    place.write("prompt.txt", "And the king said unto");
    assert!(place.done("generate -m small --prompt-file prompt.txt -n 8").len() > 8);
    assert!(place.done("inspect -m small").contains("compressed"));
    assert!(place.done("eval -m small --seq-len 256 --windows 1").contains("| original "));
    let report = json(&place.done("split report -m small --original model --seq-len 256 --windows 2 --json"));
    let measured = &report["measured"];
    let (original, compressed) = (&measured["original"]["all"], &measured["variants"][0]["perplexity"]["all"]);
    let (original, compressed) = (original.as_f64().expect("a number"), compressed.as_f64().expect("a number"));
    assert!(compressed != original && compressed < 1.2 * original, "{original} {compressed}");
    assert!(place.done("split fold -m small -o folded").contains("tensors made of factors"));
    place.done("split report -m small --original folded --seq-len 256 --windows 1");
    // The checkpoint computes what the compressed model does: greedy text is the same.
    let continued = |model: &str| place.done(&format!("generate -m {model} --prompt-file prompt.txt -n 24"));
    assert_eq!(continued("folded"), continued("small"));
    place.refused("export -m small -o out", 2, &["small", "fold"]);
    place.refused("split fold -m model -o out", 2, &["model"]);
    place.refused("split compress -m small -o out --preset svd", 2, &["compressed already"]);
}

#[test]
fn a_folded_checkpoint_passes_verify_with_the_logits_of_the_compressed_model() {
    let place = Place::with("builtin");
    let made = place.done("split plan -m model --preset svd --print-config");
    assert!(made.contains("form = \"two-factor\""), "{made}");
    for form in ["two-factor", "pivoted"] {
        place.write(&format!("{form}.toml"), &made.replace("two-factor", form));
        place.done(&format!("split compress -m model -o {form} --config {form}.toml --keep 0.7"));
        place.done(&format!("split fold -m {form} -o folded-{form}"));
        // What the compressed model computes, as `verify` reads it.
        let mut source = ModelSource::open(&place.path(form)).expect("a compressed model");
        let config = source.model_config().clone();
        let model = Decoder::load(config, &mut source, &Device::flex()).expect("sound weights");
        let text: Vec<u32> = (0..40).map(|at| (at * at * 7 + 3) % 200).collect();
        let logits = model.forward(&text).expect("a sound text");
        let shape = logits.dims();
        let numbers = logits.try_into_vec_as::<f32>().expect("numbers");
        edit_tensors(&place.path(&format!("{form}.safetensors")), |tensors| {
            let bytes = text.iter().flat_map(|&token| i64::from(token).to_le_bytes()).collect();
            tensors.push(Tensor { name: "input_ids".into(), dtype: "I64".into(), shape: vec![1, text.len()], bytes });
            let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let shape = vec![1, shape[0], shape[1]];
            tensors.push(Tensor { name: "logits".into(), dtype: "F32".into(), shape, bytes });
        });
        place.done(&format!("verify -m folded-{form} -e {form}.safetensors"));
        place.refused(&format!("verify -m model -e {form}.safetensors"), 1, &["differ"]);
        let checks = json(&place.done(&format!("split verify -m folded-{form} --json")));
        assert_eq!(checks["passed"], true);
    }
}

#[test]
fn factors_have_the_number_format_of_the_weights_unless_another_is_asked_for() {
    let place = Place::with("builtin");
    let formats = |model: &str| {
        let tensors = place.done(&format!("inspect -m {model} --tensors"));
        let factors: std::collections::BTreeSet<String> = tensors
            .lines()
            .filter(|line| line.starts_with("| share.") && !line.contains(".pivots"))
            .map(|line| line.split('|').nth(2).expect("a column").trim().to_owned())
            .collect();
        factors.into_iter().collect::<Vec<_>>().join(" ")
    };
    let bytes = |model: &str| std::fs::metadata(place.path(model).join("model.safetensors")).expect("a file").len();
    for (kept, format) in [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")] {
        place.done(&format!("convert -m model -o {kept} --weights {kept}"));
        for form in ["pivoted", "svd"] {
            let small = format!("{kept}-{form}");
            let text = if form == "svd" { "" } else { "--text text.txt --windows 4 --seq-len 128" };
            if !text.is_empty() {
                self::text(&place, "text.txt");
            }
            place.done(&format!("split compress -m {kept} -o {small} --preset {form} --keep 0.7 {text}"));
            assert_eq!(formats(&small), format, "{small}");
            // The parts of all weights that are compressed, by far the most here.
            assert!(bytes(&small) < bytes(kept), "{small}: {} of {}", bytes(&small), bytes(kept));
            place.write("prompt.txt", "And the king said unto");
            assert!(place.done(&format!("generate -m {small} --prompt-file prompt.txt -n 8")).len() > 8);
        }
    }
    // Rounded factors make nearly the same model.
    let perplexity = |model: &str| {
        let report = json(&place.done(&format!("eval -m {model} --seq-len 256 --windows 1 --format json")));
        report["lengths"][0]["original"]["all"].as_f64().expect("a number")
    };
    let (exact, rounded) = (perplexity("f32-svd"), perplexity("f16-svd"));
    assert!((rounded / exact - 1.0).abs() < 2e-3, "{exact} {rounded}");
    place.done("split compress -m model -o asked --preset svd --keep 0.7 --weights bf16");
    assert_eq!(formats("asked"), "BF16");
    place.done("split compress -m f16 -o wide --preset svd --keep 0.7 --weights f32");
    assert_eq!(formats("wide"), "F32");
    assert!(bytes("wide") > bytes("f16-svd"));
    place.refused("split compress -m model -o out --preset svd --weights f8", 2, &["--weights", "f8"]);
}

#[test]
fn moments_are_gathered_once_for_any_compression_of_the_same_model_alone() {
    let place = Place::with("builtin");
    text(&place, "text.txt");
    let gathered =
        json(&place.done(&format!("split calibrate -m model --output moments.safetensors --json {CALIBRATED}")));
    assert_eq!(gathered["schema"], "bsbr-split-calibrate/1");
    // One of eight windows is held out.
    assert_eq!((gathered["tokens"].as_u64(), gathered["held_out_tokens"].as_u64()), (Some(7 * 256), Some(256)));
    for keep in ["0.5", "0.8"] {
        let flags = format!("--calibration moments.safetensors --preset published --keep {keep}");
        let report = json(&place.done(&format!("split compress -m model -o kept-{keep} {flags} --json")));
        let share = report["parameters"]["after"].as_f64().expect("a number")
            / report["parameters"]["before"].as_f64().expect("a number");
        assert!(share <= keep.parse().expect("a number") && share > 0.4, "{share}");
    }
    place.done("convert -m model -o other");
    let words = ["moments.safetensors", "another model"];
    place.refused("split compress -m other -o out --preset each --calibration moments.safetensors", 2, &words);
}

#[test]
fn what_is_missing_is_said_before_anything_is_written() {
    let place = Place::with("builtin");
    place.refused("split compress -m model -o out", 2, &["--text FILE"]);
    place.refused("split compress -m model -o out --preset each", 2, &["--calibration FILE"]);
    place.refused("split calibrate -m model --output out", 2, &["--text FILE"]);
    place.refused("split plan -m model --preset nothing", 2, &["--preset"]);
    place.refused("split plan -m model --keep 0", 2, &["keep"]);
    place.write("bad.toml", "block_pattern = 'h\\.(\\d+)'\n[weight_types.x]\npattern = 'nothing'\n");
    place.refused("split plan -m model --config bad.toml", 2, &["nothing", "x"]);
    place.write("bad.toml", "unknown = 1\n[weight_types.x]\npattern = 'nothing'\n");
    place.refused("split plan -m model --config bad.toml", 2, &["unknown"]);
}
