//! Pivoted factors: the same product with a basis that passes some of its inputs on as they are.
//!
//! A basis `B` `[inputs, rank]` may be multiplied from the right with any invertible matrix if the coefficients are
//! multiplied with its inverse from the left. With the inverse of `rank` of its own rows those become the identity, so
//! that they need not be kept nor multiplied with: an interpolative decomposition (Cheng, Gimbutas, Martinsson and
//! Rokhlin, 2005). Which rows is a matter of numerics alone: they must be far from dependent. Elimination with pivots
//! chooses them from an orthonormal basis, and rows are exchanged until no entry of the others exceeds 2 (Goreinov and
//! others, "How to find a good submatrix", 2010), as strong rank-revealing factorisations do.

use faer::Mat;
use faer::linalg::solvers::Solve;

use super::matrix::{from_rows, is_finite, to_rows};
use crate::{GroupFactors, Share, pivots::others};

/// Largest entry of the rows that are not passed on.
const LARGEST: f64 = 2.0;

/// Factors in `f32` of a basis `[inputs, rank]` and coefficients `[rank, outputs]`.
pub(super) fn factors(share: Share, basis: &Mat<f64>, coefficients: &[Mat<f64>]) -> GroupFactors {
    let (inputs, rank) = (basis.nrows(), basis.ncols());
    let (pivots, rest) = chosen(&basis.qr().compute_thin_Q());
    let rows = Mat::from_fn(rank, rank, |row, column| basis[(pivots[row], column)]);
    GroupFactors {
        share,
        rank,
        inputs,
        outputs: coefficients.first().map_or(0, Mat::ncols),
        pivots: pivots.iter().map(|&pivot| pivot as u32).collect(),
        basis: to_rows(rest.as_ref()),
        coefficients: coefficients.iter().map(|own| to_rows((&rows * own).as_ref())).collect(),
    }
}

/// The basis of pivoted factors with the rows of its pivots, `[inputs, rank]`.
pub(super) fn whole_basis(factors: &GroupFactors) -> Mat<f64> {
    let GroupFactors { rank, inputs, pivots, basis, .. } = factors;
    let mut whole = Mat::zeros(*inputs, *rank);
    let rest = from_rows(basis, inputs - rank, *rank);
    for (row, input) in others(*inputs, pivots.iter().map(|&pivot| pivot as usize)).into_iter().enumerate() {
        whole.row_mut(input).copy_from(rest.row(row));
    }
    for (dimension, &pivot) in pivots.iter().enumerate() {
        whole[(pivot as usize, dimension)] = 1.0;
    }
    whole
}

/// As many rows as there are columns, far from dependent, and what makes the other rows of them: `[others, columns]`.
fn chosen(orthonormal: &Mat<f64>) -> (Vec<usize>, Mat<f64>) {
    let count = orthonormal.nrows();
    let mut pivots = leading_rows(orthonormal);
    let mut rest = others(count, pivots.iter().copied());
    let mut made = made_of(orthonormal, &pivots, &rest);
    // Each exchange makes the volume of the chosen rows more than twice as large, so that there are not many.
    for _ in 0..count {
        let Some((row, column, value)) = largest(&made).filter(|(_, _, value)| value.abs() > LARGEST) else { break };
        exchange(&mut made, row, column, value);
        std::mem::swap(&mut pivots[column], &mut rest[row]);
    }
    pivots.sort_unstable();
    let rest = others(count, pivots.iter().copied());
    let made = made_of(orthonormal, &pivots, &rest);
    (pivots, made)
}

/// The rows that Gaussian elimination takes first.
fn leading_rows(matrix: &Mat<f64>) -> Vec<usize> {
    let lu = matrix.partial_piv_lu();
    let (order, _) = lu.P().arrays();
    order.iter().copied().take(matrix.ncols()).collect()
}

/// The matrix that times the rows `pivots` gives the rows `rest`.
fn made_of(matrix: &Mat<f64>, pivots: &[usize], rest: &[usize]) -> Mat<f64> {
    let rank = matrix.ncols();
    let taken = Mat::from_fn(rank, rank, |row, column| matrix[(pivots[column], row)]);
    let wanted = Mat::from_fn(rank, rest.len(), |row, column| matrix[(rest[column], row)]);
    let made = taken.partial_piv_lu().solve(wanted).transpose().to_owned();
    if is_finite(made.as_ref()) { made } else { Mat::zeros(rest.len(), rank) }
}

/// The entry that is largest in absolute value.
fn largest(matrix: &Mat<f64>) -> Option<(usize, usize, f64)> {
    let entries = (0..matrix.ncols()).flat_map(|column| {
        matrix.col_as_slice(column).iter().enumerate().map(move |(row, &value)| (row, column, value))
    });
    entries.reduce(|most, entry| if entry.2.abs() > most.2.abs() { entry } else { most })
}

/// What the matrix becomes when its row `row` takes the place of the chosen row `column`.
fn exchange(made: &mut Mat<f64>, row: usize, column: usize, value: f64) {
    let of_row: Vec<f64> = made.row(row).iter().copied().collect();
    let of_column: Vec<f64> = made.col(column).iter().copied().collect();
    for (at, &factor) in of_row.iter().enumerate() {
        let entries = made.col_as_slice_mut(at);
        if at == column {
            entries.iter_mut().for_each(|entry| *entry /= value);
            entries[row] = 1.0 / value;
        } else {
            let factor = factor / value;
            for (entry, of_column) in entries.iter_mut().zip(&of_column) {
                *entry -= of_column * factor;
            }
            entries[row] = -factor;
        }
    }
}
