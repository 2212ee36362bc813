//! Loops over rows that lie anywhere: the keys and values that one query chose.

use pulp::Simd;

use crate::stored::Ahead;

/// Rows whose sums are folded together.
const TOGETHER: usize = 16;
/// Registers that hold a stretch of an output while the rows go by.
const STRETCH: usize = 4;

/// Dot products of `query` with the rows of `data` that begin at `rows`. Asks for the rows of `ahead` meanwhile.
#[inline(always)]
pub(crate) fn dots<S: Simd>(
    simd: S,
    query: &[f32],
    data: &[f32],
    rows: &[usize],
    scores: &mut [f32],
    ahead: Ahead<'_>,
) {
    match query.len() / S::F32_LANES {
        2 => dots_of::<S, 2>(simd, query, data, rows, scores, ahead),
        1 => dots_of::<S, 1>(simd, query, data, rows, scores, ahead),
        4 => dots_of::<S, 4>(simd, query, data, rows, scores, ahead),
        5 => dots_of::<S, 5>(simd, query, data, rows, scores, ahead),
        6 => dots_of::<S, 6>(simd, query, data, rows, scores, ahead),
        8 => dots_of::<S, 8>(simd, query, data, rows, scores, ahead),
        16 => dots_of::<S, 16>(simd, query, data, rows, scores, ahead),
        _ => dots_of::<S, 0>(simd, query, data, rows, scores, ahead),
    }
}

/// [`dots`] of queries of `V` registers, or 0 for any number.
#[inline(always)]
fn dots_of<S: Simd, const V: usize>(
    simd: S,
    query: &[f32],
    data: &[f32],
    rows: &[usize],
    scores: &mut [f32],
    ahead: Ahead<'_>,
) {
    let (query_vectors, query_rest) = S::as_simd_f32s(query);
    let (groups, last) = rows.as_chunks::<TOGETHER>();
    let (score_groups, last_scores) = scores.as_chunks_mut::<TOGETHER>();
    for (number, (rows, scores)) in groups.iter().zip(score_groups).enumerate() {
        ahead.ask(number * TOGETHER..(number + 1) * TOGETHER);
        // Written out, so that sums stay in registers.
        let at = [rows[0], rows[1], rows[2], rows[3]];
        let [a, b, c, d] = dots_of_four::<S, V>(simd, query, query_vectors, data, at);
        let at = [rows[4], rows[5], rows[6], rows[7]];
        let [e, f, g, h] = dots_of_four::<S, V>(simd, query, query_vectors, data, at);
        let at = [rows[8], rows[9], rows[10], rows[11]];
        let [i, j, k, l] = dots_of_four::<S, V>(simd, query, query_vectors, data, at);
        let at = [rows[12], rows[13], rows[14], rows[15]];
        let [m, n, o, p] = dots_of_four::<S, V>(simd, query, query_vectors, data, at);
        *scores = sum_each(simd, [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]);
        if !query_rest.is_empty() {
            for (score, &row) in scores.iter_mut().zip(rows) {
                *score += dot_rest::<S>(query_rest, &data[row..row + query.len()]);
            }
        }
    }
    ahead.ask(groups.len() * TOGETHER..usize::MAX);
    for (score, &row) in last_scores.iter_mut().zip(last) {
        let row = &data[row..row + query.len()];
        let (vectors, _) = S::as_simd_f32s(row);
        let mut sum = simd.splat_f32s(0.0);
        for (&query, &vector) in query_vectors.iter().zip(vectors) {
            sum = simd.mul_add_e_f32s(query, vector, sum);
        }
        *score = simd.reduce_sum_f32s(sum) + dot_rest::<S>(query_rest, row);
    }
}

/// Products of a query and the rows of `data` that begin at `rows`, to be summed across each register; without what is too
/// little for one. Takes the fast way where the query has just `V` registers.
// Written without closures, which are not compiled for the wide registers.
#[inline(always)]
fn dots_of_four<S: Simd, const V: usize>(
    simd: S,
    query: &[f32],
    query_vectors: &[S::f32s],
    data: &[f32],
    rows: [usize; 4],
) -> [S::f32s; 4] {
    let width = query.len();
    let first = S::as_simd_f32s(&data[rows[0]..rows[0] + width]).0;
    let second = S::as_simd_f32s(&data[rows[1]..rows[1] + width]).0;
    let third = S::as_simd_f32s(&data[rows[2]..rows[2] + width]).0;
    let fourth = S::as_simd_f32s(&data[rows[3]..rows[3] + width]).0;
    let zero = simd.splat_f32s(0.0);
    let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
    let whole = (query_vectors.as_array::<V>(), first.as_array::<V>(), second.as_array::<V>());
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
    for (&query, (((&first, &second), &third), &fourth)) in query_vectors.iter().zip(rows) {
        a = simd.mul_add_e_f32s(query, first, a);
        b = simd.mul_add_e_f32s(query, second, b);
        c = simd.mul_add_e_f32s(query, third, c);
        d = simd.mul_add_e_f32s(query, fourth, d);
    }
    [a, b, c, d]
}

/// `output += sum_i weights[i] row_i` over the rows of `data` that begin at `rows`. Asks for the rows of `ahead` meanwhile.
#[inline(always)]
pub(crate) fn add<S: Simd>(
    simd: S,
    weights: &[f32],
    data: &[f32],
    rows: &[usize],
    output: &mut [f32],
    ahead: Ahead<'_>,
) {
    let stretch = STRETCH * S::F32_LANES;
    let width = output.len();
    let mut at = 0;
    while at + stretch <= width {
        let mut sums = [[simd.splat_f32s(0.0); STRETCH]; 2];
        sums[0].copy_from_slice(S::as_simd_f32s(&output[at..at + stretch]).0);
        let (pairs, last) = rows.as_chunks::<2>();
        let (weight_pairs, last_weight) = weights.as_chunks::<2>();
        for (number, (pair, weights)) in pairs.iter().zip(weight_pairs).enumerate() {
            if at == 0 {
                ahead.ask(2 * number..2 * number + 2);
            }
            for i in 0..2 {
                sums[i] = add_row(simd, weights[i], &data[pair[i] + at..pair[i] + at + stretch], sums[i]);
            }
        }
        for (&row, &weight) in last.iter().zip(last_weight) {
            sums[0] = add_row(simd, weight, &data[row + at..row + at + stretch], sums[0]);
        }
        let [first, second] = sums;
        for ((out, a), b) in S::as_mut_simd_f32s(&mut output[at..at + stretch]).0.iter_mut().zip(first).zip(second) {
            *out = simd.add_f32s(a, b);
        }
        at += stretch;
    }
    if at < width {
        for (&row, weight) in rows.iter().zip(weights) {
            for (sum, value) in output[at..].iter_mut().zip(&data[row + at..row + width]) {
                *sum += weight * value;
            }
        }
    }
}

#[inline(always)]
fn add_row<S: Simd>(simd: S, weight: f32, row: &[f32], mut sums: [S::f32s; STRETCH]) -> [S::f32s; STRETCH] {
    let (vectors, _) = S::as_simd_f32s(row).0.as_chunks::<STRETCH>();
    let weight = simd.splat_f32s(weight);
    for i in 0..STRETCH {
        sums[i] = simd.mul_add_e_f32s(weight, vectors[0][i], sums[i]);
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
