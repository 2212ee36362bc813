//! Latent attention: keys and values made of one narrow vector, values narrower than keys.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{BlockAttentionConfig, Kernel, Retrieval, Selector, index::SECTION};
use bsbr_model::{
    AdapterConfig, AdapterTarget, DecoderConfig, LatentAttention, LinearPlace, ModelConfig, PositionPolicy,
    QueryTemperature, TuneConfig, calibrate_far, tune,
};
use burn::tensor::Device;
use common::{difference, latent, load, logits, mixture, naive::Naive, original, rows, same, text};

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
    BlockAttentionConfig { chunk_size: 8, block_size: 4, retrieval: Retrieval::State, ..index() }
}

fn converted(attention: BlockAttentionConfig) -> ModelConfig {
    ModelConfig { attention: Some(attention), ..ModelConfig::original(latent()) }
}

#[test]
fn every_form_of_it_is_the_written_out_decoder() {
    let with = |change: &dyn Fn(&mut DecoderConfig, &mut LatentAttention)| {
        let mut decoder = latent();
        let mut own = decoder.latent.unwrap();
        change(&mut decoder, &mut own);
        decoder.latent = Some(own);
        decoder
    };
    let experts = mixture().experts;
    let temperature = QueryTemperature { beta: 0.7, length: 5 };
    let base = latent();
    for decoder in [
        base.clone(),
        with(&|_, own| own.query_rank = None),
        with(&|_, own| own.value_dim = 12),
        with(&|decoder, own| (own.bias, decoder.attention_output_bias) = (true, true)),
        with(&|_, own| own.norm_eps = 0.5),
        with(&|decoder, _| decoder.experts.clone_from(&experts)),
        with(&|decoder, _| decoder.query_temperature = Some(temperature)),
    ] {
        let config = ModelConfig::original(decoder);
        for length in [1, 2, 40] {
            let tokens = text(length, 4);
            let (found, expected) =
                (logits(&original(config.decoder.clone()), &tokens), Naive::new(&config).logits(&tokens));
            let error = difference(&found, &expected);
            assert!(error <= 1e-4, "differs by {error}: {:?}", config.decoder);
            let other = Naive::new(&ModelConfig::original(base.clone())).logits(&tokens);
            assert!(
                config.decoder == base || length < 40 || difference(&other, &expected) > 1e-3,
                "{:?}",
                config.decoder
            );
        }
    }
}

#[test]
fn every_way_of_reading_a_text_is_one_function() {
    let tokens = text(300, 5);
    for attention in [index(), states()] {
        let model = load(converted(attention.clone()), &Device::flex());
        let at_once = logits(&model, &tokens);
        let how = same(&at_once, &logits(&model.clone().with_kernel(Kernel::Plain), &tokens), Some(&attention));
        assert!(how.is_ok(), "{attention:?}: {how:?}");
        for piece in [1, 37] {
            let mut cache = model.new_cache(&[tokens.len()]).unwrap();
            let pieces = tokens
                .chunks(piece)
                .flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap())));
            let how = same(&pieces.collect::<Vec<_>>(), &at_once, Some(&attention));
            assert!(how.is_ok(), "{attention:?} in pieces of {piece}: {how:?}");
        }
        // Exact as long as everything is read, and something else beyond.
        let whole = logits(&original(latent()), &tokens);
        let short = if attention.uses_index() { 2 * SECTION } else { 8 };
        assert!(difference(&at_once[..short], &whole[..short]) <= 1e-4, "{attention:?}");
        assert!(difference(&at_once, &whole) > 1e-3, "{attention:?}");
    }
}

#[test]
fn what_it_cannot_be_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = ModelConfig::original(latent());
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    let own = |config: &mut ModelConfig, change: &dyn Fn(&mut LatentAttention)| {
        change(config.decoder.latent.as_mut().unwrap());
    };
    assert!(refused(&|config| own(config, &|it| it.value_dim = 13)).contains("latent.value_dim"));
    assert!(refused(&|config| own(config, &|it| it.rank = 0)).contains("latent.rank"));
    assert!(refused(&|config| own(config, &|it| it.query_rank = Some(0))).contains("latent.query_rank"));
    assert!(refused(&|config| own(config, &|it| it.norm_eps = 0.0)).contains("latent.norm_eps"));
    assert!(refused(&|config| config.decoder.kv_heads = 2).contains("kv_heads"));
    assert!(refused(&|config| config.decoder.positions = common::rotary(12)).contains("positions"));
    assert!(refused(&|config| config.decoder.qkv_bias = true).contains("latent"));
    let meta = BlockAttentionConfig { selector: Selector::Meta, ..Default::default() };
    assert!(refused(&|config| config.attention = Some(meta.clone())).contains("selector"));
    let text = serde_json::to_string(&ModelConfig::original(latent())).unwrap();
    assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), ModelConfig::original(latent()));
}

#[test]
fn its_linear_layers_can_be_reached_and_run_one_by_one() {
    let mut whole = latent();
    whole.latent.as_mut().unwrap().query_rank = None;
    for decoder in [latent(), whole] {
        let model = original(decoder.clone());
        for place in decoder.linear_places() {
            let [inputs, outputs] = decoder.linear_shape(place).unwrap();
            let weight = model.projection(place).unwrap().dense_weight(&Device::flex());
            assert_eq!(weight.dims(), [inputs, outputs], "{place}");
            assert_eq!(place.to_string().parse::<LinearPlace>().unwrap(), place);
        }
        let tokens = text(40, 9);
        let mut states = model.first_states(&tokens).unwrap();
        let mut seen = Vec::new();
        for layer in 0..decoder.layers {
            let see = &mut |role, x: burn::tensor::Tensor<2>| {
                seen.push((LinearPlace { layer, role }, x.dims()[1]));
                Ok(())
            };
            states = model.run_block(layer, states, see).unwrap();
        }
        let inputs: std::collections::BTreeSet<String> =
            decoder.linear_places().iter().map(|place| place.input_name()).collect();
        assert_eq!(seen.iter().map(|(place, _)| place.input_name()).collect::<std::collections::BTreeSet<_>>(), inputs);
        assert!(seen.iter().all(|(place, width)| decoder.linear_shape(*place).unwrap()[0] == *width), "{seen:?}");
        let last = model.final_norm.as_ref().unwrap().forward(states);
        assert!(difference(&rows(model.logits(last)), &logits(&model, &tokens)) <= 1e-4);
    }
}

#[test]
fn it_is_calibrated_and_tuned_as_others_are() {
    let tokens = text(900, 3);
    let model = load(converted(index()), &Device::flex());
    calibrate_far(&model, &tokens, 400, |_, _| ()).unwrap();
    let settings = TuneConfig {
        window: 64,
        logits_window: 64,
        steps: 12,
        logits_steps: 4,
        learning_rate: 3e-2,
        logits_learning_rate: 1e-2,
        adapters: Some(AdapterConfig { rank: 2, alpha: 4.0, targets: AdapterTarget::ALL.to_vec() }),
        held_out: 0,
        ..Default::default()
    };
    let mut whole = latent();
    whole.latent.as_mut().unwrap().query_rank = None;
    for decoder in [latent(), whole] {
        let config = ModelConfig { decoder, ..converted(BlockAttentionConfig { max_chunks: Some(3), ..states() }) };
        let tuned =
            tune(&load(config, &Device::flex()), &text(64, 7), &settings, &[Device::flex()], None, &mut |_| true)
                .unwrap();
        let losses: Vec<f64> = tuned.log.steps[..12].iter().map(|record| record.loss).collect();
        assert!(losses[11] < losses[0], "{losses:?}");
    }
}

#[test]
fn keys_can_be_moved_to_grouped_positions() {
    let decoder = DecoderConfig { max_positions: 150, ..latent() };
    let attention = BlockAttentionConfig { exact_tokens: SECTION, ..index() };
    let config = ModelConfig {
        attention: Some(attention),
        position_policy: PositionPolicy::Grouped,
        ..ModelConfig::original(decoder)
    };
    if config.validate().is_err() {
        panic!("{:?}", config.validate());
    }
    let model = load(config, &Device::flex());
    let tokens = text(400, 6);
    let at_once = logits(&model, &tokens);
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    let pieces =
        tokens.chunks(50).flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap())));
    let how = same(&pieces.collect::<Vec<_>>(), &at_once, Some(&index()));
    assert!(how.is_ok(), "{how:?}");
}
