//! Layers in parts against products in f64.

#![cfg(feature = "flex")]

use std::sync::{Arc, Mutex};

use bsbr_splitlinear::{Factors, Pivots, Run, Share, ShareState, SplitLinear, Tap};
use burn::{
    module::Param,
    nn::Linear,
    tensor::{Device, Distribution, Tensor},
};

const INPUTS: usize = 24;
/// Queries of 4 heads, keys and values of 2.
const PARTS: [(&str, usize); 3] = [("q", 32), ("k", 16), ("v", 16)];
const OUTPUTS: usize = 64;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.3), &Device::flex())
}

fn layer(bias: bool) -> Linear {
    let weight = Param::from_tensor(random([OUTPUTS, INPUTS]).transpose());
    Linear { weight, bias: bias.then(|| Param::from_tensor(random([OUTPUTS]))) }
}

fn columns() -> Vec<(String, std::ops::Range<usize>)> {
    let mut end = 0;
    PARTS
        .iter()
        .map(|(name, width)| {
            end += width;
            ((*name).to_owned(), end - width..end)
        })
        .collect()
}

fn factors(rank: usize, outputs: usize, share: Share) -> Factors {
    Factors {
        left: Param::from_tensor(random([INPUTS, rank])),
        right: Param::from_tensor(random([rank, outputs])),
        pivots: None,
        share,
    }
}

fn numbers<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.clone().try_into_vec_as::<f32>().expect("numbers").into_iter().map(f64::from).collect()
}

/// `[rows, inner]` times `[inner, columns]`.
fn product(a: &[f64], b: &[f64], inner: usize) -> Vec<f64> {
    let columns = b.len() / inner;
    let row = |a: &[f64]| {
        let sum = |column: usize| a.iter().zip(b[column..].iter().step_by(columns)).map(|(a, b)| a * b).sum::<f64>();
        (0..columns).map(sum).collect::<Vec<_>>()
    };
    a.chunks(inner).flat_map(row).collect()
}

fn close(found: &Tensor<2>, expected: &[f64]) {
    let found = numbers(found);
    assert_eq!(found.len(), expected.len());
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn a_layer_of_which_every_part_is_original_is_the_layer_with_the_same_tensors() {
    for bias in [false, true] {
        let linear = layer(bias);
        let split = SplitLinear::new(linear.clone(), columns()).expect("parts that fit");
        assert_eq!((split.inputs(), split.outputs(), split.parameters()), (INPUTS, OUTPUTS, INPUTS * OUTPUTS));
        assert_eq!(split.original.as_ref().expect("a weight").id, linear.weight.id);
        for tokens in [1, 7, 40] {
            let x = random([2, tokens, INPUTS]);
            assert_eq!(numbers(&split.forward(x.clone())), numbers(&linear.forward(x)));
        }
        let all = Run::Original { columns: 0..OUTPUTS, kept: 0..OUTPUTS };
        assert_eq!(split.runs(), [all]);
    }
}

#[test]
fn showing_the_inputs_changes_no_bit_and_shows_them_all() {
    let seen: Arc<Mutex<Vec<f64>>> = Arc::default();
    let split = SplitLinear::new(layer(true), columns()).expect("parts that fit");
    let x = random([3, 5, INPUTS]);
    let expected = numbers(&split.forward(x.clone()));
    assert_eq!(split.state(1), ShareState::Original);
    let see = Arc::clone(&seen);
    let watched = split.with_tap(Some(Tap::new(move |x| see.lock().expect("no panic").extend(numbers(&x)))));
    assert_eq!(watched.state(1), ShareState::Calibrating);
    assert_eq!(numbers(&watched.forward(x.clone())), expected);
    assert_eq!(*seen.lock().expect("no panic"), numbers(&x));
    watched.with_tap(None).forward(x.clone());
    assert_eq!(seen.lock().expect("no panic").len(), x.shape().num_elements(), "seen after nobody looks");
}

#[test]
fn any_mixture_of_states_is_the_product_of_its_parts_with_the_bias_once() {
    for compressed in [vec![0], vec![1], vec![2, 0], vec![0, 1], vec![1, 2, 0]] {
        for share in [Share::Input, Share::Output, Share::None] {
            let linear = layer(true);
            let dense = numbers(&linear.weight.val());
            let bias = numbers(&linear.bias.as_ref().expect("a bias").val());
            let mut split = SplitLinear::new(linear, columns()).expect("parts that fit");
            // One left factor for all that are compressed, as where inputs are shared by parts of a layer.
            let left = Param::from_tensor(random([INPUTS, 5]));
            for &part in &compressed {
                let fresh = factors(5, PARTS[part].1, share);
                split = split.compress(part, Factors { left: left.clone(), ..fresh }).expect("factors that fit");
                assert_eq!(split.state(part), ShareState::Compressed);
            }
            let mut weight = vec![0.0; INPUTS * OUTPUTS];
            for (part, (_, columns)) in columns().into_iter().enumerate() {
                let own = split.parts[part].factors.as_ref();
                let made = own.map(|factors| product(&numbers(&factors.left.val()), &numbers(&factors.right.val()), 5));
                for input in 0..INPUTS {
                    for column in columns.clone() {
                        weight[input * OUTPUTS + column] = match &made {
                            Some(made) => made[input * columns.len() + column - columns.start],
                            None => dense[input * OUTPUTS + column],
                        };
                    }
                }
            }
            close(&split.dense_weight(), &weight);
            for tokens in [1, 50] {
                let x = random([tokens, INPUTS]);
                let mut expected = product(&numbers(&x), &weight, INPUTS);
                expected.chunks_mut(OUTPUTS).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
                close(&split.forward(x), &expected);
            }
            let kept: usize = (0..3).filter(|part| !compressed.contains(part)).map(|part| PARTS[part].1).sum();
            assert_eq!(split.original.as_ref().map_or(0, |weight| weight.dims()[1]), kept, "dense numbers are kept");
        }
    }
}

#[test]
fn a_pivoted_part_is_the_product_with_its_pivots_in_place() {
    let pivots = [3_u32, 0, 20, 7, 11];
    let rest: Vec<usize> = (0..INPUTS).filter(|&input| !pivots.contains(&(input as u32))).collect();
    let linear = layer(true);
    let dense = numbers(&linear.weight.val());
    let bias = numbers(&linear.bias.as_ref().expect("a bias").val());
    let split = SplitLinear::new(linear, columns()).expect("parts that fit");
    let taken = Pivots::new("q", &pivots, INPUTS, &Device::flex()).expect("pivots");
    let pivoted = |outputs: usize| Factors {
        left: Param::from_tensor(random([INPUTS - 5, 5])),
        pivots: Some(taken.clone()),
        ..factors(5, outputs, Share::Input)
    };
    let own = pivoted(32);
    let split = split.compress(0, own.clone()).expect("factors that fit");
    assert_eq!(split.parameters(), (INPUTS - 5) * 5 + 5 + 5 * 32 + INPUTS * 32);
    let (left, right) = (numbers(&own.left.val()), numbers(&own.right.val()));
    let mut basis = vec![0.0; INPUTS * 5];
    for (dimension, &pivot) in pivots.iter().enumerate() {
        basis[pivot as usize * 5 + dimension] = 1.0;
    }
    for (row, &input) in rest.iter().enumerate() {
        basis[input * 5..][..5].copy_from_slice(&left[row * 5..][..5]);
    }
    let made = product(&basis, &right, 5);
    let mut weight = dense;
    for input in 0..INPUTS {
        weight[input * OUTPUTS..][..32].copy_from_slice(&made[input * 32..][..32]);
    }
    close(&split.dense_weight(), &weight);
    for tokens in [1, 50] {
        let x = random([tokens, INPUTS]);
        let mut expected = product(&numbers(&x), &weight, INPUTS);
        expected.chunks_mut(OUTPUTS).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        close(&split.forward(x), &expected);
    }
    // What does not fit is refused by name.
    let refused = |pivots: &[u32], inputs| Pivots::new("q", pivots, inputs, &Device::flex()).map(drop).is_err();
    assert!(refused(&[3, 3], INPUTS) && refused(&[24], INPUTS) && refused(&[0, 1], 2));
    let wide = Pivots::new("q", &pivots, INPUTS + 1, &Device::flex()).expect("pivots");
    assert!(split.clone().compress(1, Factors { pivots: Some(wide), ..pivoted(16) }).is_err());
    let few = Pivots::new("q", &pivots[..4], INPUTS, &Device::flex()).expect("pivots");
    assert!(split.clone().compress(1, Factors { pivots: Some(few), ..pivoted(16) }).is_err());
    assert!(split.compress(1, Factors { pivots: None, ..pivoted(16) }).is_err());
}

#[test]
fn other_factors_may_take_the_place_of_factors() {
    let split = SplitLinear::new(layer(false), columns()).expect("parts that fit");
    let split = split.compress(1, factors(3, 16, Share::Input)).expect("factors that fit");
    let split = split.compress(1, factors(4, 16, Share::Input)).expect("factors that fit");
    assert_eq!(split.parts[1].factors.as_ref().expect("factors").rank(), 4);
    assert_eq!(split.parameters(), INPUTS * 48 + 4 * (INPUTS + 16));
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    let error = |parts: &[(&str, std::ops::Range<usize>)]| {
        let parts = parts.iter().map(|(name, columns)| ((*name).to_owned(), columns.clone())).collect();
        SplitLinear::new(layer(true), parts).map(drop).expect_err("a misfit").to_string()
    };
    assert!(error(&[("first", 0..10), ("gap", 12..64)]).contains("`gap`"));
    assert!(error(&[("first", 0..10), ("overlap", 8..64)]).contains("`overlap`"));
    assert!(error(&[("first", 0..10), ("empty", 10..10), ("rest", 10..64)]).contains("`empty`"));
    assert!(error(&[("short", 0..63)]).contains("`short`"));
    assert!(error(&[]).contains("part"));
    let split = || SplitLinear::new(layer(true), columns()).expect("parts that fit");
    assert!(
        split().compress(1, factors(3, 17, Share::Input)).map(drop).expect_err("a misfit").to_string().contains("`k`")
    );
    assert!(split().compress(3, factors(3, 16, Share::Input)).is_err());
}
