//! The decoder with converted weights gives the logits that transformers gives.

#![cfg(feature = "flex")]

mod common;

use std::path::{Path, PathBuf};

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_convert::{ConvertOptions, ExpectedLogits, ModelSource, convert};
use bsbr_model::{Decoder, compare_logits};
use burn::tensor::Device;
use common::{BOTH_STYLES, NEWER_STYLE, PYTORCH, all_fixtures, checkout, fixtures};

const TOLERANCE: f64 = 1e-4;

/// Largest difference between the logits of a model and those transformers computes for the fixture `name`.
fn difference(dir: &Path, name: &str) -> f64 {
    let expected = ExpectedLogits::open(&fixtures().join(name).join("expected.safetensors")).expect("a sound file");
    let mut source = ModelSource::open(dir).expect("a sound model");
    let config = source.model_config().clone();
    let decoder = Decoder::load(config, &mut source, &Device::flex()).expect("sound weights");
    compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts").max
}

fn convert_with(dir: &Path, attention: Option<BlockAttentionConfig>) -> PathBuf {
    let output = dir.with_file_name("converted");
    convert(dir, &output, &ConvertOptions { attention, ..Default::default() }, &mut |_| {}).expect("sound");
    output
}

#[test]
fn every_fixture_gives_the_logits_of_transformers_from_the_checkpoint_and_from_its_conversion() {
    for (name, config) in all_fixtures() {
        let (_temp, dir) = checkout(name, config);
        let converted = convert_with(&dir, None);
        for source in [&dir, &converted] {
            let difference = difference(source, name);
            assert!(difference <= TOLERANCE, "{name} {config}: {difference}");
        }
    }
}

#[test]
fn pytorch_files_give_the_logits_of_transformers_from_the_checkpoint_and_from_its_conversion() {
    for name in PYTORCH {
        let (_temp, dir) = checkout(name, "config.json");
        let meta = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
        let converted = convert_with(&dir, Some(meta));
        for source in [&dir, &converted] {
            let difference = difference(source, "gpt2");
            assert!(difference <= TOLERANCE, "{name}: {difference}");
        }
    }
}

#[test]
fn a_text_shorter_than_a_chunk_gives_the_same_logits_under_every_retrieval() {
    for name in BOTH_STYLES.into_iter().chain(NEWER_STYLE) {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            for selector in [Selector::MeanKey, Selector::Meta] {
                let (_temp, dir) = checkout(name, "config.json");
                let attention = BlockAttentionConfig { retrieval, selector, ..Default::default() };
                let difference = difference(&convert_with(&dir, Some(attention)), name);
                assert!(difference <= TOLERANCE, "{name} {retrieval:?} {selector:?}: {difference}");
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
    let difference = difference(&dir, "gpt_bigcode_mha");
    assert!(difference > 0.1, "{difference}");
}
