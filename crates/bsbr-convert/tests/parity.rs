//! The decoder with converted weights gives the logits that transformers gives.

#![cfg(feature = "flex")]

mod common;

use std::path::{Path, PathBuf};

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_convert::{ConvertOptions, ExpectedLogits, ModelSource, convert};
use bsbr_model::{Decoder, compare_logits};
use burn::tensor::{DType, Device};
use common::{BOTH_STYLES, LATENT, NEWER_STYLE, OF_CODES, PYTORCH, VARIANTS, all_fixtures, checkout, fixtures};

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
fn a_narrow_cache_costs_its_rounding_of_keys_and_values() {
    for name in ["gpt2", "llama", "gemma2"] {
        let (_temp, dir) = checkout(name, "config.json");
        let expected = ExpectedLogits::open(&fixtures().join(name).join("expected.safetensors")).expect("a sound file");
        let mut source = ModelSource::open(&convert_with(&dir, None)).expect("a sound model");
        let config = source.model_config().clone();
        let decoder = Decoder::load(config, &mut source, &Device::flex()).expect("sound weights");
        let largest = expected.logits.iter().flatten().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        let difference = |stored| {
            let decoder = decoder.clone().with_cache_type(stored);
            compare_logits(&decoder, &expected.tokens, &expected.logits).expect("sound texts").max / f64::from(largest)
        };
        // Rounding to 8 bits is 8 times as coarse as rounding to 11, and what comes of it is nearly proportional.
        let (half, brain) = (difference(DType::F16), difference(DType::BF16));
        assert!((2.0_f64.powi(-18)..2.0_f64.powi(-9)).contains(&half), "{name}: {half}");
        assert!((4.0..16.0).contains(&(brain / half)), "{name}: {brain} after {half}");
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
    for name in BOTH_STYLES.into_iter().chain(NEWER_STYLE).chain(OF_CODES).chain(VARIANTS) {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            for selector in [Selector::Index, Selector::Meta] {
                if selector == Selector::Meta && LATENT.contains(&name) {
                    continue;
                }
                let (_temp, dir) = checkout(name, "config.json");
                let attention = BlockAttentionConfig { retrieval, selector, ..Default::default() };
                let difference = difference(&convert_with(&dir, Some(attention)), name);
                assert!(difference <= TOLERANCE, "{name} {retrieval:?} {selector:?}: {difference}");
            }
        }
    }
}
