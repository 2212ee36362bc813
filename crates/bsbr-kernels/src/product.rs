//! The one place that calls the matrix product: `gemm`, which picks the widest instructions of the machine at run time.
#![allow(unsafe_code)]

use gemm::Parallelism;

use crate::heads::Rows;

/// `scores[r][c] = query_r . key_c` for `rows` queries of `keys.width()` numbers without gaps; row `r` of the scores begins
/// at `r * stride`.
pub(crate) fn scores(query: &[f32], rows: usize, keys: Rows<'_>, scores: &mut [f32], stride: usize) {
    let (columns, width) = (keys.len(), keys.width());
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(query.len() >= rows * width && columns <= stride && scores.len() >= (rows - 1) * stride + columns);
    assert!(keys.data().len() >= (columns - 1) * keys.stride() + width);
    // SAFETY: the assertions bound every element the product reads (`rows x width`, `columns x width`) and writes
    // (`rows x columns`) by the slices, and the written slice is borrowed mutably, so that it overlaps neither.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            width,
            scores.as_mut_ptr(),
            1,
            stride as isize,
            false,
            query.as_ptr(),
            1,
            width as isize,
            keys.data().as_ptr(),
            keys.stride() as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `output_r += sum_c weights[r][c] values_c` for `rows` rows; row `r` of the weights begins at `r * stride`, the rows of the
/// output have no gaps.
pub(crate) fn add_weighted(weights: &[f32], stride: usize, rows: usize, values: Rows<'_>, output: &mut [f32]) {
    let (columns, width) = (values.len(), values.width());
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(weights.len() >= (rows - 1) * stride + columns && output.len() >= rows * width);
    assert!(values.data().len() >= (columns - 1) * values.stride() + width);
    // SAFETY: as in `scores`.
    unsafe {
        gemm::gemm(
            rows,
            width,
            columns,
            output.as_mut_ptr(),
            1,
            width as isize,
            true,
            weights.as_ptr(),
            1,
            stride as isize,
            values.data().as_ptr(),
            1,
            values.stride() as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `output_c += sum_r weights[r][c] rows_r`, the product with the transposed weights: what a gradient needs.
pub(crate) fn add_weighted_transposed(
    weights: &[f32],
    stride: usize,
    columns: usize,
    rows: Rows<'_>,
    output: &mut [f32],
) {
    let (count, width) = (rows.len(), rows.width());
    if count == 0 || columns == 0 {
        return;
    }
    assert!(weights.len() >= (count - 1) * stride + columns && output.len() >= columns * width);
    assert!(rows.data().len() >= (count - 1) * rows.stride() + width);
    // SAFETY: as in `scores`.
    unsafe {
        gemm::gemm(
            columns,
            width,
            count,
            output.as_mut_ptr(),
            1,
            width as isize,
            true,
            weights.as_ptr(),
            stride as isize,
            1,
            rows.data().as_ptr(),
            1,
            rows.stride() as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
