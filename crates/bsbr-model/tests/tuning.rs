//! Tuning: what it does to losses, what it leaves alone, and that it can be interrupted.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_model::{
    AdapterConfig, AdapterTarget, Checkpoint, Decoder, Ending, LayerLoss, ModelConfig, ModelError, Stage,
    StateCalibrationConfig, TuneConfig, TuneEvent, Tuned, calibrate_states, tune,
};
use burn::{module::Param, nn::Linear, tensor::Device};
use common::{difference, gemma_like, gpt2_like, llama_like, load, logits, text};
use serde_json::json;

const ALL: [AdapterTarget; 4] = AdapterTarget::ALL;

/// Small chunks, so that a short text has a far part; bounded states, the kind that loses most.
fn states() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 4,
        block_size: 2,
        local_chunks: 1,
        sink_tokens: 1,
        retrieval: Retrieval::State,
        max_chunks: Some(3),
        ..Default::default()
    }
}

/// Constant memory as it is used: some tokens kept, the rest in compressed states along a basis of their own.
fn kept() -> BlockAttentionConfig {
    BlockAttentionConfig {
        kept_tokens: 5,
        max_chunks: Some(2),
        compression_factor: 2,
        calibrated_states: true,
        ..states()
    }
}

fn meta() -> BlockAttentionConfig {
    BlockAttentionConfig {
        retrieval: Retrieval::Blocks,
        selector: Selector::Meta,
        meta_blocks: 1,
        exact_tokens: 0,
        max_chunks: None,
        ..states()
    }
}

fn adapters() -> Option<AdapterConfig> {
    Some(AdapterConfig { rank: 2, alpha: 4.0, targets: ALL.to_vec() })
}

fn settings() -> TuneConfig {
    TuneConfig {
        window: 32,
        steps: 12,
        logits_window: 32,
        learning_rate: 3e-2,
        logits_learning_rate: 1e-2,
        adapters: adapters(),
        held_out: 1,
        evaluate_every: 4,
        ..Default::default()
    }
}

fn converted(attention: BlockAttentionConfig) -> Decoder {
    load(ModelConfig { attention: Some(attention), ..ModelConfig::original(llama_like()) }, &Device::flex())
}

fn run(decoder: &Decoder, settings: &TuneConfig) -> Tuned {
    tune(decoder, &text(160, 7), settings, &[Device::flex()], None, &mut |_| true).unwrap()
}

/// Every trained number.
fn numbers(decoder: &Decoder) -> Vec<Vec<f32>> {
    decoder.extra_weights().unwrap().into_iter().map(|(_, numbers)| numbers).collect()
}

/// The second factor of each adapter: 0 until it is trained.
fn decoder_ups(decoder: &Decoder) -> Vec<Vec<f32>> {
    let weights = decoder.extra_weights().unwrap().into_iter();
    weights.filter(|(name, _)| name.ends_with("adapter_up")).map(|(_, numbers)| numbers).collect()
}

#[test]
fn the_loss_of_every_layer_falls_whatever_the_kind_of_retrieval() {
    let none = BlockAttentionConfig { retrieval: Retrieval::None, max_chunks: None, ..states() };
    let blocks =
        BlockAttentionConfig { selector: Selector::Index, chunk_size: 64, local_chunks: 0, max_keys: 3, ..meta() };
    let additive = BlockAttentionConfig { retrieval: Retrieval::Additive, max_chunks: None, ..states() };
    for attention in [states(), kept(), none, blocks, additive, meta()] {
        for loss in [LayerLoss::All, LayerLoss::Far] {
            // One window, over and over: what a few steps can learn for sure.
            let window = if attention.uses_index() { 160 } else { 32 };
            let settings = TuneConfig { window, layer_loss: loss, held_out: 0, steps: 20, ..settings() };
            let tokens = text(window, 7);
            let decoder = converted(attention.clone());
            let tuned = tune(&decoder, &tokens, &settings, &[Device::flex()], None, &mut |_| true).unwrap();
            let losses: Vec<f64> = tuned.log.steps.iter().map(|record| record.loss).collect();
            assert!(losses[19] < 0.9 * losses[0], "{attention:?} {loss:?}: {losses:?}");
        }
    }
}

#[test]
fn the_divergence_of_the_logits_falls() {
    let log_softmax = |row: &Vec<f32>| {
        let highest = row.iter().copied().fold(f32::MIN, f32::max);
        let mass: f64 = row.iter().map(|&x| f64::from(x - highest).exp()).sum();
        row.iter().map(|&x| f64::from(x - highest) - mass.ln()).collect::<Vec<f64>>()
    };
    for attention in [states(), kept(), meta()] {
        let settings = TuneConfig { steps: 0, logits_steps: 20, held_out: 0, ..settings() };
        let (decoder, tokens) = (converted(attention), text(32, 7));
        let tuned = tune(&decoder, &tokens, &settings, &[Device::flex()], None, &mut |_| true).unwrap();
        let losses: Vec<f64> = tuned.log.steps.iter().map(|record| record.loss).collect();
        assert!(losses[19] < 0.7 * losses[0], "{losses:?}");

        // The loss of the first step is the divergence of the untuned model, from the logits themselves.
        let original = decoder.with_config(|config| config.attention = None).unwrap();
        let rows = |decoder: &Decoder| logits(decoder, &tokens).iter().map(log_softmax).collect::<Vec<_>>();
        let pairs = rows(&original).into_iter().zip(rows(&decoder));
        let divergence: f64 =
            pairs.flat_map(|(p, q)| p.into_iter().zip(q)).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / 32.0;
        assert!((losses[0] - divergence).abs() < 1e-5 * (1.0 + divergence), "{} and {divergence}", losses[0]);
    }
}

#[test]
fn bases_that_drop_what_matters_turn_towards_what_calibration_finds() {
    let attention = BlockAttentionConfig { compression_factor: 2, ..states() };
    let (decoder, tokens) = (converted(attention), text(64, 7));
    let calibration = StateCalibrationConfig { window: 64, windows: 1 };
    let calibrated = calibrate_states(&decoder, &tokens, calibration, |_, _| {}).unwrap().apply(&decoder).unwrap();
    // The same basis the other way round keeps what it should drop.
    let mut wrong = calibrated.clone();
    for block in &mut wrong.blocks {
        let basis = block.attention.state_basis.take().unwrap().val();
        block.attention.state_basis = Some(Param::from_tensor(basis.flip([2])));
    }
    let settings = TuneConfig { window: 64, adapters: None, held_out: 0, steps: 60, ..settings() };
    let train = |decoder: &Decoder, settings: &TuneConfig| {
        tune(decoder, &tokens, settings, &[Device::flex()], None, &mut |_| true).unwrap()
    };
    let first = |decoder: &Decoder| train(decoder, &TuneConfig { steps: 1, ..settings.clone() }).log.steps[0].loss;
    let right = first(&calibrated);
    let tuned = train(&wrong, &settings);
    let (before, after) = (tuned.log.steps[0].loss, tuned.log.steps[59].loss);
    assert!(right < before, "{right} by the calibrated bases, {before} by the wrong ones");
    assert!(after < right + 0.25 * (before - right), "{before} became {after}, calibration gives {right}");

    let width = decoder.config().decoder.head_dim;
    for basis in numbers(&tuned.decoder).iter().flat_map(|bases| bases.chunks_exact(width * width)) {
        let column = |at: usize| (0..width).map(move |row| f64::from(basis[row * width + at]));
        for (a, b) in (0..width).flat_map(|a| (0..width).map(move |b| (a, b))) {
            let product: f64 = column(a).zip(column(b)).map(|(x, y)| x * y).sum();
            assert!((product - f64::from(u8::from(a == b))).abs() < 1e-5, "columns {a} and {b}: {product}");
        }
    }
}

#[test]
fn gates_of_heads_change_nothing_at_first_and_find_what_the_original_needs() {
    let additive = BlockAttentionConfig { retrieval: Retrieval::Additive, max_chunks: None, ..states() };
    for attention in [states(), kept(), additive] {
        let (decoder, tokens) =
            (converted(BlockAttentionConfig { calibrated_states: false, ..attention }), text(64, 7));
        let settings = TuneConfig { window: 64, adapters: None, gates: true, held_out: 0, steps: 80, ..settings() };
        let train = |settings: &TuneConfig, go: bool| {
            tune(&decoder, &tokens, settings, &[Device::flex()], None, &mut |_| go).unwrap()
        };
        let untouched = train(&TuneConfig { held_out: 1, window: 32, ..settings.clone() }, false).decoder;
        assert!(untouched.config().attention.as_ref().unwrap().head_gates);
        assert!(difference(&logits(&untouched, &tokens), &logits(&decoder, &tokens)) < 1e-5);

        let tuned = train(&settings, true);
        let losses: Vec<f64> = tuned.log.steps.iter().map(|record| record.loss).collect();
        assert!(losses[79] < losses[0], "{losses:?}");
        let gates = numbers(&tuned.decoder);
        assert_eq!(gates.len(), decoder.config().decoder.layers);
        for gates in gates {
            assert_eq!(gates.len(), decoder.config().decoder.heads);
            assert!(gates.iter().any(|gate| (gate - gates[0]).abs() > 1e-4), "every head has its own: {gates:?}");
        }
        let original = |decoder: &Decoder| logits(&decoder.with_config(|c| c.attention = None).unwrap(), &tokens);
        assert_eq!(original(&tuned.decoder), original(&decoder));
    }
}

#[test]
fn adapters_change_nothing_before_the_first_step() {
    for family in [llama_like(), gpt2_like(), gemma_like()] {
        let config = ModelConfig { attention: Some(states()), ..ModelConfig::original(family) };
        let decoder = load(config, &Device::flex());
        let tuned = tune(&decoder, &text(64, 1), &settings(), &[Device::flex()], None, &mut |_| false).unwrap();
        assert_eq!(tuned.log.ending, Some(Ending::Asked));
        assert!(tuned.log.steps.is_empty());
        assert_eq!(tuned.decoder.config().adapters, adapters());
        let tokens = text(48, 2);
        assert_eq!(logits(&tuned.decoder, &tokens), logits(&decoder, &tokens));
    }
}

#[test]
fn where_nothing_is_far_there_is_no_loss_and_no_gradient() {
    let exact = BlockAttentionConfig { chunk_size: 32, local_chunks: 1, ..states() };
    let settings = TuneConfig { steps: 3, held_out: 0, weight_decay: 0.0, ..settings() };
    let decoder = converted(exact);
    let tuned = run(&decoder, &settings);
    for record in &tuned.log.steps {
        assert!(record.loss < 1e-9, "{record:?}");
    }
    let tokens = text(60, 2);
    assert_eq!(logits(&tuned.decoder, &tokens), logits(&decoder, &tokens));
    for numbers in decoder_ups(&tuned.decoder) {
        assert!(numbers.iter().all(|&number| number == 0.0));
    }
}

#[test]
fn the_original_is_untouched_by_adapters() {
    let decoder = converted(states());
    let tuned = run(&decoder, &settings()).decoder;
    let tokens = text(48, 3);
    let original = |decoder: &Decoder| logits(&decoder.with_config(|config| config.attention = None).unwrap(), &tokens);
    assert_eq!(original(&tuned), original(&decoder));
    assert!(difference(&logits(&tuned, &tokens), &logits(&decoder, &tokens)) > 1e-3);
}

#[test]
fn adapters_apart_and_merged_are_one_function() {
    for family in [llama_like(), gpt2_like(), gemma_like()] {
        let config = ModelConfig { attention: Some(states()), ..ModelConfig::original(family) };
        let tuned = run(&load(config, &Device::flex()), &settings()).decoder;
        let (merged, changed) = tuned.merged().unwrap();
        assert_eq!((merged.config().adapters.clone(), changed.len()), (None, 4 * tuned.config().decoder.layers));
        let tokens = text(48, 3);
        let (apart, merged) = (logits(&tuned, &tokens), logits(&merged, &tokens));
        let size = apart.iter().flatten().fold(0.0_f32, |most, x| most.max(x.abs()));
        assert!(difference(&apart, &merged) < 1e-5 * f64::from(size.max(1.0)));
    }
}

#[test]
fn adapters_stand_beside_compressed_projections_but_are_not_added_to_them() {
    let part = |part: &str, linear: &str, width: usize| json!({"part": part, "targets": [{"linear": linear, "start": 0, "width": width}]});
    let split = json!({"format_version": 1, "keep": 0.5, "base": "0", "groups": [
        {"name": "q", "share": "input", "rank": 4, "inputs": 16, "outputs": 24, "members": [
            part("first", "layers.0.attention.query", 24), part("second", "layers.1.attention.query", 24)]},
        {"name": "o", "share": "input", "rank": 6, "inputs": 32, "outputs": 16, "members": [
            part("out", "layers.1.attention.output", 16)]},
    ]});
    let split = serde_json::from_value(split).unwrap();
    let config = ModelConfig { attention: Some(states()), split: Some(split), ..ModelConfig::original(llama_like()) };
    let decoder = load(config, &Device::flex());
    let settings = TuneConfig { steps: 20, logits_steps: 10, held_out: 0, ..settings() };
    let tokens = text(32, 7);
    let tuned = tune(&decoder, &tokens, &settings, &[Device::flex()], None, &mut |_| true).unwrap();
    let loss = |step: usize| tuned.log.steps[step].loss;
    assert!(loss(19) < 0.9 * loss(0) && loss(29) < 0.9 * loss(20), "{:?}", tuned.log.steps);
    let error = tuned.decoder.merged().unwrap_err().to_string();
    assert!(error.contains("`layers.0.attention.query`") && error.contains("in parts"), "{error}");

    // The compressed model with its whole weights gives the same with the same adapters.
    let mut whole = tuned.decoder.clone();
    for place in tuned.decoder.config().decoder.linear_places() {
        let projection = whole.projection_mut(place).unwrap();
        let (weight, bias) = (projection.dense_weight(&Device::flex()), projection.bias().cloned());
        *projection = Linear { weight: Param::from_tensor(weight), bias }.into();
    }
    assert!(difference(&logits(&whole, &tokens), &logits(&tuned.decoder, &tokens)) < 1e-4);
}

#[test]
fn an_interrupted_run_ends_where_an_uninterrupted_one_does() {
    let place = tempfile::tempdir().unwrap();
    for (attention, gates) in [(states(), false), (kept(), true), (meta(), false)] {
        let settings = TuneConfig { steps: 6, logits_steps: 6, batch: 2, gates, ..settings() };
        let decoder = converted(attention);
        let whole = run(&decoder, &settings);
        // In either stage, at a measurement and between two.
        let dir = place.path().join("run");
        let mut resume = false;
        let mut pieces = 0;
        let interrupted = loop {
            let mut left = 3;
            let mut watch = |event: TuneEvent<'_>| {
                left -= usize::from(matches!(event, TuneEvent::Step { .. }));
                left > 0
            };
            let kept = Checkpoint { dir: &dir, resume };
            let tuned = tune(&decoder, &text(160, 7), &settings, &[Device::flex()], Some(kept), &mut watch).unwrap();
            (resume, pieces) = (true, pieces + 1);
            if tuned.log.ending == Some(Ending::Done) {
                break tuned;
            }
        };
        assert!(pieces > 3);
        assert_eq!(numbers(&whole.decoder), numbers(&interrupted.decoder));
        let losses = |tuned: &Tuned| tuned.log.steps.iter().map(|record| record.loss).collect::<Vec<f64>>();
        assert_eq!(losses(&whole), losses(&interrupted));
        assert_eq!(whole.log.held_out, interrupted.log.held_out);

        let other = TuneConfig { learning_rate: 1e-4, ..settings.clone() };
        let kept = Some(Checkpoint { dir: &dir, resume: true });
        let error = tune(&decoder, &text(160, 7), &other, &[Device::flex()], kept, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("its settings differs"), "{error}");
        let mut swapped = decoder.clone();
        swapped.blocks.swap(0, 1);
        let error = tune(&swapped, &text(160, 7), &settings, &[Device::flex()], kept, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("its model differs"), "{error}");
    }
}

#[test]
fn two_devices_are_a_batch_of_two() {
    for attention in [states(), meta()] {
        let settings = TuneConfig { steps: 3, logits_steps: 3, batch: 2, held_out: 0, ..settings() };
        let decoder = converted(attention);
        let one = run(&decoder, &settings);
        let devices = [Device::flex(), Device::flex()];
        let two = tune(&decoder, &text(160, 7), &settings, &devices, None, &mut |_| true).unwrap();
        assert!(difference(&numbers(&one.decoder), &numbers(&two.decoder)) < 1e-5);
        assert_eq!((one.log.steps.len(), two.log.steps.len()), (6, 6));
    }
}

#[test]
fn meta_projections_learn_where_attention_goes() {
    // Nothing but the choice of blocks is trained, and the loss is its divergence plus what cannot change.
    let settings = TuneConfig { adapters: None, held_out: 0, steps: 60, meta_weight: 1.0, ..settings() };
    let decoder = converted(meta());
    let tuned = tune(&decoder, &text(32, 7), &settings, &[Device::flex()], None, &mut |_| true).unwrap();
    assert_eq!(tuned.decoder.config().adapters, None);
    let without = TuneConfig { meta_weight: 0.0, steps: 1, ..settings.clone() };
    let fixed = tune(&decoder, &text(32, 7), &without, &[Device::flex()], None, &mut |_| true).unwrap();
    let losses: Vec<f64> = tuned.log.steps.iter().map(|record| record.loss).collect();
    let divergence = losses[0] - fixed.log.steps[0].loss;
    assert!(divergence > 0.0 && losses[59] < losses[0] - 0.5 * divergence, "{divergence} {losses:?}");
}

#[test]
fn a_stage_ends_when_the_held_out_loss_no_longer_falls_and_the_best_is_kept() {
    // So fast that nothing improves.
    let settings = TuneConfig { learning_rate: 10.0, steps: 40, evaluate_every: 1, patience: 3, ..settings() };
    let decoder = converted(states());
    let tuned = run(&decoder, &settings);
    assert_eq!((tuned.log.steps.len(), tuned.log.ending), (3, Some(Ending::Done)));
    let (first, best) = tuned.log.held_out_change(Stage::Layers).unwrap();
    assert_eq!(first, best);
    let tokens = text(48, 2);
    assert_eq!(logits(&tuned.decoder, &tokens), logits(&decoder, &tokens));
}

#[test]
fn the_time_ends_a_run() {
    let budget = Some(std::time::Duration::from_nanos(1));
    let tuned = run(&converted(states()), &TuneConfig { budget, ..settings() });
    assert_eq!((tuned.log.steps.len(), tuned.log.ending), (0, Some(Ending::Time)));
}

#[test]
fn settings_that_cannot_be_are_named() {
    let decoder = converted(states());
    let original = decoder.with_config(|config| config.attention = None).unwrap();
    let refused = |decoder: &Decoder, tokens: &[u32], settings: TuneConfig| -> ModelError {
        tune(decoder, tokens, &settings, &[Device::flex()], None, &mut |_| true).unwrap_err()
    };
    let long = text(160, 7);
    let rank = |rank| Some(AdapterConfig { rank, alpha: 1.0, targets: ALL.to_vec() });
    let twice = AdapterConfig { rank: 1, alpha: 1.0, targets: vec![ALL[0], ALL[0]] };
    let cases: Vec<(TuneConfig, &str)> = vec![
        (TuneConfig { window: 1, ..settings() }, "window"),
        (TuneConfig { batch: 0, ..settings() }, "batch"),
        (TuneConfig { steps: 0, ..settings() }, "steps"),
        (TuneConfig { learning_rate: f64::NAN, ..settings() }, "learning_rate"),
        (TuneConfig { clip: 0.0, ..settings() }, "clip"),
        (TuneConfig { warmup: 1.5, ..settings() }, "warmup"),
        (TuneConfig { evaluate_every: 0, ..settings() }, "evaluate_every"),
        (TuneConfig { adapters: None, ..settings() }, "nothing to train"),
        (TuneConfig { adapters: rank(0), ..settings() }, "adapters.rank"),
        (TuneConfig { adapters: Some(twice), ..settings() }, "adapters.targets"),
        (TuneConfig { layers: Some(vec![99]), ..settings() }, "layer 99"),
        (TuneConfig { layers: Some(vec![]), ..settings() }, "names none"),
        (TuneConfig { window: 90, ..settings() }, "need 180"),
    ];
    for (settings, words) in cases {
        let error = refused(&decoder, &long, settings).to_string();
        assert!(error.contains(words), "no {words:?} in {error}");
    }
    assert!(refused(&original, &long, settings()).to_string().contains("nothing to tune"));
    assert!(matches!(refused(&decoder, &[99; 160], settings()), ModelError::TokenOutOfRange { token: 99, .. }));
    let tuned = run(&decoder, &TuneConfig { steps: 1, ..settings() }).decoder;
    let error = refused(&tuned, &long, TuneConfig { adapters: rank(1), ..settings() });
    assert!(error.to_string().contains("others than the model has"), "{error}");
    let error = tune(&decoder, &long, &settings(), &[], None, &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("first device"), "{error}");
    let place = tempfile::tempdir().unwrap();
    let kept = Some(Checkpoint { dir: &place.path().join("nowhere"), resume: true });
    let error = tune(&decoder, &long, &settings(), &[Device::flex()], kept, &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}
