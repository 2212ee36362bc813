//! Calibrating the compression of states: what of them is left.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use bsbr_model::{Decoder, ModelError, StateCalibrationConfig, calibrate_states, weight_specs};
use burn::module::Param;
use common::{devices, gpt2_like, llama_like, logits, retrieving, text};

const WINDOWS: StateCalibrationConfig = StateCalibrationConfig { window: 128, windows: 4 };

/// Chunks of 8, blocks of 4.
fn state(compression_factor: usize) -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        local_chunks: 0,
        sink_tokens: 2,
        retrieval: Retrieval::State,
        compression_factor,
        ..Default::default()
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn leading_directions_lose_less_than_the_last_ones() {
    for decoder in [gpt2_like(), llama_like()] {
        let model = retrieving(decoder, state(2), &devices()[0]);
        let calibration = calibrate_states(&model, &text(512, 1), WINDOWS, |_, _| ()).unwrap();
        let calibrated = calibration.apply(&model).unwrap();
        let tokens = text(100, 2);
        let with_factor = |model: &Decoder, factor: usize| {
            let changed = model.with_config(|config| {
                config.attention.as_mut().unwrap().compression_factor = factor;
            });
            logits(&changed.unwrap(), &tokens).concat()
        };
        let exact = with_factor(&model, 1);
        // A basis changes nothing where nothing is compressed.
        assert_eq!(with_factor(&calibrated, 1), exact);
        let leading = distance(&with_factor(&calibrated, 2), &exact);
        // The same basis the other way round keeps what it should drop.
        let mut reversed = calibrated.clone();
        for block in &mut reversed.blocks {
            let basis = block.attention.state_basis.take().unwrap().val();
            block.attention.state_basis = Some(Param::from_tensor(basis.flip([2])));
        }
        let last = distance(&with_factor(&reversed, 2), &exact);
        assert!(leading > 0.0 && 1.2 * leading < last, "{leading} by the leading directions, {last} by the last");
    }
}

#[test]
fn bases_are_orthonormal_and_are_weights_of_the_model() {
    let model = retrieving(llama_like(), state(4), &devices()[0]);
    let mut heard = Vec::new();
    let calibration =
        calibrate_states(&model, &text(512, 3), WINDOWS, |done, total| heard.push((done, total))).unwrap();
    assert_eq!(heard, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    let config = calibration.configured(model.config());
    let specs = weight_specs(&config);
    let weights = calibration.weights();
    assert_eq!(weights.len(), config.decoder.layers);
    let width = config.decoder.head_dim;
    for (name, numbers) in weights {
        let spec = specs.iter().find(|spec| spec.name == name).expect("a weight of the model");
        assert!(spec.extra && spec.shape.iter().product::<usize>() == numbers.len(), "{name}");
        for basis in numbers.chunks(width * width) {
            for (a, b) in (0..width).flat_map(|a| (0..width).map(move |b| (a, b))) {
                let product: f64 =
                    (0..width).map(|row| f64::from(basis[row * width + a]) * f64::from(basis[row * width + b])).sum();
                assert!((product - f64::from(u8::from(a == b))).abs() < 1e-5, "{name}: columns {a} and {b}");
            }
        }
    }
    for layer in &calibration.layers {
        assert!(layer.held_by_a_quarter > 0.25 && layer.held_by_a_quarter <= 1.0, "{layer:?}");
    }
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let device = &devices()[0];
    let blocks = BlockAttentionConfig { retrieval: Retrieval::Blocks, chunk_size: 64, ..state(1) };
    let blocks = retrieving(llama_like(), blocks, device);
    let error = calibrate_states(&blocks, &text(512, 1), WINDOWS, |_, _| ()).unwrap_err();
    assert!(matches!(&error, ModelError::Config { setting: "retrieval", .. }), "{error}");
    let model = retrieving(llama_like(), state(1), device);
    for (tokens, window) in [(100, 128), (512, 15)] {
        let config = StateCalibrationConfig { window, windows: 2 };
        let error = calibrate_states(&model, &text(tokens, 1), config, |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("two chunks of 8 tokens") && error.contains(&tokens.to_string()), "{error}");
    }
    let error = model.with_config(|config| config.attention.as_mut().unwrap().calibrated_states = true).unwrap_err();
    assert!(error.to_string().contains("calibrate the model"), "{error}");
}
