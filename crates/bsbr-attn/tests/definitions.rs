//! Attention against its definitions, written out token by token in f64.

mod common;

use bsbr_attn::{AttentionOptions, attend};
use common::{Rows, cases, devices, settings};
use proptest::prelude::*;

proptest! {
    #![proptest_config(settings(512))]

    #[test]
    fn every_kind_computes_its_definition(case in cases()) {
        let inputs = case.inputs();
        for device in devices() {
            let output = case.attend(&inputs, &device).into_data_as::<f32>();
            let output = Rows {
                shape: [case.batch, case.heads, case.tokens, case.head_dim],
                data: output.as_slice::<f32>().unwrap().to_vec(),
            };
            for b in 0..case.batch {
                for h in 0..case.heads {
                    for t in 0..case.tokens {
                        let expected = case.naive(&inputs, b, h, t);
                        for (found, expected) in output.row(b, h, t).iter().zip(&expected) {
                            // The published formula is not normalised: its outputs reach tens.
                            let tolerance = 2e-5 * (1.0 + expected.abs());
                            prop_assert!((found - expected).abs() <= tolerance,
                                "token {t} of head {h}: {found} instead of {expected}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn full_attention_is_softmax_over_the_past() {
    let (tokens, width) = (300, 8);
    let rows = |heads, seed| Rows::random([2, heads, tokens, width], seed);
    let (query, keys, values) = (rows(4, 1), rows(2, 2), rows(2, 3));
    for device in devices() {
        for window in [None, Some(7), Some(200)] {
            let options = AttentionOptions { window, ..AttentionOptions::new(width) };
            let output =
                attend(query.tensor(&device), keys.tensor(&device), values.tensor(&device), None, None, options);
            let output = Rows { shape: query.shape, data: output.unwrap().try_into_vec_as::<f32>().unwrap() };
            for (b, h, t) in [(0, 0, 0), (0, 1, 5), (1, 3, 127), (1, 2, 128), (0, 3, 299)] {
                let q = query.row(b, h, t);
                let first = window.map_or(0, |w| (t + 1usize).saturating_sub(w));
                let weights: Vec<f64> = (first..=t)
                    .map(|i| (q.iter().zip(keys.row(b, h / 2, i)).map(|(a, b)| a * b).sum::<f64>() / 8f64.sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for x in 0..width {
                    let expected: f64 =
                        weights.iter().zip(first..=t).map(|(w, i)| w * values.row(b, h / 2, i)[x] / total).sum();
                    assert!((output.row(b, h, t)[x] - expected).abs() < 1e-5, "head {h}, token {t}");
                }
            }
        }
    }
}
