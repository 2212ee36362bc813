//! One function: however a text is cut into pieces, each token reads the same.

use std::ops::Range;

use bsbr_attn::{AttentionCache, BlockAttentionConfig, Retrieval};
use burn::tensor::Tensor;
use proptest::prelude::*;

use crate::common::{Case, Inputs, Rows, Runner, cases, devices, difference, settings};

const TOLERANCE: f64 = 1e-4;

/// Cases of every kind, compressed states among them.
fn all_cases() -> impl Strategy<Value = Case> {
    (cases(), prop::sample::select(vec![1, 1, 2])).prop_map(|(mut case, factor)| {
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
