//! Where keys carry no positions, blocks are found by what they hold: their order does not matter, and under ALiBi only
//! as much as the model itself says.

use std::ops::Range;

use bsbr_attn::{
    AttentionOptions, BlockAttentionConfig, Far, attend,
    index::{BLOCK, SECTION},
};
use proptest::{prelude::*, sample::Index};

use crate::common::{Rows, devices, difference, index::agree, index_cases, other_cases, settings};

/// Exchanges the tokens of two blocks.
fn swap(rows: &mut Rows, a: usize, b: usize, block: usize) {
    let [batch, heads, _, _] = rows.shape;
    for (text, head) in (0..batch).flat_map(|text| (0..heads).map(move |head| (text, head))) {
        for token in 0..block {
            let first = rows.row_mut(text, head, a * block + token).to_vec();
            let second = rows.row_mut(text, head, b * block + token).to_vec();
            rows.row_mut(text, head, a * block + token).copy_from_slice(&second);
            rows.row_mut(text, head, b * block + token).copy_from_slice(&first);
        }
    }
}

proptest! {
    #![proptest_config(settings(256))]

    #[test]
    fn without_positions_the_order_of_far_blocks_does_not_matter(
        mut case in other_cases(), a in any::<Index>(), b in any::<Index>(),
    ) {
        (case.options.window, case.options.alibi, case.config.max_chunks) = (None, None, None);
        case.far = None;
        // Which tokens are kept depends on what was kept before them.
        case.config.kept_tokens = 0;
        let block = case.config.statistics_block();
        let chunk = (case.tokens - 1) / case.config.chunk_size;
        // Blocks that the last chunk may read and that hold no sink.
        let far = case.config.sink_tokens.div_ceil(block)..case.config.local_start(chunk) / block;
        prop_assume!(far.len() > 1);
        let [a, b] = [a, b].map(|index| far.start + index.index(far.len()));
        let inputs = case.inputs();
        let mut swapped = inputs.clone();
        for rows in [&mut swapped.keys, &mut swapped.values, &mut swapped.meta_key] {
            swap(rows, a, b, block);
        }
        let last = chunk * case.config.chunk_size;
        for device in devices() {
            let read = |inputs| case.attend(inputs, &device).narrow(2, last, case.tokens - last);
            let (before, after) = (read(&inputs), read(&swapped));
            // The published formula is not normalised: its outputs reach tens.
            let size = before.clone().abs().max().into_scalar::<f32>().max(1.0);
            let error = difference(before, after);
            prop_assert!(error <= 1e-5 * f64::from(size), "exchanging {a} and {b} changes {error}");
        }
    }
}

proptest! {
    #![proptest_config(settings(64))]

    #[test]
    fn without_positions_the_order_of_sections_behind_those_that_found_the_index_does_not_matter(
        mut case in index_cases(), a in any::<Index>(), b in any::<Index>(),
    ) {
        (case.options.window, case.options.alibi, case.far) = (None, None, None);
        case.config.exact_tokens = 0;
        // With far sections it matters which of them are far.
        case.config.fine_tokens = 8192;
        let founding = (case.config.local_chunks + 1) * case.config.chunk_size;
        case.tokens = founding + 256 + case.config.local_chunks * case.config.chunk_size + case.tokens % 50;
        let chunk = (case.tokens - 1) / case.config.chunk_size;
        let far = founding / SECTION..case.config.local_start(chunk) / SECTION;
        prop_assume!(far.len() > 1);
        let [a, b] = [a, b].map(|index| far.start + index.index(far.len()));
        let inputs = case.inputs();
        let mut swapped = inputs.clone();
        for rows in [&mut swapped.keys, &mut swapped.values] {
            swap(rows, a, b, SECTION);
        }
        let last = chunk * case.config.chunk_size;
        for device in devices() {
            let read = |inputs| case.attend(inputs, &device).narrow(2, last, case.tokens - last);
            agree(&case, &inputs, (read(&swapped), read(&inputs)), last, 1e-5)?;
        }
    }
}

const TOKENS: usize = 320;
const HEADS: usize = 4;

/// Above it a key is read.
const THRESHOLD: f64 = 1.0 / 512.0;

/// What the last token reads of the tokens `marked`, in each head, when the score of theirs is `score` and of all others
/// 0, less the distance.
fn share_of(marked: Range<usize>, score: f32) -> Vec<f64> {
    let case_rows = |value: &dyn Fn(usize) -> f32| {
        let data = (0..HEADS).flat_map(|_| (0..TOKENS).flat_map(|token| [value(token), 0.0])).collect();
        Rows { shape: [1, HEADS, TOKENS, 2], data }
    };
    let mark = |token: usize| if marked.contains(&token) { 1.0 } else { 0.0 };
    let (query, keys, values) = (case_rows(&|_| 1.0), case_rows(&|token| score * mark(token)), case_rows(&mark));
    let config = BlockAttentionConfig {
        chunk_size: 64,
        local_chunks: 1,
        sink_tokens: 0,
        threshold: THRESHOLD,
        far: Far::None,
        exact_tokens: 0,
        ..Default::default()
    };
    let options = AttentionOptions { scale: 1.0, alibi: Some(1.0), ..AttentionOptions::new(2) };
    let shares = devices().into_iter().map(|device| {
        let [query, keys, values] = [&query, &keys, &values].map(|rows| rows.tensor(&device));
        let read = attend(query, keys, values, None, Some(&config), options.clone()).unwrap();
        let data = read.narrow(2, TOKENS - 1, 1).try_into_vec_as::<f32>().unwrap();
        data.chunks_exact(2).map(|row| f64::from(row[0])).collect::<Vec<_>>()
    });
    shares.last().expect("a device")
}

/// The same by hand: a softmax over the last 128 tokens and those of the blocks that pass, each by the distance to its middle.
fn expected_share(marked: Range<usize>, score: f64, slope: f64) -> f64 {
    let far = TOKENS - 128;
    let weight = |token: usize, at: f64| {
        let score = if marked.contains(&token) { score } else { 0.0 };
        (score - slope * ((TOKENS - 1) as f64 - at)).exp()
    };
    let near: f64 = (far..TOKENS).map(|token| weight(token, token as f64)).sum();
    let of_block = |block: usize| weight(block * BLOCK, (block * BLOCK) as f64 + 7.5);
    let all = near + (0..far / BLOCK).map(|block| BLOCK as f64 * of_block(block)).sum::<f64>();
    let passes = |token: &usize| of_block(token / BLOCK) > THRESHOLD * all;
    let read = near + (0..far).filter(passes).map(|token| weight(token, token as f64)).sum::<f64>();
    marked.clone().filter(passes).map(|token| weight(token, token as f64)).sum::<f64>() / read
}

#[test]
fn under_alibi_keys_are_chosen_for_what_they_hold_less_their_distance() {
    let slopes = AttentionOptions::alibi_slopes(HEADS);
    let (mut read, mut left) = (0, 0);
    for block in 0..(TOKENS - 128) / BLOCK {
        let marked = block * BLOCK..(block + 1) * BLOCK;
        for score in [30.0, 9.0, 3.0] {
            for (found, &slope) in share_of(marked.clone(), score as f32).into_iter().zip(&slopes) {
                let expected = expected_share(marked.clone(), score, slope);
                let right = (found - expected).abs() < 1e-5;
                assert!(right, "block {block}, {score}, slope {slope}: {found} instead of {expected}");
                *(if expected > 0.0 { &mut read } else { &mut left }) += 1;
            }
        }
    }
    assert!(read > 20 && left > 20, "{read} read, {left} left");
}
