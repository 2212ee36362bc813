//! Factors as they are stored: in `f32`, with their scale in equal parts on both sides, and with a sign that is always
//! the same.

use faer::Mat;

use super::matrix::{from_rows, scale_columns, scale_rows, square, to_rows};
use super::pivot;
use crate::{Form, GroupFactors, Share};

/// Factors in `f32`. `scales` are the singular values: half of each goes to either side, so that neither has columns
/// that coarse number formats would lose beside others. Pivoted factors have no scale to choose.
pub(super) fn factors(
    (share, form): (Share, Form),
    basis: Mat<f64>,
    coefficients: Vec<Mat<f64>>,
    scales: &[f64],
) -> GroupFactors {
    if form == Form::Pivoted {
        return pivot::factors(share, &basis, &coefficients);
    }
    let (mut basis, mut coefficients) = (basis, coefficients);
    let output = share == Share::Output;
    let rank = if output { basis.nrows() } else { basis.ncols() };
    // What carries the singular values gives half of them away: the basis of inputs, the coefficients of outputs.
    let shares: Vec<f64> = scales.iter().map(|&scale| if scale > 0.0 { scale.sqrt() } else { 1.0 }).collect();
    let basis_factors: Vec<f64> = if output { shares.clone() } else { inverses(&shares) };
    apply(share, &mut basis, &mut coefficients, &basis_factors);

    let own: f64 = coefficients.iter().map(|own| square(own.as_ref())).sum::<f64>() / coefficients.len().max(1) as f64;
    let both = (own / square(basis.as_ref())).powf(0.25);
    let signs = (0..rank).map(|index| sign(&basis, output, index));
    let last: Vec<f64> = signs.map(|sign| if both.is_finite() && both > 0.0 { sign * both } else { sign }).collect();
    apply(share, &mut basis, &mut coefficients, &last);

    let (inputs, outputs) = match (output, coefficients.first()) {
        (true, Some(own)) => (own.nrows(), basis.ncols()),
        (false, Some(own)) => (basis.nrows(), own.ncols()),
        (_, None) => (0, 0),
    };
    GroupFactors {
        share,
        rank,
        inputs,
        outputs,
        pivots: Vec::new(),
        basis: to_rows(basis.as_ref()),
        coefficients: coefficients.iter().map(|own| to_rows(own.as_ref())).collect(),
    }
}

/// Basis and coefficients of stored factors.
pub(super) fn read(factors: &GroupFactors) -> (Mat<f64>, Vec<Mat<f64>>) {
    let GroupFactors { share, rank, inputs, outputs, .. } = *factors;
    let (basis, own) = match share {
        Share::Output => ((rank, outputs), (inputs, rank)),
        Share::Input | Share::None => ((inputs, rank), (rank, outputs)),
    };
    let coefficients = factors.coefficients.iter().map(|values| from_rows(values, own.0, own.1)).collect();
    if !factors.pivots.is_empty() {
        return (pivot::whole_basis(factors), coefficients);
    }
    (from_rows(&factors.basis, basis.0, basis.1), coefficients)
}

/// Factors scaled so that the side without the singular values has directions of length 1, and the scale of each
/// dimension: one pull on all of them is then the same for each.
pub(super) fn evened(share: Share, basis: Mat<f64>, own: Mat<f64>) -> (Mat<f64>, Mat<f64>, Vec<f64>) {
    let output = share == Share::Output;
    let even = if output { &basis } else { &own };
    let norms = (0..even.nrows()).map(|row| square(even.subrows(row, 1)).sqrt());
    let norms: Vec<f64> = norms.map(|norm| if norm > 0.0 { norm } else { 1.0 }).collect();
    let factors = if output { inverses(&norms) } else { norms };
    let (mut basis, mut own) = (basis, [own]);
    apply(share, &mut basis, &mut own, &factors);
    let [own] = own;
    (basis, own, factors)
}

/// Coefficients for the basis as it was before [`evened`].
pub(super) fn restored(share: Share, mut own: Mat<f64>, factors: &[f64]) -> Mat<f64> {
    if share == Share::Output {
        scale_columns(&mut own, factors)
    } else {
        scale_rows(&mut own, factors)
    }
    own
}

/// Multiplies each dimension of the basis by its factor and divides that of the coefficients by it.
fn apply(share: Share, basis: &mut Mat<f64>, coefficients: &mut [Mat<f64>], factors: &[f64]) {
    let inverse = inverses(factors);
    if share == Share::Output {
        scale_rows(basis, factors);
        coefficients.iter_mut().for_each(|own| scale_columns(own, &inverse));
    } else {
        scale_columns(basis, factors);
        coefficients.iter_mut().for_each(|own| scale_rows(own, &inverse));
    }
}

fn inverses(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| 1.0 / value).collect()
}

/// The sign that makes the largest entry of a dimension of the basis positive.
fn sign(basis: &Mat<f64>, rows: bool, index: usize) -> f64 {
    let largest = |values: &mut dyn Iterator<Item = &f64>| {
        values.fold(0.0, |largest: f64, &value| if value.abs() > largest.abs() { value } else { largest })
    };
    let value = if rows { largest(&mut basis.row(index).iter()) } else { largest(&mut basis.col(index).iter()) };
    if value < 0.0 { -1.0 } else { 1.0 }
}
