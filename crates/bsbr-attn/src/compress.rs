//! Truncated singular value decomposition of small square matrices, in tensor operations.

use burn::tensor::Tensor;

/// Rounds of subspace iteration: the share of a direction beyond the rank falls with the ratio of singular values
/// to the power of twice this.
const ITERATIONS: usize = 6;

/// The best approximation of `[batch, heads, d, d]` matrices by `d * d / factor` numbers each: rank `d / (2 factor)`
/// (two factors of `d x rank`), at least 1. `factor = 1` returns the matrices unchanged.
///
/// Subspace iteration on `C C^T` (Halko, Martinsson, Tropp 2011, algorithm 4.4), started from pivoted columns of
/// `C C^T` instead of random ones.
pub(crate) fn truncate(matrices: Tensor<4>, factor: usize) -> Tensor<4> {
    if factor == 1 {
        return matrices;
    }
    let [_, _, width, _] = matrices.dims();
    let rank = (width / (2 * factor)).max(1);
    let transposed = matrices.clone().swap_dims(2, 3);
    let gram = matrices.clone().matmul(transposed);
    let mut basis = leading_directions(gram.clone(), rank);
    for _ in 0..ITERATIONS {
        basis = orthonormal(gram.clone().matmul(basis));
    }
    basis.clone().matmul(basis.swap_dims(2, 3).matmul(matrices))
}

/// A start for the iteration: greedy pivoted Cholesky of the Gram matrix `[batch, heads, d, d]`, `rank` columns.
fn leading_directions(gram: Tensor<4>, rank: usize) -> Tensor<4> {
    let mut residual = gram;
    let mut columns = Vec::with_capacity(rank);
    for _ in 0..rank {
        let [batch, heads, width, _] = residual.dims();
        let eye = Tensor::<2>::eye(width, &residual.device()).cast(residual.dtype()).reshape([1, 1, width, width]);
        let diagonal = (residual.clone() * eye).sum_dim(3);
        let pivot = diagonal.argmax(2).expand([batch, heads, 1, width]);
        let column = residual.clone().gather(2, pivot).swap_dims(2, 3);
        let direction = normalised(column);
        let along = direction.clone().swap_dims(2, 3).matmul(residual.clone());
        residual = residual - direction.clone().matmul(along);
        columns.push(direction);
    }
    orthonormal(Tensor::cat(columns, 3))
}

/// Modified Gram-Schmidt on the columns of `[batch, heads, d, rank]`, twice for stability. Columns that vanish stay 0.
fn orthonormal(matrices: Tensor<4>) -> Tensor<4> {
    let rank = matrices.dims()[3];
    let mut columns: Vec<Tensor<4>> = Vec::with_capacity(rank);
    for index in 0..rank {
        let mut column = normalised(matrices.clone().narrow(3, index, 1));
        for _ in 0..2 {
            if !columns.is_empty() {
                let done = Tensor::cat(columns.clone(), 3);
                let along = done.clone().swap_dims(2, 3).matmul(column.clone());
                // Normalised in between: a column that cancels to rounding noise would otherwise keep its overlap.
                column = normalised(column - done.matmul(along));
            }
        }
        columns.push(column);
    }
    Tensor::cat(columns, 3)
}

/// `[batch, heads, d, 1]` columns scaled to length 1; columns of length 0 stay 0.
fn normalised(column: Tensor<4>) -> Tensor<4> {
    let norm = column.clone().square().sum_dim(2).sqrt();
    column / norm.clamp_min(1e-30)
}
