//! Answers in closed form, in `f64`. References are decompositions of the whitened weights written out here.

mod fits;

use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side, mat};

use super::basis::{Solution, solve, spectrum};
use super::decompose::{eigen, leading, squared_singular_values};
use super::layer::{Judge, Layer};
use super::matrix::{beside, dot, square};
use super::refit::product;
use crate::{Decomposition, Share, Weighting};

/// Numbers that look normally distributed, the same for the same seed.
fn noise(rows: usize, columns: usize, seed: u64) -> Mat<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678);
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((word ^ (word >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    };
    Mat::from_fn(rows, columns, |_, _| (0..12).map(|_| uniform()).sum::<f64>() - 6.0)
}

/// Second moments of correlated inputs of uneven scale.
fn moments(width: usize, tokens: usize, seed: u64) -> Mat<f64> {
    let mut rows = noise(tokens, width, seed) * (noise(width, width, seed + 1) * faer::Scale(0.1));
    for column in 0..width {
        rows.col_as_slice_mut(column).iter_mut().for_each(|value| *value *= 1.0 + column as f64 / 4.0);
    }
    rows.transpose() * &rows
}

fn layer(weight: Mat<f64>, gram: Mat<f64>) -> Layer {
    Layer {
        weight,
        target: None,
        gram: Some(gram.clone()),
        judge: Judge::Inputs(gram),
        held_out: None,
        tokens: 1,
        ridge: 0.0,
    }
}

fn solved(layers: &[Layer], share: Share, rank: usize) -> Solution {
    solve(layers, share, Weighting::Sum, rank).unwrap()
}

fn losses(layers: &[Layer], share: Share, solution: &Solution) -> Vec<f64> {
    let loss = |(layer, own): (&Layer, &Mat<f64>)| {
        layer.judge.error(layer.weight.as_ref(), product(share, &solution.basis, own).as_ref())
    };
    layers.iter().zip(&solution.coefficients).map(loss).collect()
}

fn weights(layers: &[Layer], share: Share, solution: &Solution) -> Vec<Mat<f64>> {
    solution.coefficients[..layers.len()].iter().map(|own| product(share, &solution.basis, own)).collect()
}

#[track_caller]
fn assert_close(a: MatRef<'_, f64>, b: MatRef<'_, f64>, within: f64) {
    assert_eq!((a.nrows(), a.ncols()), (b.nrows(), b.ncols()));
    let distance = square((a - b).as_ref()).sqrt() / square(b).sqrt().max(1e-300);
    assert!(distance <= within, "off by {distance:e}");
}

#[track_caller]
fn assert_near(a: f64, b: f64, size: f64, within: f64) {
    assert!((a - b).abs() <= within * size, "{a:e} is not {b:e}");
}

/// Truncated whitening with an inverse, as published.
fn published(gram: &Mat<f64>, weight: &Mat<f64>, rank: usize) -> (Mat<f64>, Vec<f64>) {
    let lower = gram.llt(Side::Lower).unwrap().L().to_owned();
    let whitened = lower.transpose() * weight;
    let svd = whitened.thin_svd().unwrap();
    let (u, v) = (svd.U().subcols(0, rank), svd.V().subcols(0, rank));
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let mut scaled = u.to_owned();
    super::matrix::scale_columns(&mut scaled, &values[..rank]);
    lower.transpose().to_owned().solve_upper_triangular_in_place(&mut scaled);
    (scaled * v.transpose(), values)
}

#[test]
fn the_known_failure_of_other_decompositions_is_not_ours() {
    let ones = Mat::from_fn(3, 5, |_, _| 1.0);
    for matrix in [ones.as_ref(), ones.transpose()] {
        let found = leading(matrix, 3).unwrap();
        assert_near(found.values[0].sqrt(), 3.872_983_346_207_417, 1.0, 1e-12);
        assert_near(found.values.iter().sum::<f64>(), 15.0, 15.0, 1e-12);
        assert_eq!(found.vectors.ncols(), 1, "a matrix of rank 1 has one direction");
    }
}

#[test]
fn decompositions_of_every_shape_pass_their_checks() {
    for (seed, (rows, columns)) in [(1, 1), (1, 7), (7, 1), (5, 40), (40, 5), (24, 24)].into_iter().enumerate() {
        let matrix = noise(rows, columns, seed as u64);
        let found = leading(matrix.as_ref(), rows.min(columns)).unwrap();
        let expected = matrix.singular_values().unwrap();
        for (value, expected) in found.values.iter().zip(&expected) {
            assert_near(*value, expected * expected, expected * expected, 1e-9);
        }
        assert_close((&matrix * &found.vectors * found.vectors.transpose()).as_ref(), matrix.as_ref(), 1e-10);
        assert_eq!(found.how, Decomposition::Gram);
        let values = squared_singular_values(matrix.as_ref()).unwrap();
        assert_near(values[0], expected[0] * expected[0], values[0], 1e-9);
    }
    assert!(leading(mat![[f64::NAN]].as_ref(), 1).is_err());
    assert!(eigen(mat![[1.0, 2.0], [2.0, 1.0]].as_ref()).unwrap().0[1] < 0.0);
}

#[test]
fn a_planted_basis_is_found() {
    for (inputs, outputs, rank, count) in [(20, 8, 5, 3), (12, 30, 7, 2), (9, 9, 4, 1), (40, 6, 6, 2)] {
        let planted = noise(inputs, rank, 3);
        let layers: Vec<Layer> = (0..count)
            .map(|seed| layer(&planted * noise(rank, outputs, 10 + seed), moments(inputs, 3 * inputs, 20 + seed)))
            .collect();
        let solution = solved(&layers, Share::Input, rank);
        for (layer, found) in layers.iter().zip(weights(&layers, Share::Input, &solution)) {
            assert_close(found.as_ref(), layer.weight.as_ref(), 1e-12);
        }
    }
}

#[test]
fn the_loss_is_the_tail_of_the_spectrum() {
    for (inputs, outputs) in [(16, 10), (10, 16), (12, 12)] {
        let gram = moments(inputs, 60, 5);
        let layers = [layer(noise(inputs, outputs, 1), gram.clone())];
        let (_, values) = published(&gram, &layers[0].weight, 1);
        let all: f64 = values.iter().map(|value| value * value).sum();
        for rank in 1..inputs.min(outputs) {
            for share in [Share::Input, Share::Output, Share::None] {
                let solution = solved(&layers, share, rank);
                let tail: f64 = values[rank..].iter().map(|value| value * value).sum();
                assert_near(losses(&layers, share, &solution)[0], tail, all, 1e-10);
            }
            let Solution { basis, coefficients, .. } = solved(&layers, Share::Input, rank);
            let products = basis.transpose() * &gram * &basis;
            let expected = Mat::from_fn(rank, rank, |i, j| if i == j { values[i] * values[i] } else { 0.0 });
            assert_near(square((products - expected).as_ref()).sqrt(), 0.0, all, 1e-10);
            let identity = &coefficients[0] * coefficients[0].transpose();
            assert_close(identity.as_ref(), Mat::<f64>::identity(rank, rank).as_ref(), 1e-10);
        }
        let spectrum = spectrum(&layers, Share::None, Weighting::Sum).unwrap();
        assert_near(spectrum.energy, all, all, 1e-10);
        assert_near(spectrum.values[1], values[1] * values[1], all, 1e-10);
    }
}

#[test]
fn the_optimum_is_that_of_whitening_with_an_inverse() {
    for (inputs, outputs, rank) in [(16, 10, 4), (10, 16, 4), (12, 40, 6)] {
        let gram = moments(inputs, 80, 8);
        let layers = [layer(noise(inputs, outputs, 2), gram.clone())];
        let (expected, _) = published(&gram, &layers[0].weight, rank);
        let solution = solved(&layers, Share::None, rank);
        assert_close(weights(&layers, Share::None, &solution)[0].as_ref(), expected.as_ref(), 1e-10);
    }
    // And in a group, with the sum of the moments, as Basis Sharing is published.
    let grams = [moments(10, 50, 3), moments(10, 50, 4)];
    let layers = [layer(noise(10, 8, 5), grams[0].clone()), layer(noise(10, 8, 6), grams[1].clone())];
    let stacked = beside(&[layers[0].weight.clone(), layers[1].weight.clone()]);
    let (expected, _) = published(&(&grams[0] + &grams[1]), &stacked, 5);
    let solution = solved(&layers, Share::Input, 5);
    assert_close(beside(&weights(&layers, Share::Input, &solution)).as_ref(), expected.as_ref(), 1e-10);
}

#[test]
fn moments_decide_which_direction_is_kept() {
    // By hand: the singular values are 3 sqrt(1) and 2 sqrt(9), so that the second direction is kept and 9 is lost.
    let weight = mat![[3.0, 0.0], [0.0, 2.0]];
    for share in [Share::Input, Share::Output, Share::None] {
        let layers = [layer(weight.clone(), mat![[1.0, 0.0], [0.0, 9.0]])];
        let solution = solved(&layers, share, 1);
        let expected = mat![[0.0, 0.0], [0.0, 2.0]];
        assert_close(weights(&layers, share, &solution)[0].as_ref(), expected.as_ref(), 1e-14);
        assert_near(losses(&layers, share, &solution)[0], 9.0, 9.0, 1e-14);
        assert_near(solution.values[0], 36.0, 36.0, 1e-14);
    }
}

#[test]
fn equal_moments_give_the_truncated_decomposition_of_the_weights() {
    let weight = noise(9, 14, 4);
    let layers = [layer(weight.clone(), Mat::identity(9, 9))];
    let svd = weight.thin_svd().unwrap();
    let mut scaled = svd.U().subcols(0, 4).to_owned();
    super::matrix::scale_columns(&mut scaled, &svd.S().column_vector().iter().copied().take(4).collect::<Vec<_>>());
    let expected = scaled * svd.V().subcols(0, 4).transpose();
    let solution = solved(&layers, Share::Input, 4);
    assert_close(weights(&layers, Share::Input, &solution)[0].as_ref(), expected.as_ref(), 1e-11);
}

#[test]
fn nothing_near_the_optimum_is_better() {
    let gram = moments(14, 60, 9);
    let layers = [layer(noise(14, 20, 1), gram.clone())];
    let solution = solved(&layers, Share::None, 5);
    let best = losses(&layers, Share::None, &solution)[0];
    let plain = [layer(layers[0].weight.clone(), Mat::identity(14, 14))];
    let plain =
        product(Share::None, &solved(&plain, Share::None, 5).basis, &solved(&plain, Share::None, 5).coefficients[0]);
    assert!(best < layers[0].judge.error(layers[0].weight.as_ref(), plain.as_ref()));
    for seed in 0..200 {
        let size = 10_f64.powi(-(seed as i32 % 5));
        let moved = &solution.basis + noise(14, 5, 100 + seed) * faer::Scale(size);
        // The best coefficients for the moved basis, by the normal equations.
        let products = moved.transpose() * &gram * &moved;
        let wanted = moved.transpose() * &gram * &layers[0].weight;
        let own = products.llt(Side::Lower).unwrap().solve(wanted);
        let loss = layers[0].judge.error(layers[0].weight.as_ref(), (moved * own).as_ref());
        assert!(loss >= best * (1.0 - 1e-9), "{loss} < {best}");
    }
}

#[test]
fn scale_order_and_rotation_change_only_what_they_should() {
    let grams = [moments(12, 60, 1), moments(12, 60, 2)];
    let own = [noise(12, 9, 3), noise(12, 9, 4)];
    let group = |grams: &[Mat<f64>; 2], own: &[Mat<f64>; 2]| {
        [layer(own[0].clone(), grams[0].clone()), layer(own[1].clone(), grams[1].clone())]
    };
    for share in [Share::Input, Share::Output] {
        let layers = group(&grams, &own);
        let found = weights(&layers, share, &solved(&layers, share, 4));
        // Louder text.
        let louder = group(&[&grams[0] * faer::Scale(7.0), &grams[1] * faer::Scale(7.0)], &own);
        let same = weights(&louder, share, &solved(&louder, share, 4));
        assert_close(same[0].as_ref(), found[0].as_ref(), 1e-10);
        // The other order.
        let turned = group(&[grams[1].clone(), grams[0].clone()], &[own[1].clone(), own[0].clone()]);
        let same = weights(&turned, share, &solved(&turned, share, 4));
        assert_close(same[1].as_ref(), found[0].as_ref(), 1e-10);
        // Another basis of the outputs.
        let rotation = noise(9, 9, 5).qr().compute_Q();
        let rotated = group(&grams, &[&own[0] * &rotation, &own[1] * &rotation]);
        let same = weights(&rotated, share, &solved(&rotated, share, 4));
        assert_close(same[0].as_ref(), (&found[0] * &rotation).as_ref(), 1e-10);
        // The same layer twice.
        let twice = group(&[grams[0].clone(), grams[0].clone()], &[own[0].clone(), own[0].clone()]);
        let alone = [layer(own[0].clone(), grams[0].clone())];
        let (twice_solution, alone_solution) = (solved(&twice, share, 4), solved(&alone, share, 4));
        let same = weights(&twice, share, &twice_solution);
        assert_close(same[0].as_ref(), same[1].as_ref(), 1e-12);
        assert_close(same[0].as_ref(), weights(&alone, share, &alone_solution)[0].as_ref(), 1e-10);
    }
}

#[test]
fn text_that_shows_few_directions_leaves_the_others_as_they_are() {
    // 6 tokens, 16 inputs: the moments have rank 6.
    let text = noise(6, 16, 1);
    let gram = text.transpose() * &text;
    let weight = noise(16, 12, 2);
    let layers = [layer(weight.clone(), gram.clone())];
    for rank in [6, 9, 12] {
        let solution = solved(&layers, Share::None, rank);
        let found = &weights(&layers, Share::None, &solution)[0];
        assert_close((&text * found).as_ref(), (&text * &weight).as_ref(), 1e-7);
        // On other text it is at least as good as forgetting what was not shown.
        let other = moments(16, 64, 7);
        let error = |approximation: MatRef<'_, f64>| Judge::Inputs(other.clone()).error(weight.as_ref(), approximation);
        let (values, vectors) = eigen(gram.as_ref()).unwrap();
        let shown = vectors.subcols(0, values.iter().filter(|&&value| value > 1e-9 * values[0]).count());
        let forgetting = shown * (shown.transpose() * &weight);
        assert!(error(found.as_ref()) <= error(forgetting.as_ref()));
    }
    assert_close(weights(&layers, Share::None, &solved(&layers, Share::None, 12))[0].as_ref(), weight.as_ref(), 1e-10);
    // The limit of a vanishing ridge.
    let mut lifted = gram.clone();
    super::matrix::add_diagonal(&mut lifted, 1e-9);
    let lifted = [layer(weight, lifted)];
    let (with, without) = (solved(&lifted, Share::None, 4), solved(&layers, Share::None, 4));
    assert_close(
        weights(&lifted, Share::None, &with)[0].as_ref(),
        weights(&layers, Share::None, &without)[0].as_ref(),
        1e-6,
    );
}

#[test]
fn dead_inputs_and_dead_weights_are_no_accident() {
    let weight = noise(8, 6, 1);
    for share in [Share::Input, Share::Output, Share::None] {
        for weighting in [Weighting::Sum, Weighting::Relative] {
            let dead = [layer(weight.clone(), Mat::zeros(8, 8))];
            let plain = [layer(weight.clone(), Mat::identity(8, 8))];
            let found = solve(&dead, share, weighting, 3).unwrap();
            let expected = solved(&plain, share, 3);
            assert_close(
                weights(&dead, share, &found)[0].as_ref(),
                weights(&plain, share, &expected)[0].as_ref(),
                1e-10,
            );
            let empty = [layer(Mat::zeros(8, 6), moments(8, 30, 1))];
            let found = solve(&empty, share, weighting, 3).unwrap();
            assert_eq!(square(weights(&empty, share, &found)[0].as_ref()), 0.0);
            // Beside a layer that lives.
            let mixed = [layer(weight.clone(), moments(8, 30, 1)), layer(weight.clone(), Mat::zeros(8, 8))];
            if share != Share::None {
                let found = solve(&mixed, share, weighting, 6).unwrap();
                for found in weights(&mixed, share, &found) {
                    assert_close(found.as_ref(), weight.as_ref(), 1e-9);
                }
            }
        }
    }
}

#[test]
fn a_shared_output_side_is_exact() {
    let layers: Vec<Layer> = (0..3).map(|seed| layer(noise(20, 8, seed), moments(20, 60, 10 + seed))).collect();
    let mut sum = Mat::<f64>::zeros(8, 8);
    for layer in &layers {
        sum += layer.weight.transpose() * layer.gram.as_ref().unwrap() * &layer.weight;
    }
    let mut values = sum.self_adjoint_eigenvalues(Side::Lower).unwrap();
    values.reverse();
    let all: f64 = values.iter().sum();
    for rank in 1..8 {
        let loss: f64 = losses(&layers, Share::Output, &solved(&layers, Share::Output, rank)).iter().sum();
        assert_near(loss, values[rank..].iter().sum(), all, 1e-11);
    }
}

#[test]
fn relative_weights_protect_the_quiet_layer() {
    let grams = [moments(12, 60, 1), moments(12, 60, 2)];
    let layers =
        [layer(noise(12, 10, 3) * faer::Scale(30.0), grams[0].clone()), layer(noise(12, 10, 4), grams[1].clone())];
    let relative = |share, weighting| {
        let solution = solve(&layers, share, weighting, 5).unwrap();
        let all = losses(&layers, share, &solution);
        let energy = |layer: &Layer| layer.judge.energy(layer.weight.as_ref());
        all.iter().zip(&layers).map(|(loss, layer)| loss / energy(layer)).collect::<Vec<_>>()
    };
    for share in [Share::Input, Share::Output] {
        let (sum, even) = (relative(share, Weighting::Sum), relative(share, Weighting::Relative));
        assert!(even[1] < sum[1] && even[0] + even[1] < sum[0] + sum[1], "{sum:?} {even:?}");
    }
    // Loudness alone, of the weights or of the inputs, changes nothing then.
    let louder = [
        layer(&layers[0].weight * faer::Scale(0.1), &grams[0] * faer::Scale(9.0)),
        layer(layers[1].weight.clone(), grams[1].clone()),
    ];
    let found = |layers: &[Layer]| {
        weights(layers, Share::Output, &solve(layers, Share::Output, Weighting::Relative, 5).unwrap())[1].clone()
    };
    assert_close(found(&louder).as_ref(), found(&layers).as_ref(), 1e-9);
}

#[test]
fn energies_and_products_are_traces() {
    let (a, b) = (mat![[1.0, 2.0], [3.0, 4.0]], mat![[5.0, 6.0], [7.0, 8.0]]);
    assert_eq!(dot(a.as_ref(), b.as_ref()), 70.0);
    assert_eq!(square(a.as_ref()), 30.0);
}
