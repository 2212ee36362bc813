//! How BSBR applies in models that limit their own attention: a layer whose window lies inside the exact set keeps its
//! window, global layers become BSBR, and so do layers that know distances only or no positions at all.

mod common;

use bsbr_attn::{BlockAttentionConfig, Retrieval, Selector};
use bsbr_model::{Decoder, DecoderConfig};
use common::{alibi, devices, difference, gemma_like, logits, retrieving, text, without_positions};

const TOLERANCE: f64 = 1e-4;
const CHUNK: usize = 64;
const LOCAL_CHUNKS: usize = 1;
const LENGTH: usize = 250;
/// The longest window that every token finds in its local region: the first token of a chunk has the shortest.
const INSIDE: usize = LOCAL_CHUNKS * CHUNK + 1;

/// One setting of every kind.
fn attentions() -> impl Iterator<Item = BlockAttentionConfig> {
    let kinds = [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive];
    kinds.into_iter().flat_map(|retrieval| {
        [Selector::Index, Selector::Meta].map(|selector| BlockAttentionConfig {
            chunk_size: CHUNK,
            block_size: 2,
            local_chunks: LOCAL_CHUNKS,
            sink_tokens: 2,
            meta_blocks: 1,
            max_keys: 2,
            retrieval,
            selector,
            exact_tokens: 0,
            ..Default::default()
        })
    })
}

/// As Gemma 2, whose layers are windowed and global by turns.
fn windowed(windows: [Option<usize>; 2]) -> DecoderConfig {
    DecoderConfig { windows: windows.to_vec(), ..gemma_like() }
}

/// Logits of the original, and with BSBR in the layers of `model` but not in `kept`.
fn both(model: &Decoder, tokens: &[u32], kept: &[usize]) -> [Vec<Vec<f32>>; 2] {
    let changed = model.with_config(|config| config.original_layers = kept.to_vec()).unwrap();
    let original = model.with_config(|config| config.attention = None).unwrap();
    [logits(&original, tokens), logits(&changed, tokens)]
}

#[test]
fn a_layer_whose_window_lies_inside_the_exact_set_keeps_its_window() {
    let tokens = text(LENGTH, 1);
    for attention in attentions() {
        let inside = Some(INSIDE);
        for (windows, global) in [([inside, None], &[1][..]), ([None, inside], &[0]), ([Some(5), inside], &[])] {
            for device in devices() {
                let model = retrieving(windowed(windows), attention.clone(), &device);
                let [original, changed] = both(&model, &tokens, global);
                let error = difference(&original, &changed);
                assert!(error <= TOLERANCE, "{:?} {windows:?}: {error}", attention.retrieval);
            }
        }
    }
}

#[test]
fn one_token_more_and_a_windowed_layer_retrieves_as_well() {
    let tokens = text(LENGTH, 1);
    // What nothing is retrieved for shows what left the exact set.
    let attention = BlockAttentionConfig { sink_tokens: 0, ..attentions().next().unwrap() };
    for device in devices() {
        let model = retrieving(windowed([Some(INSIDE + 1), None]), attention.clone(), &device);
        let [original, changed] = both(&model, &tokens, &[1]);
        assert!(difference(&original, &changed) > 0.01);
    }
}

#[test]
fn global_layers_become_bsbr_beside_windowed_ones() {
    let tokens = text(LENGTH, 2);
    for attention in attentions() {
        for device in devices() {
            let model = retrieving(windowed([Some(INSIDE), None]), attention.clone(), &device);
            let [original, global] = both(&model, &tokens, &[0]);
            assert!(difference(&original, &global) > 0.01, "{:?}", attention.retrieval);
            let [_, all] = both(&model, &tokens, &[]);
            assert!(
                difference(&global, &all) <= TOLERANCE,
                "{:?}: the windowed layer changes too",
                attention.retrieval
            );
        }
    }
}

#[test]
fn nothing_outside_a_window_is_read_whatever_is_retrieved() {
    // The window of the last token, the first of its chunk, begins with a block: one that it cut would be chosen or not by
    // the mean of all its keys. The first tokens of a text decide in which steps an index counts, so every key passes there.
    let window = 2 * CHUNK + 1;
    let tokens = text(3 * CHUNK + 1, 3);
    for attention in attentions() {
        let attention = BlockAttentionConfig { threshold: 0.0, max_keys: 1000, ..attention };
        for device in devices() {
            let one = DecoderConfig { layers: 1, windows: vec![Some(window)], ..gemma_like() };
            let model = retrieving(one, attention.clone(), &device);
            let last = |tokens: &[u32]| logits(&model, tokens)[tokens.len() - 1..].to_vec();
            let before = last(&tokens);
            let first_seen = tokens.len() - window;
            let mut changed = tokens.clone();
            changed[..first_seen].iter_mut().for_each(|token| *token = (*token + 1) % 40);
            assert_eq!(last(&changed), before, "{:?} {:?}", attention.retrieval, attention.selector);
        }
    }
}

#[test]
fn layers_with_alibi_and_layers_without_positions_become_bsbr() {
    let tokens = text(LENGTH, 4);
    for decoder in [alibi(), without_positions()] {
        for attention in attentions() {
            for device in devices() {
                let model = retrieving(decoder.clone(), attention.clone(), &device);
                let [original, changed] = both(&model, &tokens, &[0]);
                let exact = (LOCAL_CHUNKS + 1) * CHUNK;
                assert!(difference(&original[..exact], &changed[..exact]) <= TOLERANCE);
                assert!(difference(&original, &changed) > 0.01, "{:?}", attention.retrieval);
            }
        }
    }
}
