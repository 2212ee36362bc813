//! Weights whose numbers stand elsewhere: floats of 8 and of 4 bits with scales in a tensor of their own, and numbers of 64 bits. What they
//! mean is computed here from its definition.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_convert::{
    ConvertError, ConvertOptions, ModelSource, PlanProblem, WeightsPolicy, convert, export, plan_checkpoint,
};
use bsbr_model::{WeightSpec, weight_specs};
use common::{
    Tensor, checkout, convert_plain, edit_config, edit_tensors, message, read_dir_tensors, read_tensors, refused,
    snapshot, write_tensors,
};
use serde_json::json;
use tempfile::TempDir;

/// Floats of 8 bits by their fields: sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinities.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let size = if exponent == 0 { mantissa * 2f64.powi(-6) } else { (1.0 + mantissa) * 2f64.powi(exponent - 7) };
    if code & 0x7f == 0x7f {
        f64::NAN
    } else if code & 0x80 == 0 {
        size
    } else {
        -size
    }
}

/// Codes without a NaN, from all others in turn.
fn codes(count: usize, seed: usize) -> Vec<u8> {
    (0..count)
        .map(|at| ((at * 37 + at / 256 * 11 + seed) % 256) as u8)
        .map(|c| if c & 0x7f == 0x7f { c & 0xf0 } else { c })
        .collect()
}

/// A weight of floats of 8 bits and its scales for blocks of so many outputs and inputs.
fn f8(name: &str, [outputs, inputs]: [usize; 2], block: [usize; 2], dtype: &str) -> [Tensor; 2] {
    let scales = [outputs.div_ceil(block[0]), inputs.div_ceil(block[1])];
    // Neither powers of two nor, in half precision, rounded.
    let numbers = (0..scales[0] * scales[1]).map(|at| 0.000_9 * (1.0 + 0.37 * (at + name.len() % 5) as f32));
    let bytes = match dtype {
        "BF16" => numbers.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    };
    let codes = codes(outputs * inputs, name.len());
    [
        Tensor { name: name.into(), dtype: "F8_E4M3".into(), shape: vec![outputs, inputs], bytes: codes },
        Tensor { name: format!("{name}_scale_inv"), dtype: dtype.into(), shape: scales.to_vec(), bytes },
    ]
}

/// What they stand for: one product, rounded once.
fn meant([codes, scales]: [&Tensor; 2], block: [usize; 2]) -> Vec<f32> {
    let &[_, inputs] = &codes.shape[..] else { panic!("a matrix") };
    let scale = |at: usize| match scales.dtype.as_str() {
        "BF16" => half::bf16::from_le_bytes([scales.bytes[2 * at], scales.bytes[2 * at + 1]]).to_f32(),
        _ => f32::from_le_bytes(scales.bytes[4 * at..4 * at + 4].try_into().expect("4 bytes")),
    };
    let number = |(at, code): (usize, &u8)| {
        let (row, column) = (at / inputs, at % inputs);
        (e4m3(*code) * f64::from(scale(row / block[0] * scales.shape[1] + column / block[1]))) as f32
    };
    codes.bytes.iter().enumerate().map(number).collect()
}

const HIDDEN: usize = 128;

/// A Llama of one layer whose matrices are floats of 8 bits; `inner` is the width of its MLP.
fn llama(inner: usize, block: [usize; 2], dtype: &str) -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let dir = temp.path().join("model");
    fs::create_dir(&dir).expect("a fresh directory");
    let config = json!({"model_type": "llama", "vocab_size": 11, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": inner, "tie_word_embeddings": true,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}});
    fs::write(dir.join("config.json"), config.to_string()).expect("room");
    let f32 = |name: &str, shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        Tensor::f32(name, shape, (0..count).map(|at| 1.0 + 0.3 * (at as f32 * 0.7).sin()))
    };
    let mut tensors = vec![
        f32("model.embed_tokens.weight", &[11, HIDDEN]),
        f32("model.layers.0.input_layernorm.weight", &[HIDDEN]),
        f32("model.layers.0.post_attention_layernorm.weight", &[HIDDEN]),
        f32("model.norm.weight", &[HIDDEN]),
    ];
    for (part, shape) in [
        ("self_attn.q_proj", [HIDDEN, HIDDEN]),
        ("self_attn.k_proj", [HIDDEN / 2, HIDDEN]),
        ("self_attn.v_proj", [HIDDEN / 2, HIDDEN]),
        ("self_attn.o_proj", [HIDDEN, HIDDEN]),
        ("mlp.gate_proj", [inner, HIDDEN]),
        ("mlp.up_proj", [inner, HIDDEN]),
        ("mlp.down_proj", [HIDDEN, inner]),
    ] {
        tensors.extend(f8(&format!("model.layers.0.{part}.weight"), shape, block, dtype));
    }
    write_tensors(&dir.join("model.safetensors"), &tensors);
    (temp, dir)
}

/// The weight that each of those tensors becomes.
fn weight_of(name: &str) -> Option<String> {
    let (_, part) = name.strip_suffix(".weight")?.split_once("layers.0.")?;
    let part = match part.split_once('.')? {
        ("self_attn", part) => format!("attention.{}", ["query", "key", "value", "output"]["qkvo".find(&part[..1])?]),
        (mlp, part) => format!("{mlp}.{}", part.strip_suffix("_proj")?),
    };
    Some(format!("layers.0.{part}.weight"))
}

fn spec(source: &ModelSource, name: &str) -> WeightSpec {
    weight_specs(source.model_config()).into_iter().find(|spec| spec.name == name).expect("a weight")
}

fn format_of(source: &ModelSource, name: &str) -> String {
    source.stored_weight(&spec(source, name)).expect("sound").expect("a matrix").format().to_string()
}

/// Every weight of the checkpoint `dir` that is codes is what its codes mean, and so it is in `source`.
fn assert_meant(dir: &Path, source: &ModelSource, block: [usize; 2]) {
    let tensors = read_dir_tensors(dir);
    let mut seen = 0;
    for (name, codes) in tensors.iter().filter(|(_, tensor)| tensor.dtype == "F8_E4M3") {
        let expected = meant([codes, &tensors[&format!("{name}_scale_inv")]], block);
        let weight = spec(source, &weight_of(name).expect("a known name"));
        assert_eq!(source.read_weight(&weight).expect("sound"), expected, "{name}");
        let stored = source.stored_weight(&weight).expect("sound").expect("a matrix");
        let mut widened = vec![0.0; expected.len()];
        stored.view().widen(0..weight.shape[0], &mut widened);
        assert_eq!(widened, expected, "{name} as it is stored");
        seen += 1;
    }
    assert_eq!(seen, 7);
}

fn converted(dir: &Path, weights: WeightsPolicy) -> PathBuf {
    let output = dir.with_file_name(format!("converted-{weights:?}"));
    convert(dir, &output, &ConvertOptions { weights, ..Default::default() }, &mut |_| {}).expect("sound");
    output
}

fn assert_comes_back(dir: &Path, converted: &Path) {
    let back = dir.with_file_name("back");
    let report = export(converted, &back, true, &mut |_| {}).expect("exports");
    assert!(report.is_original() && report.files.iter().all(|file| !file.decoded), "{report:?}");
    assert_eq!(snapshot(&back), snapshot(dir));
}

#[test]
fn floats_of_8_bits_stay_codes_and_mean_their_product_with_the_scale_of_their_block() {
    // The last blocks of outputs are smaller; scales may be of wider blocks than rows of codes have.
    for (inner, block, dtype) in
        [(384, [128, 128], "F32"), (256, [128, 128], "BF16"), (384, [48, 256], "F32"), (128, [1, 128], "F32")]
    {
        let (_temp, dir) = llama(inner, block, dtype);
        let output = converted(&dir, WeightsPolicy::Keep);
        for path in [&dir, &output] {
            let source = ModelSource::open(path).expect("sound");
            assert_meant(&dir, &source, block);
            assert_eq!(format_of(&source, "layers.0.mlp.down.weight"), "F8_E4M3");
        }
        assert!(read_dir_tensors(&output).keys().all(|name| !name.starts_with("source.ignored.")));
        assert_comes_back(&dir, &output);
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_numbers_and_their_codes_are_kept_aside() {
    for (inner, block) in [(200, [128, 128]), (130, [64, 128]), (256, [32, 48])] {
        let (_temp, dir) = llama(inner, block, "F32");
        let output = converted(&dir, WeightsPolicy::Keep);
        for path in [&dir, &output] {
            let source = ModelSource::open(path).expect("sound");
            assert_meant(&dir, &source, block);
            assert_eq!(format_of(&source, "layers.0.mlp.down.weight"), "F32");
            let whole = if block[1] == 128 { "F8_E4M3" } else { "F32" };
            assert_eq!(format_of(&source, "layers.0.attention.query.weight"), whole);
        }
        let kept = read_dir_tensors(&output);
        for end in ["weight", "weight_scale_inv"] {
            assert!(kept.contains_key(&format!("source.ignored.model.layers.0.mlp.down_proj.{end}")));
        }
        assert_comes_back(&dir, &output);
    }
}

#[test]
fn another_number_format_is_made_of_the_numbers_and_gives_no_codes_back() {
    let (_temp, dir) = llama(384, [128, 128], "F32");
    for (weights, format) in [(WeightsPolicy::F32, "F32"), (WeightsPolicy::Bf16, "BF16"), (WeightsPolicy::Int8, "Q8_0")]
    {
        let output = converted(&dir, weights);
        let source = ModelSource::open(&output).expect("sound");
        assert_eq!(format_of(&source, "layers.0.mlp.down.weight"), format);
        if weights == WeightsPolicy::F32 {
            assert_meant(&dir, &source, [128, 128]);
        }
        let error = export(&output, &dir.with_file_name("back"), false, &mut |_| {}).expect_err("no codes");
        match weights {
            WeightsPolicy::F32 => {
                assert!(matches!(&error, ConvertError::CodesGone { found, .. } if found == "F32"), "{error}");
                let text = message(&error);
                assert!(
                    text.contains(".q_proj.weight` of the original is codes") && text.contains("--weights keep"),
                    "{text}"
                );
            }
            _ => assert!(matches!(error, ConvertError::LossyCast { .. }), "{error}"),
        }
    }
}

#[test]
fn codes_and_scales_in_different_files_belong_together() {
    let (_temp, dir) = llama(256, [128, 128], "F32");
    let tensors = read_tensors(&dir.join("model.safetensors"));
    fs::remove_file(dir.join("model.safetensors")).expect("a file");
    let (scales, others): (Vec<Tensor>, Vec<Tensor>) =
        tensors.into_iter().partition(|tensor| tensor.name.ends_with("_scale_inv"));
    let mut places = BTreeMap::new();
    for (file, tensors) in [("model-00001-of-00002.safetensors", others), ("model-00002-of-00002.safetensors", scales)]
    {
        write_tensors(&dir.join(file), &tensors);
        places.extend(tensors.into_iter().map(|tensor| (tensor.name, file)));
    }
    let index = json!({"metadata": {}, "weight_map": places});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("room");
    let output = converted(&dir, WeightsPolicy::Keep);
    assert_meant(&dir, &ModelSource::open(&output).expect("sound"), [128, 128]);
    assert_comes_back(&dir, &output);
}

fn only(error: ConvertError) -> PlanProblem {
    match error {
        ConvertError::Plan { mut problems, .. } if problems.len() == 1 => problems.remove(0),
        other => panic!("{other}"),
    }
}

#[test]
fn scales_that_are_missing_of_another_shape_or_of_nothing_are_named() {
    let name = "model.layers.0.mlp.up_proj.weight".to_owned();
    let scales = format!("{name}_scale_inv");
    let damaged = |damage: &dyn Fn(&mut Vec<Tensor>)| {
        let (_temp, dir) = llama(384, [128, 128], "F32");
        edit_tensors(&dir, |tensors| damage(tensors));
        only(refused(&dir))
    };
    let missing = damaged(&|tensors| tensors.retain(|tensor| tensor.name != scales));
    assert_eq!(missing, PlanProblem::MissingScales { tensor: scales.clone(), codes: name.clone() });
    assert_eq!(missing.to_string(), format!("missing: `{scales}`, the scales of the codes `{name}`"));
    let gone = damaged(&|tensors| tensors.retain(|tensor| tensor.name != name));
    assert_eq!(gone, PlanProblem::ScalesOfNothing { tensor: scales.clone(), codes: name.clone() });
    for (shape, bytes) in [(vec![1, 3], 12), (vec![3], 12), (vec![3, 2], 24), (vec![], 4)] {
        let other = damaged(&|tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.name == scales).expect("there");
            (tensor.shape, tensor.bytes) = (shape.clone(), vec![0; bytes]);
        });
        let (tensor, codes, expected, found) = (scales.clone(), name.clone(), vec![3, 1], shape);
        assert_eq!(other, PlanProblem::ScalesShape { tensor, codes, expected, found });
    }
    let integers = damaged(&|tensors| {
        tensors.iter_mut().find(|tensor| tensor.name == scales).expect("there").dtype = "I32".into();
    });
    let expected = "F32 or BF16 or F16".to_owned();
    assert_eq!(integers, PlanProblem::Dtype { tensor: scales.clone(), found: "I32".into(), expected });
    let numbers = damaged(&|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).expect("there");
        (tensor.dtype, tensor.bytes) = ("F32".into(), vec![0; 4 * tensor.bytes.len()]);
    });
    assert_eq!(numbers, PlanProblem::ScalesOfNothing { tensor: scales.clone(), codes: name.clone() });
}

#[test]
fn a_code_that_is_no_number_is_named_with_its_place() {
    for (inner, code) in [(384, 0x7f), (384, 0xff), (200, 0x7f), (200, 0xff)] {
        for (name, at) in [("model.layers.0.mlp.down_proj.weight", 131), ("model.layers.0.self_attn.k_proj.weight", 0)]
        {
            let (_temp, dir) = llama(inner, [128, 128], "F32");
            edit_tensors(&dir, |tensors| {
                tensors.iter_mut().find(|tensor| tensor.name == name).expect("there").bytes[at] = code;
            });
            let source = ModelSource::open(&dir).expect("headers that are sound");
            let weight = spec(&source, &weight_of(name).expect("known"));
            for error in [
                refused(&dir),
                source.stored_weight(&weight).expect_err("a NaN"),
                source.read_weight(&weight).expect_err("a NaN"),
            ] {
                let ConvertError::NotFinite { tensor, element, value, .. } = error else { panic!("{error}") };
                assert_eq!((tensor.as_str(), element), (name, at));
                assert!(value.is_nan());
            }
        }
    }
}

#[test]
fn descriptions_of_other_codes_are_refused() {
    for (key, value, words) in [
        ("weight_block_size", json!(null), "`quantization_config.weight_block_size` must be two numbers above 0"),
        ("weight_block_size", json!([128]), "`quantization_config.weight_block_size` must be two numbers above 0"),
        ("weight_block_size", json!([0, 128]), "`quantization_config.weight_block_size` must be two numbers above 0"),
        ("fmt", json!("e5m2"), "`quantization_config.fmt` must be e4m3"),
        ("quant_method", json!("gptq"), "is quantised (config.json has a `quantization_config`: gptq)"),
    ] {
        let (_temp, dir) = llama(256, [128, 128], "F32");
        edit_config(&dir, |config| config["quantization_config"][key] = value);
        let text = message(&refused(&dir));
        assert!(text.contains(words), "{words}\n{text}");
    }
    // Codes that nothing describes.
    let (_temp, dir) = llama(256, [128, 128], "F32");
    edit_config(&dir, |config| config["quantization_config"] = json!(null));
    assert!(matches!(refused(&dir), ConvertError::Quantised { .. }));
}

#[test]
fn blocks_of_4_bits_are_read_as_their_definition_says_and_stay_codes() {
    let (_temp, dir) = checkout("gpt_oss_hub", "config.json");
    let tensors = read_dir_tensors(&dir);
    let sizes = [0.0_f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    // `[experts, outputs, inputs]`.
    let numbers = |name: &str| -> Vec<f32> {
        let (blocks, scales) = (&tensors[&format!("{name}_blocks")], &tensors[&format!("{name}_scales")]);
        let codes = blocks.bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]);
        let number = |(at, code): (usize, u8)| {
            let size = sizes[usize::from(code % 8)] * 2f32.powi(i32::from(scales.bytes[at / 32]) - 127);
            if code < 8 { size } else { -size }
        };
        codes.enumerate().map(number).collect()
    };
    let output = converted(&dir, WeightsPolicy::Keep);
    for path in [&dir, &output] {
        let source = ModelSource::open(path).expect("sound");
        for layer in 0..2 {
            let experts = format!("model.layers.{layer}.mlp.experts");
            let (gate_up, down) =
                (numbers(&format!("{experts}.gate_up_proj")), numbers(&format!("{experts}.down_proj")));
            for expert in 0..4 {
                let weight = |part: &str| {
                    let name = format!("layers.{layer}.mlp.experts.{expert}.{part}.weight");
                    assert_eq!(format_of(&source, &name), "MXFP4");
                    source.read_weight(&spec(&source, &name)).expect("sound")
                };
                let row = |from: &[f32], row: usize| from[row * 64..(row + 1) * 64].to_vec();
                let of = |at: usize| (0..64).flat_map(|r| row(&gate_up, expert * 128 + 2 * r + at)).collect::<Vec<_>>();
                assert_eq!(weight("gate"), of(0));
                assert_eq!(weight("up"), of(1));
                assert_eq!(weight("down"), down[expert * 64 * 64..(expert + 1) * 64 * 64]);
            }
        }
    }
    assert_comes_back(&dir, &output);
    let error = export(&converted(&dir, WeightsPolicy::F32), &dir.with_file_name("b"), false, &mut |_| {});
    assert!(matches!(error, Err(ConvertError::CodesGone { .. })), "{error:?}");
}

#[test]
fn damaged_blocks_of_4_bits_are_named() {
    let name = "model.layers.1.mlp.experts.gate_up_proj";
    let damaged = |damage: &dyn Fn(&mut Tensor), which: &str| {
        let (_temp, dir) = checkout("gpt_oss_hub", "config.json");
        edit_tensors(&dir, |tensors| {
            damage(tensors.iter_mut().find(|tensor| tensor.name == format!("{name}{which}")).expect("there"));
        });
        refused(&dir)
    };
    let renamed = only(damaged(&|tensor| tensor.name += "_0", "_scales"));
    assert!(
        matches!(&renamed, PlanProblem::MissingScales { tensor, .. } if *tensor == format!("{name}_scales")),
        "{renamed}"
    );
    let shape = only(damaged(&|tensor| tensor.shape = vec![4, 2, 128], "_scales"));
    assert!(
        matches!(&shape, PlanProblem::ScalesShape { expected, found, .. } if expected == &[4, 128, 2] && found == &[4, 2, 128]),
        "{shape}"
    );
    let error = damaged(&|tensor| tensor.name += "_0", "_blocks");
    assert!(matches!(only(error), PlanProblem::ScalesOfNothing { .. }));
    // A power of two that is none.
    let error = damaged(&|tensor| tensor.bytes[77] = 255, "_scales");
    let ConvertError::NotFinite { tensor, element, .. } = error else { panic!("{error}") };
    assert_eq!((tensor, element), (format!("{name}_blocks"), 77 * 32));
    // Without their description they are nothing at all.
    let (_temp, dir) = checkout("gpt_oss_hub", "config.json");
    edit_config(&dir, |config| config["quantization_config"] = json!(null));
    let text = message(&refused(&dir));
    assert!(text.contains("gate_up_proj_blocks` is U8, expected F32, F16 or BF16"), "{text}");
}

/// Some tensors of a fixture in 64 bits, with more of them than fit in 32.
fn widened(dir: &Path) {
    edit_tensors(dir, |tensors| {
        for (at, tensor) in tensors.iter_mut().enumerate().filter(|(at, _)| at % 2 == 0) {
            let finer = |(n, x): (usize, f32)| f64::from(x) * (1.0 + 1e-7 * ((at + n) % 7) as f64);
            tensor.bytes = tensor.values().into_iter().enumerate().map(finer).flat_map(f64::to_le_bytes).collect();
            tensor.dtype = "F64".into();
        }
    });
}

#[test]
fn numbers_of_64_bits_are_rounded_to_the_nearest_and_come_back_whole() {
    for name in ["llama", "gpt2", "granite_swa", "gpt_oss"] {
        let (temp, dir) = checkout(name, "config.json");
        let before = ModelSource::open(&dir).expect("a fixture");
        let specs = weight_specs(before.model_config());
        let weights = |source: &ModelSource| -> Vec<Vec<f32>> {
            specs.iter().map(|spec| source.read_weight(spec).expect("sound")).collect()
        };
        let expected = weights(&before);
        widened(&dir);
        let output = temp.path().join("out");
        convert_plain(&dir, &output).expect("sound");
        for path in [&dir, &output] {
            let found = weights(&ModelSource::open(path).expect("sound"));
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
            assert!(found.iter().flatten().zip(expected.iter().flatten()).all(near), "{name}");
            assert!(found != expected, "{name}: some are rounded to others");
        }
        assert_comes_back(&dir, &output);
        // And a number that is none in 32 bits.
        edit_tensors(&dir, |tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.dtype == "F64").expect("there");
            tensor.bytes[..8].copy_from_slice(&1e300_f64.to_le_bytes());
        });
        let error =
            plan_checkpoint(&dir).map(|_| ()).and_then(|()| convert_plain(&dir, &temp.path().join("o")).map(|_| ()));
        assert!(matches!(error, Err(ConvertError::NotFinite { element: 0, .. })), "{name}: {error:?}");
    }
}
