//! Recurrent layers beside attention behind a gate.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector, index::SECTION};
use bsbr_model::{
    AdapterConfig, AdapterTarget, AttentionMapConfig, DecoderConfig, GatedDelta, LayerLoss, LinearPlace, ModelConfig,
    PositionPolicy, TuneConfig, attention_map, calibrate_far, tune, weight_specs,
};
use burn::tensor::Device;
use common::{difference, load, logits, naive::Naive, original, recurrent, rows, same, text};

fn index() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: SECTION,
        local_chunks: 0,
        sink_tokens: 3,
        exact_tokens: 2 * SECTION,
        max_keys: 12,
        threshold: 1.0 / 64.0,
        ..Default::default()
    }
}

fn states() -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 8, block_size: 4, retrieval: Retrieval::State, max_chunks: Some(3), ..index() }
}

fn converted(attention: BlockAttentionConfig) -> ModelConfig {
    ModelConfig { attention: Some(attention), ..ModelConfig::original(recurrent()) }
}

fn with(change: impl FnOnce(&mut DecoderConfig, &mut GatedDelta)) -> DecoderConfig {
    let mut decoder = recurrent();
    let mut own = decoder.recurrent.clone().unwrap();
    change(&mut decoder, &mut own);
    decoder.recurrent = Some(own);
    decoder
}

#[test]
fn every_form_of_it_is_the_written_out_decoder() {
    let base = recurrent();
    for decoder in [
        base.clone(),
        with(|_, own| own.layers = vec![1]),
        with(|_, own| own.layers = vec![1, 2]),
        with(|_, own| own.key_heads = 4),
        with(|_, own| own.key_heads = 1),
        with(|_, own| (own.key_dim, own.value_dim) = (3, 8)),
        with(|_, own| own.kernel = 2),
        with(|_, own| own.kernel = 7),
        with(|decoder, _| decoder.attention_gate = false),
        DecoderConfig { recurrent: None, ..recurrent() },
    ] {
        let config = ModelConfig::original(decoder);
        for length in [1, 2, 33, 100] {
            let tokens = text(length, 4);
            let (found, expected) =
                (logits(&original(config.decoder.clone()), &tokens), Naive::new(&config).logits(&tokens));
            let error = difference(&found, &expected);
            assert!(error <= 1e-4, "differs by {error}: {:?}", config.decoder);
            let other = Naive::new(&ModelConfig::original(base.clone())).logits(&tokens);
            assert!(
                config.decoder == base || length < 33 || difference(&other, &expected) > 1e-3,
                "{:?}",
                config.decoder
            );
        }
    }
}

#[test]
fn attention_is_converted_beside_it_and_every_way_of_reading_is_one_function() {
    let tokens = text(300, 5);
    let whole = logits(&original(recurrent()), &tokens);
    for attention in [index(), states()] {
        let config = converted(attention.clone());
        assert!(config.layer_attention(1).is_some());
        assert!([0, 2].iter().all(|&layer| config.layer_attention(layer).is_none()));
        let model = load(config, &Device::flex());
        let at_once = logits(&model, &tokens);
        for piece in [1, 37] {
            let mut cache = model.new_cache(&[tokens.len()]).unwrap();
            let pieces = tokens
                .chunks(piece)
                .flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap())));
            let how = same(&pieces.collect::<Vec<_>>(), &at_once, Some(&attention));
            assert!(how.is_ok(), "{attention:?} in pieces of {piece}: {how:?}");
            // The one layer with attention.
            let reads = cache.reads();
            assert_eq!(reads.all, 2 * 300 * 301 / 2);
        }
        let short = if attention.uses_index() { 2 * SECTION } else { 8 };
        assert!(difference(&at_once[..short], &whole[..short]) <= 1e-4, "{attention:?}");
        assert!(difference(&at_once, &whole) > 1e-3, "{attention:?}");
    }
}

#[test]
fn a_state_is_as_large_after_any_number_of_tokens() {
    let model = load(converted(states()), &Device::flex());
    let decoder = &model.config().decoder;
    let own = recurrent().recurrent.unwrap();
    // Two layers: 3 inputs of 44 channels, 4 matrices of 6 by 5.
    assert_eq!(decoder.state_width(), 2 * (3 * 44 + 4 * 6 * 5));
    assert_eq!(decoder.state_width(), 2 * own.state_width());
    let bytes = |length: usize| {
        let mut cache = model.new_cache(&[length]).unwrap();
        model.hidden(&[text(length, 1)], &mut cache).unwrap();
        cache.bytes()
    };
    assert_eq!(bytes(100), bytes(400));
    assert!(bytes(100) > 4 * decoder.state_width());
    assert_eq!(decoder.kv_width(), 2 * 2 * 8);
}

#[test]
fn what_it_cannot_be_is_refused_by_name() {
    let refused = |decoder: DecoderConfig| ModelConfig::original(decoder).validate().unwrap_err().to_string();
    assert!(refused(with(|_, own| own.layers = vec![])).contains("recurrent.layers"));
    assert!(refused(with(|_, own| own.layers = vec![2, 0])).contains("ascending"));
    assert!(refused(with(|_, own| own.layers = vec![0, 3])).contains("recurrent.layers"));
    assert!(refused(with(|_, own| own.layers = vec![0, 1, 2])).contains("with attention"));
    assert!(refused(with(|_, own| own.key_heads = 3)).contains("recurrent.key_heads"));
    assert!(refused(with(|_, own| own.key_dim = 0)).contains("recurrent.key_dim"));
    assert!(refused(with(|_, own| own.value_dim = 0)).contains("recurrent.value_dim"));
    assert!(refused(with(|_, own| own.kernel = 1)).contains("recurrent.kernel"));
    assert!(refused(with(|decoder, _| decoder.qkv_bias = true)).contains("qkv_bias"));
    assert!(refused(with(|decoder, _| decoder.windows = vec![Some(4), None, None])).contains("windows"));
    let gated = DecoderConfig { attention_gate: true, ..common::latent() };
    assert!(refused(gated).contains("attention_gate"));
    let model = original(recurrent());
    let mut other = original(with(|_, own| own.key_dim = 7)).new_cache(&[5]).unwrap();
    assert!(model.hidden(&[vec![1, 2]], &mut other).unwrap_err().to_string().contains("another model"));
}

#[test]
fn its_linear_layers_can_be_reached_and_run_one_by_one() {
    let decoder = recurrent();
    let model = original(decoder.clone());
    let names: Vec<String> = weight_specs(model.config()).into_iter().map(|spec| spec.name).collect();
    for place in decoder.linear_places() {
        let [inputs, outputs] = decoder.linear_shape(place).unwrap();
        let weight = model.projection(place).unwrap().dense_weight(&Device::flex());
        assert_eq!(weight.dims(), [inputs, outputs], "{place}");
        assert_eq!(place.to_string().parse::<LinearPlace>().unwrap(), place);
        assert!(names.contains(&format!("{place}.weight")), "{place}");
    }
    let tokens = text(40, 9);
    let mut states = model.first_states(&tokens).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for layer in 0..decoder.layers {
        let see = &mut |role, x: burn::tensor::Tensor<2>| {
            let place = LinearPlace { layer, role };
            assert_eq!(x.dims(), [40, decoder.linear_shape(place).unwrap()[0]], "{place}");
            seen.insert(place.input_name());
            Ok(())
        };
        states = model.run_block(layer, states, see).unwrap();
    }
    let inputs = decoder.linear_places().iter().map(|place| place.input_name()).collect();
    assert_eq!(seen, inputs);
    let last = model.final_norm.as_ref().unwrap().forward(states);
    assert!(difference(&rows(model.logits(last)), &logits(&model, &tokens)) <= 1e-4);
}

#[test]
fn only_attention_is_calibrated_mapped_and_tuned() {
    let tokens = text(900, 3);
    let model = load(converted(index()), &Device::flex());
    let found = calibrate_far(&model, &tokens, 400, |_, _| ()).unwrap();
    assert_eq!(found.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1]);
    let mut steps = Vec::new();
    let map = attention_map(&model, &tokens[..200], AttentionMapConfig::default(), |done, of| steps.push((done, of)))
        .unwrap();
    assert_eq!(map.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1]);
    assert_eq!(steps, [(1, 1)]);
    for (loss, attention) in [(LayerLoss::All, states()), (LayerLoss::Far, states())] {
        let settings = TuneConfig {
            window: 64,
            logits_window: 64,
            steps: 12,
            logits_steps: 12,
            learning_rate: 3e-2,
            logits_learning_rate: 1e-2,
            layer_loss: loss,
            adapters: Some(AdapterConfig { rank: 2, alpha: 4.0, targets: AdapterTarget::ALL.to_vec() }),
            held_out: 0,
            ..Default::default()
        };
        let model = load(converted(attention), &Device::flex());
        let tuned = tune(&model, &text(64, 7), &settings, &[Device::flex()], None, &mut |_| true).unwrap();
        // Through the recurrent layer behind it, too.
        for part in [0..12, 12..24] {
            let losses: Vec<f64> = tuned.log.steps[part].iter().map(|record| record.loss).collect();
            assert!(losses[11] < losses[0], "{loss:?}: {losses:?}");
        }
        let weights = tuned.decoder.extra_weights().unwrap();
        assert!(!weights.is_empty());
        assert!(weights.iter().all(|(name, _)| name.starts_with("bsbr.layers.1.")), "{loss:?}");
    }
}

#[test]
fn keys_beside_it_can_be_moved_to_grouped_positions() {
    let decoder = DecoderConfig { max_positions: 150, ..recurrent() };
    let attention = BlockAttentionConfig { exact_tokens: SECTION, ..index() };
    let config = ModelConfig {
        attention: Some(attention.clone()),
        position_policy: PositionPolicy::Grouped,
        ..ModelConfig::original(decoder)
    };
    config.validate().unwrap();
    let model = load(config, &Device::flex());
    let tokens = text(400, 6);
    let at_once = logits(&model, &tokens);
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    let pieces =
        tokens.chunks(50).flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap())));
    let how = same(&pieces.collect::<Vec<_>>(), &at_once, Some(&attention));
    assert!(how.is_ok(), "{how:?}");
}

#[test]
fn meta_projections_are_those_of_layers_with_attention() {
    let meta = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    let names = weight_specs(&converted(meta)).into_iter().map(|spec| spec.name);
    let meta: Vec<String> = names.filter(|name| name.contains(".meta_")).collect();
    assert_eq!(meta, ["bsbr.layers.1.meta_query.weight", "bsbr.layers.1.meta_key.weight"]);
}
