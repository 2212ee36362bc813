//! Small square matrices stored as fewer numbers: along a basis, or by truncated singular value decomposition.

use burn::tensor::Tensor;

/// Rounds of subspace iteration: the share of a direction beyond the rank falls with the ratio of singular values
/// to the power of twice this.
const ITERATIONS: usize = 6;

/// How a matrix of a block is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Any matrix.
    General,
    /// A symmetric one.
    Symmetric,
}

/// How `head_dim x head_dim` matrices are stored: as `1 / factor` of their numbers.
///
/// Along a calibrated basis `B` of `head_dim / factor` orthonormal columns a matrix `C` is `B^T C`, a symmetric one `S` is
/// `B^T S B`; sums and means of stored matrices are those of the matrices. Without a basis each matrix is two factors of
/// rank `head_dim / (2 factor)`. At least one direction is kept; `factor = 1` stores matrices as they are.
#[derive(Debug, Clone)]
pub(crate) struct Compression {
    factor: usize,
    /// `[1, kv_heads, head_dim, rank]`.
    basis: Option<Tensor<4>>,
}

impl Compression {
    pub(crate) fn new(factor: usize) -> Self {
        Self { factor, basis: None }
    }

    /// With the first columns of `basis`, `[kv_heads, head_dim, head_dim]`.
    pub(crate) fn along(self, basis: Tensor<3>) -> Self {
        let width = basis.dims()[1];
        let rank = (width / self.factor).max(1);
        let basis = (self.factor > 1).then(|| basis.narrow(2, 0, rank).unsqueeze::<4>());
        Self { basis, ..self }
    }

    /// Numbers of a stored matrix.
    pub(crate) fn numbers(&self, width: usize, form: Form) -> usize {
        match (&self.basis, form) {
            _ if self.factor == 1 => width * width,
            (Some(basis), Form::General) => basis.dims()[3] * width,
            (Some(basis), Form::Symmetric) => basis.dims()[3] * basis.dims()[3],
            (None, _) => 2 * self.rank(width) * width,
        }
    }

    /// Of the two factors.
    fn rank(&self, width: usize) -> usize {
        (width / (2 * self.factor)).max(1)
    }

    /// `[batch, kv_heads, d, d]` as rows `[batch, kv_heads, 1, numbers]`.
    pub(crate) fn store(&self, matrices: Tensor<4>, form: Form) -> Tensor<4> {
        let [batch, heads, width, _] = matrices.dims();
        let stored = match &self.basis {
            _ if self.factor == 1 => matrices,
            Some(basis) => {
                let basis = basis.clone().expand([batch, heads, width, basis.dims()[3]]);
                let along = basis.clone().swap_dims(2, 3).matmul(matrices);
                if form == Form::Symmetric { along.matmul(basis) } else { along }
            }
            None => {
                let (left, right) = factors(matrices, self.rank(width));
                Tensor::cat(vec![left.swap_dims(2, 3), right], 2)
            }
        };
        stored.reshape([batch, heads, 1, self.numbers(width, form)])
    }

    /// Stored matrices `[batch, kv_heads, n, numbers]` whole again, `[batch, kv_heads, n, d * d]`.
    pub(crate) fn load(&self, rows: Tensor<4>, width: usize, form: Form) -> Tensor<4> {
        let [batch, heads, count, _] = rows.dims();
        let whole = match &self.basis {
            _ if self.factor == 1 => return rows,
            Some(basis) => {
                let rank = basis.dims()[3];
                let basis = basis.clone().unsqueeze_dim::<5>(2).expand([batch, heads, count, width, rank]);
                let along = match form {
                    Form::General => rows.reshape([batch, heads, count, rank, width]),
                    Form::Symmetric => {
                        rows.reshape([batch, heads, count, rank, rank]).matmul(basis.clone().swap_dims(3, 4))
                    }
                };
                basis.matmul(along)
            }
            None => {
                let rank = self.rank(width);
                let both = rows.reshape([batch, heads, count, 2 * rank, width]);
                both.clone().narrow(3, 0, rank).swap_dims(3, 4).matmul(both.narrow(3, rank, rank))
            }
        };
        whole.reshape([batch, heads, count, width * width])
    }
}

/// Orthonormal columns `U` `[batch, heads, d, rank]` and `U^T C` for matrices `C` `[batch, heads, d, d]`: `U U^T C` is their
/// best approximation of that rank.
///
/// Subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4), started from pivoted columns instead of random
/// ones.
fn factors(matrices: Tensor<4>, rank: usize) -> (Tensor<4>, Tensor<4>) {
    let transposed = matrices.clone().swap_dims(2, 3);
    let mut basis = leading_columns(matrices.clone(), rank);
    for _ in 0..ITERATIONS {
        // One factor after the other: in `C C^T` directions weaker than the root of the rounding error are lost.
        basis = orthonormal(matrices.clone().matmul(transposed.clone().matmul(basis)));
    }
    let along = basis.clone().swap_dims(2, 3).matmul(matrices);
    (basis, along)
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
    use std::slice::from_ref;

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

    /// The matrices, `[1, matrices, width, width]`, stored and loaded.
    fn truncated(matrices: &[Vec<f64>], width: usize, factor: usize) -> Vec<Vec<f64>> {
        let data: Vec<f32> = matrices.iter().flatten().map(|&x| x as f32).collect();
        let data = TensorData::new(data, [1, matrices.len(), width, width]);
        let compression = Compression::new(factor);
        let stored = compression.store(Tensor::from_data(data, &Device::flex()), Form::General);
        assert_eq!(stored.dims(), [1, matrices.len(), 1, compression.numbers(width, Form::General)]);
        let result = compression.load(stored, width, Form::General).try_into_vec_as::<f64>().unwrap();
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
                let error = distance(&truncated(from_ref(&matrix), width, factor)[0], &matrix) / norm(&values);
                assert!(error < 1e-5, "width {width}, factor {factor}, rank {rank}: {error}");
            }
        }
    }

    #[test]
    fn the_error_is_within_one_percent_of_the_best_approximation() {
        // Fast, slow, by a power, not at all: how the singular values fall.
        let spectra: [fn(usize) -> f64; 4] =
            [|k| 0.5f64.powi(k as i32), |k| 0.95f64.powi(k as i32), |k| 1.0 / (1 + k) as f64, |_| 2.0];
        for (width, factor) in [(4, 2), (8, 2), (16, 4), (64, 2), (64, 8)] {
            let rank = width / (2 * factor);
            // One batch for all spectra: matrices side by side do not mix.
            let values = spectra.map(|value| (0..width).map(value).collect::<Vec<f64>>());
            let matrices: Vec<Vec<f64>> = values.iter().enumerate().map(|(at, x)| matrix(x, 1000 * at)).collect();
            for (at, result) in truncated(&matrices, width, factor).iter().enumerate() {
                let (error, best) = (distance(result, &matrices[at]), norm(&values[at][rank..]));
                // Rounding on top, where next to nothing is dropped.
                let rounding = 1e-6 * norm(&values[at]);
                let case = format!("spectrum {at}, width {width}, factor {factor}: {error}, at best {best}");
                assert!(error <= 1.01 * best + rounding, "{case}");
                assert!(error >= 0.99 * best - rounding, "more than rank {rank} was kept: {case}");
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

    /// The first columns of an orthonormal basis, and matrices that live in their span.
    #[test]
    fn a_matrix_in_the_span_of_the_basis_is_kept_whole_in_its_share_of_numbers() {
        let width = 16;
        let columns = orthonormal_columns(width, 3);
        let entries = |at: usize| columns[at % width][at / width] as f32;
        let basis = TensorData::new((0..width * width).map(entries).collect(), [1, width, width]);
        let basis = Tensor::<3>::from_data(basis, &Device::flex());
        for factor in [2, 4, 16] {
            let compression = Compression::new(factor).along(basis.clone());
            let rank = width / factor;
            for (form, numbers) in [(Form::General, width * width / factor), (Form::Symmetric, rank * rank)] {
                let entry = |at: usize| -> f64 {
                    let (row, column) = (at / width, at % width);
                    let right = |k: usize| match form {
                        Form::Symmetric => columns[k][column],
                        Form::General => noise(k * width + column),
                    };
                    (0..rank).map(|k| (1.0 + k as f64) * columns[k][row] * right(k)).sum()
                };
                let matrix: Vec<f64> = (0..width * width).map(entry).collect();
                let data: Vec<f32> = matrix.iter().map(|&x| x as f32).collect();
                let data = Tensor::from_data(TensorData::new(data, [1, 1, width, width]), &Device::flex());
                let stored = compression.store(data, form);
                assert_eq!(stored.dims(), [1, 1, 1, numbers]);
                let found = compression.load(stored, width, form).try_into_vec_as::<f64>().unwrap();
                let error = distance(&found, &matrix) / norm(&matrix);
                assert!(error < 1e-5, "factor {factor}, {form:?}: {error}");
            }
        }
    }

    #[test]
    fn factor_one_changes_no_bit() {
        let values: Vec<f64> = (0..8).map(|k| 1.0 / (1 + k) as f64).collect();
        let matrix: Vec<f64> = matrix(&values, 5).iter().map(|&x| f64::from(x as f32)).collect();
        assert_eq!(truncated(from_ref(&matrix), 8, 1)[0], matrix);
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
