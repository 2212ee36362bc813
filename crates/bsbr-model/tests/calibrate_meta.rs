//! Calibrating meta projections: what is read with them afterwards.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_model::{Decoder, DecoderConfig, MetaCalibrationConfig, ModelError, Norm, calibrate_meta, weight_specs};
use common::{
    alibi, devices, gemma_like, gpt2_like, llama_like, logits, multi_query, retrieving, rotary, sandwich, text, weight,
};

/// Chunks of 8, blocks of 4.
fn meta(retrieval: Retrieval) -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        local_chunks: 1,
        sink_tokens: 2,
        meta_blocks: 4,
        exact_tokens: 0,
        selector: Selector::Meta,
        retrieval,
        ..Default::default()
    }
}

const WINDOWS: MetaCalibrationConfig = MetaCalibrationConfig { window: 128, windows: 8 };

fn model(decoder: DecoderConfig, retrieval: Retrieval) -> Decoder {
    retrieving(decoder, meta(retrieval), &devices()[0])
}

#[test]
fn calibrated_projections_read_text_they_never_saw_better_and_replace_only_worse_ones() {
    for retrieval in [Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
        for decoder in [gpt2_like(), llama_like(), gemma_like(), sandwich(), alibi()] {
            let model = model(decoder.clone(), retrieval);
            let (mut before, mut after) = (0.0, 0.0);
            let calibration = calibrate_meta(&model, &text(1024, 1), WINDOWS, |_, _| ()).unwrap();
            assert_eq!((calibration.windows, calibration.held_out), (6, 2));
            let calibrated = calibration.apply(&model).unwrap();
            // The "start values" of a second calibration are the result of the first, measured on another text.
            let other = text(1024, 2);
            let fresh = calibrate_meta(&model, &other, WINDOWS, |_, _| ()).unwrap();
            let again = calibrate_meta(&calibrated, &other, WINDOWS, |_, _| ()).unwrap();
            for ((first, fresh), again) in calibration.layers.iter().zip(&fresh.layers).zip(&again.layers) {
                assert_eq!(first.accepted, first.after > first.before);
                before += fresh.before;
                after += again.before;
            }
            assert!(after > before + 0.02, "{retrieval:?} {:?}: {before} became {after}", decoder.positions);
        }
    }
}

#[test]
fn chunks_and_blocks_of_one_token_find_the_projections_of_queries_and_keys() {
    for decoder in [gpt2_like(), llama_like(), multi_query()] {
        // What LayerNorm gives lies in a hyperplane: no text determines weights across it.
        let decoder = DecoderConfig { layers: 1, norm: Norm::Rms, ..decoder };
        let attention =
            BlockAttentionConfig { chunk_size: 1, block_size: 1, sink_tokens: 0, ..meta(Retrieval::Blocks) };
        let model = retrieving(decoder.clone(), attention, &devices()[0]);
        let calibration = calibrate_meta(&model, &text(1024, 7), WINDOWS, |_, _| ()).unwrap();
        assert!(calibration.layers[0].accepted);
        let found = calibration.weights().unwrap();
        let specs = weight_specs(model.config());
        let planted = |name: &str| weight(specs.iter().find(|spec| spec.name == name).expect("a weight"));
        for (meta, part, heads) in [("meta_query", "query", decoder.heads), ("meta_key", "key", decoder.kv_heads)] {
            let (_, found) = found.iter().find(|(name, _)| name.contains(&format!("{meta}.weight"))).expect("a weight");
            let rows = planted(&format!("layers.0.attention.{part}.weight"));
            let size = decoder.head_dim * decoder.hidden_size;
            let shared = decoder.heads / heads;
            let planted: Vec<f32> =
                (0..decoder.heads).flat_map(|head| rows[head / shared * size..][..size].to_vec()).collect();
            let cosine = cosine(found, &planted);
            assert!(cosine > 0.99, "{meta} of {:?}: {cosine}", decoder.positions);
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn the_same_text_gives_the_same_numbers_and_the_original_is_left_alone() {
    let model = model(llama_like(), Retrieval::Blocks);
    let tokens = text(1024, 3);
    let mut heard = Vec::new();
    let first = calibrate_meta(&model, &tokens, WINDOWS, |done, total| heard.push((done, total))).unwrap();
    let second = calibrate_meta(&model, &tokens, WINDOWS, |_, _| ()).unwrap();
    assert_eq!(heard, (1..=8).map(|done| (done, 8)).collect::<Vec<_>>());
    assert_eq!(first.layers, second.layers);
    let weights = first.weights().unwrap();
    assert_eq!(weights, second.weights().unwrap());
    let specs = weight_specs(model.config());
    for (name, numbers) in &weights {
        let spec = specs.iter().find(|spec| spec.name == *name).expect("a weight of the model");
        assert!(spec.extra && spec.shape.iter().product::<usize>() == numbers.len(), "{name}");
    }
    let calibrated = first.apply(&model).unwrap();
    let full = |model: &Decoder| logits(&model.with_config(|config| config.attention = None).unwrap(), &tokens[..50]);
    assert_eq!(full(&calibrated), full(&model));
    assert!(logits(&calibrated, &tokens[..120]) != logits(&model, &tokens[..120]));
}

#[test]
fn only_layers_with_meta_projections_are_calibrated() {
    let model = model(llama_like(), Retrieval::Blocks).with_config(|config| config.original_layers = vec![0]).unwrap();
    let calibration = calibrate_meta(&model, &text(512, 4), WINDOWS, |_, _| ()).unwrap();
    assert_eq!(calibration.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1]);
}

#[test]
fn what_cannot_be_calibrated_is_refused_with_a_reason() {
    let model = model(gpt2_like(), Retrieval::Blocks);
    let tokens = text(1024, 5);
    let refused = |model: &Decoder, length: usize, window: usize, windows: usize| {
        let config = MetaCalibrationConfig { window, windows };
        calibrate_meta(model, &tokens[..length], config, |_, _| ()).unwrap_err()
    };
    let by_index = model
        .with_config(|config| {
            let index = BlockAttentionConfig { selector: Selector::Index, chunk_size: 64, ..meta(Retrieval::Blocks) };
            config.attention = Some(index);
        })
        .unwrap();
    assert!(matches!(refused(&by_index, 1024, 128, 8), ModelError::Config { setting: "selector", .. }));
    for (length, window, windows, words) in [
        (1024, 32, 8, "leaves no block to choose"),
        (1024, 0, 8, "leaves no block to choose"),
        (1024, 128, 1, "at least 2"),
        (200, 128, 8, "two windows need 256"),
    ] {
        let problem = refused(&model, length, window, windows).to_string();
        assert!(problem.contains(words), "{problem}");
    }
    assert!(matches!(refused(&model, 1024, 512, 2), ModelError::TooLong { length: 512, max_positions: 256 }));
}

#[test]
fn a_window_too_short_for_the_settings_names_the_length_that_is_enough() {
    let decoder = DecoderConfig { norm: Norm::Rms, positions: rotary(8), ..gpt2_like() };
    let model = model(decoder, Retrieval::Blocks);
    let tokens = text(512, 6);
    let run = |window: usize| calibrate_meta(&model, &tokens, MetaCalibrationConfig { window, windows: 2 }, |_, _| ());
    let problem = run(20).unwrap_err().to_string();
    let least: usize = problem.split(" are needed").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(run(least - 1).is_err());
    let layers = run(least).unwrap().layers;
    assert!(layers.iter().all(|layer| layer.before > 0.0), "{layers:?}");
}
