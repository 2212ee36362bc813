//! The decoder with converted weights gives the logits that transformers gives.

#![cfg(feature = "flex")]

mod common;

use std::path::{Path, PathBuf};

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_convert::{ConvertOptions, ModelSource, convert};
use bsbr_model::Decoder;
use burn::tensor::Device;
use common::{FIXTURES, checkout, fixtures, read_tensors};

const TOLERANCE: f32 = 1e-4;

/// Texts of a fixture and the logits of transformers for each, in f32.
fn expected(name: &str) -> Vec<(Vec<u32>, Vec<f32>)> {
    let tensors = read_tensors(&fixtures().join(name).join("expected.safetensors"));
    let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name).expect(name);
    let (ids, logits) = (find("input_ids"), find("logits"));
    let [texts, length] = ids.shape[..] else { panic!("{:?}", ids.shape) };
    let ids = ids.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")));
    let ids: Vec<u32> = ids.map(|id| id.try_into().expect("an id")).collect();
    let logits = logits.values();
    let width = logits.len() / texts;
    (0..texts)
        .map(|n| (ids[n * length..(n + 1) * length].to_vec(), logits[n * width..(n + 1) * width].to_vec()))
        .collect()
}

fn logits(mut source: ModelSource, text: &[u32]) -> Vec<f32> {
    let config = source.model_config().clone();
    let decoder = Decoder::load(config, &mut source, &Device::flex()).expect("a sound model");
    decoder.forward(text).expect("a sound text").into_data().try_to_vec().expect("f32")
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn convert_with(dir: &Path, attention: Option<BlockAttentionConfig>) -> PathBuf {
    let output = dir.with_file_name("converted");
    convert(dir, &output, &ConvertOptions { attention, ..Default::default() }, &mut |_| {}).expect("sound");
    output
}

#[test]
fn every_fixture_gives_the_logits_of_transformers_from_the_checkpoint_and_from_its_conversion() {
    let mut compared = 0;
    for (name, config) in FIXTURES {
        if !fixtures().join(name).join("expected.safetensors").is_file() {
            continue;
        }
        let (_temp, dir) = checkout(name, config);
        let converted = convert_with(&dir, None);
        for (text, expected) in expected(name) {
            for source in [&dir, &converted] {
                let found = logits(ModelSource::open(source).expect("sound"), &text);
                let difference = difference(&found, &expected);
                assert!(difference <= TOLERANCE, "{name} {config}: {difference}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 2 * 8);
}

#[test]
fn a_text_shorter_than_a_chunk_gives_the_same_logits_under_every_retrieval() {
    for name in ["gpt2", "gpt_bigcode_mqa", "llama"] {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            for selector in [Selector::MeanKey, Selector::Meta] {
                let (_temp, dir) = checkout(name, "config.json");
                let attention = BlockAttentionConfig { retrieval, selector, ..Default::default() };
                let converted = convert_with(&dir, Some(attention));
                for (text, expected) in expected(name) {
                    let source = ModelSource::open(&converted).expect("sound");
                    let difference = difference(&logits(source, &text), &expected);
                    assert!(difference <= TOLERANCE, "{name} {retrieval:?} {selector:?}: {difference}");
                }
            }
        }
    }
}

#[test]
fn a_wrong_order_of_the_fused_projection_would_not_pass() {
    // The same shapes as per-head interleaving: only the logits tell.
    let (_temp, dir) = checkout("gpt_bigcode_mha", "config.json");
    common::edit_config(&dir, |config| {
        config["model_type"] = "gpt2".into();
    });
    common::edit_tensors(&dir, |tensors| {
        // Into the layout of GPT-2, so that only the order of the fused rows differs.
        for tensor in tensors.iter_mut().filter(|t| t.name.contains(".c_") && t.shape.len() == 2) {
            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
            let values = tensor.values();
            let transposed = (0..rows * cols).map(|n| values[n % rows * cols + n / rows]);
            *tensor = common::Tensor::f32(&tensor.name.clone(), &[cols, rows], transposed);
        }
    });
    let (text, expected) = expected("gpt_bigcode_mha").swap_remove(0);
    let difference = difference(&logits(ModelSource::open(&dir).expect("sound"), &text), &expected);
    assert!(difference > 0.1, "{difference}");
}
