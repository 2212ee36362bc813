//! Causal: a token changes nothing before it, bit for bit, in every kind.

use bsbr_attn::{AttentionOptions, BlockAttentionConfig};
use burn::tensor::{DType, Tensor};
use proptest::{prelude::*, sample::Index};

use crate::common::{Case, Inputs, Rows, Runner, bits, devices, index_cases, other_cases, settings};

/// Everything that is known of token `t`, in every row of the batch, replaced by larger numbers.
fn perturbed(inputs: &Inputs, t: usize) -> Inputs {
    let mut changed = inputs.clone();
    let Inputs { query, keys, values, meta_query, meta_key } = &mut changed;
    for rows in [query, keys, values, meta_query, meta_key] {
        let [batch, heads, _, width] = rows.shape;
        let other = Rows::random([batch, heads, 1, width], 77 + t as u64);
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let values = other.row(b, h, 0);
            rows.row_mut(b, h, t).iter_mut().zip(values).for_each(|(x, y)| *x = 3.0 * y as f32);
        }
    }
    changed
}

fn assert_causal(
    case: &Case,
    attend: impl Fn(&Inputs) -> Tensor<4>,
    changes: impl Iterator<Item = usize>,
) -> Result<(), TestCaseError> {
    let inputs = case.inputs();
    let before = bits(attend(&inputs));
    for t in changes {
        let after = bits(attend(&perturbed(&inputs, t)));
        for at in 0..before.len() / case.head_dim {
            let row = at * case.head_dim..(at + 1) * case.head_dim;
            let same = before[row.clone()] == after[row];
            let token = at % case.tokens;
            prop_assert!(same || token >= t, "token {t} changes what token {token} reads");
            prop_assert!(!same || token != t, "token {t} changes nothing for itself");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(settings(96))]

    #[test]
    fn no_token_changes_what_an_earlier_one_reads(case in other_cases()) {
        for device in devices() {
            // Every token, and so every border of a chunk and of a block.
            assert_causal(&case, |inputs| case.attend(inputs, &device), 0..case.tokens)?;
        }
    }
}

proptest! {
    #![proptest_config(settings(32))]

    #[test]
    fn no_token_changes_what_an_earlier_one_reads_through_an_index(
        case in index_cases(), others in prop::collection::vec(any::<Index>(), 4),
    ) {
        // Borders of chunks (the index is founded at one of them), of a block and a section, and any token.
        let chunk = case.config.chunk_size;
        let borders = (1..case.tokens.div_ceil(chunk)).flat_map(|at| [at * chunk - 1, at * chunk]);
        let changes = borders.chain([15, 16]).chain(others.iter().map(|at| at.index(case.tokens)));
        let changes: Vec<usize> = changes.filter(|&at| at < case.tokens).collect();
        for device in devices() {
            assert_causal(&case, |inputs| case.attend(inputs, &device), changes.iter().copied())?;
        }
    }
}

#[test]
fn full_attention_is_causal_across_its_tiles() {
    let case = full_case(300);
    for device in devices() {
        let attend = |inputs: &Inputs| case.full(inputs, &device);
        assert_causal(&case, attend, [0, 1, 126, 127, 128, 129, 255, 256, 298, 299].into_iter()).unwrap();
    }
}

/// What a token does reach: the tokens after it that may see it.
#[test]
fn every_token_of_full_attention_changes_all_later_ones() {
    let case = full_case(40);
    let inputs = case.inputs();
    for device in devices() {
        let run = |inputs: &Inputs, device: &Runner| bits(case.full(inputs, device));
        let (before, after) = (run(&inputs, &device), run(&perturbed(&inputs, 7), &device));
        for at in 0..before.len() / case.head_dim {
            let row = at * case.head_dim..(at + 1) * case.head_dim;
            assert_eq!(before[row.clone()] != after[row], at % case.tokens >= 7);
        }
    }
}

fn full_case(tokens: usize) -> Case {
    let config = BlockAttentionConfig::default();
    Case {
        batch: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        tokens,
        config,
        options: AttentionOptions::new(8),
        seed: 5,
        far: None,
        stored: DType::F32,
    }
}
