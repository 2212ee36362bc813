//! Decompositions that are checked before they are believed.
//!
//! Wrong results without an error are known of singular value decompositions in use, and failures to converge of all of
//! them. So every result is checked for the three things that make it right (energy, orthogonality, residual), and a
//! second way is taken where the first does not pass.

use faer::{Mat, MatRef, Side};

use super::matrix::{is_finite, scale_columns, square, trace};
use crate::Decomposition;

/// Directions whose singular value is smaller, in units of the largest, are rounding.
const SMALLEST: f64 = 1e-7;
/// How far energies may differ, in units of the whole.
const ENERGY: f64 = 1e-9;
/// How far products of basis vectors may be from 0 and 1.
const ORTHOGONALITY: f64 = 1e-10;

/// The leading right singular vectors of a matrix.
pub(super) struct Directions {
    /// One in each column, orthonormal; fewer than asked for where the matrix has fewer.
    pub(super) vectors: Mat<f64>,
    /// All squared singular values, falling.
    pub(super) values: Vec<f64>,
    /// How they were found.
    pub(super) how: Decomposition,
}

/// The `count` leading right singular vectors of `matrix`, or what failed.
pub(super) fn leading(matrix: MatRef<'_, f64>, count: usize) -> Result<Directions, String> {
    let energy = square(matrix);
    if !energy.is_finite() {
        return Err("its energy is not finite".to_owned());
    }
    if energy == 0.0 {
        let values = vec![0.0; matrix.nrows().min(matrix.ncols())];
        return Ok(Directions { vectors: Mat::zeros(matrix.ncols(), 0), values, how: Decomposition::Gram });
    }
    by_gram(matrix, count, energy)
        .or_else(|first| by_singular_values(matrix, count, energy).map_err(|second| format!("{first}; {second}")))
}

/// The squared singular values of `matrix`, falling, or what failed.
pub(super) fn squared_singular_values(matrix: MatRef<'_, f64>) -> Result<Vec<f64>, String> {
    let energy = square(matrix);
    let product = smaller_product(matrix);
    if let Ok(mut values) = product.self_adjoint_eigenvalues(Side::Lower) {
        values.reverse();
        if close(values.iter().sum(), energy, energy) {
            values.iter_mut().for_each(|value| *value = value.max(0.0));
            return Ok(values);
        }
    }
    leading(matrix, 0).map(|directions| directions.values)
}

/// Eigenvalues, falling, and eigenvectors of a symmetric matrix, or what failed.
pub(super) fn eigen(matrix: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), String> {
    let found = matrix.self_adjoint_eigen(Side::Lower).map_err(|error| format!("eigenvectors: {error:?}"))?;
    let vectors = found.U().reverse_cols().to_owned();
    let values: Vec<f64> = found.S().column_vector().iter().rev().copied().collect();
    let size = square(matrix).sqrt();
    if !close(values.iter().sum(), trace(matrix), size) {
        return Err("eigenvectors: the eigenvalues do not sum to the trace".to_owned());
    }
    check_orthonormal(vectors.as_ref()).map_err(|error| format!("eigenvectors: {error}"))?;
    let mut residual = matrix * &vectors;
    let mut scaled = vectors.clone();
    scale_columns(&mut scaled, &values);
    residual -= &scaled;
    if square(residual.as_ref()).sqrt() <= ENERGY * size {
        Ok((values, vectors))
    } else {
        Err("eigenvectors: the matrix does not map them to their multiples".to_owned())
    }
}

/// A matrix `s` with `s^T s = matrix`, for a symmetric matrix without negative eigenvalues (but for rounding).
pub(super) fn root(matrix: MatRef<'_, f64>) -> Result<Mat<f64>, String> {
    if let Ok(factor) = matrix.llt(Side::Lower) {
        let root = factor.L().transpose().to_owned();
        if is_finite(root.as_ref()) && close(square(root.as_ref()), trace(matrix), trace(matrix)) {
            return Ok(root);
        }
    }
    let (values, vectors) = eigen(matrix)?;
    let mut root = vectors;
    scale_columns(&mut root, &values.iter().map(|value| value.max(0.0).sqrt()).collect::<Vec<_>>());
    Ok(root.transpose().to_owned())
}

/// `m^T m` or `m m^T`, whichever is smaller.
fn smaller_product(matrix: MatRef<'_, f64>) -> Mat<f64> {
    if matrix.ncols() <= matrix.nrows() { matrix.transpose() * matrix } else { matrix * matrix.transpose() }
}

fn by_gram(matrix: MatRef<'_, f64>, count: usize, energy: f64) -> Result<Directions, String> {
    let (values, vectors) = eigen(smaller_product(matrix).as_ref())?;
    let values: Vec<f64> = values.into_iter().map(|value| value.max(0.0)).collect();
    let count = significant(&values, count);
    let vectors = if matrix.ncols() <= matrix.nrows() {
        vectors.subcols(0, count).to_owned()
    } else {
        let mut right = matrix.transpose() * vectors.subcols(0, count);
        scale_columns(&mut right, &values.iter().take(count).map(|value| 1.0 / value.sqrt()).collect::<Vec<_>>());
        orthonormalised(right).ok_or("eigenvectors: those of the other side are not independent")?
    };
    checked(matrix, Directions { vectors, values, how: Decomposition::Gram }, energy)
}

fn by_singular_values(matrix: MatRef<'_, f64>, count: usize, energy: f64) -> Result<Directions, String> {
    let found = matrix.thin_svd().map_err(|error| format!("singular values: {error:?}"))?;
    let values: Vec<f64> = found.S().column_vector().iter().map(|value| value * value).collect();
    let vectors = found.V().subcols(0, significant(&values, count)).to_owned();
    checked(matrix, Directions { vectors, values, how: Decomposition::SingularValues }, energy)
        .map_err(|error| format!("singular values: {error}"))
}

fn significant(values: &[f64], count: usize) -> usize {
    let least = values.first().copied().unwrap_or(0.0) * SMALLEST * SMALLEST;
    values.iter().take(count).take_while(|&&value| value > least).count()
}

/// Makes nearly orthonormal columns orthonormal, each from those before it.
fn orthonormalised(columns: Mat<f64>) -> Option<Mat<f64>> {
    if columns.ncols() == 0 {
        return Some(columns);
    }
    let products = columns.transpose() * &columns;
    let lower = products.llt(Side::Lower).ok()?.L().to_owned();
    let mut rows = columns.transpose().to_owned();
    lower.solve_lower_triangular_in_place(&mut rows);
    is_finite(rows.as_ref()).then(|| rows.transpose().to_owned())
}

fn checked(matrix: MatRef<'_, f64>, directions: Directions, energy: f64) -> Result<Directions, String> {
    if !close(directions.values.iter().sum(), energy, energy) {
        return Err("the squared singular values do not sum to the energy".to_owned());
    }
    check_orthonormal(directions.vectors.as_ref())?;
    let kept = square((matrix * &directions.vectors).as_ref());
    let expected: f64 = directions.values.iter().take(directions.vectors.ncols()).sum();
    if (kept - expected).abs() <= 10.0 * ENERGY * energy {
        Ok(directions)
    } else {
        Err("the directions do not hold the energy of their singular values".to_owned())
    }
}

fn check_orthonormal(vectors: MatRef<'_, f64>) -> Result<(), String> {
    let products = vectors.transpose() * vectors;
    let unlike = |row: usize, column: usize| (products[(row, column)] - f64::from(u8::from(row == column))).abs();
    let worst = (0..products.ncols())
        .flat_map(|column| (column..products.nrows()).map(move |row| (row, column)))
        .map(|(row, column)| unlike(row, column))
        .fold(0.0, |worst: f64, value| if value > worst || value.is_nan() { value } else { worst });
    if worst <= ORTHOGONALITY { Ok(()) } else { Err(format!("they are not orthonormal by {worst:.1e}")) }
}

fn close(value: f64, expected: f64, size: f64) -> bool {
    (value - expected).abs() <= ENERGY * size
}
