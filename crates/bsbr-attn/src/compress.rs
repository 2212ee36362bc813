//! Truncated singular value decomposition of small square matrices, in tensor operations.

use burn::tensor::Tensor;

/// Rounds of subspace iteration: the share of a direction beyond the rank falls with the ratio of singular values
/// to the power of twice this.
const ITERATIONS: usize = 6;

/// The best approximation of `[batch, heads, d, d]` matrices by `d * d / factor` numbers each: rank `d / (2 factor)`
/// (two factors of `d x rank`), at least 1. `factor = 1` returns the matrices unchanged.
///
/// Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4), started from pivoted columns instead of random
/// ones.
pub(crate) fn truncate(matrices: Tensor<4>, factor: usize) -> Tensor<4> {
    if factor == 1 {
        return matrices;
    }
    let [_, _, width, _] = matrices.dims();
    let rank = (width / (2 * factor)).max(1);
    let transposed = matrices.clone().swap_dims(2, 3);
    let mut basis = leading_columns(matrices.clone(), rank);
    for _ in 0..ITERATIONS {
        // One factor after the other: in `C C^T` directions weaker than the root of the rounding error are lost.
        basis = orthonormal(matrices.clone().matmul(transposed.clone().matmul(basis)));
    }
    basis.clone().matmul(basis.swap_dims(2, 3).matmul(matrices))
}

/// A start for the iteration: `rank` columns of `[batch, heads, d, d]`, each the longest beside those before it.
fn leading_columns(matrices: Tensor<4>, rank: usize) -> Tensor<4> {
    let [batch, heads, width, _] = matrices.dims();
    let mut residual = matrices;
    let mut columns = Vec::with_capacity(rank);
    for _ in 0..rank {
        let pivot = residual.clone().square().sum_dim(2).argmax(3).expand([batch, heads, width, 1]);
        let direction = normalised(residual.clone().gather(3, pivot));
        residual = beside(&direction, residual);
        columns.push(direction);
    }
    orthonormal(Tensor::cat(columns, 3))
}

/// Gram-Schmidt on the columns of `[batch, heads, d, rank]`. Columns that lie in the span of those before them, up to
/// rounding, become 0.
fn orthonormal(matrices: Tensor<4>) -> Tensor<4> {
    let rank = matrices.dims()[3];
    let mut columns: Vec<Tensor<4>> = Vec::with_capacity(rank);
    for index in 0..rank {
        let mut column = normalised(matrices.clone().narrow(3, index, 1));
        if !columns.is_empty() {
            let done = Tensor::cat(columns.clone(), 3);
            // Twice is enough (Kahan): what the second pass shortens again was nothing but rounding.
            column = beside(&done, normalised(beside(&done, column)));
            let shortened = column.clone().square().sum_dim(2).lower_elem(0.25).expand(column.dims());
            column = normalised(column).mask_fill(shortened, 0.0);
        }
        columns.push(column);
    }
    Tensor::cat(columns, 3)
}

/// What is left of the columns of `matrices` without their parts along the orthonormal columns of `basis`.
fn beside(basis: &Tensor<4>, matrices: Tensor<4>) -> Tensor<4> {
    let along = basis.clone().swap_dims(2, 3).matmul(matrices.clone());
    matrices - basis.clone().matmul(along)
}

/// `[batch, heads, d, 1]` columns scaled to length 1; columns of length 0 stay 0.
fn normalised(column: Tensor<4>) -> Tensor<4> {
    // Bounded before the root, whose slope at 0 is infinite.
    let norm = column.clone().square().sum_dim(2).clamp_min(1e-36).sqrt();
    column / norm
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    type Columns = Vec<Vec<f64>>;

    /// Numbers in -0.5..0.5 without visible order, the same in every run.
    fn noise(seed: usize) -> f64 {
        let x = (seed as f64 * 12.9898 + 78.233).sin() * 43758.5453;
        x - x.floor() - 0.5
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// `width` orthonormal columns, by Gram-Schmidt.
    fn orthonormal_columns(width: usize, seed: usize) -> Columns {
        let mut columns: Columns = Vec::new();
        for index in 0..width {
            let mut column: Vec<f64> = (0..width).map(|row| noise(seed + index * width + row)).collect();
            for done in columns.iter().chain(&columns) {
                let along = dot(done, &column);
                column.iter_mut().zip(done).for_each(|(x, y)| *x -= along * y);
            }
            let norm = dot(&column, &column).sqrt();
            columns.push(column.iter().map(|x| x / norm).collect());
        }
        columns
    }

    /// `U diag(values) V^T`, rows one after the other.
    fn matrix(values: &[f64], seed: usize) -> Vec<f64> {
        let width = values.len();
        let (u, v) = (orthonormal_columns(width, seed), orthonormal_columns(width, seed + 10_007));
        let entry = |at: usize| (0..width).map(|k| values[k] * u[k][at / width] * v[k][at % width]).sum();
        (0..width * width).map(entry).collect()
    }

    /// The matrices, `[1, matrices, width, width]`, after [`truncate`].
    fn truncated(matrices: &[Vec<f64>], width: usize, factor: usize) -> Vec<Vec<f64>> {
        let data: Vec<f32> = matrices.iter().flatten().map(|&x| x as f32).collect();
        let data = TensorData::new(data, [1, matrices.len(), width, width]);
        let result = truncate(Tensor::from_data(data, &Device::flex()), factor).try_into_vec_as::<f64>().unwrap();
        result.chunks(width * width).map(<[f64]>::to_vec).collect()
    }

    /// Frobenius norm of `a - b`.
    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
    }

    fn norm(values: &[f64]) -> f64 {
        dot(values, values).sqrt()
    }

    #[test]
    fn a_matrix_of_low_rank_is_kept_whole() {
        for (width, factor) in [(4, 2), (8, 2), (16, 2), (16, 4), (64, 2), (64, 8)] {
            for rank in 1..=width / (2 * factor) {
                let values: Vec<f64> = (0..width).map(|k| if k < rank { 3.0 / (1 + k) as f64 } else { 0.0 }).collect();
                let matrix = matrix(&values, 31 * rank);
                let error =
                    distance(&truncated(std::slice::from_ref(&matrix), width, factor)[0], &matrix) / norm(&values);
                assert!(error < 1e-5, "width {width}, factor {factor}, rank {rank}: {error}");
            }
        }
    }

    #[test]
    fn the_error_is_within_one_percent_of_the_best_approximation() {
        type Spectrum = fn(usize) -> f64;
        let spectra: [(&str, Spectrum); 4] = [
            ("fast", |k| 0.5f64.powi(k as i32)),
            ("slow", |k| 0.95f64.powi(k as i32)),
            ("harmonic", |k| 1.0 / (1 + k) as f64),
            ("equal", |_| 2.0),
        ];
        for (width, factor) in [(4, 2), (8, 2), (16, 4), (64, 2), (64, 8)] {
            let rank = width / (2 * factor);
            // One batch for all spectra: matrices side by side do not mix.
            let values = spectra.map(|(_, value)| (0..width).map(value).collect::<Vec<f64>>());
            let matrices: Vec<Vec<f64>> = values.iter().enumerate().map(|(at, x)| matrix(x, 1000 * at)).collect();
            let results = truncated(&matrices, width, factor);
            for (((name, _), values), (matrix, result)) in
                spectra.iter().zip(&values).zip(matrices.iter().zip(&results))
            {
                let (error, best) = (distance(result, matrix), norm(&values[rank..]));
                // Rounding on top, where next to nothing is dropped.
                let bound = 1.01 * best + 1e-6 * norm(values);
                assert!(error <= bound, "{name}, width {width}, factor {factor}: {error}, at best {best}");
                assert!(error >= 0.99 * best - 1e-6 * norm(values), "no approximation of rank {rank} is so good");
            }
        }
    }

    /// Where numbers are simple, columns can be parallel to the last bit.
    #[test]
    fn simple_matrices_of_low_rank_are_kept_whole() {
        for width in [4, 8, 16, 64] {
            let simple: [fn(usize, usize) -> f64; 7] = [
                |_, _| 1.0,
                |row, column| if row == 0 && column == 0 { 1.0 } else { 0.0 },
                |row, column| if row == 1 && column == 2 { 3.0 } else { 0.0 },
                |row, _| if row % 2 == 0 { 1.0 } else { -1.0 },
                |_, column| column as f64,
                |row, column| ((row + 1) * (column + 1)) as f64,
                |row, column| if row == column && row == 3 { 1e-4 } else { 0.0 },
            ];
            let of = |entry: fn(usize, usize) -> f64| -> Vec<f64> {
                (0..width * width).map(|at| entry(at / width, at % width)).collect()
            };
            let matrices = simple.map(of);
            for (at, (matrix, result)) in matrices.iter().zip(truncated(&matrices, width, 2)).enumerate() {
                let error = distance(&result, matrix) / norm(matrix);
                assert!(error < 1e-5, "matrix {at} of width {width}: {error}");
            }
        }
    }

    #[test]
    fn factor_one_changes_no_bit() {
        let values: Vec<f64> = (0..8).map(|k| 1.0 / (1 + k) as f64).collect();
        let matrix: Vec<f64> = matrix(&values, 5).iter().map(|&x| f64::from(x as f32)).collect();
        assert_eq!(truncated(std::slice::from_ref(&matrix), 8, 1)[0], matrix);
    }

    #[test]
    fn zero_stays_zero_even_beside_others() {
        let values: Vec<f64> = (0..8).map(|k| 1.0 / (1 + k) as f64).collect();
        let (zero, other) = (vec![0.0; 64], matrix(&values, 5));
        let together = truncated(&[zero.clone(), other.clone()], 8, 2);
        assert_eq!(together[0], zero);
        assert!(distance(&together[1], &truncated(&[other], 8, 2)[0]) < 1e-6);
    }
}
