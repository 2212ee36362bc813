//! Small helpers over dense matrices.

use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};

/// Row-major `f32` as a matrix.
pub(super) fn from_rows(values: &[f32], rows: usize, columns: usize) -> Mat<f64> {
    let view = MatRef::from_row_major_slice(values, rows, columns);
    Mat::from_fn(rows, columns, |row, column| f64::from(view[(row, column)]))
}

/// A matrix as row-major `f32`.
pub(super) fn to_rows(matrix: MatRef<'_, f64>) -> Vec<f32> {
    (0..matrix.nrows()).flat_map(|row| (0..matrix.ncols()).map(move |column| matrix[(row, column)] as f32)).collect()
}

/// The sum of the products of equal entries: `tr(a^T b)`.
pub(super) fn dot(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    (0..a.ncols()).map(|column| a.col(column).iter().zip(b.col(column).iter()).map(|(a, b)| a * b).sum::<f64>()).sum()
}

/// The sum of the squares of all entries.
pub(super) fn square(a: MatRef<'_, f64>) -> f64 {
    dot(a, a)
}

/// The sum of the diagonal.
pub(super) fn trace(a: MatRef<'_, f64>) -> f64 {
    (0..a.nrows().min(a.ncols())).map(|index| a[(index, index)]).sum()
}

/// Adds to the diagonal.
pub(super) fn add_diagonal(a: &mut Mat<f64>, value: f64) {
    for index in 0..a.nrows().min(a.ncols()) {
        a[(index, index)] += value;
    }
}

/// Multiplies each column by its factor.
pub(super) fn scale_columns(a: &mut Mat<f64>, factors: &[f64]) {
    for (column, factor) in factors.iter().enumerate().take(a.ncols()) {
        a.col_as_slice_mut(column).iter_mut().for_each(|value| *value *= factor);
    }
}

/// Multiplies each row by its factor.
pub(super) fn scale_rows(a: &mut Mat<f64>, factors: &[f64]) {
    for column in 0..a.ncols() {
        a.col_as_slice_mut(column).iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
    }
}

/// `a^-1 b` for a positive definite `a`; `None` for others.
pub(super) fn solve_positive(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let solution = a.llt(Side::Lower).ok()?.solve(b);
    is_finite(solution.as_ref()).then_some(solution)
}

/// Whether every entry is.
pub(super) fn is_finite(a: MatRef<'_, f64>) -> bool {
    (0..a.ncols()).all(|column| a.col(column).iter().all(|value| value.is_finite()))
}

/// Side by side.
pub(super) fn beside(parts: &[Mat<f64>]) -> Mat<f64> {
    let rows = parts.first().map_or(0, Mat::nrows);
    let mut all = Mat::zeros(rows, parts.iter().map(Mat::ncols).sum());
    let mut start = 0;
    for part in parts {
        all.subcols_mut(start, part.ncols()).copy_from(part);
        start += part.ncols();
    }
    all
}

/// One below the other.
pub(super) fn below(parts: &[Mat<f64>]) -> Mat<f64> {
    let columns = parts.first().map_or(0, Mat::ncols);
    let mut all = Mat::zeros(parts.iter().map(Mat::nrows).sum(), columns);
    let mut start = 0;
    for part in parts {
        all.subrows_mut(start, part.nrows()).copy_from(part);
        start += part.nrows();
    }
    all
}
