//! Weights as they are stored mean the numbers that reading them gives, bit for bit.

#![cfg(feature = "flex")]

mod common;

use std::path::Path;

use bsbr_convert::{ConvertError, ConvertOptions, ModelSource, WeightsPolicy, convert};
use bsbr_model::{Decoder, WeightSpec, compare_logits, weight_specs};
use bsbr_weights::{Format, StoredMatrix};
use burn::tensor::Device;
use common::gguf::{CODES, GgufParts, gguf_checkout, sound_codes};
use common::{PYTORCH, Tensor, all_fixtures, checkout, convert_plain, edit_tensors};

fn specs(source: &ModelSource) -> Vec<WeightSpec> {
    weight_specs(source.model_config())
}

fn widened(matrix: &StoredMatrix) -> Vec<f32> {
    let [outputs, inputs] = matrix.shape();
    let mut numbers = vec![0.0; outputs * inputs];
    matrix.view().widen(0..outputs, &mut numbers);
    numbers
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Compares all weights of a model; gives the formats of its matrices, and how many are in place.
fn compare(model: &Path) -> (Vec<(String, Format)>, usize) {
    let source = ModelSource::open(model).expect("a sound model");
    let (mut formats, mut in_place) = (Vec::new(), 0);
    for spec in specs(&source) {
        let (read, stored) =
            (source.read_weight(&spec).expect("a weight"), source.stored_weight(&spec).expect("a weight"));
        assert_eq!(stored.is_some(), spec.shape.len() == 2 && !spec.whole, "{}", spec.name);
        let Some(stored) = stored else { continue };
        assert_eq!(stored.shape()[..], spec.shape, "{}", spec.name);
        assert_eq!(bits(&widened(&stored)), bits(&read), "{}: {}", model.display(), spec.name);
        // A copy is another one each time.
        let again = source.stored_weight(&spec).expect("a weight").expect("a matrix");
        in_place += usize::from(again.view().bytes().as_ptr() == stored.view().bytes().as_ptr());
        formats.push((spec.name, stored.format()));
    }
    (formats, in_place)
}

#[test]
fn every_checkpoint_and_its_conversion_give_as_stored_what_they_give_as_numbers() {
    let pytorch = PYTORCH.map(|name| (name, "config.json"));
    for (name, config) in all_fixtures().filter(|(_, config)| *config == "config.json").chain(pytorch) {
        let (temp, dir) = checkout(name, config);
        let (formats, _) = compare(&dir);
        let expected = |weight: &str| match name {
            "llama_bf16" => Format::Bf16,
            "gpt_oss_hub" if weight.contains(".experts.") => Format::Mxfp4,
            _ => Format::F32,
        };
        let all = formats.iter().all(|(weight, format)| *format == expected(weight));
        assert!(name == "gpt2_sharded" || all, "{name}: {formats:?}");
        let converted = temp.path().join("converted");
        convert_plain(&dir, &converted).expect(name);
        let (converted, in_place) = compare(&converted);
        assert_eq!(converted, formats, "{name}");
        // A conversion has every weight row by row; its F32 begins at multiples of four bytes.
        assert_eq!(in_place, formats.len(), "{name}");
    }
}

#[test]
fn weights_of_a_checkpoint_are_read_where_they_are_in_the_file() {
    for (name, transposed) in [("llama", 0), ("llama_bf16", 0), ("phi3", 0), ("gpt2", 4)] {
        let (_temp, dir) = checkout(name, "config.json");
        let (formats, in_place) = compare(&dir);
        let layers = formats.iter().filter(|(name, _)| name.ends_with("attention.output.weight")).count();
        // Query, key and value of GPT-2 are one tensor, and all its linear weights are transposed.
        let copied = if transposed > 0 { (transposed + 2) * layers } else { 0 };
        assert_eq!(in_place, formats.len() - copied, "{name}");
    }
}

#[test]
fn gguf_files_of_every_kind_give_as_stored_what_they_give_as_numbers() {
    for name in ["llama", "gpt2", "qwen2", "qwen3", "phi3", "starcoder2", "gemma", "gemma2", "gemma3_text", "mixed"] {
        let (temp, file) = gguf_checkout(&format!("{name}.gguf"));
        let (formats, in_place) = compare(&file);
        // Queries and keys of Llama have their rows in another order.
        let moved = if ["llama", "mixed"].contains(&name) {
            formats.iter().filter(|(name, _)| name.ends_with("query.weight") || name.ends_with("key.weight")).count()
        } else {
            0
        };
        assert_eq!(in_place, formats.len() - moved, "{name}");
        let converted = temp.path().join("converted");
        convert_plain(&file, &converted).expect(name);
        assert_eq!(compare(&converted), (formats.clone(), formats.len()), "{name}");
    }
}

#[test]
fn codes_of_every_format_stay_codes_whatever_the_order_of_the_rows() {
    for (kind, format) in CODES {
        let mut parts = GgufParts::read("mixed.gguf");
        for (n, tensor) in parts.tensors.iter_mut().filter(|tensor| tensor.axes.len() == 2).enumerate() {
            tensor.kind = kind;
            tensor.data = sound_codes(format, tensor.axes.iter().product::<u64>() as usize, n as u64);
        }
        let (temp, file) = parts.write();
        let (formats, _) = compare(&file);
        assert!(formats.iter().all(|(_, found)| *found == format), "{format}: {formats:?}");
        let converted = temp.path().join("converted");
        convert_plain(&file, &converted).expect("sound");
        assert_eq!(compare(&converted), (formats.clone(), formats.len()), "{format}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_named_as_reading_them_names_them() {
    let same = |source: &ModelSource, name: &str| {
        let spec = specs(source).into_iter().find(|spec| spec.name == name).expect(name);
        let (read, stored) = (source.read_weight(&spec).unwrap_err(), source.stored_weight(&spec).unwrap_err());
        assert!(matches!(&stored, ConvertError::NotFinite { .. }), "{stored}");
        assert_eq!(read.to_string(), stored.to_string());
    };
    for (fixture, tensor, weight) in [
        ("llama", "model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up.weight"),
        ("llama_bf16", "model.layers.0.self_attn.q_proj.weight", "layers.0.attention.query.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "layers.0.mlp.up.weight"),
    ] {
        let (_temp, dir) = checkout(fixture, "config.json");
        edit_tensors(&dir, |tensors| {
            let found = |known: &&mut Tensor| known.name == tensor || format!("transformer.{}", known.name) == tensor;
            let tensor = tensors.iter_mut().find(found).expect(tensor);
            let at = 100 * if tensor.dtype == "F32" { 4 } else { 2 };
            let size = if tensor.dtype == "F32" { 4 } else { 2 };
            tensor.bytes[at..at + size].fill(0xff);
        });
        same(&ModelSource::open(&dir).expect("sound but for its numbers"), weight);
    }
    for (kind, format) in CODES {
        let mut parts = GgufParts::read("mixed.gguf");
        let tensor = parts.tensor("blk.0.attn_q.weight");
        tensor.kind = kind;
        tensor.data = sound_codes(format, tensor.axes.iter().product::<u64>() as usize, 1);
        // The scale of a block in the third row.
        let row = format.row_bytes(tensor.axes[0] as usize).expect("whole blocks");
        let scale = 2 * row + if format == Format::Q6K { 208 } else { 0 };
        tensor.data[scale..scale + 2].fill(0xff);
        let (_temp, file) = parts.write();
        same(&ModelSource::open(&file).expect("sound but for its numbers"), "layers.0.attention.query.weight");
    }
}

#[test]
fn a_weight_of_another_shape_and_one_that_no_file_holds_are_told_apart() {
    let (_temp, dir) = checkout("llama", "config.json");
    let source = ModelSource::open(&dir).expect("sound");
    let mut spec = specs(&source).into_iter().find(|spec| spec.name == "layers.0.mlp.up.weight").expect("a weight");
    spec.shape.reverse();
    assert!(matches!(source.stored_weight(&spec), Err(ConvertError::NoSuchWeight { .. })));
    spec.name = "bsbr.layers.0.meta_query.weight".to_owned();
    assert!(source.stored_weight(&spec).expect("nothing is wrong").is_none());
}

#[test]
fn a_decoder_gives_the_logits_of_the_same_numbers_in_f32() {
    let texts: Vec<Vec<u32>> = vec![(0..40).map(|at| at * 7 % 60).collect(), vec![5]];
    let (temp, file) = gguf_checkout("mixed.gguf");
    let mut models = vec![file.clone()];
    for policy in
        [WeightsPolicy::Keep, WeightsPolicy::F16, WeightsPolicy::Bf16, WeightsPolicy::Int8, WeightsPolicy::Int4]
    {
        let output = temp.path().join(format!("{policy:?}"));
        let options = ConvertOptions { weights: policy, ..Default::default() };
        convert(&file, &output, &options, &mut |_| {}).expect("sound");
        models.push(output);
    }
    for model in models {
        let mut wide = ModelSource::open(&model).expect("sound").widened();
        let config = wide.model_config().clone();
        let vocabulary = config.decoder.vocab_size as u32;
        let texts: Vec<Vec<u32>> = texts.iter().map(|text| text.iter().map(|id| id % vocabulary).collect()).collect();
        let decoder = Decoder::load(config.clone(), &mut wide, &Device::flex()).expect("sound");
        let expected: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| {
                let mut cache = decoder.new_cache(&[text.len()]).expect("a cache");
                let hidden = decoder.hidden(std::slice::from_ref(text), &mut cache).expect("a text");
                decoder.logits(hidden).try_into_vec_as::<f32>().expect("f32")
            })
            .collect();
        let mut stored = ModelSource::open(&model).expect("sound");
        let decoder = Decoder::load(config, &mut stored, &Device::flex()).expect("sound");
        let found = compare_logits(&decoder, &texts, &expected).expect("the same texts");
        let largest = expected.iter().flatten().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        assert!(found.max <= 1e-4 * f64::from(largest.max(1.0)), "{}: {}", model.display(), found.max);
    }
}
