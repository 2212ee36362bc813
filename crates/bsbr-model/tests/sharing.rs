//! Layers that read the keys and values of others: what is kept for them, and that every way of running them is one function.
#![cfg(feature = "flex")]

mod common;

use bsbr_attn::{BlockAttentionConfig, Kernel, Retrieval, Selector, index::SECTION};
use bsbr_model::{
    AdapterConfig, AdapterTarget, Decoder, DecoderConfig, LayerKeys, LayerShape, LinearPlace, LinearRole, ModelConfig,
    PositionPolicy, Positions, RotaryScaling, TuneConfig, tune,
};
use burn::tensor::{Device, Tensor};
use common::{beside_experts, difference, families, load, logits, original, rows, same, sharing, text};

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

fn converted(decoder: DecoderConfig, attention: BlockAttentionConfig) -> Decoder {
    load(ModelConfig { attention: Some(attention), ..ModelConfig::original(decoder) }, &Device::flex())
}

/// Bytes kept for a text that was read.
fn bytes(model: &Decoder, tokens: &[u32]) -> usize {
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    model.hidden(&[tokens.to_vec()], &mut cache).unwrap();
    // What decides how an index is built is known only once it is.
    let expected = model.expected_cache_bytes(tokens.len()).unwrap();
    let indexed = model.config().attention.is_some();
    assert!(cache.bytes() == expected || indexed && cache.bytes() - expected < 1000, "{} {expected}", cache.bytes());
    cache.bytes()
}

/// The decoder without the layers that read others.
fn owners() -> DecoderConfig {
    let all = sharing();
    DecoderConfig {
        layers: 3,
        windows: all.windows[..3].to_vec(),
        layer_rotary: all.layer_rotary[..3].to_vec(),
        layer_shapes: all.layer_shapes[..3].to_vec(),
        ..all
    }
}

#[test]
fn a_layer_that_reads_another_keeps_nothing() {
    let tokens = text(300, 3);
    for attention in [None, Some(index())] {
        let model = |decoder| {
            load(ModelConfig { attention: attention.clone(), ..ModelConfig::original(decoder) }, &Device::flex())
        };
        let (all, own) = (model(sharing()), model(owners()));
        // A row that keeps the shape of what is empty, in the layers that read others as before the first token.
        let empty = |model: &Decoder| model.new_cache(&[0]).unwrap().bytes();
        let (rows, all, own) = (empty(&all) - empty(&own), bytes(&all, &tokens), bytes(&own, &tokens));
        assert_eq!(all - own, rows, "{attention:?}");
        if attention.is_none() {
            assert_eq!(rows, 4 * 2 * 2 * (8 + 16));
            assert_eq!(own, 4 * 300 * sharing().kv_width());
        }
    }
}

#[test]
fn caches_are_shared_where_keys_are_kept_where_they_were() {
    let of = |attention: Option<BlockAttentionConfig>, change: &dyn Fn(&mut ModelConfig)| {
        let mut config = ModelConfig { attention, ..ModelConfig::original(sharing()) };
        change(&mut config);
        config.validate().unwrap();
        (0..5).map(|layer| config.cache_owner(layer)).collect::<Vec<_>>()
    };
    let (shared, none) = ([None, None, None, Some(2), Some(1)], [None; 5]);
    assert_eq!(of(None, &|_| ()), shared);
    assert_eq!(of(Some(index()), &|_| ()), shared);
    assert_eq!(of(Some(states()), &|_| ()), none);
    assert_eq!(of(Some(BlockAttentionConfig { retrieval: Retrieval::None, ..index() }), &|_| ()), none);
    assert_eq!(
        of(Some(BlockAttentionConfig { selector: Selector::Meta, chunk_size: 8, block_size: 4, ..index() }), &|_| ()),
        none
    );
    // An owner of full attention has no index; what an index was made of can be read whole.
    assert_eq!(of(Some(index()), &|config| config.original_layers = vec![1]), [None, None, None, Some(2), None]);
    assert_eq!(of(Some(index()), &|config| config.original_layers = vec![4]), shared);
    assert_eq!(of(Some(index()), &|config| config.position_policy = PositionPolicy::Grouped), none);
}

#[test]
fn every_kernel_reads_the_same_in_every_kind_of_retrieval() {
    let tokens = text(300, 5);
    let meta = BlockAttentionConfig { selector: Selector::Meta, chunk_size: 8, block_size: 4, ..index() };
    for decoder in [sharing(), beside_experts()] {
        for attention in [index(), states(), meta.clone()] {
            let model = converted(decoder.clone(), attention.clone());
            let fused = logits(&model, &tokens);
            let how = same(&fused, &logits(&model.clone().with_kernel(Kernel::Plain), &tokens), Some(&attention));
            assert!(how.is_ok(), "{attention:?}: {how:?}");
            // What is far counts: it is not the original that is compared with itself.
            let none = model.with_config(|config| config.attention = Some(attention.without_retrieval())).unwrap();
            assert!(difference(&fused, &logits(&none, &tokens)) > 1e-3, "{attention:?}");
        }
    }
}

#[test]
fn a_layer_may_be_original_where_the_one_it_reads_is_not() {
    let tokens = text(300, 6);
    for original_layers in [vec![1], vec![4], vec![0, 2], vec![3]] {
        let config = ModelConfig { attention: Some(index()), original_layers, ..ModelConfig::original(sharing()) };
        let model = load(config, &Device::flex());
        let at_once = logits(&model, &tokens);
        let mut cache = model.new_cache(&[tokens.len()]).unwrap();
        let pieces = tokens
            .chunks(37)
            .flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap())));
        let how = same(&pieces.collect::<Vec<_>>(), &at_once, Some(&index()));
        assert!(how.is_ok(), "{how:?}");
    }
}

#[test]
fn a_text_begins_with_what_another_has_read() {
    let tokens = text(400, 8);
    for attention in [None, Some(index())] {
        let config = ModelConfig { attention: attention.clone(), ..ModelConfig::original(sharing()) };
        let model = load(config, &Device::flex());
        let mut first = model.new_cache(&[400]).unwrap();
        model.hidden(&[tokens[..350].to_vec()], &mut first).unwrap();
        let mut begun = model.begin_with(&first, 0, 300, 400).unwrap();
        assert_eq!(begun.length(0), 300);
        let found = rows(model.hidden(&[tokens[300..].to_vec()], &mut begun).unwrap());
        let mut fresh = model.new_cache(&[400]).unwrap();
        model.hidden(&[tokens[..300].to_vec()], &mut fresh).unwrap();
        let expected = rows(model.hidden(&[tokens[300..].to_vec()], &mut fresh).unwrap());
        assert!(found == expected, "{attention:?}");
    }
}

#[test]
fn blocks_run_one_by_one_are_the_whole() {
    let tokens = text(40, 9);
    for decoder in families() {
        let model = original(decoder);
        let mut states = model.first_states(&tokens).unwrap();
        let mut seen = Vec::new();
        for layer in 0..model.config().decoder.layers {
            states = model
                .run_block(layer, states, &mut |role, x| {
                    seen.push((LinearPlace { layer, role }, x.dims()));
                    Ok(())
                })
                .unwrap();
        }
        let last = model.stream(states);
        let last = match &model.final_norm {
            Some(norm) => norm.forward(last),
            None => last,
        };
        let error = difference(&rows(model.logits(last)), &logits(&model, &tokens));
        assert!(error <= 1e-4, "differs by {error}: {:?}", model.config().decoder);
        for (place, [_, width]) in seen {
            let [inputs, _] = model.config().decoder.linear_shape(place).unwrap();
            assert_eq!(width, inputs, "{place}");
        }
    }
    let model = original(sharing());
    let narrow = Tensor::zeros([3, 16], &Device::flex());
    assert!(model.run_block(0, narrow, &mut |_, _| Ok(())).unwrap_err().to_string().contains("16 numbers wide"));
}

#[test]
fn linear_layers_are_those_that_there_are() {
    let decoder = sharing();
    let shape = |name: &str| decoder.linear_shape(name.parse::<LinearPlace>().unwrap());
    assert_eq!(shape("layers.1.attention.key"), Some([16, 32]));
    assert_eq!(shape("layers.4.attention.query"), Some([16, 64]));
    assert_eq!((shape("layers.4.attention.key"), shape("layers.4.attention.value")), (None, None));
    assert_eq!((shape("layers.3.mlp.up"), shape("layers.3.per_layer.gate")), (Some([16, 56]), Some([16, 6])));
    assert_eq!(shape("layers.0.per_layer.down"), Some([6, 16]));
    let mixture = beside_experts();
    let roles = mixture.linear_roles(1);
    assert!(roles.contains(&LinearRole::Key) && !roles.contains(&LinearRole::Value) && roles.contains(&LinearRole::Up));
    let model = original(decoder.clone());
    for place in decoder.linear_places() {
        let [inputs, outputs] = decoder.linear_shape(place).unwrap();
        let weight = model.projection(place).unwrap().dense_weight(&Device::flex());
        assert_eq!(weight.dims(), [inputs, outputs], "{place}");
    }
}

#[test]
fn tuning_trains_layers_with_and_without_keys_of_their_own() {
    let adapters = AdapterConfig { rank: 2, alpha: 4.0, targets: AdapterTarget::ALL.to_vec() };
    let attention = BlockAttentionConfig { max_chunks: Some(3), local_chunks: 1, ..states() };
    for decoder in [sharing(), beside_experts()] {
        let decoder = DecoderConfig { windows: vec![], ..decoder };
        for (steps, logits_steps) in [(12, 0), (0, 6)] {
            let settings = TuneConfig {
                window: 64,
                logits_window: 64,
                steps,
                logits_steps,
                learning_rate: 3e-2,
                logits_learning_rate: 1e-2,
                adapters: Some(adapters.clone()),
                held_out: 0,
                ..Default::default()
            };
            let model = converted(decoder.clone(), attention.clone());
            let tuned = tune(&model, &text(64, 7), &settings, &[Device::flex()], None, &mut |_| true).unwrap();
            let losses: Vec<f64> = tuned.log.steps.iter().map(|record| record.loss).collect();
            assert!(losses[losses.len() - 1] < losses[0], "{losses:?}");
            let names: Vec<String> = tuned.decoder.extra_weights().unwrap().into_iter().map(|(name, _)| name).collect();
            for layer in 0..decoder.layers {
                let keys = names.iter().any(|name| name.contains(&format!("layers.{layer}.attention.key.adapter")));
                assert_eq!(keys, !matches!(decoder.shape(layer).keys, LayerKeys::Of { .. }), "{names:?}");
            }
            // The same is read back from its weights.
            let (merged, _) = tuned.decoder.merged().unwrap();
            let tokens = text(50, 2);
            assert!(difference(&logits(&merged, &tokens), &logits(&tuned.decoder, &tokens)) <= 1e-3);
        }
    }
}

#[test]
fn heads_as_wide_as_real_ones_are_read_as_narrow_ones_are() {
    let narrow = sharing();
    let wide = |shape: &LayerShape| LayerShape { head_dim: 32 * shape.head_dim, ..*shape };
    let decoder = DecoderConfig {
        layer_shapes: narrow.layer_shapes.iter().map(wide).collect(),
        head_dim: 256,
        attention_scale: 0.02,
        positions: Positions::Rotary {
            theta: 1e6,
            rotary_dim: 512,
            scaling: Some(RotaryScaling::Proportional { rotating: 128, factor: 1.0 }),
        },
        ..narrow
    };
    assert_eq!((decoder.shape(0).head_dim, decoder.widest_head()), (256, 512));
    let tokens = text(260, 4);
    let model = converted(decoder.clone(), index());
    let fused = logits(&model, &tokens);
    let how = same(&fused, &logits(&model.clone().with_kernel(Kernel::Plain), &tokens), Some(&index()));
    assert!(how.is_ok(), "{how:?}");
    let whole = logits(&original(decoder), &tokens);
    assert!(difference(&fused[..2 * SECTION], &whole[..2 * SECTION]) <= 1e-4);
    assert!(difference(&fused, &whole) > 1e-4);
}
