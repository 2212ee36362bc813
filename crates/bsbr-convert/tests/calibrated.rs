//! New numbers for the weights BSBR added: everything else stays as it is.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{
    Calibrated, ConversionRecord, ConvertError, ConvertOptions, ModelSource, RecordedCalibration, convert, export,
    write_calibrated,
};
use bsbr_model::{MetaLayer, weight_specs};
use common::{checkout, read_dir_tensors, snapshot};
use tempfile::TempDir;

/// A fixture under `model`, and converted with meta projections under `converted`.
fn converted(fixture: &str) -> (TempDir, PathBuf, PathBuf) {
    let (temp, dir) = checkout(fixture, "config.json");
    let output = temp.path().join("converted");
    let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    convert(&dir, &output, &ConvertOptions { attention: Some(attention), ..Default::default() }, &mut |_| {})
        .expect("sound");
    (temp, dir, output)
}

fn calibration() -> RecordedCalibration {
    let layer = |layer| MetaLayer {
        layer,
        before: 0.25,
        after: 0.5 + layer as f64 / 3.0,
        accepted: layer == 1,
        query_ridge: 0.1,
        key_ridge: 0.01,
    };
    let meta = vec![layer(0), layer(1)];
    RecordedCalibration {
        text_sha256: "abc".to_owned(),
        tokens: 96,
        window: 32,
        held_out: 1,
        meta,
        states: Vec::new(),
        far: Vec::new(),
        index: None,
    }
}

/// New numbers for the meta projections of the last layer.
fn new_weights(dir: &Path) -> Vec<(String, Vec<f32>)> {
    let config = ModelSource::open(dir).expect("sound").model_config().clone();
    let last = format!("bsbr.layers.{}.", config.decoder.layers - 1);
    let specs = weight_specs(&config).into_iter().filter(|spec| spec.name.starts_with(&last));
    let numbers = |count: usize| (0..count).map(|at| at as f32 / 7.0 - 1.0).collect();
    specs.map(|spec| (spec.name.clone(), numbers(spec.shape.iter().product()))).collect()
}

fn write(
    model: &Path,
    output: &Path,
    weights: &[(String, Vec<f32>)],
    force: bool,
) -> Result<ConversionRecord, ConvertError> {
    let calibrated = Calibrated { config: None, weights, calibration: calibration() };
    write_calibrated(model, output, &calibrated, force, &mut |_| {})
}

#[test]
fn added_weights_change_and_an_export_still_gives_back_every_byte() {
    for fixture in ["gpt2", "gpt2_sharded", "gpt2_legacy_bin", "llama_bf16", "gpt_bigcode_mqa"] {
        let (temp, dir, model) = converted(fixture);
        let weights = new_weights(&model);
        let output = temp.path().join("calibrated");
        let record = write(&model, &output, &weights, false).expect(fixture);
        assert_eq!(record.calibration, Some(calibration()));

        let new: BTreeMap<&str, &[f32]> = weights.iter().map(|(name, x)| (name.as_str(), x.as_slice())).collect();
        let (before, after) = (read_dir_tensors(&model), read_dir_tensors(&output));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, tensor) in &after {
            match new.get(name.as_str()) {
                Some(numbers) => assert_eq!(tensor.values(), *numbers, "{fixture}: {name}"),
                None => assert_eq!(tensor, &before[name], "{fixture}: {name}"),
            }
        }
        for (name, content) in snapshot(&model) {
            let same = fs::read(output.join(&name)).expect("the same files") == content;
            assert_eq!(same, !["README.md", "conversion.json", "model.safetensors"].contains(&name.as_str()), "{name}");
        }
        let [first, second] = [(&model, "a"), (&output, "b")].map(|(model, name)| {
            let back = temp.path().join(name);
            assert!(export(model, &back, false, &mut |_| {}).expect(fixture).is_original());
            snapshot(&back)
        });
        assert_eq!(first, second, "{fixture}");
        assert_eq!(
            first.contains_key("model.safetensors"),
            dir.join("model.safetensors").exists() || fixture.ends_with("bin")
        );
    }
}

#[test]
fn a_model_replaces_itself_and_its_card_has_one_section_on_calibration() {
    let (temp, _, model) = converted("llama");
    let weights = new_weights(&model);
    let card = fs::read_to_string(model.join("README.md")).expect("a card");
    fs::write(model.join("README.md"), format!("{card}\n## Mine\n\nkept\n")).expect("room");
    let aside = temp.path().join("aside");
    write(&model, &aside, &weights, false).expect("sound");
    write(&model, &model, &weights, false).expect("its own place");
    assert_eq!(snapshot(&model), snapshot(&aside));
    write(&model, &model, &weights, false).expect("a second time");
    assert_eq!(snapshot(&model), snapshot(&aside));
    let card = fs::read_to_string(model.join("README.md")).expect("a card");
    assert_eq!(card.matches("## Calibration").count(), 1);
    assert!(card.contains("fitted in 1 of 2 layers") && card.contains("SHA-256 `abc`"), "{card}");
    assert!(card.contains("## Settings") && card.contains("## Mine\n\nkept\n"), "{card}");
    let names: Vec<_> =
        fs::read_dir(temp.path()).expect("a directory").map(|e| e.expect("a file").file_name()).collect();
    assert_eq!(names.len(), 3, "nothing is left beside them: {names:?}");
}

#[test]
fn weights_that_do_not_belong_there_are_refused_and_nothing_is_written() {
    let (temp, dir, model) = converted("llama");
    let weights = new_weights(&model);
    let output = temp.path().join("out");
    let (name, numbers) = weights[0].clone();
    for (name, numbers) in [
        (name.clone(), numbers[1..].to_vec()),
        (name.replace("bsbr.", "bsbr.x."), numbers.clone()),
        // A weight of the original must not change.
        ("final_norm.weight".to_owned(), vec![1.0; read_dir_tensors(&model)["final_norm.weight"].shape[0]]),
    ] {
        let before = snapshot(&model);
        for output in [&output, &model] {
            let error = write(&model, output, &[(name.clone(), numbers.clone())], false).unwrap_err();
            assert!(matches!(&error, ConvertError::NoSuchWeight { tensor, .. } if *tensor == name), "{error}");
        }
        assert!(!output.exists());
        assert_eq!(snapshot(&model), before);
    }
    assert!(matches!(write(&dir, &output, &weights, false), Err(ConvertError::NotConverted { .. })));
    write(&model, &output, &weights, false).expect("sound");
    assert!(matches!(write(&model, &output, &weights, false), Err(ConvertError::OutputExists { .. })));
    write(&model, &output, &weights, true).expect("forced");
}
