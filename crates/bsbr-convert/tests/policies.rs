//! Converting to another number format: what it changes is told, and what is gone is not said to be there.

#![cfg(feature = "flex")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{
    ConversionReport, ConvertError, ConvertOptions, ExpectedLogits, IGNORED_PREFIX, ModelSource, PlanProblem,
    WeightsPolicy, convert, estimate, export, plan_checkpoint,
};
use bsbr_model::{Decoder, compare_logits};
use burn::tensor::Device;
use common::{
    OF_CODES, Tensor, all_fixtures, checkout, edit_tensors, fixtures, message, read_dir_tensors, snapshot,
    write_tensors,
};
use half::{bf16, f16};

const POLICIES: [WeightsPolicy; 4] = [WeightsPolicy::Keep, WeightsPolicy::F32, WeightsPolicy::F16, WeightsPolicy::Bf16];

fn try_convert(dir: &Path, dtype: WeightsPolicy) -> Result<ConversionReport, ConvertError> {
    convert(
        dir,
        &dir.with_file_name("converted"),
        &ConvertOptions { weights: dtype, ..Default::default() },
        &mut |_| {},
    )
}

fn converted(dir: &Path, dtype: WeightsPolicy) -> (ConversionReport, BTreeMap<String, Tensor>) {
    let report = try_convert(dir, dtype).expect("a sound checkpoint");
    (report, read_dir_tensors(&dir.with_file_name("converted")))
}

fn try_export(dir: &Path) -> Result<bsbr_convert::ExportReport, ConvertError> {
    export(&dir.with_file_name("converted"), &dir.with_file_name("back"), false, &mut |_| {})
}

/// Another format for the weights of a checkpoint: exact, as the upper halves of F32 are BF16.
fn halve(dir: &Path, dtype: &str) {
    edit_tensors(dir, |tensors| {
        for tensor in tensors {
            tensor.bytes = match dtype {
                "BF16" => tensor.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect(),
                _ => tensor.values().into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            };
            tensor.dtype = dtype.into();
        }
    });
}

#[test]
fn every_number_is_the_nearest_in_the_format_asked_for() {
    let (_temp, dir) = checkout("llama", "config.json");
    let (_, kept) = converted(&dir, WeightsPolicy::Keep);
    for (policy, name) in [(WeightsPolicy::F16, "F16"), (WeightsPolicy::Bf16, "BF16"), (WeightsPolicy::F32, "F32")] {
        let (temp, dir) = checkout("llama", "config.json");
        let (report, cast) = converted(&dir, policy);
        assert_eq!(report.record.casts.len(), if name == "F32" { 0 } else { kept.len() });
        for (tensor, original) in &kept {
            let values = original.values().into_iter();
            let expected: Vec<u8> = match name {
                "F16" => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
                "BF16" => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
                _ => original.bytes.clone(),
            };
            assert_eq!((cast[tensor].dtype.as_str(), &cast[tensor].bytes), (name, &expected), "{tensor}");
        }
        drop(temp);
    }
}

#[test]
fn a_lossy_cast_is_counted_in_the_record_the_notes_and_the_card_and_is_not_exported() {
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").expect("a norm");
        let mut values = norm.values();
        values.fill(1.0);
        // Exact, rounded by a 4096th of itself, a tie to even downwards, too small for any number but zero.
        values[..4].copy_from_slice(&[-2.5, 1.0 + 1.0 / 4096.0, 1.0 + 1.0 / 2048.0, 1e-9]);
        *norm = Tensor::f32("model.norm.weight", &[values.len()], values.clone());
    });
    let (report, tensors) = converted(&dir, WeightsPolicy::F16);
    let cast = report.record.casts.iter().find(|cast| cast.tensor == "final_norm.weight").expect("a cast");
    assert_eq!((cast.from.as_str(), cast.to.as_str(), cast.changed, cast.underflowed), ("F32", "F16", 3, 1));
    assert_eq!(cast.largest_relative_error, 1.0);
    let first: Vec<f32> = tensors["final_norm.weight"].bytes.chunks_exact(2).take(4).map(half).collect();
    assert_eq!(first, [-2.5, 1.0, 1.0, 0.0]);

    let changed: u64 = report.record.casts.iter().map(|cast| cast.changed).sum();
    let note = report.notes.last().expect("a note");
    assert!(note.starts_with(&format!("{} weights were cast to F16; in ", tensors.len())), "{note}");
    assert!(note.contains(&format!("{changed} numbers changed")) && note.contains("1 became zero"), "{note}");
    assert!(note.contains("original bits are gone and an export is refused"), "{note}");
    let card = fs::read_to_string(dir.with_file_name("converted").join("README.md")).expect("a card");
    assert!(card.contains("it cannot be exported") && !card.contains("bit for bit"), "{card}");

    let error = try_export(&dir).expect_err("the original is gone");
    assert!(matches!(&error, ConvertError::LossyCast { from, to, .. } if from == "F32" && to == "F16"), "{error}");
    assert!(message(&error).contains("original bits are gone"), "{error}");
    assert!(!dir.with_file_name("back").exists());
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

#[test]
fn a_cast_that_loses_nothing_comes_back_bit_for_bit() {
    // What becomes of codes is in `tests/scaled.rs`.
    let numbers = |(name, config): &(&str, &str)| *config == "config.json" && !OF_CODES.contains(name);
    for (name, config) in all_fixtures().filter(numbers) {
        for dtype in ["F16", "BF16"] {
            let (_temp, dir) = checkout(name, config);
            let is_single = dir.join("model.safetensors").is_file();
            if is_single && name != "llama_bf16" {
                halve(&dir, dtype);
            }
            let (report, tensors) = converted(&dir, WeightsPolicy::F32);
            // What is kept aside for an export is no weight.
            let weights = tensors.values().filter(|tensor| !tensor.name.starts_with(IGNORED_PREFIX));
            assert!(weights.into_iter().all(|tensor| tensor.dtype == "F32"), "{name}");
            assert!(report.record.casts.iter().all(|cast| !cast.is_lossy()), "{name}");
            assert!(try_export(&dir).expect(name).is_original(), "{name} {dtype}");
            assert_eq!(snapshot(&dir.with_file_name("back")), snapshot(&dir), "{name} {dtype}");
        }
    }
}

#[test]
fn a_narrow_format_that_happens_to_hold_every_number_comes_back_bit_for_bit() {
    // Numbers with eight bits in the range of both: BF16 and F16 hold them all.
    let (_temp, dir) = checkout("llama", "config.json");
    edit_tensors(&dir, |tensors| {
        for tensor in tensors {
            let values = tensor.values().into_iter().map(|x| bf16::from_f32(x).to_f32());
            // Below 2^-16 the numbers of F16 lie further apart than those of BF16.
            let values: Vec<f32> = values.map(|x| if x.abs() < 2_f32.powi(-16) { 0.0 } else { x }).collect();
            *tensor = Tensor::f32(&tensor.name, &tensor.shape, values);
        }
    });
    for policy in [WeightsPolicy::F16, WeightsPolicy::Bf16] {
        let (report, _) = converted(&dir, policy);
        let note = report.notes.last().expect("a note");
        assert!(note.ends_with("without loss: an export gives the original bits back"), "{note}");
        assert!(try_export(&dir).expect("nothing was lost").is_original());
        assert_eq!(snapshot(&dir.with_file_name("back")), snapshot(&dir));
        ["converted", "back"]
            .iter()
            .for_each(|name| fs::remove_dir_all(dir.with_file_name(name)).expect("it is there"));
    }
}

#[test]
fn a_number_beyond_the_format_is_named_and_nothing_is_written() {
    for (value, fits) in [(65_519.0, true), (65_520.0, false), (-1e30, false)] {
        let (_temp, dir) = checkout("llama", "config.json");
        edit_tensors(&dir, |tensors| {
            let weight = tensors.iter_mut().find(|t| t.name == "model.layers.1.mlp.up_proj.weight").expect("a weight");
            let mut values = weight.values();
            values[77] = value;
            *weight = Tensor::f32(&weight.name, &weight.shape, values);
        });
        let result = try_convert(&dir, WeightsPolicy::F16);
        assert_eq!(result.is_ok(), fits, "{value}");
        let Err(error) = result else { continue };
        assert!(matches!(error, ConvertError::CastOverflow { element: 77, .. }), "{error}");
        let text = message(&error);
        assert!(text.contains("`model.layers.1.mlp.up_proj.weight`") && text.contains("the largest F16"), "{text}");
        assert!(!dir.with_file_name("converted").exists());
        try_convert(&dir, WeightsPolicy::Bf16).expect("within the range of BF16");
    }
}

#[test]
fn masks_keep_their_format_and_meta_projections_are_f32() {
    let (_temp, dir) = checkout("gpt2_legacy_bin", "config.json");
    let output = dir.with_file_name("converted");
    let attention = Some(BlockAttentionConfig { selector: Selector::Meta, ..Default::default() });
    let options = ConvertOptions { attention, weights: WeightsPolicy::Bf16, ..Default::default() };
    convert(&dir, &output, &options, &mut |_| {}).expect("sound");
    for (name, tensor) in read_dir_tensors(&output) {
        let wide = name.starts_with("bsbr.") || name.starts_with("source.ignored.");
        assert_eq!(tensor.dtype, if wide { "F32" } else { "BF16" }, "{name}");
    }
    ModelSource::open(&output).expect("sound");
    assert!(matches!(try_export(&dir), Err(ConvertError::LossyCast { .. })));
}

#[test]
fn pytorch_weights_cast_without_loss_come_back_bit_for_bit() {
    let (_temp, dir) = checkout("llama_bf16", "config.json");
    let tensors = common::read_tensors(&dir.join("model.safetensors"));
    fs::remove_file(dir.join("model.safetensors")).expect("it was there");
    let bytes = common::pytorch::StateDict::of(&tensors).zip();
    fs::write(dir.join("pytorch_model.bin"), bytes).expect("room");
    let (report, _) = converted(&dir, WeightsPolicy::F32);
    assert_eq!(report.record.casts.len(), tensors.len());
    assert!(try_export(&dir).expect("nothing was lost").is_original());
    let found = read_dir_tensors(&dir.with_file_name("back"));
    tensors.iter().for_each(|tensor| assert_eq!(found[&tensor.name], *tensor));
}

#[test]
fn a_wider_format_gives_the_same_logits_and_a_narrower_one_nearly_the_same() {
    let logits = |dir: &Path, name: &str| {
        let expected = ExpectedLogits::open(&fixtures().join(name).join("expected.safetensors")).expect("a sound file");
        let mut source = ModelSource::open(dir).expect("a sound model");
        let decoder =
            Decoder::load(source.model_config().clone(), &mut source, &Device::flex()).expect("sound weights");
        compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts").max
    };
    for (name, policy, least, most) in [
        ("llama_bf16", WeightsPolicy::F32, 0.0, 1e-4),
        // Half a unit in the last of 11 and of 8 bits, on logits of about 5.
        ("llama", WeightsPolicy::F16, 1e-4, 0.05),
        ("llama", WeightsPolicy::Bf16, 1e-3, 0.4),
    ] {
        let (_temp, dir) = checkout(name, "config.json");
        converted(&dir, policy);
        let difference = logits(&dir.with_file_name("converted"), name);
        assert!((least..=most).contains(&difference), "{name} {policy:?}: {difference}");
    }
}

#[test]
fn a_record_that_denies_a_cast_is_refused() {
    let (_temp, dir) = checkout("llama_bf16", "config.json");
    converted(&dir, WeightsPolicy::F32);
    let path = dir.with_file_name("converted").join("conversion.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    record.as_object_mut().expect("an object").remove("casts").expect("casts");
    fs::write(&path, record.to_string()).expect("room");
    let error = try_export(&dir).expect_err("F32 is not BF16");
    assert!(
        matches!(&error, ConvertError::Plan { problems, .. } if matches!(problems[0], PlanProblem::Dtype { .. })),
        "{error}"
    );
}

#[test]
fn weights_changed_after_a_cast_are_said_not_to_be_the_original() {
    let (_temp, dir) = checkout("llama_bf16", "config.json");
    converted(&dir, WeightsPolicy::F32);
    let path = dir.with_file_name("converted").join("model.safetensors");
    let mut tensors = common::read_tensors(&path);
    tensors[0].bytes[3] ^= 1;
    write_tensors(&path, &tensors);
    assert!(!try_export(&dir).expect("sound").is_original());
}

#[test]
fn an_estimate_is_what_a_conversion_writes_to_the_byte() {
    let meta = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    for name in ["gpt2", "llama_bf16", "stablelm_12b", "gpt2_sharded", "gpt2_legacy_bin"] {
        for dtype in POLICIES {
            for attention in [None, Some(meta.clone())] {
                let (_temp, dir) = checkout(name, "config.json");
                let options = ConvertOptions { attention, weights: dtype, ..Default::default() };
                let estimate = estimate(&plan_checkpoint(&dir).expect("sound"), &options).expect("sound");
                let output = dir.with_file_name("converted");
                let report = convert(&dir, &output, &options, &mut |_| {}).expect("sound");
                assert_eq!(estimate.output_bytes, report.output_bytes, "{name}");
                assert_eq!(
                    estimate.output_bytes,
                    fs::metadata(output.join("model.safetensors")).expect("a file").len()
                );
                assert_eq!(estimate.source_bytes, report.source_bytes);
                let parameters = [estimate.parameters_before, estimate.parameters_before + estimate.parameters_added];
                assert_eq!(parameters, [report.record.parameters_before, report.record.parameters_after]);
                let written = read_dir_tensors(&output);
                assert_eq!(estimate.tensors.len(), written.len());
                for tensor in &estimate.tensors {
                    let other = &written[&tensor.name];
                    assert_eq!((&tensor.shape, tensor.format.clone()), (&other.shape, other.dtype.clone()));
                    assert_eq!(tensor.bytes, other.bytes.len() as u64, "{}", tensor.name);
                }
                let largest = estimate.tensors.iter().map(|tensor| tensor.bytes).max().expect("a tensor");
                assert!(estimate.peak_bytes >= largest);
            }
        }
    }
}
