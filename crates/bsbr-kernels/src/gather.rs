//! Loops over rows that lie anywhere: the keys and values that one query chose.
#![allow(unsafe_code)]

use std::ops::Range;

use pulp::Simd;

use crate::heads::Rows;

/// Rows whose sums are folded together.
pub(crate) const TOGETHER: usize = 16;
/// Registers that hold a stretch of an output while the rows go by.
const STRETCH: usize = 4;

/// Rows at some positions, all of which there are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gathered<'a> {
    rows: Rows<'a>,
    positions: &'a [u32],
}

impl<'a> Gathered<'a> {
    /// Those of `rows` at `positions`.
    ///
    /// # Panics
    ///
    /// If a position has no row.
    #[inline(always)]
    pub(crate) fn new(rows: Rows<'a>, positions: &'a [u32]) -> Self {
        let mut last = 0;
        for &position in positions {
            last = last.max(position);
        }
        // What the loops below rely on.
        assert!(positions.is_empty() || last as usize * rows.stride() + rows.width() <= rows.data().len());
        Self { rows, positions }
    }

    /// Some of them.
    #[inline(always)]
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        Self { rows: self.rows, positions: &self.positions[range] }
    }
}

/// Dot products of `query` with the first rows, as many as `scores` has: in steps of [`TOGETHER`] rows, the last of which may
/// hold fewer.
#[inline(always)]
pub(crate) fn dots<S: Simd>(simd: S, query: &[f32], rows: Gathered<'_>, scores: &mut [f32]) {
    assert_eq!(query.len(), rows.rows.width());
    match query.len() / S::F32_LANES {
        2 => dots_of::<S, 2>(simd, query, rows, scores),
        1 => dots_of::<S, 1>(simd, query, rows, scores),
        4 => dots_of::<S, 4>(simd, query, rows, scores),
        5 => dots_of::<S, 5>(simd, query, rows, scores),
        6 => dots_of::<S, 6>(simd, query, rows, scores),
        8 => dots_of::<S, 8>(simd, query, rows, scores),
        16 => dots_of::<S, 16>(simd, query, rows, scores),
        _ => dots_of::<S, 0>(simd, query, rows, scores),
    }
}

/// [`dots`] of queries of `V` registers, or 0 for any number.
#[inline(always)]
fn dots_of<S: Simd, const V: usize>(simd: S, query: &[f32], rows: Gathered<'_>, scores: &mut [f32]) {
    let Gathered { rows, positions } = rows;
    let (steps, last) = positions.as_chunks::<TOGETHER>();
    let (step_scores, last_scores) = scores.as_chunks_mut::<TOGETHER>();
    for (at, scores) in steps.iter().zip(step_scores) {
        *scores = dots_of_step::<S, V>(simd, query, rows, at);
    }
    if let Some(&first) = last.first() {
        // Fewer rows than go together: the first in place of what is missing.
        let mut at = [first; TOGETHER];
        for (at, &position) in at.iter_mut().zip(last) {
            *at = position;
        }
        let sums = dots_of_step::<S, V>(simd, query, rows, &at);
        for (score, sum) in last_scores.iter_mut().zip(sums) {
            *score = sum;
        }
    }
    let (_, query_rest) = S::as_simd_f32s(query);
    if !query_rest.is_empty() {
        for (score, &position) in scores.iter_mut().zip(positions) {
            *score += dot_rest::<S>(query_rest, &rows.row(position as usize)[..query.len()]);
        }
    }
}

/// Products of the whole registers of a query and of the rows at `at`, which were checked.
#[inline(always)]
fn dots_of_step<S: Simd, const V: usize>(
    simd: S,
    query: &[f32],
    rows: Rows<'_>,
    at: &[u32; TOGETHER],
) -> [f32; TOGETHER] {
    let (query, _) = S::as_simd_f32s(query);
    // Written out, so that sums stay in registers.
    let [a, b, c, d] = dots_of_four::<S, V>(simd, query, rows, [at[0], at[1], at[2], at[3]]);
    let [e, f, g, h] = dots_of_four::<S, V>(simd, query, rows, [at[4], at[5], at[6], at[7]]);
    let [i, j, k, l] = dots_of_four::<S, V>(simd, query, rows, [at[8], at[9], at[10], at[11]]);
    let [m, n, o, p] = dots_of_four::<S, V>(simd, query, rows, [at[12], at[13], at[14], at[15]]);
    sum_each(simd, [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
}

/// The registers of the row at `position`.
///
/// # Safety
///
/// The row must have at least `vectors` registers of numbers.
#[inline(always)]
unsafe fn row<'a, S: Simd>(rows: Rows<'a>, position: u32, vectors: usize) -> &'a [S::f32s] {
    // SAFETY: as the caller promises. Registers in memory are as aligned as numbers, which `S::as_simd_f32s` counts on too.
    unsafe {
        let start = rows.data().as_ptr().add(position as usize * rows.stride());
        let numbers = std::slice::from_raw_parts(start, vectors * S::F32_LANES);
        S::as_simd_f32s(numbers).0
    }
}

/// Products of a query and the rows at `positions`, to be summed across each register; without what is too little for one.
/// Takes the fast way where the query has just `V` registers.
// Written without closures, which are not compiled for the wide registers.
#[inline(always)]
fn dots_of_four<S: Simd, const V: usize>(
    simd: S,
    query: &[S::f32s],
    rows: Rows<'_>,
    positions: [u32; 4],
) -> [S::f32s; 4] {
    let count = query.len();
    // SAFETY: the rows are as long as the query, which was checked.
    let (first, second, third, fourth) = unsafe {
        (
            row::<S>(rows, positions[0], count),
            row::<S>(rows, positions[1], count),
            row::<S>(rows, positions[2], count),
            row::<S>(rows, positions[3], count),
        )
    };
    let zero = simd.splat_f32s(0.0);
    let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
    let whole = (query.as_array::<V>(), first.as_array::<V>(), second.as_array::<V>());
    if let ((Some(query), Some(first), Some(second)), (Some(third), Some(fourth))) =
        (whole, (third.as_array::<V>(), fourth.as_array::<V>()))
    {
        for v in 0..V {
            a = simd.mul_add_e_f32s(query[v], first[v], a);
            b = simd.mul_add_e_f32s(query[v], second[v], b);
            c = simd.mul_add_e_f32s(query[v], third[v], c);
            d = simd.mul_add_e_f32s(query[v], fourth[v], d);
        }
        return [a, b, c, d];
    }
    let rows = first.iter().zip(second).zip(third).zip(fourth);
    for (&query, (((&first, &second), &third), &fourth)) in query.iter().zip(rows) {
        a = simd.mul_add_e_f32s(query, first, a);
        b = simd.mul_add_e_f32s(query, second, b);
        c = simd.mul_add_e_f32s(query, third, c);
        d = simd.mul_add_e_f32s(query, fourth, d);
    }
    [a, b, c, d]
}

/// `output += sum_i weights[i] row_i`.
#[inline(always)]
pub(crate) fn add<S: Simd>(simd: S, weights: &[f32], rows: Gathered<'_>, output: &mut [f32]) {
    let Gathered { rows, positions } = rows;
    let stretch = STRETCH * S::F32_LANES;
    let width = output.len();
    assert_eq!(width, rows.width());
    let (pairs, last) = positions.as_chunks::<2>();
    let (weight_pairs, last_weight) = weights.as_chunks::<2>();
    let mut at = 0;
    while at + stretch <= width {
        let mut sums = [[simd.splat_f32s(0.0); STRETCH]; 2];
        sums[0].copy_from_slice(S::as_simd_f32s(&output[at..at + stretch]).0);
        let vectors = (at / S::F32_LANES) + STRETCH;
        for (pair, weights) in pairs.iter().zip(weight_pairs) {
            for i in 0..2 {
                // SAFETY: the rows are as long as the output, and were checked.
                let row = unsafe { row::<S>(rows, pair[i], vectors) };
                sums[i] = add_row(simd, weights[i], &row[vectors - STRETCH..], sums[i]);
            }
        }
        for (&position, &weight) in last.iter().zip(last_weight) {
            // SAFETY: as above.
            let row = unsafe { row::<S>(rows, position, vectors) };
            sums[0] = add_row(simd, weight, &row[vectors - STRETCH..], sums[0]);
        }
        let [first, second] = sums;
        for ((out, a), b) in S::as_mut_simd_f32s(&mut output[at..at + stretch]).0.iter_mut().zip(first).zip(second) {
            *out = simd.add_f32s(a, b);
        }
        at += stretch;
    }
    if at < width {
        for (&position, weight) in positions.iter().zip(weights) {
            for (sum, value) in output[at..].iter_mut().zip(&rows.row(position as usize)[at..width]) {
                *sum += weight * value;
            }
        }
    }
}

#[inline(always)]
fn add_row<S: Simd>(simd: S, weight: f32, row: &[S::f32s], mut sums: [S::f32s; STRETCH]) -> [S::f32s; STRETCH] {
    let weight = simd.splat_f32s(weight);
    for i in 0..STRETCH {
        sums[i] = simd.mul_add_e_f32s(weight, row[i], sums[i]);
    }
    sums
}

/// What the last numbers of a row, too few for a register, add to its dot product.
#[inline(always)]
fn dot_rest<S: Simd>(query_rest: &[f32], row: &[f32]) -> f32 {
    let (_, rest) = S::as_simd_f32s(row);
    query_rest.iter().zip(rest).map(|(x, y)| x * y).sum()
}

/// The sum of the lanes of each register.
#[inline(always)]
fn sum_each<S: Simd>(simd: S, sums: [S::f32s; TOGETHER]) -> [f32; TOGETHER] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::any::Any;
        let wide = (&simd as &dyn Any).downcast_ref::<pulp::x86::V4>();
        let registers = (&sums as &dyn Any).downcast_ref::<[pulp::f32x16; TOGETHER]>();
        if let (Some(&wide), Some(registers)) = (wide, registers) {
            return sixteen::sum_each(wide, registers);
        }
    }
    let mut all = [0.0; TOGETHER];
    for (total, sum) in all.iter_mut().zip(sums) {
        *total = simd.reduce_sum_f32s(sum);
    }
    all
}

/// [`sum_each`] for registers of sixteen: folds pairs, so that every step works on full registers.
// Functions, not closures: only what is always inlined is compiled for the wide registers.
#[cfg(target_arch = "x86_64")]
mod sixteen {
    use std::arch::x86_64::__m512;

    use pulp::{cast, f32x16, x86::V4};

    /// In each quarter: the sums of two numbers of `a` and of `b`, twice.
    #[inline(always)]
    fn pair(simd: V4, a: f32x16, b: f32x16) -> __m512 {
        let f = simd.avx512f;
        f._mm512_add_ps(f._mm512_unpacklo_ps(cast(a), cast(b)), f._mm512_unpackhi_ps(cast(a), cast(b)))
    }

    /// In each quarter: the sums of four numbers of each of four registers.
    #[inline(always)]
    fn four(simd: V4, sums: &[f32x16]) -> __m512 {
        let f = simd.avx512f;
        let (ab, cd) = (cast(pair(simd, sums[0], sums[1])), cast(pair(simd, sums[2], sums[3])));
        f._mm512_add_ps(cast(f._mm512_unpacklo_pd(ab, cd)), cast(f._mm512_unpackhi_pd(ab, cd)))
    }

    /// Adds neighbouring quarters.
    #[inline(always)]
    fn fold(simd: V4, a: __m512, b: __m512) -> __m512 {
        let f = simd.avx512f;
        f._mm512_add_ps(f._mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), f._mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    }

    #[inline(always)]
    pub(super) fn sum_each(simd: V4, sums: &[f32x16; 16]) -> [f32; 16] {
        let low = fold(simd, four(simd, &sums[0..4]), four(simd, &sums[4..8]));
        let high = fold(simd, four(simd, &sums[8..12]), four(simd, &sums[12..16]));
        cast(fold(simd, low, high))
    }
}
