//! Attention against its definitions, written out token by token in f64.

mod common;

use std::cell::Cell;

use bsbr_attn::{AttentionOptions, attend};
use common::{
    Case, Rows, devices,
    index::{DECIDED, Reference},
    index_cases, other_cases, settings,
};
use proptest::prelude::*;

/// Rows compared, and those that differ because a choice fell the other way.
#[derive(Default)]
struct Counts {
    compared: Cell<usize>,
    flipped: Cell<usize>,
}

fn count(counter: &Cell<usize>) {
    counter.set(counter.get() + 1);
}

/// Every token reads what the definition says, or came so close to another choice that rounding decides.
fn assert_defined(case: &Case, counts: &Counts) -> Result<(), TestCaseError> {
    let inputs = case.inputs();
    let mut reference = Reference::new(case, &inputs);
    let outputs: Vec<Rows> = (devices().iter())
        .map(|device| Rows {
            shape: [case.batch, case.heads, case.tokens, case.head_dim],
            data: common::numbers(case.attend(&inputs, device)),
        })
        .collect();
    for (b, h) in (0..case.batch).flat_map(|b| (0..case.heads).map(move |h| (b, h))) {
        for t in 0..case.tokens {
            let expected = reference.read(b, h, t);
            for output in &outputs {
                let found = output.row(b, h, t);
                count(&counts.compared);
                // The published formula is not normalised: its outputs reach tens.
                let right = |(found, expected): (&f64, &f64)| (found - expected).abs() <= 2e-5 * (1.0 + expected.abs());
                if found.iter().zip(&expected.output).all(right) {
                    continue;
                }
                prop_assert!(
                    expected.margin < DECIDED,
                    "token {t} of head {h} of row {b}: {found:?} instead of {:?}; the closest choice is {} nats from another",
                    expected.output,
                    expected.margin
                );
                count(&counts.flipped);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(settings(512))]

    #[test]
    fn every_kind_but_the_index_computes_its_definition(case in other_cases()) {
        assert_defined(&case, &Counts::default())?;
    }
}

#[test]
#[allow(clippy::print_stderr)] // How rare it is that rounding decides.
fn the_index_computes_its_definition() {
    let counts = Counts::default();
    proptest!(settings(128), |(case in index_cases())| assert_defined(&case, &counts)?);
    let (compared, flipped) = (counts.compared.get(), counts.flipped.get());
    eprintln!("{flipped} of {compared} rows of a head chose otherwise by rounding");
    assert!(flipped * 2000 <= compared, "{flipped} of {compared} rows chose otherwise by rounding");
}

/// Widths of heads that kernels treat apart, with a text just long enough to choose from.
#[test]
fn heads_of_any_width_compute_their_definition() {
    let widths = prop::sample::select(vec![20, 32, 64, 128, 256]);
    proptest!(settings(10), |(mut case in index_cases(), width in widths, more in 1usize..=40)| {
        let founding = (case.config.exact_tokens / case.config.chunk_size).max(case.config.local_chunks + 1);
        (case.batch, case.head_dim, case.far) = (1, width, None);
        case.config.index_channels = None;
        case.options.scale = AttentionOptions::new(width).scale;
        case.tokens = founding * case.config.chunk_size + more;
        assert_defined(&case, &Counts::default())?;
    });
}

#[test]
fn full_attention_is_softmax_over_the_past() {
    let (tokens, width) = (300, 8);
    let rows = |heads, seed| Rows::random([2, heads, tokens, width], seed);
    let (query, keys, values) = (rows(4, 1), rows(2, 2), rows(2, 3));
    for device in devices() {
        for (window, sinks) in
            [(None, None), (Some(7), None), (Some(200), Some([0.5, -2.0, 3.0, 40.0])), (None, Some([0.0; 4]))]
        {
            let sink_logits = sinks.map(Into::into);
            let options = AttentionOptions { window, sink_logits, ..AttentionOptions::new(width) };
            let output =
                attend(query.tensor(&device), keys.tensor(&device), values.tensor(&device), None, None, options);
            let output = Rows { shape: query.shape, data: output.unwrap().try_into_vec_as::<f32>().unwrap() };
            for (b, h, t) in [(0, 0, 0), (0, 1, 5), (1, 3, 127), (1, 2, 128), (0, 3, 299)] {
                let q = query.row(b, h, t);
                let first = window.map_or(0, |w| (t + 1usize).saturating_sub(w));
                let weights: Vec<f64> = (first..=t)
                    .map(|i| (q.iter().zip(keys.row(b, h / 2, i)).map(|(a, b)| a * b).sum::<f64>() / 8f64.sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum::<f64>() + sinks.map_or(0.0, |sinks| f64::from(sinks[h]).exp());
                for x in 0..width {
                    let expected: f64 =
                        weights.iter().zip(first..=t).map(|(w, i)| w * values.row(b, h / 2, i)[x] / total).sum();
                    assert!((output.row(b, h, t)[x] - expected).abs() < 1e-5, "head {h}, token {t}");
                }
            }
        }
    }
}
