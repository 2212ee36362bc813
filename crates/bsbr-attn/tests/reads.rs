//! How much tokens read, against attention itself: values that are unit vectors show the weight of every position.
#![cfg(feature = "flex")]

use std::collections::BTreeSet;

use bsbr_attn::{
    AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Far, Kernel, KeysRead, Meta, Retrieval,
    Retrieved, Selector, block_shares,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

const TOKENS: usize = 96;
/// Long enough for an index of chunks of 64 tokens.
const LONG: usize = 400;

fn settings(retrieval: Retrieval, far: Far) -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        meta_blocks: 3,
        sink_tokens: 4,
        exact_tokens: 24,
        covariance_weight: 0.0,
        retrieval,
        selector: if retrieval == Retrieval::Blocks { Selector::Meta } else { Selector::Index },
        far,
        ..Default::default()
    }
}

fn index(far: Far) -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 64, sink_tokens: 4, exact_tokens: 150, far, ..Default::default() }
}

/// Small scores, so that no weight vanishes, and different for every pair.
fn rows(tokens: usize, count: usize, turn: f32) -> Tensor<4> {
    let numbers = (0..count * tokens).map(|at| (at as f32 * turn).sin() * 0.1).collect::<Vec<_>>();
    Tensor::<4>::from_data(TensorData::new(numbers, [1, 1, count, tokens]), &Device::flex())
}

/// The weight of each position for each token, one query head, and what was retrieved.
fn weights(
    attention: Option<&BlockAttentionConfig>,
    window: Option<usize>,
    tokens: usize,
) -> (Vec<Vec<f32>>, Retrieved) {
    let meta = attention.filter(|attention| attention.needs_meta()).map(|attention| Meta {
        query: Some(rows(tokens, tokens.div_ceil(attention.chunk_size), 2.11)),
        key: Some(rows(tokens, tokens / attention.block_size, 0.37)),
    });
    let unit = Tensor::<2>::eye(tokens, &Device::flex()).reshape([1, 1, tokens, tokens]);
    let config = CacheConfig {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: tokens,
        options: AttentionOptions { window, ..AttentionOptions::new(tokens) },
        attention: attention.cloned(),
        dtype: DType::F32,
        stored: DType::F32,
        kernel: Kernel::Fastest,
    };
    let mut cache = AttentionCache::new(config, &Device::flex()).expect("settings that fit");
    let read =
        cache.prefill(rows(tokens, tokens, 1.37), rows(tokens, tokens, 0.73), unit, meta).expect("inputs that fit");
    let numbers = read.reshape([tokens, tokens]).try_into_vec_as::<f32>().expect("numbers");
    (numbers.chunks_exact(tokens).map(<[f32]>::to_vec).collect(), cache.retrieved())
}

/// The positions each token reads.
fn positions(attention: Option<&BlockAttentionConfig>, window: Option<usize>) -> Vec<BTreeSet<usize>> {
    positions_of(weights(attention, window, TOKENS).0)
}

fn positions_of(weights: Vec<Vec<f32>>) -> Vec<BTreeSet<usize>> {
    let read = |row: Vec<f32>| (0..row.len()).filter(|&at| row[at] > 1e-8).collect();
    weights.into_iter().map(read).collect()
}

fn exact(attention: Option<&BlockAttentionConfig>, window: Option<usize>, tokens: usize) -> Vec<usize> {
    (0..tokens).map(|token| KeysRead::of_token(attention, window, token).exact as usize).collect()
}

fn lengths(read: &[BTreeSet<usize>]) -> Vec<usize> {
    read.iter().map(BTreeSet::len).collect()
}

#[test]
fn the_keys_counted_are_those_with_a_weight() {
    for window in [None, Some(30), Some(7)] {
        assert_eq!(exact(None, window, TOKENS), lengths(&positions(None, window)), "full, window {window:?}");
        let none = settings(Retrieval::None, Far::None);
        let found = lengths(&positions(Some(&none), window));
        assert_eq!(exact(Some(&none), window, TOKENS), found, "none, window {window:?}");
    }
    let changes: [fn(&mut BlockAttentionConfig); 6] = [
        |_| (),
        |settings| settings.exact_tokens = 0,
        |settings| settings.local_chunks = 0,
        |settings| settings.sink_tokens = 0,
        |settings| (settings.sink_tokens, settings.local_chunks) = (16, 3),
        |settings| settings.meta_blocks = 100,
    ];
    for change in changes {
        let mut blocks = settings(Retrieval::Blocks, Far::None);
        change(&mut blocks);
        let found = lengths(&positions(Some(&blocks), None));
        assert_eq!(exact(Some(&blocks), None, TOKENS), found, "{blocks:?}");
        let whole = KeysRead::of_text(Some(&blocks), None, TOKENS).exact as usize;
        assert_eq!(whole, found.iter().sum::<usize>());
    }
}

/// Under an index what the settings say and what was retrieved are together what has a weight.
#[test]
fn keys_counted_and_keys_retrieved_are_those_with_a_weight() {
    let changes: [fn(&mut BlockAttentionConfig); 6] = [
        |_| (),
        |settings| settings.exact_tokens = 0,
        |settings| settings.sink_tokens = 70,
        |settings| settings.max_keys = 9,
        |settings| (settings.fine_tokens, settings.max_sections) = (0, 1),
        |settings| settings.threshold = 0.9,
    ];
    for window in [None, Some(250), Some(66), Some(60)] {
        for change in changes {
            let mut settings = BlockAttentionConfig { threshold: 1.0 / 256.0, ..index(Far::None) };
            change(&mut settings);
            let (read, retrieved) = weights(Some(&settings), window, LONG);
            let (counted, found) = (exact(Some(&settings), window, LONG), lengths(&positions_of(read)));
            let more: Vec<usize> = found.iter().zip(&counted).map(|(found, counted)| found - counted).collect();
            let what = format!("window {window:?}, {settings:?}");
            assert_eq!(more.iter().sum::<usize>() as u64, retrieved.keys, "{what}");
            assert!(more.iter().all(|&keys| keys <= settings.max_keys), "{what}");
            let all = BlockAttentionConfig { max_keys: LONG, ..settings.clone() };
            let all = lengths(&positions_of(weights(Some(&all), window, LONG).0));
            let capped = all.iter().zip(&counted).filter(|(all, counted)| *all - *counted > settings.max_keys).count();
            assert_eq!(retrieved.capped, capped as u64, "{what}");
            if settings.threshold > 0.5 {
                assert_eq!(retrieved.keys, 0, "{what}");
            }
            let chooses = |&t: &usize| KeysRead::of_token(Some(&settings), window, t).summaries > 0;
            assert_eq!(retrieved.tokens, (0..LONG).filter(chooses).count() as u64, "{what}");
            for t in (0..LONG).filter(|t| !chooses(t)) {
                assert_eq!(found[t], (t + 1).min(window.unwrap_or(LONG)), "{what}: token {t}");
            }
        }
    }
}

#[test]
fn a_chosen_block_that_is_cut_reads_fewer_keys_than_are_counted_and_never_more() {
    for (sinks, window) in [(3, None), (5, None), (4, Some(50)), (6, Some(41))] {
        let blocks = BlockAttentionConfig { sink_tokens: sinks, ..settings(Retrieval::Blocks, Far::None) };
        let (counted, found) = (exact(Some(&blocks), window, TOKENS), lengths(&positions(Some(&blocks), window)));
        let mut same = 0;
        for (token, (&counted, &found)) in counted.iter().zip(&found).enumerate() {
            assert!(found <= counted && found + 8 > counted, "{sinks} {window:?} {token}: {found} of {counted}");
            same += usize::from(found == counted);
        }
        assert!(same > TOKENS / 2, "{sinks} {window:?}: {same} tokens read what is counted");
    }
}

/// Blocks of `size` tokens with a weight among positions that are not read exactly.
fn summarised(read: &BTreeSet<usize>, exact: &BTreeSet<usize>, size: usize) -> usize {
    read.difference(exact).map(|at| at / size).collect::<BTreeSet<_>>().len()
}

#[test]
fn summaries_are_the_blocks_that_count_without_being_read() {
    let near = positions(Some(&settings(Retrieval::None, Far::None)), None);
    let state = settings(Retrieval::State, Far::None);
    for (token, (read, near)) in positions(Some(&state), None).iter().zip(&near).enumerate() {
        let found = KeysRead::of_token(Some(&state), None, token);
        assert_eq!((found.exact, found.summaries), (near.len() as u64, summarised(read, near, 4) as u64), "{token}");
    }
    let bounded = BlockAttentionConfig { max_chunks: Some(3), ..state };
    assert_eq!(KeysRead::of_token(Some(&bounded), None, TOKENS - 1).summaries, 3);

    // Kept tokens are read as themselves; with the others dropped nothing else has a weight.
    let kept = BlockAttentionConfig { kept_tokens: 5, max_chunks: Some(0), ..settings(Retrieval::State, Far::None) };
    for (token, read) in positions(Some(&kept), None).iter().enumerate() {
        let found = KeysRead::of_token(Some(&kept), None, token);
        assert_eq!((found.exact, found.summaries), (read.len() as u64, 0), "{token}");
    }

    // Under `blocks` those chosen are scored as well: three of them.
    let mean = settings(Retrieval::Blocks, Far::Mean);
    let chosen = positions(Some(&settings(Retrieval::Blocks, Far::None)), None);
    for (token, (read, exact)) in positions(Some(&mean), None).iter().zip(&chosen).enumerate() {
        let found = KeysRead::of_token(Some(&mean), None, token).summaries;
        let left = summarised(read, exact, 4) as u64;
        assert_eq!(found, if left == 0 { 0 } else { left + 3 }, "{token}");
    }
}

#[test]
fn sections_scored_as_a_whole_count_once() {
    // Token 399: chunk 6, local from 320: 20 blocks.
    let all = BlockAttentionConfig { sink_tokens: 4, ..index(Far::Mean) };
    assert_eq!(KeysRead::of_token(Some(&all), None, 399), KeysRead { exact: 4 + 80, summaries: 20 });
    // Of five sections three lie further back than 100 tokens; more than one is not opened.
    let far = BlockAttentionConfig { fine_tokens: 100, max_sections: 1, ..all.clone() };
    assert_eq!(KeysRead::of_token(Some(&far), None, 399), KeysRead { exact: 4 + 80, summaries: 3 + 2 * 4 });
    let open = BlockAttentionConfig { max_sections: 3, ..far };
    assert_eq!(KeysRead::of_token(Some(&open), None, 399).summaries, 20);
    // The window of chunk 6, which begins at 384, reaches back to 285: one section.
    assert_eq!(KeysRead::of_token(Some(&all), Some(100), 399), KeysRead { exact: 80, summaries: 4 });
}

#[test]
fn shares_are_of_the_blocks_that_a_chunk_chooses_from() {
    let (query, keys) = (rows(TOKENS, TOKENS, 1.37), rows(TOKENS, TOKENS, 0.73));
    for (sink_tokens, window) in [(0, None), (4, None), (5, None), (5, Some(50)), (6, Some(41))] {
        let attention = BlockAttentionConfig { sink_tokens, ..settings(Retrieval::Blocks, Far::Mean) };
        let options = AttentionOptions { window, ..AttentionOptions::new(TOKENS) };
        let (full, _) = weights(None, window, TOKENS);
        let chunks = block_shares(&query, &keys, &attention, &options);
        assert!(!chunks.is_empty());
        for chunk in chunks {
            let start = chunk.chunk * attention.chunk_size;
            let first = sink_tokens.max(window.map_or(0, |window| (start + 1).saturating_sub(window)));
            let expected = first / 4..attention.local_start(chunk.chunk) / 4;
            assert_eq!(chunk.blocks, expected, "{sink_tokens}, {window:?}");
            let found = chunk.shares.try_into_vec_as::<f32>().unwrap();
            for (block, found) in expected.zip(found) {
                let held = (block * 4).max(sink_tokens)..(block + 1) * 4;
                let share = |t: usize| full[t][held.clone()].iter().sum::<f32>();
                let expected = (start..start + 8).map(share).sum::<f32>() / 8.0;
                assert!((found - expected).abs() < 1e-5, "block {block}: {found} instead of {expected}");
            }
        }
    }
}
