//! Fits to the layers' own inputs, and to those of a compressed model.

use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};

use super::super::basis::Solution;
use super::super::layer::{Judge, Layer};
use super::super::matrix::square;
use super::super::refit::{alternate, fit_coefficients, fitted, product};
use super::{assert_close, assert_near, layer, losses, moments, noise, solved, weights};
use crate::Share;

fn differing_layers() -> [Layer; 2] {
    let held_out = |layer: Layer| Layer { held_out: Some(Judge::Inputs(layer.gram.clone().unwrap())), ..layer };
    [held_out(layer(noise(16, 12, 1), moments(16, 90, 2))), held_out(layer(noise(16, 12, 3), moments(16, 90, 4)))]
}

#[test]
fn a_fit_of_the_coefficients_never_loses_on_the_text_it_is_made_with() {
    let layers = differing_layers();
    for rank in [2, 6, 10] {
        let mut solution = solved(&layers, Share::Input, rank);
        let before = losses(&layers, Share::Input, &solution);
        let Solution { basis, coefficients, .. } = &mut solution;
        assert!(fit_coefficients(&layers, Share::Input, basis, coefficients, 0.0));
        let after = losses(&layers, Share::Input, &solution);
        assert!(after[0] < before[0] && after[1] < before[1]);
        // And is the optimum: what is left is orthogonal to the basis.
        for (layer, found) in layers.iter().zip(weights(&layers, Share::Input, &solution)) {
            let left = &layer.weight - found;
            let overlap = solution.basis.transpose() * layer.gram.as_ref().unwrap() * left;
            let size = layer.judge.energy(layer.weight.as_ref());
            assert!(square(overlap.as_ref()).sqrt() < 1e-10 * size);
        }
    }
}

#[test]
fn equal_inputs_leave_nothing_to_fit() {
    let gram = moments(16, 90, 2);
    let layers = [layer(noise(16, 12, 1), gram.clone()), layer(noise(16, 12, 3), gram)];
    let solution = solved(&layers, Share::Input, 6);
    for (layer, own) in layers.iter().zip(&solution.coefficients) {
        for rho in [0.0, 0.01, 1.0] {
            let new = fitted(layer, Share::Input, &solution.basis, own, rho).unwrap();
            assert_close(new.as_ref(), own.as_ref(), 1e-10);
        }
    }
}

#[test]
fn fitting_both_sides_in_turn_only_gains() {
    let layers = differing_layers();
    let mut solution = solved(&layers, Share::Input, 6);
    let Solution { basis, coefficients, .. } = &mut solution;
    fit_coefficients(&layers, Share::Input, basis, coefficients, 0.0);
    let mut last: f64 = losses(&layers, Share::Input, &solution).iter().sum();
    let start = last;
    for _ in 0..4 {
        let Solution { basis, coefficients, .. } = &mut solution;
        alternate(&layers, &[1.0, 1.0], basis, coefficients, 0.0, 1);
        let loss: f64 = losses(&layers, Share::Input, &solution).iter().sum();
        assert!(loss <= last * (1.0 + 1e-12));
        last = loss;
    }
    assert!(last < 0.95 * start, "{start} -> {last}");
}

fn anchored(weight: Mat<f64>, original: &Mat<f64>, compressed: &Mat<f64>) -> Layer {
    let gram = compressed.transpose() * compressed;
    let cross = compressed.transpose() * original;
    let target = gram.llt(Side::Lower).unwrap().solve(&cross * &weight);
    let judge = Judge::Paired { original: original.transpose() * original, compressed: gram.clone(), cross };
    Layer { weight, target: Some(target), gram: Some(gram), judge, held_out: None, tokens: 1, ridge: 0.0 }
}

#[test]
fn anchoring_minimises_the_distance_to_the_original_outputs() {
    let (weight, text) = (noise(10, 8, 1), noise(70, 10, 2));
    let drift = noise(10, 10, 3) * faer::Scale(0.15) + Mat::<f64>::identity(10, 10);
    let seen = &text * &drift;
    let layers = [anchored(weight.clone(), &text, &seen)];
    let distance = |found: MatRef<'_, f64>| square((&text * &weight - &seen * found).as_ref());
    for share in [Share::None, Share::Output] {
        // Without truncation the drift is undone exactly.
        let whole = &weights(&layers, share, &solved(&layers, share, 8))[0];
        assert!(distance(whole.as_ref()) < 1e-20 * square((&text * &weight).as_ref()));
        let solution = solved(&layers, share, 4);
        let found = &weights(&layers, share, &solution)[0];
        // The judge measures that distance, and it is less than without the anchor.
        let judged = layers[0].judge.error(weight.as_ref(), found.as_ref());
        assert_near(judged, distance(found.as_ref()), square((&text * &weight).as_ref()), 1e-12);
        let plain = [layer(weight.clone(), text.transpose() * &text)];
        let unanchored = &weights(&plain, share, &solved(&plain, share, 4))[0];
        assert!(distance(found.as_ref()) < distance(unanchored.as_ref()));
        // No other matrix of that rank is nearer: those that are rounded versions of it are not.
        for seed in 0..50 {
            let other = (
                &solution.basis + noise(solution.basis.nrows(), solution.basis.ncols(), 50 + seed) * faer::Scale(1e-3),
                &solution.coefficients[0],
            );
            let moved = product(share, &other.0, other.1);
            assert!(distance(moved.as_ref()) >= distance(found.as_ref()) * (1.0 - 1e-9));
        }
    }
    // Where nothing has drifted it is the ordinary optimum.
    let same = [anchored(weight.clone(), &text, &text)];
    let plain = [layer(weight, text.transpose() * &text)];
    let (same, plain) = (
        weights(&same, Share::None, &solved(&same, Share::None, 4)).remove(0),
        weights(&plain, Share::None, &solved(&plain, Share::None, 4)).remove(0),
    );
    assert_close(same.as_ref(), plain.as_ref(), 1e-10);
}
