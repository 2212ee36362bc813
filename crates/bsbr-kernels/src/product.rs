//! The one place that calls the matrix product: `gemm`, which picks the widest instructions of the machine at run time.
#![allow(unsafe_code)]

use gemm::Parallelism;

use crate::heads::{Rows, checked_stride};

/// `scores[r][c] = query_r . key_c` for `rows` queries of `keys.width()` numbers without gaps; row `r` of the scores begins
/// at `r * stride`.
pub(crate) fn scores(query: &[f32], rows: usize, keys: Rows<'_>, scores: &mut [f32], stride: usize) {
    let (columns, width) = (keys.len(), keys.width());
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= stride, "rows of {columns} scores, {stride} apart, overlap");
    let query_stride = checked_stride(query.len(), rows, width, width);
    let score_stride = checked_stride(scores.len(), rows, stride, columns);
    let key_stride = keys.checked_stride();
    // SAFETY: `checked_stride` bounds every element the product reads (`rows x width`, `columns x width`) and writes
    // (`rows x columns`) by the slices, without wrapping around, and the written slice is borrowed mutably, so that it
    // overlaps neither. The rows of the scores do not overlap each other.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            width,
            scores.as_mut_ptr(),
            1,
            score_stride,
            false,
            query.as_ptr(),
            1,
            query_stride,
            keys.data().as_ptr(),
            key_stride,
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
    let weight_stride = checked_stride(weights.len(), rows, stride, columns);
    let output_stride = checked_stride(output.len(), rows, width, width);
    let value_stride = values.checked_stride();
    // SAFETY: as in `scores`.
    unsafe {
        gemm::gemm(
            rows,
            width,
            columns,
            output.as_mut_ptr(),
            1,
            output_stride,
            true,
            weights.as_ptr(),
            1,
            weight_stride,
            values.data().as_ptr(),
            1,
            value_stride,
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
    let weight_stride = checked_stride(weights.len(), count, stride, columns);
    let output_stride = checked_stride(output.len(), columns, width, width);
    let row_stride = rows.checked_stride();
    // SAFETY: as in `scores`.
    unsafe {
        gemm::gemm(
            columns,
            width,
            count,
            output.as_mut_ptr(),
            1,
            output_stride,
            true,
            weights.as_ptr(),
            weight_stride,
            1,
            rows.data().as_ptr(),
            1,
            row_stride,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;
    use crate::Heads;

    /// Strides and counts whose product wraps around to something small.
    const HALF: usize = 1 << (usize::BITS - 1);

    #[test]
    fn no_product_reads_or_writes_past_its_slices() {
        let numbers = [1.0_f32; 64];
        let rows = |count| Rows::contiguous(&numbers, count, 8);
        let refused =
            |run: &(dyn Fn(&mut [f32]) + std::panic::RefUnwindSafe)| catch_unwind(|| run(&mut [0.0; 64])).is_err();
        assert!(!refused(&|out| scores(&numbers, 8, rows(8), out, 8)));
        assert!(refused(&|out| scores(&numbers, 3, rows(8), out, HALF)));
        assert!(refused(&|out| scores(&numbers, 1 << (usize::BITS - 3), rows(8), out, 8)));
        assert!(refused(&|out| scores(&numbers, 2, rows(8), out, 7)));
        assert!(refused(&|out| scores(&numbers[..63], 8, rows(8), out, 8)));
        assert!(!refused(&|out| add_weighted(&numbers, 8, 8, rows(8), out)));
        assert!(refused(&|out| add_weighted(&numbers, HALF, 3, rows(8), out)));
        assert!(refused(&|out| add_weighted(&numbers, 0, HALF, rows(8), out)));
        assert!(!refused(&|out| add_weighted_transposed(&numbers, 8, 8, rows(8), out)));
        assert!(refused(&|out| add_weighted_transposed(&numbers, HALF, 8, rows(3), out)));
        assert!(refused(&|out| add_weighted_transposed(&numbers, 8, 1 << (usize::BITS - 3), rows(1), out)));
    }

    #[test]
    fn rows_of_a_view_that_steps_nowhere_or_never_are_those_they_claim_to_be() {
        let numbers: Vec<f32> = (0..8).map(|n| n as f32).collect();
        // The same row three times, and one row with a stride that no number of this machine reaches twice.
        for (count, stride) in [(3, 0), (1, usize::MAX)] {
            let keys = Heads::new(&numbers, [1, 1, count, 8], [0, 0, stride]).head(0, 0);
            let mut out = vec![0.0; count];
            scores(&numbers, 1, keys, &mut out, count);
            assert_eq!(out, vec![140.0; count]);
        }
    }
}
