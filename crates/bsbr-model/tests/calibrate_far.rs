//! Calibrating how much blocks count that are read by their means.

mod common;

use bsbr_attn::{BlockAttentionConfig, Far};
use bsbr_model::{Decoder, ModelError, calibrate_far};
use burn::tensor::Device;
use common::{devices, gpt2_like, llama_like, logits, retrieving, text};

/// Chunks of 64, and of what is behind them one key.
fn settings() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 0,
        sink_tokens: 2,
        max_keys: 1,
        exact_tokens: 0,
        ..Default::default()
    }
}

fn model(device: &Device) -> Decoder {
    retrieving(llama_like(), settings(), device)
}

/// The squared distance of what two decoders compute of a text.
fn distance(a: &Decoder, b: &Decoder, tokens: &[u32]) -> f64 {
    let (a, b) = (logits(a, tokens).concat(), logits(b, tokens).concat());
    a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn the_shifts_it_finds_bring_the_model_nearer_to_the_original_than_others() {
    for device in devices() {
        let model = model(&device);
        let mut heard = Vec::new();
        let calibration = calibrate_far(&model, &text(500, 1), 250, |done, total| heard.push((done, total))).unwrap();
        let layers = model.config().decoder.layers;
        assert_eq!(heard.len(), 2 * layers);
        assert_eq!(heard.last(), Some(&(2 * layers, 2 * layers)));
        assert_eq!(calibration.layers.len(), layers);
        for layer in &calibration.layers {
            let accepted = layer.after < 0.95 * layer.before;
            assert!(if layer.shift == 0.0 { layer.after == layer.before } else { accepted }, "{layer:?}");
        }
        // What was found for each layer is right for the whole model, on another text.
        let with = |shifts: Vec<f64>| model.with_config(|config| config.far_shifts = shifts).unwrap();
        let original = model.with_config(|config| config.attention = None).unwrap();
        let found: Vec<f64> = calibration.layers.iter().map(|layer| layer.shift).collect();
        let far_off = found.iter().map(|shift| shift + 3.0).collect();
        let tokens = text(250, 5);
        let (near, off) = (distance(&with(found), &original, &tokens), distance(&with(far_off), &original, &tokens));
        assert!(near < off, "{near} calibrated, {off} with masses 20 times that");
    }
}

#[test]
fn a_shift_belongs_to_its_layer() {
    let model = model(&devices()[0]);
    let mut shifts = vec![0.0; model.config().decoder.layers];
    shifts[1] = -2.0;
    let shifted = model.with_config(|config| config.far_shifts = shifts.clone()).unwrap();
    let all = model.with_config(|config| config.attention.as_mut().unwrap().far_shift = -2.0).unwrap();
    let tokens = text(200, 3);
    let [plain, one, every] = [&model, &shifted, &all].map(|model| logits(model, &tokens).concat());
    assert!(plain != one && one != every);
    shifts.pop();
    let error = model.with_config(|config| config.far_shifts = shifts).unwrap_err();
    assert!(error.to_string().contains("far_shifts"), "{error}");
    let error = model.with_config(|config| config.far_shifts = vec![f64::NAN; config.decoder.layers]).unwrap_err();
    assert!(error.to_string().contains("far_shift"), "{error}");
}

#[test]
fn without_a_far_part_or_enough_text_there_is_nothing_to_find() {
    let device = &devices()[0];
    let none = retrieving(gpt2_like(), BlockAttentionConfig { far: Far::None, ..settings() }, device);
    assert!(matches!(
        calibrate_far(&none, &text(500, 1), 250, |_, _| ()),
        Err(ModelError::Config { setting: "far", .. })
    ));
    let model = model(device);
    for (tokens, window) in [(499, 250), (500, 127)] {
        let error = calibrate_far(&model, &text(tokens, 1), window, |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("two windows of at least 128 tokens"), "{error}");
    }
}
