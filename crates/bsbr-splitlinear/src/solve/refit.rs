//! Fits to the layers' own inputs, once a basis is known.
//!
//! A shared input side is found with the mean of the layers' moments; what each layer really reads differs. With the
//! basis fixed the best coefficients of each layer have a closed form, and with the coefficients fixed so has the basis.

use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};

use super::layer::{Judge, Layer};
use super::matrix::{add_diagonal, dot, is_finite, solve_positive, square, trace};
use crate::Share;

/// Steps of conjugate gradients in which a basis is fitted.
const STEPS: usize = 12;
/// What a fit must gain, in units of the error, before another is tried.
const LEAST_GAIN: f64 = 1e-4;

/// What takes the place of the weight.
pub(super) fn product(share: Share, basis: &Mat<f64>, coefficients: &Mat<f64>) -> Mat<f64> {
    if share == Share::Output { coefficients * basis } else { basis * coefficients }
}

/// The coefficients that fit a layer best, drawn to `before` by `rho` in units of the mean energy of a direction.
/// `None` where they are not determined.
pub(super) fn fitted(layer: &Layer, share: Share, basis: &Mat<f64>, before: &Mat<f64>, rho: f64) -> Option<Mat<f64>> {
    if share == Share::Output {
        return fitted_inputs(layer.target(), basis, before, rho);
    }
    let weighted = layer.weighted(basis.as_ref());
    let mut products = basis.transpose() * &weighted;
    let mut wanted = weighted.transpose() * layer.target();
    draw(&mut products, &mut wanted, before.as_ref(), rho);
    solve_positive(products.as_ref(), wanted.as_ref())
}

/// The same where the basis is on the side of the outputs: the moments of the inputs then do not matter.
fn fitted_inputs(target: MatRef<'_, f64>, basis: &Mat<f64>, before: &Mat<f64>, rho: f64) -> Option<Mat<f64>> {
    let mut products = basis * basis.transpose();
    let mut wanted = basis * target.transpose();
    draw(&mut products, &mut wanted, before.transpose(), rho);
    Some(solve_positive(products.as_ref(), wanted.as_ref())?.transpose().to_owned())
}

fn draw(products: &mut Mat<f64>, wanted: &mut Mat<f64>, before: MatRef<'_, f64>, rho: f64) {
    let pull = rho * trace(products.as_ref()) / products.nrows().max(1) as f64;
    add_diagonal(products, pull);
    *wanted += before * faer::Scale(pull);
}

/// Fits the coefficients of each layer, keeping those whose error on held-out text is smaller. Says whether any was kept.
pub(super) fn fit_coefficients(
    layers: &[Layer],
    share: Share,
    basis: &Mat<f64>,
    coefficients: &mut [Mat<f64>],
    rho: f64,
) -> bool {
    let mut any = false;
    for (layer, own) in layers.iter().zip(coefficients) {
        let Some(judge) = &layer.held_out else { continue };
        let Some(new) = fitted(layer, share, basis, own, rho) else { continue };
        let error = |own: &Mat<f64>| judge.error(layer.weight.as_ref(), product(share, basis, own).as_ref());
        if error(&new) < error(own) {
            *own = new;
            any = true;
        }
    }
    any
}

/// Fits the basis to the coefficients and these to the basis, up to `rounds` times, as long as the sum of the errors on
/// held-out text shrinks. Says whether it did.
pub(super) fn alternate(
    layers: &[Layer],
    weights: &[f64],
    basis: &mut Mat<f64>,
    coefficients: &mut [Mat<f64>],
    rho: f64,
    rounds: usize,
) -> bool {
    let error = |basis: &Mat<f64>, coefficients: &[Mat<f64>]| -> f64 {
        let one = |((layer, weight), own): ((&Layer, &f64), &Mat<f64>)| {
            let judged = |judge: &Judge| judge.error(layer.weight.as_ref(), product(Share::Input, basis, own).as_ref());
            weight * layer.held_out.as_ref().map_or(0.0, judged)
        };
        layers.iter().zip(weights).zip(coefficients).map(one).sum()
    };
    let mut least = error(basis, coefficients);
    let mut any = false;
    for _ in 0..rounds {
        let Some(new) = fitted_basis(layers, weights, basis, coefficients) else { break };
        let mut own = coefficients.to_vec();
        fit_coefficients(layers, Share::Input, &new, &mut own, rho);
        let reached = error(&new, &own);
        if reached >= least {
            break;
        }
        let enough = reached < least * (1.0 - LEAST_GAIN);
        (least, any, *basis) = (reached, true, new);
        coefficients.clone_from_slice(&own);
        if !enough {
            break;
        }
    }
    any
}

/// The basis that fits the coefficients: solves `sum G_i B C_i C_i^T = sum G_i T_i C_i^T` by conjugate gradients from
/// the present basis, preconditioned with the solution for equal `G_i`.
fn fitted_basis(layers: &[Layer], weights: &[f64], basis: &Mat<f64>, coefficients: &[Mat<f64>]) -> Option<Mat<f64>> {
    let rank = basis.ncols();
    let mut gram = Mat::<f64>::zeros(basis.nrows(), basis.nrows());
    let mut products = Vec::new();
    let mut all = Mat::<f64>::zeros(rank, rank);
    let mut residual = Mat::<f64>::zeros(basis.nrows(), rank);
    for ((layer, &weight), own) in layers.iter().zip(weights).zip(coefficients) {
        gram += layer.gram.as_ref()? * faer::Scale(weight);
        let product = own * own.transpose() * faer::Scale(weight);
        all += &product;
        let left = layer.target() - basis * own;
        residual += layer.weighted((left * own.transpose()).as_ref()) * faer::Scale(weight);
        products.push(product);
    }
    let jitter = 1e-12 * trace(all.as_ref()) / rank.max(1) as f64;
    add_diagonal(&mut all, jitter);
    let (gram, all) = (gram.llt(Side::Lower).ok()?, all.llt(Side::Lower).ok()?);
    let precondition = |matrix: &Mat<f64>| {
        let left = gram.solve(matrix);
        all.solve(left.transpose()).transpose().to_owned()
    };
    let apply = |direction: &Mat<f64>| {
        let mut sum = Mat::<f64>::zeros(direction.nrows(), rank);
        for (layer, product) in layers.iter().zip(&products) {
            sum += layer.weighted((direction * product).as_ref());
        }
        sum
    };

    let mut found = basis.clone();
    let start = square(residual.as_ref());
    let mut improved = precondition(&residual);
    let mut direction = improved.clone();
    let mut energy = dot(residual.as_ref(), improved.as_ref());
    for _ in 0..STEPS {
        let mapped = apply(&direction);
        let curvature = dot(direction.as_ref(), mapped.as_ref());
        if !(energy > 0.0 && curvature > 0.0) {
            break;
        }
        let step = faer::Scale(energy / curvature);
        found += &direction * step;
        residual -= mapped * step;
        if square(residual.as_ref()) <= 1e-16 * start {
            break;
        }
        improved = precondition(&residual);
        let next = dot(residual.as_ref(), improved.as_ref());
        direction = &improved + &direction * faer::Scale(next / energy);
        energy = next;
    }
    is_finite(found.as_ref()).then_some(found)
}
