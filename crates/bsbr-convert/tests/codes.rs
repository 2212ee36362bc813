//! Conversions whose weights are codes: what is written, what it means, and files that lie.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_attn::{BlockAttentionConfig, Selector};
use bsbr_convert::{
    Calibrated, ConversionReport, ConvertError, ConvertOptions, FormatProblem, ModelSource, PlanProblem,
    RecordedCalibration, WeightsPolicy, convert, estimate, export, plan_checkpoint, write_calibrated,
};
use bsbr_model::weight_specs;
use bsbr_weights::{Format, decode, encode};
use common::{Tensor, message, read_tensors, snapshot, write_raw, write_tensors};
use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

const HIDDEN: usize = 64;
/// No whole blocks of 32.
const INNER: usize = 80;
const VOCAB: usize = 40;

/// A small Llama in BF16.
fn checkpoint() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let dir = temp.path().join("model");
    fs::create_dir(&dir).expect("a fresh directory");
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER, "tie_word_embeddings": true,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    });
    fs::write(dir.join("config.json"), config.to_string()).expect("room");
    let mut tensors =
        vec![tensor("model.embed_tokens.weight", &[VOCAB, HIDDEN]), tensor("model.norm.weight", &[HIDDEN])];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[HIDDEN][..]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.k_proj", &[HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", &[HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
            ("mlp.gate_proj", &[INNER, HIDDEN]),
            ("mlp.up_proj", &[INNER, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, INNER]),
        ] {
            tensors.push(tensor(&format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    write_tensors(&dir.join("model.safetensors"), &tensors);
    (temp, dir)
}

/// Numbers of about 0.1, by the name.
fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let mut state = name.bytes().fold(7_u64, |state, byte| state.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 2_f32.powi(24) - 0.5
    };
    let count = shape.iter().product::<usize>();
    let numbers = (0..count).map(|_| bf16::from_f32((next() + next() + next()) * 0.2));
    let bytes = numbers.flat_map(bf16::to_le_bytes).collect();
    Tensor { name: name.into(), dtype: "BF16".into(), shape: shape.to_vec(), bytes }
}

fn options(weights: WeightsPolicy) -> ConvertOptions {
    ConvertOptions { weights, ..Default::default() }
}

fn converted(dir: &Path, options: &ConvertOptions) -> (ConversionReport, PathBuf) {
    let output = dir.with_file_name("converted");
    let report = convert(dir, &output, options, &mut |_| {}).expect("a sound checkpoint");
    (report, output)
}

/// All weights of a model.
fn weights(model: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let source = ModelSource::open(model).expect("a sound model");
    let read = |spec: bsbr_model::WeightSpec| {
        let numbers = source.read_weight(&spec).expect("a weight");
        (spec.name, (spec.shape, numbers))
    };
    weight_specs(source.model_config()).into_iter().map(read).collect()
}

fn squared_error(a: &[f32], b: &[f32], weights: &[f32]) -> f64 {
    let each = a.iter().zip(b).zip(weights.iter().cycle());
    each.map(|((a, b), weight)| f64::from(*weight) * (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

#[test]
fn linear_weights_and_tables_become_the_codes_of_their_numbers_and_nothing_else_does() {
    for (policy, of_blocks) in [(WeightsPolicy::Int8, Format::Q8_0), (WeightsPolicy::Int4, Format::Q4_0)] {
        let (_temp, dir) = checkpoint();
        let original = weights(&dir);
        let (report, output) = converted(&dir, &options(policy));
        let found = weights(&output);
        let header = read_tensors(&output.join("model.safetensors"));
        let mut bits = 0;
        for (name, (shape, numbers)) in &original {
            let stored = header.iter().find(|tensor| tensor.name == *name).expect("a tensor");
            let cast = report.record.casts.iter().find(|cast| cast.tensor == *name);
            bits += 8 * stored.bytes.len();
            if name.contains("norm") {
                assert_eq!((stored.dtype.as_str(), &found[name].1), ("BF16", numbers), "{name}");
                assert!(cast.is_none(), "{name}");
                continue;
            }
            let cast = cast.expect(name);
            let format = if name == "embed.weight" { Format::Q8_0 } else { of_blocks };
            if name.ends_with("down.weight") {
                let expected: Vec<f32> = numbers.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
                assert_eq!((stored.dtype.as_str(), &found[name].1), ("F16", &expected), "{name}");
                assert_eq!((cast.to.as_str(), cast.rms_error), ("F16", None), "{name}");
                continue;
            }
            let codes = encode(format, shape[1], numbers, None).expect("sound");
            let row = format.row_bytes(shape[1]).expect("whole blocks");
            assert_eq!((stored.dtype.as_str(), &stored.shape[..]), ("U8", &[shape[0], row][..]), "{name}");
            assert_eq!(stored.bytes, codes, "{name}");
            let mut decoded = vec![0.0; numbers.len()];
            decode(format, &codes, &mut decoded);
            assert_eq!(found[name].1, decoded, "{name}");
            let ones = [1.0];
            let error = (squared_error(numbers, &decoded, &ones)
                / numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>())
            .sqrt();
            let recorded = cast.rms_error.expect("codes have one");
            assert!((recorded - error).abs() <= 1e-12, "{name}: {recorded} {error}");
            assert_eq!((cast.from.as_str(), cast.to.as_str()), ("BF16", format.name()));
            let changed = numbers.iter().zip(&decoded).filter(|(a, b)| a != b).count();
            assert_eq!(cast.changed, changed as u64, "{name}");
        }
        assert_eq!(report.record.weights, policy);
        let source = ModelSource::open(&output).expect("sound");
        let count: usize = original.values().map(|(_, numbers)| numbers.len()).sum();
        assert_eq!(source.bits_per_weight().expect("sound"), bits as f64 / count as f64);
        let totals = source.dtype_totals();
        let mut formats = vec!["BF16", "F16", of_blocks.name(), "Q8_0"];
        formats.dedup();
        assert_eq!(totals.keys().collect::<Vec<_>>(), formats, "{totals:?}");
        for (name, total) in &report.formats {
            assert_eq!((total.tensors, total.bytes as usize), totals[name], "{name}");
        }
        let note = report.notes.last().expect("a note");
        let cast = match policy {
            WeightsPolicy::Int4 => "12 weights were cast to Q4_0, 1 weights were cast to Q8_0",
            _ => "13 weights were cast to Q8_0",
        };
        assert!(note.contains(cast) && note.contains("export is refused"), "{note}");
        let error = export(&output, &dir.with_file_name("back"), false, &mut |_| {}).expect_err("the bits are gone");
        assert!(matches!(error, ConvertError::LossyCast { .. }), "{error}");

        // To the byte as estimated, and the same every time.
        let estimate = estimate(&plan_checkpoint(&dir).expect("sound"), &options(policy)).expect("sound");
        assert_eq!((estimate.output_bytes, &estimate.formats), (report.output_bytes, &report.formats));
        let first = snapshot(&output);
        fs::remove_dir_all(&output).expect("it is there");
        converted(&dir, &options(policy));
        assert_eq!(snapshot(&output), first);
    }
}

#[test]
fn a_reader_of_safetensors_opens_the_file() {
    let (_temp, dir) = checkpoint();
    let (_, output) = converted(&dir, &options(WeightsPolicy::Int4));
    let bytes = fs::read(output.join("model.safetensors")).expect("a file");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("others read it");
    let formats = metadata.metadata().as_ref().expect("metadata");
    assert_eq!(formats["format.embed.weight"], "Q8_0");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("others read it");
    assert_eq!(file.tensor("embed.weight").expect("a tensor").shape(), [VOCAB, HIDDEN / 32 * 34]);
}

#[test]
fn inputs_that_count_more_have_smaller_errors() {
    let (_temp, dir) = checkpoint();
    let name = "layers.1.mlp.up.weight";
    let importance: Vec<f32> = (0..HIDDEN).map(|at| if at % 8 == 0 { 50.0 } else { 0.5 }).collect();
    let plain = converted(&dir, &options(WeightsPolicy::Int4)).1;
    let (original, without) = (weights(&dir), weights(&plain));
    fs::remove_dir_all(&plain).expect("it is there");
    let options = ConvertOptions {
        importance: HashMap::from([(name.to_owned(), importance.clone())]),
        ..options(WeightsPolicy::Int4)
    };
    let with = weights(&converted(&dir, &options).1);
    let numbers = &original[name].1;
    let error = |found: &[f32]| squared_error(numbers, found, &importance);
    let (with_it, without_it) = (error(&with[name].1), error(&without[name].1));
    assert!(with_it < 0.8 * without_it, "{with_it} {without_it}");
    for (other, (_, numbers)) in &with {
        assert!(other == name || *numbers == without[other].1, "{other}");
    }
    // What belongs to no weight, or not to its inputs, is no importance.
    for (name, count) in [("layers.9.mlp.up.weight", HIDDEN), (name, HIDDEN - 1)] {
        let importance = HashMap::from([(name.to_owned(), vec![1.0; count])]);
        let options = ConvertOptions { importance, force: true, ..options.clone() };
        let error = convert(&dir, &dir.with_file_name("converted"), &options, &mut |_| {}).expect_err("no such weight");
        assert!(message(&error).contains(if count == HIDDEN { name } else { "importance" }), "{}", message(&error));
    }
}

#[test]
fn a_number_beyond_the_scales_is_named() {
    let (_temp, dir) = checkpoint();
    common::edit_tensors(&dir, |tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name.ends_with("1.mlp.up_proj.weight")).expect("a weight");
        tensor.bytes[2 * 77..2 * 78].copy_from_slice(&bf16::from_f32(1e7).to_le_bytes());
    });
    let output = dir.with_file_name("converted");
    let error = convert(&dir, &output, &options(WeightsPolicy::Int4), &mut |_| {}).expect_err("too large");
    assert!(matches!(&error, ConvertError::CastOverflow { element: 77, to, .. } if to == "Q4_0"), "{error}");
    assert!(!output.exists());
    converted(&dir, &options(WeightsPolicy::Bf16));
}

#[test]
fn weights_that_were_added_do_not_touch_the_codes() {
    let (temp, dir) = checkpoint();
    let attention = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    let options = ConvertOptions { attention: Some(attention), ..options(WeightsPolicy::Int4) };
    let (_, model) = converted(&dir, &options);
    let spec = weight_specs(ModelSource::open(&model).expect("sound").model_config());
    let added = spec.into_iter().find(|spec| spec.extra && spec.shape.len() == 2).expect("a meta projection");
    let new = vec![(added.name.clone(), vec![0.5; added.shape.iter().product()])];
    let calibration = RecordedCalibration {
        text_sha256: String::new(),
        tokens: 1,
        window: 1,
        held_out: 0,
        meta: Vec::new(),
        states: Vec::new(),
        far: Vec::new(),
        index: None,
    };
    let calibrated = Calibrated { config: None, weights: &new, calibration };
    let output = temp.path().join("calibrated");
    write_calibrated(&model, &output, &calibrated, false, &mut |_| {}).expect("sound");
    let [before, after] = [&model, &output].map(|dir| read_tensors(&dir.join("model.safetensors")));
    for (before, after) in before.iter().zip(&after).filter(|(before, _)| before.name != added.name) {
        assert_eq!(before, after);
    }
    assert_eq!(weights(&output)[&added.name].1, new[0].1);
}

/// The header of the weights of a model as JSON, and the data.
fn parts(model: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(model.join("model.safetensors")).expect("a file");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("a length")) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).expect("JSON"), bytes[8 + length..].to_vec())
}

#[test]
fn a_header_that_lies_about_codes_is_refused() {
    const WEIGHT: &str = "layers.0.attention.query.weight";
    let (_temp, dir) = checkpoint();
    let (_, model) = converted(&dir, &options(WeightsPolicy::Int4));
    let (header, data) = parts(&model);
    let refused = |edit: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        edit(&mut header);
        write_raw(&model.join("model.safetensors"), &header.to_string(), &data);
        ModelSource::open(&model).expect_err("it lies")
    };
    let format = |error: ConvertError| match error {
        ConvertError::Format { problem, .. } => *problem,
        other => panic!("{other}"),
    };
    let key = format!("format.{WEIGHT}");
    for name in [json!("Q3_X"), json!("q4_0"), json!("F32"), json!(""), json!(4), Value::Null, json!(["Q4_0"])] {
        let problem = format(refused(&|header| header["__metadata__"][&key] = name.clone()));
        assert!(matches!(&problem, FormatProblem::UnknownFormat { tensor, .. } if tensor == WEIGHT), "{problem}");
    }
    let problem = format(refused(&|header| header["__metadata__"]["format.nothing"] = json!("Q4_0")));
    assert!(matches!(&problem, FormatProblem::FormatOfNothing { tensor } if tensor == "nothing"), "{problem}");
    // Rows of Q8_0 have 34 bytes for 32 numbers, those of Q6_K 210 for 256.
    for name in ["Q8_0", "Q6_K", "Q5_0"] {
        let problem = format(refused(&|header| header["__metadata__"][&key] = json!(name)));
        assert!(matches!(&problem, FormatProblem::Codes { tensor, .. } if tensor == WEIGHT), "{problem}");
    }
    let bytes = HIDDEN * HIDDEN / 32 * 18;
    for (dtype, shape) in [
        ("I8", vec![HIDDEN, 36]),
        ("BOOL", vec![HIDDEN, 36]),
        ("U8", vec![bytes]),
        ("U8", vec![HIDDEN, 36, 1]),
        ("U8", vec![HIDDEN / 2, 72]),
    ] {
        let error = refused(&|header| {
            header[WEIGHT]["dtype"] = json!(dtype);
            header[WEIGHT]["shape"] = json!(shape);
        });
        match error {
            ConvertError::Format { problem, .. } => {
                assert!(matches!(*problem, FormatProblem::Codes { .. }), "{problem}")
            }
            // Whole blocks, in another shape.
            ConvertError::Plan { problems, .. } => {
                assert_eq!(shape, [HIDDEN / 2, 72]);
                assert!(
                    matches!(&problems[..], [PlanProblem::Shape { found, .. }] if *found == [HIDDEN / 2, 2 * HIDDEN]),
                    "{problems:?}"
                );
            }
            other => panic!("{other}"),
        }
    }
    // Without a format they are bytes, which no weight is.
    let error = refused(&|header| drop(header["__metadata__"].as_object_mut().expect("an object").remove(&key)));
    let ConvertError::Plan { problems, .. } = &error else { panic!("{error}") };
    assert!(
        problems.iter().any(|problem| matches!(problem, PlanProblem::Dtype { found, .. } if found == "U8")),
        "{error}"
    );
}

#[test]
fn codes_in_place_of_a_norm_or_of_what_is_kept_aside_are_refused() {
    let (_temp, dir) = checkpoint();
    let (_, model) = converted(&dir, &options(WeightsPolicy::Int4));
    let (mut header, data) = parts(&model);
    // A norm of 64 numbers in BF16 is 128 bytes; as codes it would have two axes.
    header["final_norm.weight"]["dtype"] = json!("U8");
    header["final_norm.weight"]["shape"] = json!([1, 128]);
    header["__metadata__"]["format.final_norm.weight"] = json!("Q4_0");
    write_raw(&model.join("model.safetensors"), &header.to_string(), &data);
    let error = ModelSource::open(&model).expect_err("128 is no multiple of 18");
    assert!(
        matches!(&error, ConvertError::Format { problem, .. } if matches!(**problem, FormatProblem::Codes { .. })),
        "{error}"
    );

    // One whose bytes are whole blocks: two norms of a Llama of 72 numbers would be; here a longer one.
    let (mut header, mut data) = parts(&model);
    let end = data.len();
    data.extend([0; 36]);
    let object = header.as_object_mut().expect("an object");
    object.remove("final_norm.weight").expect("a norm");
    let known = object["__metadata__"].clone();
    let gap = object.clone();
    object.clear();
    // In the order of their bytes, the norm last; what was its place moves up.
    let mut entries: Vec<(String, Value)> = gap.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    entries.sort_by_key(|(_, entry)| entry["data_offsets"][0].as_u64());
    let mut moved = Vec::new();
    let mut formats = serde_json::Map::new();
    for (name, entry) in entries {
        let [start, stop] = [0, 1].map(|n| entry["data_offsets"][n].as_u64().expect("a number") as usize);
        let from = moved.len();
        moved.extend_from_slice(&data[start..stop]);
        if entry["dtype"] == "U8" {
            let format = format!("format.{name}");
            formats.insert(format.clone(), known[&format].clone());
        }
        object.insert(
            name,
            json!({"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [from, moved.len()]}),
        );
    }
    let from = moved.len();
    moved.extend_from_slice(&data[end..]);
    object.insert(
        "final_norm.weight".into(),
        json!({"dtype": "U8", "shape": [1, 36], "data_offsets": [from, moved.len()]}),
    );
    formats.insert("format.final_norm.weight".into(), json!("Q4_0"));
    object.insert("__metadata__".into(), Value::Object(formats));
    write_raw(&model.join("model.safetensors"), &header.to_string(), &moved);
    let error = ModelSource::open(&model).expect_err("a norm is no codes");
    let ConvertError::Plan { problems, .. } = &error else { panic!("{error}") };
    let is_codes = |problem: &PlanProblem| matches!(problem, PlanProblem::Dtype { tensor, found, .. } if tensor == "final_norm.weight" && found == "Q4_0");
    assert!(problems.iter().any(is_codes), "{error}");
}
