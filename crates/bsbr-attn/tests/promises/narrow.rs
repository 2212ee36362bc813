//! The promises where queries, keys and values are f16 or bf16: types of what goes in and out, not of what is computed.
#![cfg(feature = "flex")]

use bsbr_attn::{AttentionCache, BlockAttentionConfig, CacheConfig, Kernel, attend};
use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::common::{Case, Inputs, Rows, cases, difference, index::agree, index_cases, settings};

/// A narrow type, and how far apart two of its numbers may be that were computed alike: two roundings.
fn types() -> impl Strategy<Value = (DType, f64)> {
    prop::sample::select(vec![(DType::F16, 2e-3), (DType::BF16, 1.6e-2)])
}

/// A case whose inputs are numbers of the type.
fn narrow_inputs(case: &Case, dtype: DType) -> Inputs {
    let mut inputs = case.inputs();
    let Inputs { query, keys, values, .. } = &mut inputs;
    for rows in [query, keys, values] {
        rows.data = rows.tensor(&Device::flex()).cast(dtype).cast(DType::F32).try_into_vec_as::<f32>().unwrap();
    }
    inputs
}

fn tensors(inputs: &Inputs, dtype: DType) -> [Tensor<4>; 3] {
    [&inputs.query, &inputs.keys, &inputs.values].map(|rows: &Rows| rows.tensor(&Device::flex()).cast(dtype))
}

fn read(case: &Case, inputs: &Inputs, dtype: DType, attention: Option<&BlockAttentionConfig>) -> Tensor<4> {
    let [query, keys, values] = tensors(inputs, dtype);
    let output = attend(query, keys, values, None, attention, case.options.clone()).unwrap();
    assert_eq!(output.dtype(), dtype);
    output.cast(DType::F32)
}

/// Token by token or in pieces, through a cache of this type.
fn in_pieces(case: &Case, inputs: &Inputs, dtype: DType, length: usize, kernel: Kernel) -> Tensor<4> {
    let config = CacheConfig { dtype, stored: dtype, kernel, ..case.cache_config() };
    let mut cache = AttentionCache::new(config, &Device::flex()).unwrap();
    let [query, keys, values] = tensors(inputs, dtype);
    let pieces = (0..case.tokens).step_by(length).map(|start| {
        let of = |rows: &Tensor<4>| rows.clone().narrow(2, start, length.min(case.tokens - start));
        cache.prefill(of(&query), of(&keys), of(&values), None).unwrap().cast(DType::F32)
    });
    Tensor::cat(pieces.collect(), 2)
}

/// Cases of every kind whose inputs are queries, keys and values alone.
fn plain_cases() -> impl Strategy<Value = Case> {
    cases().prop_filter("meta inputs", |case| !case.config.needs_meta()).prop_map(|case| Case { far: None, ..case })
}

proptest! {
    #![proptest_config(settings(64))]

    #[test]
    fn narrow_inputs_are_read_as_the_numbers_they_are(case in plain_cases(), (dtype, _) in types(), length in 1usize..=90) {
        let inputs = narrow_inputs(&case, dtype);
        // Rounded once, at the end.
        let rounded = |output: Tensor<4>| output.cast(dtype).cast(DType::F32);
        let wide = rounded(read(&case, &inputs, DType::F32, Some(&case.config)));
        prop_assert_eq!(difference(read(&case, &inputs, dtype, Some(&case.config)), wide), 0.0);
        for kernel in [Kernel::Plain, Kernel::Fastest] {
            let wide = rounded(in_pieces(&case, &inputs, DType::F32, length, kernel));
            prop_assert_eq!(difference(in_pieces(&case, &inputs, dtype, length, kernel), wide), 0.0);
        }
    }

    #[test]
    fn any_split_of_a_narrow_text_reads_the_same(
        case in index_cases(), (dtype, tolerance) in types(), length in prop_oneof![1usize..=9, 1usize..=200],
    ) {
        let case = Case { far: None, ..case };
        let inputs = narrow_inputs(&case, dtype);
        let split = in_pieces(&case, &inputs, dtype, length, Kernel::Fastest);
        agree(&case, &inputs, (split, read(&case, &inputs, dtype, Some(&case.config))), 0, tolerance)?;
    }

    #[test]
    fn a_narrow_text_that_is_short_gets_full_attention((mut case, (dtype, tolerance)) in (index_cases(), types())) {
        case.far = None;
        (case.config.threshold, case.config.max_keys, case.config.max_sections) = (0.0, 1024, 1024);
        let inputs = narrow_inputs(&case, dtype);
        let error = difference(read(&case, &inputs, dtype, Some(&case.config)), read(&case, &inputs, dtype, None));
        prop_assert!(error <= tolerance, "differs from full attention by {error}");
    }
}

proptest! {
    #![proptest_config(settings(16))]

    #[test]
    fn no_token_of_a_narrow_text_changes_what_an_earlier_one_reads(
        case in index_cases(), (dtype, _) in types(), at in any::<prop::sample::Index>(),
    ) {
        let case = Case { far: None, ..case };
        let inputs = narrow_inputs(&case, dtype);
        for t in [at.index(case.tokens), (case.tokens - 1) / case.config.chunk_size * case.config.chunk_size] {
            let mut changed = inputs.clone();
            for rows in [&mut changed.query, &mut changed.keys, &mut changed.values] {
                let [batch, heads, ..] = rows.shape;
                for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
                    rows.row_mut(b, h, t).iter_mut().for_each(|x| *x *= -2.0);
                }
            }
            if t > 0 {
                let before = |inputs| read(&case, inputs, dtype, Some(&case.config)).narrow(2, 0, t);
                prop_assert_eq!(difference(before(&inputs), before(&changed)), 0.0);
            }
        }
    }
}
