//! GGUF files become the models that the Hugging Face checkpoints become they were made of.

#![cfg(feature = "flex")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bsbr_convert::{
    ConvertError, ConvertOptions, ExpectedLogits, ModelSource, WeightsPolicy, convert, export, export_gguf, keeps_gguf,
};
use bsbr_model::{Decoder, TextTokenizer, WeightSpec, compare_logits, weight_specs};
use burn::tensor::Device;
use common::gguf::{CODES, GgufParts, gguf_checkout, gguf_fixture, sound_codes};
use common::{checkout, convert_plain, fixtures, read_dir_tensors, read_tensors};
use half::f16;
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-4;

fn difference(model: &Path, expected: &Path) -> f64 {
    let expected = ExpectedLogits::open(expected).expect("a sound file");
    let mut source = ModelSource::open(model).expect("a sound model");
    let config = source.model_config().clone();
    let decoder = Decoder::load(config, &mut source, &Device::flex()).expect("sound weights");
    compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts").max
}

/// All weights of a model.
fn weights(model: &Path) -> BTreeMap<String, Vec<f32>> {
    let source = ModelSource::open(model).expect("a sound model");
    let read = |spec: WeightSpec| (spec.name.clone(), source.read_weight(&spec).expect("a weight"));
    weight_specs(source.model_config()).into_iter().map(read).collect()
}

#[test]
fn f32_files_give_the_logits_of_transformers_and_the_weights_of_the_checkpoint_bit_for_bit() {
    for name in ["llama", "gpt2"] {
        let (temp, file) = gguf_checkout(&format!("{name}.gguf"));
        let (_other, dir) = checkout(name, "config.json");
        let (converted, exported) = (temp.path().join("converted"), temp.path().join("exported"));
        convert_plain(&file, &converted).expect("a sound file");
        let report = export(&converted, &exported, false, &mut |_| {}).expect("a sound model");
        assert!(report.is_original() && !report.files[0].decoded, "{name}");
        assert_eq!(report.files[0].instead_of.as_deref(), Some(format!("{name}.gguf").as_str()));
        let expected = weights(&dir);
        for model in [&file, &converted, &exported] {
            assert_eq!(weights(model), expected, "{name}: {}", model.display());
            let difference = difference(model, &fixtures().join(name).join("expected.safetensors"));
            assert!(difference <= TOLERANCE, "{name}: {difference}");
        }
        // Names, shapes and numbers of the export are those of the checkpoint the file was made of.
        assert_eq!(read_dir_tensors(&exported), read_dir_tensors(&dir), "{name}");
    }
}

#[test]
fn f16_files_give_the_rounded_weights_and_the_decoder_of_the_checkpoint() {
    for name in ["qwen2", "qwen3", "phi3", "starcoder2", "gemma", "gemma2", "gemma3_text"] {
        let (_temp, dir) = checkout(name, "config.json");
        let (original, found) =
            (ModelSource::open(&dir).unwrap(), ModelSource::open(&gguf_fixture(&format!("{name}.gguf"))).unwrap());
        let mut expected = original.model_config().decoder.clone();
        if ["gemma2", "gemma3_text"].contains(&name) {
            // The fixtures have a scale that the format cannot say: it is the one of the width of a head, 16.
            expected.attention_scale = 0.25;
        }
        assert_eq!(found.model_config().decoder, expected, "{name}");
        for spec in weight_specs(original.model_config()) {
            let mut expected = original.read_weight(&spec).unwrap();
            if spec.shape.len() > 1 {
                expected.iter_mut().for_each(|number| *number = f16::from_f32(*number).to_f32());
            }
            if name.starts_with("gemma") && spec.shape.len() == 1 {
                // The file holds the norms plus one: what the decoder multiplies by must be exactly that.
                expected.iter_mut().for_each(|number| *number = (*number + 1.0) - 1.0);
            }
            assert_eq!(found.read_weight(&spec).unwrap(), expected, "{name}: {}", spec.name);
        }
    }
}

#[test]
fn a_quantised_file_gives_the_logits_that_transformers_gives_with_its_decoded_weights() {
    let (temp, file) = gguf_checkout("mixed.gguf");
    let (converted, exported) = (temp.path().join("converted"), temp.path().join("exported"));
    let report = convert_plain(&file, &converted).expect("a sound file");
    let kinds: Vec<&str> = report.record.tensors.iter().filter_map(|tensor| tensor.stored.as_deref()).collect();
    for kind in ["Q6_K", "Q4_K", "Q5_K", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "F32"] {
        assert!(kinds.contains(&kind), "{kind} in {kinds:?}");
    }
    assert!(report.notes.iter().any(|note| note.contains("7 tensors are quantised")), "{:?}", report.notes);
    let report = export(&converted, &exported, false, &mut |_| {}).expect("a sound model");
    assert!(report.is_original() && report.files[0].decoded);
    for model in [&file, &converted, &exported] {
        let difference = difference(model, &gguf_fixture("mixed.safetensors"));
        assert!(difference <= TOLERANCE, "{}: {difference}", model.display());
    }
    // A quantised tensor became f32, one in bf16 stayed so.
    let exported = read_tensors(&exported.join("model.safetensors"));
    let dtype = |name: &str| &exported.iter().find(|tensor| tensor.name == name).expect("a tensor").dtype;
    assert_eq!(dtype("model.layers.0.self_attn.q_proj.weight"), "F32");
    assert_eq!(dtype("model.layers.0.self_attn.v_proj.weight"), "BF16");
}

#[test]
fn numbers_of_a_written_configuration_have_the_types_that_transformers_wants() {
    for name in ["gemma2", "gemma3_text"] {
        let (temp, file) = gguf_checkout(&format!("{name}.gguf"));
        let (converted, exported) = (temp.path().join("converted"), temp.path().join("exported"));
        convert_plain(&file, &converted).expect("a sound file");
        export(&converted, &exported, false, &mut |_| {}).expect("a sound model");
        let config: Value =
            serde_json::from_slice(&fs::read(exported.join("config.json")).expect("a file")).expect("JSON");
        assert!(config["query_pre_attn_scalar"].is_u64(), "{name}: {}", config["query_pre_attn_scalar"]);
        for key in ["rms_norm_eps", "rope_theta", "rope_local_base_freq", "final_logit_softcapping"] {
            assert!(config[key].is_null() || config[key].is_f64(), "{name}: {key} {}", config[key]);
        }
    }
}

#[test]
fn converting_a_file_twice_gives_the_same_bytes() {
    let (temp, file) = gguf_checkout("mixed.gguf");
    let made = ["one", "two"].map(|name| {
        let output = temp.path().join(name);
        convert_plain(&file, &output).expect("a sound file");
        common::snapshot(&output)
    });
    assert_eq!(made[0], made[1]);
}

#[test]
fn a_wrong_order_of_rows_would_not_pass() {
    // Neighbouring rows of the queries swapped: the shapes stay, the logits do not.
    let mut parts = GgufParts::read("llama.gguf");
    let row = 4 * 48;
    parts.tensor("blk.0.attn_q.weight").data[..2 * row].rotate_left(row);
    let (_temp, file) = parts.write();
    let difference = difference(&file, &fixtures().join("llama/expected.safetensors"));
    assert!(difference > 0.01, "{difference}");
}

#[test]
fn biases_of_queries_and_keys_are_in_the_order_of_their_weights() {
    let mut parts = GgufParts::read("llama.gguf");
    for layer in 0..2 {
        for (name, rows) in [("q", 48), ("k", 24), ("v", 24), ("output", 48)] {
            let numbers: Vec<f32> = (0..rows).map(|row| row as f32).collect();
            parts.add_f32(&format!("blk.{layer}.attn_{name}.bias"), &numbers);
        }
    }
    let (_temp, file) = parts.write();
    let weights = weights(&file);
    // Heads of 12 rows: the first of each pair, then the second.
    let head = |first: usize| (0..12).map(move |row| (first + row % 6 * 2 + row / 6) as f32);
    let expected: Vec<f32> = [0, 12, 24, 36].into_iter().flat_map(head).collect();
    assert_eq!(weights["layers.1.attention.query.bias"], expected);
    assert_eq!(weights["layers.1.attention.key.bias"], expected[..24]);
    assert_eq!(weights["layers.1.attention.value.bias"], (0..24).map(|row| row as f32).collect::<Vec<_>>());
}

#[test]
fn a_head_equal_to_the_embedding_table_is_stored_once_and_exported_twice() {
    let mut parts = GgufParts::read("llama.gguf");
    let embedding = parts.tensor("token_embd.weight").data.clone();
    parts.tensor("output.weight").data = embedding;
    let (temp, file) = parts.write();
    let converted = temp.path().join("converted");
    let report = convert_plain(&file, &converted).expect("a sound file");
    assert!(report.config.decoder.tied_head);
    let exported = temp.path().join("exported");
    export(&converted, &exported, false, &mut |_| {}).expect("a sound model");
    let tensors = read_dir_tensors(&exported);
    assert_eq!(tensors["lm_head.weight"].bytes, tensors["model.embed_tokens.weight"].bytes);
    assert_eq!(weights(&exported), weights(&file));
}

#[test]
fn a_directory_with_one_gguf_file_is_that_file() {
    let (temp, file) = gguf_checkout("llama.gguf");
    assert_eq!(weights(temp.path()), weights(&file));
    // What lies beside it belongs to it.
    fs::write(temp.path().join("tokenizer.json"), "{}").expect("room");
    let output = tempfile::tempdir().expect("a temporary directory");
    convert(temp.path(), &output.path().join("one"), &ConvertOptions::default(), &mut |_| {}).expect("a sound file");
    convert(&file, &output.path().join("two"), &ConvertOptions::default(), &mut |_| {}).expect("a sound file");
    assert!(output.path().join("one/tokenizer.json").is_file());
    assert!(!output.path().join("two/tokenizer.json").exists());
}

#[test]
fn tokenizers_give_the_ids_of_transformers_and_of_sentencepiece() {
    let golden: serde_json::Value =
        serde_json::from_slice(&fs::read(gguf_fixture("tokenizers.json")).expect("a file")).expect("JSON");
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    for (kind, all) in golden["ids"].as_object().unwrap() {
        // The tokenizer of one file, the model of another.
        let mut parts = GgufParts::read("llama.gguf");
        let tokenizer = GgufParts::read(&format!("tokenizer_{kind}.gguf")).metadata;
        parts.metadata.extend(tokenizer.into_iter().filter(|(key, _)| key.starts_with("tokenizer.")));
        let (_temp, file) = parts.write();
        let source = ModelSource::open(&file).expect("a sound file");
        let tokenizer = TextTokenizer::from_bytes(source.tokenizer_json().expect("a known kind"), kind).unwrap();
        let mut compared = 0;
        for (text, ids) in texts.iter().zip(all.as_array().unwrap()) {
            let Some(ids) = ids.as_array() else { continue };
            let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{kind}: {text:?}");
            compared += 1;
        }
        assert!(compared >= texts.len() - 1, "{kind}");
        let text = "Hello world, naïve café 日本語 12";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text, "{kind}");
        // Converted, it lies beside a file that names its special tokens, and stays what it is.
        let output = tempfile::tempdir().expect("a temporary directory");
        convert_plain(&file, &output.path().join("out")).expect("a sound file");
        let converted = TextTokenizer::open(&output.path().join("out/tokenizer.json")).unwrap();
        let named = ["<s>a</s><unk>b<pad>", "<|endoftext|>a<|im_start|>"];
        for text in texts.iter().chain(&named) {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(converted.encode(text).unwrap(), ids, "{kind}: {text:?}");
            assert_eq!(converted.decode(&ids).unwrap(), tokenizer.decode(&ids).unwrap(), "{kind}: {text:?}");
        }
    }
}

#[test]
fn rotary_settings_are_those_of_the_configuration_they_stand_for() {
    let (short, long): (Vec<f32>, Vec<f32>) = (vec![1.0, 1.25, 1.5, 2.0, 2.5, 4.0], vec![1.0, 2.0, 4.0, 8.0, 9.0, 9.5]);
    let longrope =
        json!({"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": 1.125});
    type Change<'a> = &'a dyn Fn(&mut GgufParts);
    let cases: [(&str, Value, Change<'_>); 6] = [
        ("llama", json!({"rope_type": "linear", "factor": 2.5}), &|parts| {
            parts.set_text("llama.rope.scaling.type", "linear");
            parts.set_f32("llama.rope.scaling.factor", 2.5);
        }),
        // As it was written before scalings had names.
        ("llama", json!({"rope_type": "linear", "factor": 2.5}), &|parts| {
            parts.set_f32("llama.rope.scale_linear", 2.5)
        }),
        ("llama", json!({"rope_type": "default"}), &|parts| parts.set_text("llama.rope.scaling.type", "none")),
        (
            "qwen2",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24.0}),
            &|parts| {
                parts.set_text("qwen2.rope.scaling.type", "yarn");
                parts.set_f32("qwen2.rope.scaling.factor", 4.0);
                parts.set_u32("qwen2.rope.scaling.original_context_length", 16);
                parts.set_f32("qwen2.rope.scaling.yarn_beta_fast", 24.0);
            },
        ),
        ("phi3", longrope, &|parts| {
            parts.set_u32("phi3.rope.scaling.original_context_length", 32);
            parts.set_f32("phi3.rope.scaling.attn_factor", 1.125);
            parts.add_f32("rope_factors_long.weight", &long);
            parts.add_f32("rope_factors_short.weight", &short);
        }),
        ("phi3", json!({"rope_type": "default", "partial_rotary_factor": 0.5}), &|parts| {
            parts.set_u32("phi3.rope.dimension_count", 6);
        }),
    ];
    for (name, scaling, change) in cases {
        let mut parts = GgufParts::read(&format!("{name}.gguf"));
        change(&mut parts);
        let (_temp, file) = parts.write();
        let (_other, dir) = checkout(name, "config.json");
        common::edit_config(&dir, |config| {
            config["rope_parameters"] = scaling.clone();
            config["rope_parameters"]["rope_theta"] = json!(10000.0);
            if scaling["rope_type"] == "longrope" {
                config["original_max_position_embeddings"] = json!(32);
            }
        });
        let [found, expected] =
            [&file, &dir].map(|model| ModelSource::open(model).unwrap().model_config().decoder.clone());
        assert_eq!(found.positions, expected.positions, "{name}: {scaling}");
    }
}

/// Converts a file and exports it again as it was.
fn comes_back(file: &Path) -> std::path::PathBuf {
    let (converted, exported) = (file.with_file_name("converted"), file.with_file_name("exported"));
    convert_plain(file, &converted).expect("a sound file");
    assert!(keeps_gguf(&converted));
    let report = export_gguf(&converted, &exported, false, &mut |_| {}).expect("a sound model");
    assert!(report.is_original(), "{}", file.display());
    let name = file.file_name().expect("a name");
    assert!(fs::read(exported.join(name)).expect("a file") == fs::read(file).expect("a file"), "{}", file.display());
    assert_eq!(fs::read_dir(&exported).expect("a directory").count(), 1);
    converted
}

#[test]
fn a_conversion_gives_the_file_back_byte_for_byte_and_holds_its_large_tensors_once() {
    for name in ["llama", "gpt2", "qwen2", "qwen3", "phi3", "starcoder2", "gemma", "gemma2", "gemma3_text", "mixed"] {
        let (_temp, file) = gguf_checkout(&format!("{name}.gguf"));
        let converted = comes_back(&file);
        // Beside the rows of matrices there are norms, biases and the header.
        let matrices = GgufParts::read(&format!("{name}.gguf")).tensors;
        let held = |tensor: &&common::gguf::GgufTensor| tensor.axes.len() == 2 && !tensor.name.starts_with("position");
        let matrices: usize = matrices.iter().filter(held).map(|tensor| tensor.data.len()).sum();
        let [all, rest] =
            [&file, &converted.join("source_gguf.bin")].map(|path| fs::metadata(path).expect("a file").len() as usize);
        assert!(rest <= all - matrices + 32 * 100, "{name}: {rest} of {all}, {matrices} in matrices");
    }
}

#[test]
fn codes_of_every_format_come_back_byte_for_byte() {
    for (kind, format) in CODES {
        let mut parts = GgufParts::read("mixed.gguf");
        for (n, tensor) in parts.tensors.iter_mut().filter(|tensor| tensor.axes.len() == 2).enumerate() {
            tensor.kind = kind;
            tensor.data = sound_codes(format, tensor.axes.iter().product::<u64>() as usize, n as u64);
        }
        let (_temp, file) = parts.write();
        comes_back(&file);
    }
    // A head that is the embedding table again.
    let mut parts = GgufParts::read("llama.gguf");
    let embedding = parts.tensor("token_embd.weight").data.clone();
    parts.tensor("output.weight").data = embedding;
    let (_temp, file) = parts.write();
    comes_back(&file);
}

#[test]
fn a_model_that_is_no_more_what_the_file_was_gives_no_file_back() {
    let (temp, file) = gguf_checkout("mixed.gguf");
    let refused =
        |model: &Path| export_gguf(model, &temp.path().join("back"), false, &mut |_| {}).expect_err("no file");
    let cast = temp.path().join("cast");
    let options = ConvertOptions { weights: WeightsPolicy::F16, ..Default::default() };
    convert(&file, &cast, &options, &mut |_| {}).expect("sound");
    assert!(!keeps_gguf(&cast));
    assert!(matches!(refused(&cast), ConvertError::NoGguf { .. }));
    let (_other, dir) = checkout("llama", "config.json");
    convert_plain(&dir, &temp.path().join("other")).expect("sound");
    assert!(matches!(refused(&temp.path().join("other")), ConvertError::NoGguf { .. }));

    let converted = temp.path().join("converted");
    convert_plain(&file, &converted).expect("sound");
    let rest = converted.join("source_gguf.bin");
    let bytes = fs::read(&rest).expect("a file");
    // Cut, longer, and without its start.
    for changed in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat(), &bytes[1..], &[]] {
        fs::write(&rest, changed).expect("room");
        let error = refused(&converted);
        assert!(matches!(error, ConvertError::Gguf { .. }), "{error}");
    }
    // Another byte is another file.
    let mut changed = bytes.clone();
    *changed.last_mut().expect("bytes") ^= 1;
    fs::write(&rest, changed).expect("room");
    let report = export_gguf(&converted, &temp.path().join("changed"), false, &mut |_| {}).expect("sound");
    assert!(!report.is_original());
}
