//! The promises of BSBR at the level of logits: exact when short, causal, one function, batching, bounded memory.

mod common;

use bsbr_attn::{BlockAttentionConfig, Far, Retrieval, Selector, index::SECTION};
use bsbr_model::{Decoder, DecoderCache, DecoderConfig, PREFILL_PIECE, prefill};
use common::{VOCABULARY, devices, difference, families, llama_like, logits, retrieving, rows, same, settings, text};
use proptest::prelude::*;

const TOLERANCE: f64 = 1e-4;

/// Settings of every kind. An index has blocks of its own and chunks of whole sections; the others have small ones.
fn attentions() -> impl Strategy<Value = BlockAttentionConfig> {
    let sizes = (prop::sample::select(vec![(4, 2), (8, 4), (8, 2), (6, 3)]), 0usize..=2, 0usize..=5);
    let kind = (
        prop::sample::select(vec![
            Retrieval::None,
            Retrieval::Blocks,
            Retrieval::Blocks,
            Retrieval::State,
            Retrieval::Additive,
        ]),
        prop::sample::select(vec![Selector::Index, Selector::Meta]),
        prop::sample::select(vec![Far::None, Far::Mean, Far::State]),
        1usize..=3,
        prop::option::of(1usize..=3),
    );
    let index = (
        prop::sample::select(vec![0.0, 1.0 / 2048.0, 1.0 / 64.0]),
        prop::sample::select(vec![7usize, 1024]),
        prop::sample::select(vec![0usize, 8192]),
    );
    (sizes, kind, index).prop_map(|(((chunk_size, block_size), local_chunks, sink_tokens), kind, index)| {
        let (retrieval, selector, far, meta_blocks, max_chunks) = kind;
        let (threshold, max_keys, fine_tokens) = index;
        let settings = BlockAttentionConfig {
            chunk_size,
            block_size,
            local_chunks,
            sink_tokens,
            retrieval,
            selector,
            far,
            meta_blocks,
            max_chunks: max_chunks.filter(|_| retrieval == Retrieval::State),
            exact_tokens: 0,
            threshold,
            max_keys,
            fine_tokens,
            max_sections: 1,
            ..Default::default()
        };
        if !settings.uses_index() {
            return settings;
        }
        let far = if far == Far::State { Far::Mean } else { far };
        BlockAttentionConfig { chunk_size: SECTION, block_size: 16, local_chunks: local_chunks % 2, far, ..settings }
    })
}

/// A length that is `length` tokens for small chunks, and as much more for larger ones.
fn stretched(attention: &BlockAttentionConfig, length: usize) -> usize {
    if attention.uses_index() { 5 * length } else { length }
}

fn decoders() -> impl Strategy<Value = DecoderConfig> {
    prop::sample::select(families())
}

fn with_original_attention(model: &Decoder) -> Decoder {
    model.with_config(|config| config.attention = None).unwrap()
}

/// Logits of the next `tokens` of a text that `cache` holds alone.
fn read_on(model: &Decoder, tokens: &[u32], cache: &mut DecoderCache) -> Vec<Vec<f32>> {
    rows(model.logits(model.hidden(&[tokens.to_vec()], cache).unwrap()))
}

/// Logits of a text read in pieces of these lengths, over and over.
fn in_pieces(model: &Decoder, tokens: &[u32], lengths: &[usize]) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    let (mut rest, mut lengths, mut found) = (tokens, lengths.iter().cycle(), Vec::new());
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(*lengths.next().unwrap()));
        found.extend(read_on(model, piece, &mut cache));
        rest = after;
    }
    assert_eq!(cache.length(0), tokens.len());
    found
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

proptest! {
    #![proptest_config(settings(64))]

    #[test]
    fn a_short_text_has_the_logits_of_the_original(
        decoder in decoders(), attention in attentions(), seed in any::<u64>(), length in any::<prop::sample::Index>(),
    ) {
        let exact = (attention.local_chunks + 1) * attention.chunk_size;
        let tokens = text(1 + length.index(exact), seed);
        for device in devices() {
            let model = retrieving(decoder.clone(), attention.clone(), &device);
            let error = difference(&logits(&model, &tokens), &logits(&with_original_attention(&model), &tokens));
            prop_assert!(error <= TOLERANCE, "{} tokens differ by {error}", tokens.len());
        }
    }

    #[test]
    fn retrieving_every_key_gives_the_logits_of_the_original(
        decoder in decoders(), attention in attentions(), seed in any::<u64>(), length in 1usize..=50,
    ) {
        let attention = BlockAttentionConfig {
            retrieval: Retrieval::Blocks,
            meta_blocks: 50,
            threshold: 0.0,
            max_keys: 1024,
            max_sections: 50,
            max_chunks: None,
            ..attention
        };
        prop_assume!(attention.validate().is_ok());
        let length = stretched(&attention, length);
        let tokens = text(length, seed);
        for device in devices() {
            let model = retrieving(decoder.clone(), attention.clone(), &device);
            let error = difference(&logits(&model, &tokens), &logits(&with_original_attention(&model), &tokens));
            prop_assert!(error <= TOLERANCE, "{length} tokens differ by {error}");
        }
    }

    #[test]
    fn any_split_of_a_text_has_the_same_logits(
        decoder in decoders(), attention in attentions(), seed in any::<u64>(), length in 1usize..=45,
        lengths in prop::collection::vec(1usize..=20, 1..6),
    ) {
        let tokens = text(stretched(&attention, length), seed);
        for device in devices() {
            let model = retrieving(decoder.clone(), attention.clone(), &device);
            let at_once = logits(&model, &tokens);
            for lengths in [&lengths[..], &[1]] {
                let how = same(&in_pieces(&model, &tokens, lengths), &at_once, Some(&attention));
                prop_assert!(how.is_ok(), "pieces of {lengths:?}: {how:?}");
            }
        }
    }

    #[test]
    fn texts_read_together_have_the_logits_of_each_alone(
        decoder in decoders(), attention in attentions(), seed in any::<u64>(),
        // Up to five calls, each with so many new tokens of each of four texts; the first call has all four.
        calls in prop::collection::vec(prop::array::uniform4(0usize..=9), 0..5),
        first in prop::array::uniform4(1usize..=30),
    ) {
        let first = first.map(|length| stretched(&attention, length));
        let calls: Vec<[usize; 4]> =
            std::iter::once(first).chain(calls.into_iter().filter(|call| call.iter().sum::<usize>() > 0)).collect();
        let length = |text: usize| calls.iter().map(|call| call[text]).sum::<usize>();
        let texts: Vec<Vec<u32>> = (0..4).map(|at| text(length(at), seed.wrapping_add(at as u64))).collect();
        let lengths: Vec<usize> = (0..4).map(length).collect();
        for device in devices() {
            let model = retrieving(decoder.clone(), attention.clone(), &device);
            let mut cache = model.new_cache(&lengths).unwrap();
            let mut together: Vec<Vec<Vec<f32>>> = vec![Vec::new(); 4];
            for call in &calls {
                let new: Vec<Vec<u32>> =
                    (0..4).map(|at| texts[at][together[at].len()..][..call[at]].to_vec()).collect();
                let mut packed = rows(model.logits(model.hidden(&new, &mut cache).unwrap())).into_iter();
                together.iter_mut().zip(call).for_each(|(text, &count)| text.extend(packed.by_ref().take(count)));
                prop_assert!(packed.next().is_none());
            }
            for (at, tokens) in texts.iter().enumerate() {
                prop_assert_eq!(cache.length(at), tokens.len());
                let how = same(&together[at], &logits(&model, tokens), Some(&attention));
                prop_assert!(how.is_ok(), "text {at} of {lengths:?} in {calls:?}: {how:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(settings(32))]

    #[test]
    fn no_token_changes_the_logits_before_it(
        decoder in decoders(), attention in attentions(), seed in any::<u64>(), length in 1usize..=40,
        change in 1u32..VOCABULARY as u32,
    ) {
        let length = stretched(&attention, length);
        let tokens = text(length, seed);
        let chunk = attention.chunk_size;
        let borders = (0..length).step_by(chunk).flat_map(|start| [start.saturating_sub(1), start]);
        for device in devices() {
            let model = retrieving(decoder.clone(), attention.clone(), &device);
            let before = bits(&logits(&model, &tokens));
            for t in borders.clone().chain([seed as usize % length, length - 1]) {
                let mut changed = tokens.clone();
                changed[t] = (changed[t] + change) % VOCABULARY as u32;
                let after = bits(&logits(&model, &changed));
                prop_assert!(before[..t] == after[..t], "token {t} changes logits before it");
                prop_assert!(before[t] != after[t], "token {t} does not change its own logits");
            }
        }
    }

    #[test]
    fn a_bounded_state_has_constant_bytes(
        decoder in decoders(), attention in attentions(), limit in 1usize..=3, seed in any::<u64>(),
    ) {
        let bounded = BlockAttentionConfig {
            retrieval: Retrieval::State,
            max_chunks: Some(limit),
            chunk_size: 8,
            block_size: 4,
            ..attention.clone()
        };
        let chunk = bounded.chunk_size;
        let unbounded = BlockAttentionConfig { max_chunks: None, ..bounded.clone() };
        let tokens = text(25 * chunk, seed);
        for device in devices() {
            let bytes = |attention: BlockAttentionConfig, length: usize| {
                let model = retrieving(decoder.clone(), attention, &device);
                let mut cache = model.new_cache(&[tokens.len()]).unwrap();
                in_steps(&model, &tokens[..length], chunk, &mut cache);
                cache.bytes()
            };
            for phase in [0, 1, chunk - 1] {
                let [short, long] = [10, 24].map(|chunks| bytes(bounded.clone(), chunks * chunk + phase));
                prop_assert_eq!(short, long, "at token {} of a chunk", phase);
            }
            let [short, long] = [10, 24].map(|chunks| bytes(unbounded.clone(), chunks * chunk));
            prop_assert!(long > short, "without a bound the state grows");
        }
    }
}

/// Reads a text in pieces of `length` tokens.
fn in_steps(model: &Decoder, tokens: &[u32], length: usize, cache: &mut DecoderCache) {
    for piece in tokens.chunks(length) {
        model.hidden(&[piece.to_vec()], cache).unwrap();
    }
}

#[test]
fn a_long_prompt_read_in_prefill_pieces_has_the_same_last_logits() {
    let tokens = text(PREFILL_PIECE + 77, 9);
    for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
        for selector in [Selector::Index, Selector::Meta] {
            let chunk_size = if selector == Selector::Meta { 48 } else { 192 }; // a piece ends inside a chunk
            let attention = BlockAttentionConfig {
                retrieval,
                selector,
                chunk_size,
                meta_blocks: 4,
                max_keys: 50,
                exact_tokens: 0,
                ..Default::default()
            };
            for device in devices() {
                let model = retrieving(llama_like(), attention.clone(), &device);
                let mut cache = model.new_cache(&[tokens.len()]).unwrap();
                let last = rows(model.logits(prefill(&model, &tokens, &mut cache).unwrap()));
                let error = difference(&last, &logits(&model, &tokens)[tokens.len() - 1..]);
                assert!(error <= TOLERANCE, "{retrieval:?}, {selector:?}: differs by {error}");
                assert_eq!(cache.length(0), tokens.len());
            }
        }
    }
}

#[test]
fn layers_can_keep_the_original_attention() {
    let attention =
        BlockAttentionConfig { chunk_size: 64, local_chunks: 0, max_keys: 1, exact_tokens: 0, ..Default::default() };
    let tokens = text(250, 3);
    for device in devices() {
        let model = retrieving(llama_like(), attention.clone(), &device);
        let keeping = |layers: &[usize]| {
            let changed = model.with_config(|config| config.original_layers = layers.to_vec()).unwrap();
            logits(&changed, &tokens)
        };
        let original = logits(&with_original_attention(&model), &tokens);
        assert_eq!(bits(&keeping(&[0, 1])), bits(&original));
        for layers in [&[][..], &[0], &[1]] {
            assert!(difference(&keeping(layers), &original) > 0.01, "retrieval runs beside {layers:?}");
        }
        assert!(difference(&keeping(&[0]), &keeping(&[1])) > 0.01);
    }
}
