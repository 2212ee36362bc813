//! Calibrating what an index retrieves: within the target, and no dearer than it must be.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use bsbr_model::{
    Decoder, EvaluateConfig, IndexCalibration, IndexCalibrationConfig, ModelError, calibrate_index, evaluate,
};
use common::{devices, gpt2_like, llama_like, retrieving, text};

const WINDOW: usize = 250;

fn settings() -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 64, local_chunks: 0, exact_tokens: 0, ..Default::default() }
}

fn model() -> Decoder {
    retrieving(llama_like(), settings(), &devices()[0])
}

fn calibrate(model: &Decoder, target_kl: f64) -> IndexCalibration {
    let config = IndexCalibrationConfig { target_kl, window: WINDOW, windows: 3 };
    let mut heard = Vec::new();
    let found = calibrate_index(model, &text(3 * WINDOW, 1), config, |done, most| heard.push((done, most))).unwrap();
    assert!(heard.iter().enumerate().all(|(at, &(done, most))| done == at + 1 && done <= most), "{heard:?}");
    found
}

#[test]
fn what_is_found_is_within_the_target_as_an_evaluation_measures_it() {
    let model = model();
    for target in [0.003, 0.03] {
        let found = calibrate(&model, target);
        assert_eq!((found.windows, found.held_out, found.target_kl), (2, 1, target));
        assert!(found.met && found.held_out_kl <= target && found.found.kl <= target, "{found:?}");
        let config = found.configured(model.config());
        let calibrated = model.with_config(|own| own.clone_from(&config)).unwrap();
        let original = model.with_config(|config| config.attention = None).unwrap();
        let held_out = &text(3 * WINDOW, 1)[2 * WINDOW..];
        let measure = EvaluateConfig { window: WINDOW, windows: 1, skip: 64 };
        let report = evaluate(&original, &[("calibrated", &calibrated)], held_out, measure, |_, _| ()).unwrap();
        let kl = report.variants[0].agreement.kl;
        assert!((kl - found.held_out_kl).abs() < 1e-9, "{kl} instead of {}", found.held_out_kl);
    }
}

#[test]
fn a_looser_target_is_cheaper_and_every_cheaper_trial_misses_it() {
    let model = model();
    let [strict, loose] = [0.001, 0.05].map(|target| calibrate(&model, target));
    assert!(loose.found.cost < strict.found.cost, "{loose:?} {strict:?}");
    for found in [&strict, &loose] {
        let cheaper = found.trials.iter().filter(|trial| trial.cost < found.found.cost);
        for trial in cheaper {
            assert!(trial.kl > found.target_kl, "{trial:?} serves, and costs less than {:?}", found.found);
        }
        assert!(found.trials.len() <= 24, "{} trials", found.trials.len());
    }
}

#[test]
fn thresholds_of_layers_are_taken_only_where_they_save_something_and_serve() {
    let model = model();
    let found = calibrate(&model, 0.01);
    let config = found.configured(model.config());
    if found.threshold_factors.is_empty() {
        assert!(config.threshold_factors.is_empty());
    } else {
        assert_eq!(found.threshold_factors.len(), 2);
        let own = config.calibrated_attention(1).unwrap().threshold;
        assert_eq!(own, found.found.settings.threshold * found.threshold_factors[1]);
    }
    let attention = config.attention.unwrap();
    assert_eq!(
        (attention.threshold, attention.max_keys),
        (found.found.settings.threshold, found.found.settings.max_keys)
    );
    assert_eq!(attention.index_channels, Some(found.found.settings.index_channels));
}

#[test]
fn a_target_that_nothing_meets_is_said_to_be_missed() {
    // Of the sections far back only one is opened, whatever passes in the others, and there is no far part for the rest.
    let dropped = BlockAttentionConfig { far: bsbr_attn::Far::None, fine_tokens: 64, max_sections: 1, ..settings() };
    let model = retrieving(llama_like(), dropped, &devices()[0]);
    let found = calibrate(&model, 1e-12);
    assert!(!found.met && found.found.kl > 1e-12, "{found:?}");
    let nearest = found.trials.iter().map(|trial| trial.kl).fold(f64::INFINITY, f64::min);
    assert!(found.found.kl <= nearest * 1.5 + 1e-9, "{found:?}");
}

#[test]
fn a_factor_belongs_to_its_layer() {
    let model = model();
    let with = |factors: Vec<f64>| model.with_config(|config| config.threshold_factors = factors);
    let changed = with(vec![1.0, 4.0]).unwrap();
    let threshold = |layer| changed.config().calibrated_attention(layer).unwrap().threshold;
    assert_eq!([threshold(0), threshold(1)], [1.0 / 2048.0, 4.0 / 2048.0]);
    for bad in [vec![1.0], vec![1.0, 0.0], vec![1.0, f64::NAN], vec![1.0, -2.0]] {
        let error = with(bad).unwrap_err();
        assert!(matches!(error, ModelError::Config { setting: "threshold_factors", .. }), "{error}");
    }
    assert!(with(vec![1.0, 2048.0]).unwrap_err().to_string().contains("threshold"));
}

#[test]
fn without_an_index_a_target_or_enough_text_there_is_nothing_to_search() {
    let refused = |model: &Decoder, tokens: usize, target_kl: f64, window: usize, windows: usize| {
        let config = IndexCalibrationConfig { target_kl, window, windows };
        calibrate_index(model, &text(tokens, 1), config, |_, _| panic!("a trial ran")).unwrap_err()
    };
    let none = retrieving(gpt2_like(), settings().with_retrieval(Retrieval::None), &devices()[0]);
    assert!(matches!(refused(&none, 500, 0.1, 250, 2), ModelError::Config { setting: "selector", .. }));
    let model = model();
    for target in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(refused(&model, 500, target, 250, 2), ModelError::Config { setting: "target_kl", .. }));
    }
    for (tokens, window, windows) in [(499, 250, 2), (500, 127, 2), (500, 250, 1), (500, 0, 2)] {
        let error = refused(&model, tokens, 0.1, window, windows).to_string();
        assert!(error.contains("two windows of at least 128 tokens"), "{error}");
    }
    let short = retrieving(gpt2_like(), settings(), &devices()[0]);
    assert!(matches!(refused(&short, 600, 0.1, 257, 2), ModelError::TooLong { length: 257, max_positions: 256 }));
}
