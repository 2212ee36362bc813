//! How much tokens read, against attention itself: values that are unit vectors show the weight of every position.
#![cfg(feature = "flex")]

use std::collections::BTreeSet;

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Far, KeysRead, Retrieval, attend};
use burn::tensor::{Device, Tensor, TensorData};

const TOKENS: usize = 96;

fn settings(retrieval: Retrieval, far: Far) -> BlockAttentionConfig {
    BlockAttentionConfig {
        chunk_size: 8,
        block_size: 4,
        top_k: 3,
        sink_tokens: 4,
        exact_tokens: 24,
        fine_tokens: 1 << 20,
        covariance_weight: 0.0,
        retrieval,
        far,
        ..Default::default()
    }
}

/// The weight of each position for each token, one query head.
fn weights(attention: Option<&BlockAttentionConfig>, window: Option<usize>) -> Vec<Vec<f32>> {
    let device = Device::flex();
    // Small scores, so that no weight vanishes, and different for every pair.
    let rows = |turn: f32| {
        let numbers = (0..TOKENS * TOKENS).map(|at| (at as f32 * turn).sin() * 0.1).collect::<Vec<_>>();
        Tensor::<4>::from_data(TensorData::new(numbers, [1, 1, TOKENS, TOKENS]), &device)
    };
    let unit = Tensor::<2>::eye(TOKENS, &device).reshape([1, 1, TOKENS, TOKENS]);
    let options = AttentionOptions { window, ..AttentionOptions::new(TOKENS) };
    let read = attend(rows(1.37), rows(0.73), unit, None, attention, options).expect("settings that fit");
    let numbers = read.reshape([TOKENS, TOKENS]).try_into_vec_as::<f32>().expect("numbers");
    numbers.chunks_exact(TOKENS).map(<[f32]>::to_vec).collect()
}

/// The positions each token reads.
fn positions(attention: Option<&BlockAttentionConfig>, window: Option<usize>) -> Vec<BTreeSet<usize>> {
    let read = |row: Vec<f32>| (0..TOKENS).filter(|&at| row[at] > 1e-8).collect();
    weights(attention, window).into_iter().map(read).collect()
}

fn exact(attention: Option<&BlockAttentionConfig>, window: Option<usize>) -> Vec<usize> {
    (0..TOKENS).map(|token| KeysRead::of_token(attention, window, token).exact as usize).collect()
}

#[test]
fn the_keys_counted_are_those_with_a_weight() {
    for window in [None, Some(30), Some(7)] {
        let lengths = |read: Vec<BTreeSet<usize>>| read.iter().map(BTreeSet::len).collect::<Vec<_>>();
        assert_eq!(exact(None, window), lengths(positions(None, window)), "full, window {window:?}");
        let none = settings(Retrieval::None, Far::None);
        assert_eq!(exact(Some(&none), window), lengths(positions(Some(&none), window)), "none, window {window:?}");
    }
    let changes: [fn(&mut BlockAttentionConfig); 8] = [
        |_| (),
        |settings| settings.exact_tokens = 0,
        |settings| settings.local_chunks = 0,
        |settings| settings.sink_tokens = 0,
        |settings| (settings.sink_tokens, settings.local_chunks) = (16, 3),
        |settings| settings.top_k = 100,
        |settings| (settings.fine_tokens, settings.section_size, settings.top_sections) = (16, 8, 2),
        |settings| {
            (settings.fine_tokens, settings.section_size, settings.top_sections) = (16, 4, 2);
            (settings.middle_tokens, settings.page_size, settings.top_pages) = (20, 8, 1);
        },
    ];
    for change in changes {
        let mut blocks = settings(Retrieval::Blocks, Far::None);
        change(&mut blocks);
        let found: Vec<usize> = positions(Some(&blocks), None).iter().map(BTreeSet::len).collect();
        assert_eq!(exact(Some(&blocks), None), found, "{blocks:?}");
        let whole = KeysRead::of_text(Some(&blocks), None, TOKENS).exact as usize;
        assert_eq!(whole, found.iter().sum::<usize>());
    }
}

#[test]
fn a_chosen_block_that_is_cut_reads_fewer_keys_than_are_counted_and_never_more() {
    for (sinks, window) in [(3, None), (5, None), (4, Some(50)), (6, Some(41))] {
        let blocks = BlockAttentionConfig { sink_tokens: sinks, ..settings(Retrieval::Blocks, Far::None) };
        let (counted, found) = (exact(Some(&blocks), window), positions(Some(&blocks), window));
        let mut same = 0;
        for (token, (counted, found)) in counted.iter().zip(&found).enumerate() {
            let found = found.len();
            assert!(found <= *counted && found + 8 > *counted, "{sinks} {window:?} {token}: {found} of {counted}");
            same += usize::from(found == *counted);
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
fn sections_and_pages_scored_as_a_whole_count_once() {
    // Token 95: chunk 11, local from 80. Blocks 1 to 19 are candidates; 16 tokens before 80 are scored finely, so the
    // sections of 8, 0 to 7, are distant. Two are opened: 8 sections, 2 x 2 blocks of them, 4 fine blocks.
    let two_levels = BlockAttentionConfig {
        fine_tokens: 16,
        section_size: 8,
        top_sections: 2,
        ..settings(Retrieval::Blocks, Far::Mean)
    };
    let found = KeysRead::of_token(Some(&two_levels), None, 95);
    assert_eq!(found, KeysRead { exact: 4 + 16 + 3 * 4, summaries: 8 + 4 + 4 });
    // Of the sections those 0 to 5 are in pages of 16, three of which one is opened: 3 pages, 2 sections of it, 2 others.
    let pages = BlockAttentionConfig { middle_tokens: 24, page_size: 16, top_pages: 1, ..two_levels.clone() };
    let found = KeysRead::of_token(Some(&pages), None, 95);
    assert_eq!(found, KeysRead { exact: 4 + 16 + 3 * 4, summaries: 3 + 2 + 2 + 4 + 4 });
    let one_level = BlockAttentionConfig { fine_tokens: 1 << 20, ..two_levels };
    assert_eq!(KeysRead::of_token(Some(&one_level), None, 95), KeysRead { exact: 32, summaries: 19 });
}
