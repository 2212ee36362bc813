//! Masks are honoured: padding takes part in nothing, and rows of a batch know nothing of each other.

use bsbr_attn::{BlockAttentionConfig, Padding, Retrieval, Selector, attend_padded};
use burn::tensor::{Device, Tensor, TensorData};
use proptest::{prelude::*, sample::Index};

use crate::common::{Case, Inputs, Rows, bits, cases, devices, difference, settings};

/// Where the padding of a row stands.
#[derive(Debug, Clone, Copy)]
enum Side {
    Left,
    Right,
    Anywhere,
}

/// A mask of `width` columns with at least one real token.
fn mask(width: usize) -> impl Strategy<Value = Vec<bool>> {
    let side = prop::sample::select(vec![Side::Left, Side::Right, Side::Anywhere]);
    (side, any::<Index>(), prop::collection::vec(any::<bool>(), width)).prop_map(move |(side, count, noise)| {
        let count = count.index(width);
        let mut mask = match side {
            Side::Left => (0..width).map(|column| column >= count).collect(),
            Side::Right => (0..width).map(|column| column < width - count).collect(),
            Side::Anywhere => noise,
        };
        mask[count] |= !mask.contains(&true);
        mask
    })
}

fn padded_cases() -> impl Strategy<Value = (Case, Vec<Vec<bool>>)> {
    cases().prop_flat_map(|mut case| {
        // Meta inputs depend on where chunks begin in each row.
        if case.config.needs_meta() && case.config.retrieval == Retrieval::Blocks {
            case.config.retrieval = Retrieval::None;
        }
        (case.config.selector, case.far) = (Selector::Index, None);
        let masks = prop::collection::vec(mask(case.tokens), case.batch);
        (Just(case), masks)
    })
}

/// `rows` with `garbage` wherever `mask` says padding.
fn filled(rows: &Rows, mask: &[Vec<bool>], garbage: f32) -> Rows {
    let mut filled = rows.clone();
    let [_, heads, _, _] = rows.shape;
    for (b, row) in mask.iter().enumerate() {
        for t in (0..row.len()).filter(|&t| !row[t]) {
            for h in 0..heads {
                filled.row_mut(b, h, t).fill(garbage);
            }
        }
    }
    filled
}

/// The real tokens of row `b` alone.
fn packed(rows: &Rows, b: usize, real: &[usize], device: &Device) -> Tensor<4> {
    let [_, heads, _, width] = rows.shape;
    let of = |h: usize| real.iter().flat_map(move |&t| rows.row(b, h, t)).map(|x| x as f32);
    let data: Vec<f32> = (0..heads).flat_map(of).collect();
    Tensor::from_data(TensorData::new(data, [1, heads, real.len(), width]), device)
}

proptest! {
    #![proptest_config(settings(128))]

    #[test]
    fn padding_takes_part_in_nothing(
        (case, mask) in padded_cases(),
        garbage in prop::sample::select(vec![1e4, -1e4, f32::INFINITY, f32::NAN]),
    ) {
        let inputs = case.inputs();
        let padding = Padding::new(&mask).unwrap();
        for device in devices() {
            for attention in [Some(&case.config), None] {
                let of = |rows: &Rows| filled(rows, &mask, garbage).tensor(&device);
                let (query, keys, values) = (of(&inputs.query), of(&inputs.keys), of(&inputs.values));
                let output = attend_padded(query, keys, values, &padding, attention, case.options.clone()).unwrap();
                for (b, mask) in mask.iter().enumerate() {
                    assert_row(&case, &inputs, attention, mask, output.clone().narrow(0, b, 1), b, &device)?;
                }
            }
        }
    }

    #[test]
    fn rows_of_a_batch_do_not_influence_each_other(
        mut case in cases(),
        garbage in prop::sample::select(vec![1e4, f32::NAN]),
    ) {
        case.batch = 2;
        let inputs = case.inputs();
        let mut other = inputs.clone();
        let Inputs { query, keys, values, meta_query, meta_key } = &mut other;
        for rows in [query, keys, values, meta_query, meta_key] {
            let half = rows.data.len() / 2;
            rows.data[half..].fill(garbage);
        }
        for device in devices() {
            let first = |inputs: &Inputs| bits(case.attend(inputs, &device).narrow(0, 0, 1));
            prop_assert_eq!(first(&inputs), first(&other));
        }
    }

    #[test]
    fn a_row_of_a_batch_reads_what_it_reads_alone(mut case in cases()) {
        case.batch = 2;
        let inputs = case.inputs();
        let second = |rows: &Rows| {
            let [_, heads, tokens, width] = rows.shape;
            Rows { shape: [1, heads, tokens, width], data: rows.data[rows.data.len() / 2..].to_vec() }
        };
        let alone = Inputs {
            query: second(&inputs.query),
            keys: second(&inputs.keys),
            values: second(&inputs.values),
            meta_query: second(&inputs.meta_query),
            meta_key: second(&inputs.meta_key),
        };
        for device in devices() {
            let together = case.attend(&inputs, &device).narrow(0, 1, 1);
            let error = difference(case.attend(&alone, &device), together);
            prop_assert!(error <= 1e-5, "differs by {error}");
        }
    }
}

/// Row `b` of a padded output is that of its real tokens alone, and 0 at its padding.
fn assert_row(
    case: &Case,
    inputs: &Inputs,
    attention: Option<&BlockAttentionConfig>,
    mask: &[bool],
    output: Tensor<4>,
    b: usize,
    device: &Device,
) -> Result<(), TestCaseError> {
    let real: Vec<usize> = (0..mask.len()).filter(|&t| mask[t]).collect();
    let of = |rows: &Rows| packed(rows, b, &real, device);
    let (query, keys, values) = (of(&inputs.query), of(&inputs.keys), of(&inputs.values));
    let expected = bsbr_attn::attend(query, keys, values, None, attention, case.options.clone()).unwrap();
    for (at, &t) in real.iter().enumerate() {
        let error = difference(output.clone().narrow(2, t, 1), expected.clone().narrow(2, at, 1));
        prop_assert!(error <= 1e-5, "column {t} of row {b} differs from token {at} alone by {error}");
    }
    for t in (0..mask.len()).filter(|&t| !mask[t]) {
        let padding = output.clone().narrow(2, t, 1).abs().max().into_scalar::<f32>();
        prop_assert_eq!(padding, 0.0, "padding at column {} of row {}", t, b);
    }
    Ok(())
}
