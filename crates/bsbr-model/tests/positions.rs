//! Reading past the trained length: what each position policy means, and that it keeps the promises.

mod common;

use bsbr_attn::{BlockAttentionConfig, Far, Retrieval};
use bsbr_model::{
    Decoder, DecoderConfig, LayerRotary, ModelConfig, ModelError, PositionPolicy, Positions, RotaryScaling, prefill,
};
use common::{
    devices, difference, families, gemma_like, gpt2_like, llama_like, load, logits, multi_query, naive::Naive,
    retrieving, rotary, rows, same, text,
};

const TOLERANCE: f64 = 1e-4;
const CHUNK: usize = 64;
/// Tokens of the local region of the last token of a chunk.
const LOCAL: usize = 2 * CHUNK;
const TRAINED: usize = 147;
/// A text that is twice past the trained length.
const LONG: usize = 380;

fn attention() -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: CHUNK,
        local_chunks: 1,
        sink_tokens: 3,
        max_keys: 20,
        meta_blocks: 2,
        exact_tokens: 0,
        ..Default::default()
    }
}

/// Every far key is read exactly.
fn reading_everything() -> BlockAttentionConfig {
    BlockAttentionConfig { threshold: 0.0, max_keys: 1000, ..attention() }
}

fn grouping(decoder: DecoderConfig, attention: BlockAttentionConfig) -> ModelConfig {
    let decoder = DecoderConfig { max_positions: TRAINED, ..decoder };
    let position_policy = PositionPolicy::Grouped;
    ModelConfig { attention: Some(attention), position_policy, ..ModelConfig::original(decoder) }
}

/// Where query and key stand under `grouped` for a trained length of [`TRAINED`].
fn grouped(token: usize, key: usize) -> (usize, usize) {
    let local_start = (token / CHUNK).saturating_sub(1) * CHUNK;
    if token < TRAINED || key >= local_start {
        return (token, key);
    }
    // The smallest group that leaves every distance within the trained length.
    let group = (1..).find(|group| token <= LOCAL + group * (TRAINED - 1 - LOCAL)).unwrap();
    (token / group + LOCAL - LOCAL / group, key / group)
}

fn rotary_families() -> impl Iterator<Item = DecoderConfig> {
    let rotates = |decoder: &DecoderConfig| matches!(decoder.positions, Positions::Rotary { .. });
    families().into_iter().filter(move |decoder| rotates(decoder))
}

#[test]
fn far_keys_are_read_at_grouped_positions() {
    for decoder in rotary_families() {
        let config = grouping(decoder, reading_everything());
        let mut reference = Naive::new(&config);
        reference.standing = grouped;
        let tokens = text(LONG, 1);
        let expected = reference.logits(&tokens);
        let effect = difference(&Naive::new(&config).logits(&tokens), &expected);
        assert!(effect > 10.0 * TOLERANCE, "the policy changes nothing in {:?}", config.decoder);
        for device in devices() {
            let error = difference(&logits(&load(config.clone(), &device), &tokens), &expected);
            assert!(error <= TOLERANCE, "differs by {error} on {device:?}: {:?}", config.decoder);
        }
    }
}

#[test]
fn grouped_positions_turn_by_the_frequencies_of_the_model() {
    let scaled = |scaling| Positions::Rotary { theta: 10000.0, rotary_dim: 8, scaling: Some(scaling) };
    let local = LayerRotary::Local { theta: 50.0 };
    let factors = |factor: f64| vec![factor; 4];
    let longrope = RotaryScaling::Longrope {
        short_factor: factors(1.0),
        long_factor: factors(3.0),
        original_max_positions: 8,
        attention_factor: 1.1,
        long_attention_factor: None,
    };
    let dynamic = RotaryScaling::Dynamic { factor: 2.0, original_max_positions: TRAINED };
    for (positions, layer_rotary, divisor, factor) in [
        (scaled(RotaryScaling::Linear { factor: 3.0 }), vec![], 3.0, 1.0),
        (scaled(longrope), vec![], 3.0, 1.1),
        // Within the trained length the base does not grow, and under the policy nothing is longer.
        (scaled(dynamic), vec![], 1.0, 1.0),
        (rotary(8), vec![local, LayerRotary::Off], 1.0, 1.0),
    ] {
        let config = grouping(DecoderConfig { positions, layer_rotary, ..llama_like() }, reading_everything());
        let mut reference = Naive::new(&config);
        reference.standing = grouped;
        reference.rotation.1 = factor;
        reference.rotation.0.iter_mut().for_each(|frequency| *frequency /= divisor);
        let tokens = text(LONG, 2);
        for device in devices() {
            let error = difference(&logits(&load(config.clone(), &device), &tokens), &reference.logits(&tokens));
            assert!(error <= TOLERANCE, "differs by {error}: {:?}", config.decoder);
        }
    }
}

#[test]
fn within_the_trained_length_nothing_changes_by_a_bit() {
    let tokens = text(TRAINED, 3);
    for decoder in rotary_families() {
        for device in devices() {
            let config = grouping(decoder.clone(), attention());
            let plain = ModelConfig { position_policy: PositionPolicy::Error, ..config.clone() };
            assert_eq!(logits(&load(config, &device), &tokens), logits(&load(plain, &device), &tokens));
        }
    }
}

fn in_pieces(model: &Decoder, tokens: &[u32], length: usize) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    let pieces = tokens.chunks(length);
    pieces.flat_map(|piece| rows(model.logits(model.hidden(&[piece.to_vec()], &mut cache).unwrap()))).collect()
}

/// Models under the policies that go on past the trained length in a way of their own.
fn going_on() -> Vec<Decoder> {
    let mut models = Vec::new();
    for device in devices() {
        for decoder in [llama_like(), multi_query(), gemma_like()] {
            for (retrieval, far) in
                [(Retrieval::None, Far::None), (Retrieval::Blocks, Far::Mean), (Retrieval::Blocks, Far::None)]
            {
                let attention = BlockAttentionConfig { retrieval, far, ..attention() };
                models.push(load(grouping(decoder.clone(), attention), &device));
            }
        }
        for far in [Far::Mean, Far::State] {
            let meta = BlockAttentionConfig { selector: bsbr_attn::Selector::Meta, far, ..attention() };
            let decoder = DecoderConfig { max_positions: TRAINED, ..llama_like() };
            let model = retrieving(decoder, meta, &device);
            models.push(model.with_config(|config| config.position_policy = PositionPolicy::Grouped).unwrap());
        }
        let decoder = DecoderConfig { max_positions: TRAINED, ..gpt2_like() };
        for attention in [None, Some(attention())] {
            let position_policy = PositionPolicy::Slide;
            let config = ModelConfig { attention, position_policy, ..ModelConfig::original(decoder.clone()) };
            models.push(load(config, &device));
        }
    }
    models
}

#[test]
fn any_split_of_a_long_text_reads_the_same() {
    let tokens = text(LONG, 4);
    for model in going_on() {
        let expected = logits(&model, &tokens);
        for length in [1, 7, 64, TRAINED, TRAINED + 1] {
            let found = in_pieces(&model, &tokens, length);
            if let Err(how) = same(&found, &expected, model.config().attention.as_ref()) {
                panic!("pieces of {length}: {how}: {:?}", model.config());
            }
        }
    }
}

#[test]
fn no_token_of_a_long_text_changes_what_stands_before_it() {
    let tokens = text(LONG, 5);
    for model in going_on() {
        let before = logits(&model, &tokens);
        for t in [0, 127, 128, TRAINED - 1, TRAINED, TRAINED + 1, 166, 167, 191, 192, 319, LONG - 1] {
            let mut changed = tokens.clone();
            changed[t] = (changed[t] + 1) % 40;
            let after = logits(&model, &changed);
            assert_eq!(before[..t], after[..t], "token {t}: {:?}", model.config());
            assert_ne!(before[t], after[t], "token {t}: {:?}", model.config());
        }
    }
}

#[test]
fn long_texts_of_a_batch_read_what_they_read_alone() {
    let texts = [text(LONG, 6), text(9, 7), text(170, 8)];
    for model in going_on() {
        let mut cache = model.new_cache(&[LONG, 9, 170]).unwrap();
        let together = rows(model.logits(model.hidden(&texts, &mut cache).unwrap()));
        let alone: Vec<Vec<f32>> = texts.iter().flat_map(|text| logits(&model, text)).collect();
        if let Err(how) = same(&together, &alone, model.config().attention.as_ref()) {
            panic!("{how}: {:?}", model.config());
        }
        assert_eq!((0..3).map(|text| cache.length(text)).collect::<Vec<_>>(), [LONG, 9, 170]);
    }
}

#[test]
fn a_sliding_text_is_read_in_windows_that_begin_with_half_of_the_one_before() {
    let decoder = DecoderConfig { max_positions: 20, ..gpt2_like() };
    let config = ModelConfig { position_policy: PositionPolicy::Slide, ..ModelConfig::original(decoder) };
    let tokens = text(75, 9);
    let reference = Naive::new(&config);
    let mut expected = reference.logits(&tokens[..20]);
    for start in [10, 20, 30, 40, 50] {
        expected.extend_from_slice(&reference.logits(&tokens[start..start + 20])[10..]);
    }
    expected.extend_from_slice(&reference.logits(&tokens[60..])[10..]);
    for device in devices() {
        let model = load(config.clone(), &device);
        let error = difference(&logits(&model, &tokens), &expected);
        assert!(error <= TOLERANCE, "differs by {error}");
        let mut cache = model.new_cache(&[75]).unwrap();
        let last = rows(model.logits(prefill(&model, &tokens, &mut cache).unwrap()));
        assert!(difference(&last, &expected[74..]) <= TOLERANCE);
    }
}

#[test]
fn a_cache_of_another_policy_is_refused() {
    let decoder = DecoderConfig { max_positions: TRAINED, ..gpt2_like() };
    let clamping = ModelConfig { position_policy: PositionPolicy::Clamp, ..ModelConfig::original(decoder) };
    let clamping = load(clamping, &devices()[0]);
    let plain = ModelConfig { position_policy: PositionPolicy::Error, ..grouping(llama_like(), attention()) };
    let plain = load(plain, &devices()[0]);
    for (model, policy) in [(clamping, PositionPolicy::Slide), (plain, PositionPolicy::Grouped)] {
        let other = model.with_config(|config| config.position_policy = policy).unwrap();
        let mut cache = model.new_cache(&[30]).unwrap();
        model.hidden(&[text(30, 1)], &mut cache).unwrap();
        let error = other.hidden(&[text(1, 1)], &mut cache).unwrap_err();
        assert!(error.to_string().contains("other settings"), "{error}");
        assert_eq!(cache.length(0), 30);
    }
}

#[test]
fn a_policy_that_makes_no_sense_is_refused() {
    let refused = |config: ModelConfig, words: &[&str]| {
        let error = config.validate().unwrap_err();
        assert!(matches!(error, ModelError::Config { .. } | ModelError::Attention(_)));
        words.iter().for_each(|word| assert!(error.to_string().contains(word), "{word}: {error}"));
    };
    let alibi = DecoderConfig { positions: Positions::Alibi { factor: 1.0 }, ..llama_like() };
    refused(grouping(gpt2_like(), attention()), &["grouped", "rotary", "slide"]);
    refused(grouping(alibi.clone(), attention()), &["grouped", "ALiBi"]);
    for retrieval in [Retrieval::State, Retrieval::Additive] {
        let attention = BlockAttentionConfig { retrieval, ..attention() };
        refused(grouping(llama_like(), attention), &["retrieval", "blocks or none"]);
    }
    let far = BlockAttentionConfig { local_chunks: 4, ..attention() };
    refused(grouping(llama_like(), far), &["chunk_size", "320", "147"]);
    let kept = ModelConfig { original_layers: vec![1], ..grouping(llama_like(), attention()) };
    refused(kept.clone(), &["layer 1", "full attention"]);
    let windowed = DecoderConfig { windows: vec![None, Some(8)], max_positions: TRAINED, ..llama_like() };
    ModelConfig { decoder: windowed, ..kept }.validate().unwrap();
    for decoder in [llama_like(), alibi] {
        let config = ModelConfig { position_policy: PositionPolicy::Slide, ..ModelConfig::original(decoder) };
        refused(config, &["slide", "learned"]);
    }
}
