//! The map of what tokens read, against sums in f64 over the queries and keys that the model shows.

mod common;

use bsbr_attn::{BlockAttentionConfig, Far, Retrieval, Selector};
use bsbr_model::{
    AttentionMap, AttentionMapConfig, Decoder, DecoderConfig, LayerTrace, ModelError, PositionPolicy, SHARE,
    attention_map,
};
use common::{alibi, devices, gemma_like, gpt2_like, llama_like, retrieving, sandwich, sinks, text};

const TOKENS: usize = 230;

/// Rounding to ten-thousandths, twice, and of f32.
const ROUNDING: f64 = 1.5;

fn index() -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 64, exact_tokens: 0, threshold: 1.0 / 64.0, ..Default::default() }
}

fn map(model: &Decoder, tokens: &[u32], rows: usize) -> AttentionMap {
    let mut told = Vec::new();
    let config = AttentionMapConfig { rows, parts: 32 };
    let map = attention_map(model, tokens, config, |done, total| told.push((done, total))).unwrap();
    assert_eq!(told, [(1, 2), (2, 2)]);
    map
}

/// Queries and keys of every layer, `[heads][tokens][width]`.
fn traced(model: &Decoder, tokens: &[u32]) -> Vec<[Vec<Vec<Vec<f64>>>; 2]> {
    let mut layers = Vec::new();
    let mut cache = model.new_cache(&[tokens.len()]).unwrap();
    let rows = |tensor: burn::tensor::Tensor<4>| {
        let [_, heads, tokens, width] = tensor.dims();
        let numbers = tensor.try_into_vec_as::<f32>().unwrap();
        let row = |at: usize| numbers[at * width..(at + 1) * width].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        (0..heads).map(|head| (0..tokens).map(|t| row(head * tokens + t)).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    model
        .trace(tokens, &mut cache, &mut |trace: LayerTrace| layers.push([rows(trace.query), rows(trace.keys)]))
        .unwrap();
    layers
}

/// What full attention gives to each token that the one at `t` sees, and the first of these.
fn full(
    model: &Decoder,
    layer: usize,
    [query, keys]: &[Vec<Vec<Vec<f64>>>; 2],
    head: usize,
    t: usize,
) -> (usize, Vec<f64>) {
    let decoder: &DecoderConfig = &model.config().decoder;
    let keys = &keys[head / (decoder.heads / decoder.kv_heads)];
    let first = decoder.window(layer).map_or(0, |window| (t + 1).saturating_sub(window));
    let score = |i: usize| {
        let dot: f64 = query[head][t].iter().zip(&keys[i]).map(|(a, b)| a * b).sum();
        let score = dot * decoder.attention_scale;
        let score = decoder.attention_softcap.map_or(score, |cap| cap * (score / cap).tanh());
        match decoder.positions {
            bsbr_model::Positions::Alibi { factor } => {
                score - factor * bsbr_attn::AttentionOptions::alibi_slopes(decoder.heads)[head] * (t - i) as f64
            }
            _ => score,
        }
    };
    // A sink stands beside the keys.
    let sink = model.blocks[layer].attention.sink_logits.as_ref().map(|sinks| f64::from(sinks[head]));
    let scores: Vec<f64> = (first..=t).map(score).chain(sink).collect();
    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
    let masses: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
    let sum: f64 = masses.iter().sum();
    (first, masses[..=t - first].iter().map(|mass| mass / sum).collect())
}

/// What holds of every map.
fn assert_whole(map: &AttentionMap) {
    for head in map.layers.iter().flat_map(|layer| &layer.heads) {
        for (row, &t) in map.rows.iter().enumerate() {
            let parts = &head.parts[row];
            let sum = |of: &dyn Fn(&bsbr_model::PartShare) -> f64| parts.iter().map(of).sum::<f64>();
            let many = ROUNDING * parts.len() as f64;
            let near = |a: f64, b: f64| assert!((a - b).abs() <= many, "token {t}: {a} and {b}");
            let (exact, statistics) = (sum(&|part| f64::from(part.2)), sum(&|part| f64::from(part.3)));
            near(exact, f64::from(head.near[row]) + f64::from(head.chosen[row]));
            near(statistics, f64::from(head.statistics[row]));
            let sink = head.sink.get(row).map_or(0.0, |&share| f64::from(share));
            near(exact + statistics + sink, SHARE);
            let full = sum(&|part| f64::from(part.4));
            let sink_of_full = if head.sink.is_empty() { 0.0 } else { SHARE - full };
            near(full + sink_of_full, SHARE);
            let apart = sum(&|part| (f64::from(part.2) + f64::from(part.3) - f64::from(part.4)).abs());
            let apart = (apart + (sink - sink_of_full).abs()) / 2.0;
            near(apart, f64::from(head.apart[row]));
            let keys = sum(&|part| f64::from(part.1));
            assert_eq!(keys as u32, head.near_keys[row] + head.chosen_keys[row], "token {t}");
            assert!(parts.iter().all(|part| (part.0 as usize * map.part) <= t), "token {t} reads what comes later");
        }
    }
}

#[test]
fn what_full_attention_gives_is_a_softmax_over_the_queries_and_keys_of_the_layer() {
    let tokens = text(TOKENS, 3);
    for decoder in [gpt2_like(), llama_like(), gemma_like(), sandwich(), alibi(), sinks()] {
        let model = retrieving(decoder, index(), &devices()[0]);
        let map = map(&model, &tokens, 23);
        assert_eq!((map.tokens, map.part, map.rows.len()), (TOKENS, 8, 23));
        assert_whole(&map);
        let traced = traced(&model, &tokens);
        for (layer, shown) in map.layers.iter().enumerate() {
            assert_eq!((shown.layer, shown.window), (layer, model.config().decoder.window(layer)));
            for ((head, shown), (row, &t)) in
                shown.heads.iter().enumerate().flat_map(|head| map.rows.iter().enumerate().map(move |row| (head, row)))
            {
                let (first, weights) = full(&model, layer, &traced[layer], head, t);
                let mut expected = vec![0.0; TOKENS.div_ceil(map.part)];
                weights.iter().enumerate().for_each(|(at, weight)| expected[(first + at) / map.part] += weight * SHARE);
                for (part, expected) in expected.into_iter().enumerate() {
                    let found = shown.parts[row].iter().find(|share| share.0 as usize == part);
                    let found = found.map_or(0.0, |share| f64::from(share.4));
                    assert!((found - expected).abs() <= ROUNDING, "layer {layer}, token {t}: {found} and {expected}");
                }
            }
        }
    }
}

#[test]
fn without_retrieval_the_neighbourhood_and_the_sinks_are_read_by_their_own_softmax() {
    let tokens = text(TOKENS, 4);
    let attention = BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        sink_tokens: 3,
        retrieval: Retrieval::None,
        ..Default::default()
    };
    let model = retrieving(llama_like(), attention.clone(), &devices()[0]);
    let map = map(&model, &tokens, 40);
    assert_whole(&map);
    let traced = traced(&model, &tokens);
    for (layer, shown) in map.layers.iter().enumerate() {
        assert_eq!(shown.retrieval, Some(Retrieval::None));
        for (head, shown) in shown.heads.iter().enumerate() {
            for (row, &t) in map.rows.iter().enumerate() {
                let (_, weights) = full(&model, layer, &traced[layer], head, t);
                let local = attention.local_start(t / attention.chunk_size);
                let read: Vec<usize> = (0..=t).filter(|&i| i < 3 || i >= local).collect();
                let covered: f64 = read.iter().map(|&i| weights[i]).sum();
                assert_eq!(
                    (shown.near_keys[row] as usize, shown.chosen_keys[row], shown.runs[row]),
                    (read.len(), 0, 0)
                );
                assert!((f64::from(shown.covered[row]) - covered * SHARE).abs() <= ROUNDING);
                assert_eq!(u64::from(shown.near[row]), SHARE as u64);
                // All that is read gets what the rest would have had, in equal shares of its own.
                let mut expected = vec![0.0; TOKENS.div_ceil(map.part)];
                read.iter().for_each(|&i| expected[i / map.part] += weights[i] / covered * SHARE);
                for share in &shown.parts[row] {
                    let expected = expected[share.0 as usize];
                    assert!((f64::from(share.2) - expected).abs() <= ROUNDING, "token {t}: {share:?} and {expected}");
                }
            }
        }
    }
}

#[test]
fn of_a_short_text_everything_is_read_and_nothing_lies_apart() {
    let tokens = text(100, 5);
    for attention in [index(), BlockAttentionConfig { exact_tokens: 512, ..index() }] {
        let model = retrieving(gpt2_like(), attention, &devices()[0]);
        let map = map(&model, &tokens, 100);
        assert_eq!(map.rows, (0..100).collect::<Vec<_>>());
        for head in map.layers.iter().flat_map(|layer| &layer.heads) {
            let all = |of: &[u16], expected: u16| of.iter().all(|&share| share.abs_diff(expected) <= 1);
            assert!(all(&head.near, 10_000) && all(&head.covered, 10_000) && all(&head.apart, 0), "{head:?}");
            assert!(head.near_keys.iter().enumerate().all(|(t, &keys)| keys as usize == t + 1));
        }
    }
}

#[test]
fn other_kinds_of_retrieval_and_original_layers_have_maps_of_their_own() {
    let tokens = text(TOKENS, 6);
    let small =
        BlockAttentionConfig { chunk_size: 16, block_size: 4, exact_tokens: 0, sink_tokens: 4, ..Default::default() };
    let meta = BlockAttentionConfig { selector: Selector::Meta, meta_blocks: 3, far: Far::Mean, ..small.clone() };
    let model = retrieving(llama_like(), meta.clone(), &devices()[0]);
    let found = map(&model, &tokens, 10);
    assert_whole(&found);
    // The last token chooses three blocks and reads the others by their statistics: those between 4 and 208.
    let last = &found.layers[1].heads[3];
    assert_eq!((last.chosen_keys[9], last.runs[9]), (12, 51 - 3));
    // The same without meta projections, by tokens that are kept.
    let kept = BlockAttentionConfig { retrieval: Retrieval::State, kept_tokens: 20, max_chunks: Some(2), ..small };
    let model = retrieving(llama_like(), kept, &devices()[0]);
    let found = map(&model, &tokens, 10);
    assert_whole(&found);
    assert_eq!((found.layers[0].heads[0].chosen_keys[9], found.layers[0].heads[0].runs[9]), (20, 1));
    let original = model.with_config(|config| config.original_layers = vec![1]).unwrap();
    let found = map(&original, &tokens, 10);
    assert_eq!(found.layers[1].retrieval, None);
    assert!(found.layers[1].heads.iter().all(|head| head.covered.iter().all(|&share| share >= 9_999)));
    assert_whole(&found);
}

#[test]
fn what_cannot_be_shown_is_refused() {
    let model = retrieving(gpt2_like(), index(), &devices()[0]);
    let refused = |model: &Decoder, length: usize, rows: usize| {
        attention_map(model, &text(length, 1), AttentionMapConfig { rows, parts: 4 }, |_, _| ()).unwrap_err()
    };
    assert!(refused(&model, 10, 0).to_string().starts_with("0 rows and 4 parts are asked for"));
    assert!(matches!(refused(&model, 0, 1), ModelError::EmptyInput));
    assert!(matches!(refused(&model, 257, 1), ModelError::TooLong { .. }));
    let slides = model.with_config(|config| config.position_policy = PositionPolicy::Slide).unwrap();
    assert!(refused(&slides, 257, 1).to_string().contains("at most 256 tokens; the text has 257"));
}
