//! One function: however a text is cut into pieces, each token reads the same.

use std::ops::Range;

use bsbr_attn::{AttentionCache, BlockAttentionConfig, Retrieval};
use burn::tensor::Tensor;
use proptest::prelude::*;

use crate::common::{
    Case, Inputs, Rows, Runner, devices, difference, index::agree, index_cases, other_cases, settings,
};

const TOLERANCE: f64 = 1e-4;

/// Cases of every kind but the index, compressed states among them.
fn all_cases() -> impl Strategy<Value = Case> {
    (other_cases(), prop::sample::select(vec![1, 1, 2])).prop_map(|(mut case, factor)| {
        case.config.compression_factor = factor;
        case
    })
}

/// Pieces of random lengths that make up `tokens` tokens.
fn pieces(tokens: usize, lengths: &[usize]) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut lengths = lengths.iter().cycle();
    while let start = pieces.last().map_or(0, |piece| piece.end)
        && start < tokens
    {
        pieces.push(start..tokens.min(start + lengths.next().unwrap()));
    }
    pieces
}

fn in_pieces(case: &Case, inputs: &Inputs, pieces: &[Range<usize>], device: &Runner) -> Tensor<4> {
    let mut cache = case.cache(device);
    let outputs = pieces.iter().map(|piece| case.feed(&mut cache, inputs, piece.clone(), device));
    Tensor::cat(outputs.collect(), 2)
}

/// Takes tokens in without their queries.
fn append(case: &Case, cache: &mut AttentionCache, inputs: &Inputs, range: Range<usize>, device: &Runner) {
    let of = |rows: &Rows| rows.tensor(device).narrow(2, range.start, range.len());
    let meta = case.meta(inputs, range.clone(), device);
    cache.append(of(&inputs.keys), of(&inputs.values), meta).unwrap();
}

proptest! {
    #![proptest_config(settings(384))]

    #[test]
    fn any_split_of_a_text_reads_the_same(
        case in all_cases(),
        lengths in prop::collection::vec(1usize..=30, 1..8),
    ) {
        let inputs = case.inputs();
        for device in devices() {
            let at_once = case.attend(&inputs, &device);
            let split = in_pieces(&case, &inputs, &pieces(case.tokens, &lengths), &device);
            let error = difference(split, at_once.clone());
            prop_assert!(error <= TOLERANCE, "pieces of {lengths:?} differ by {error}");
        }
    }

    #[test]
    fn token_by_token_reads_the_same(case in all_cases()) {
        let inputs = case.inputs();
        for device in devices() {
            let decoded = in_pieces(&case, &inputs, &pieces(case.tokens, &[1]), &device);
            let error = difference(decoded, case.attend(&inputs, &device));
            prop_assert!(error <= TOLERANCE, "differs by {error}");
        }
    }

    #[test]
    fn appended_tokens_are_read_like_any_others(
        case in all_cases(),
        lengths in prop::collection::vec(1usize..=30, 1..8),
        appended in any::<prop::sample::Index>(),
    ) {
        let by_first_query =
            matches!(case.config.retrieval, Retrieval::State | Retrieval::Additive) && !case.config.needs_meta();
        prop_assume!(!by_first_query, "refuses to append");
        let inputs = case.inputs();
        let pieces = pieces(case.tokens, &lengths);
        let (before, after) = pieces.split_at(appended.index(pieces.len()));
        for device in devices() {
            let mut cache = case.cache(&device);
            for piece in before {
                append(&case, &mut cache, &inputs, piece.clone(), &device);
            }
            let start = cache.len();
            let outputs = after.iter().map(|piece| case.feed(&mut cache, &inputs, piece.clone(), &device));
            let outputs = Tensor::cat(outputs.collect(), 2);
            let expected = case.attend(&inputs, &device).narrow(2, start, case.tokens - start);
            let error = difference(outputs, expected);
            prop_assert!(error <= TOLERANCE, "{start} tokens appended, pieces of {lengths:?}: differs by {error}");
        }
    }

    #[test]
    fn the_cache_says_which_tokens_begin_chunks_and_end_blocks(case in all_cases(), length in 1usize..=30) {
        let inputs = case.inputs();
        let device = &devices()[0];
        let mut cache = case.cache(device);
        let BlockAttentionConfig { retrieval, chunk_size, block_size, .. } = case.config;
        let block = if retrieval == Retrieval::Additive { chunk_size } else { block_size };
        for piece in pieces(case.tokens, &[length]) {
            let starts: Vec<usize> = cache.chunk_starts(piece.len()).iter().map(|at| piece.start + at).collect();
            let ends: Vec<usize> = cache.block_ends(piece.len()).iter().map(|at| piece.start + at).collect();
            prop_assert_eq!(starts, piece.clone().filter(|t| t % chunk_size == 0).collect::<Vec<_>>());
            prop_assert_eq!(ends, piece.clone().filter(|t| t % block == block - 1).collect::<Vec<_>>());
            case.feed(&mut cache, &inputs, piece, device);
        }
    }
}

/// Pieces of an index case: shorter and longer than its blocks and chunks.
fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1usize..=20, 1usize..=200], 1..8)
}

/// Every way through a text has the same integers, but scores are rounded otherwise; so may a choice be that is a matter of that.
#[test]
#[allow(clippy::print_stderr)] // How rare it is that rounding decides.
fn any_split_of_a_text_chooses_the_same_keys() {
    let flipped = std::cell::Cell::new((0, 0));
    proptest!(settings(96), |(case in index_cases(), lengths in lengths())| {
        let inputs = case.inputs();
        for device in devices() {
            let at_once = case.attend(&inputs, &device);
            let split = in_pieces(&case, &inputs, &pieces(case.tokens, &lengths), &device);
            let more = agree(&case, &inputs, (split, at_once), 0, TOLERANCE)?;
            let rows = case.batch * case.heads * case.tokens;
            flipped.set((flipped.get().0 + more, flipped.get().1 + rows));
        }
    });
    let (flipped, rows) = flipped.get();
    eprintln!("{flipped} of {rows} rows chose otherwise by rounding");
    assert!(flipped * 2000 <= rows, "{flipped} of {rows} rows chose otherwise by rounding");
}

proptest! {
    #![proptest_config(settings(16))]

    #[test]
    fn token_by_token_chooses_the_same_keys(case in index_cases()) {
        let inputs = case.inputs();
        for device in devices() {
            let decoded = in_pieces(&case, &inputs, &pieces(case.tokens, &[1]), &device);
            agree(&case, &inputs, (decoded, case.attend(&inputs, &device)), 0, TOLERANCE)?;
        }
    }
}

proptest! {
    #![proptest_config(settings(64))]

    #[test]
    fn what_is_retrieved_is_counted_alike_in_any_split(case in index_cases(), lengths in lengths()) {
        let inputs = case.inputs();
        for device in devices() {
            let counted = |pieces: &[Range<usize>]| {
                let mut cache = case.cache(&device);
                for piece in pieces {
                    case.feed(&mut cache, &inputs, piece.clone(), &device);
                }
                cache.retrieved()
            };
            let whole = std::slice::from_ref(&(0..case.tokens)).to_vec();
            let (at_once, split) = (counted(&whole), counted(&pieces(case.tokens, &lengths)));
            prop_assert_eq!(at_once.tokens, split.tokens);
            // A key in ten thousand may lie on the threshold.
            prop_assert!(at_once.keys.abs_diff(split.keys) * 10_000 <= at_once.keys.max(10_000));
            prop_assert!(at_once.capped.abs_diff(split.capped) <= 1);
        }
    }

    #[test]
    fn tokens_appended_behind_those_that_found_the_index_are_read_like_any_others(
        case in index_cases(), lengths in lengths(), appended in any::<prop::sample::Index>(),
    ) {
        let inputs = case.inputs();
        let founding = (case.config.exact_tokens / case.config.chunk_size).max(case.config.local_chunks + 1)
            * case.config.chunk_size;
        prop_assume!(case.tokens > founding + 1);
        let last = founding + 1 + appended.index(case.tokens - founding - 1);
        for device in devices() {
            let mut cache = case.cache(&device);
            case.feed(&mut cache, &inputs, 0..founding, &device);
            append(&case, &mut cache, &inputs, founding..last, &device);
            let rest: Vec<Range<usize>> =
                pieces(case.tokens - last, &lengths).iter().map(|piece| last + piece.start..last + piece.end).collect();
            let outputs = rest.iter().map(|piece| case.feed(&mut cache, &inputs, piece.clone(), &device)).collect();
            let expected = case.attend(&inputs, &device).narrow(2, last, case.tokens - last);
            agree(&case, &inputs, (Tensor::cat(outputs, 2), expected), last, TOLERANCE)?;
        }
    }
}
