//! Loops over rows that lie anywhere: the keys and values that one query chose.

use pulp::Simd;

use crate::prefetch::prefetch;

/// Rows whose sums are folded together.
const TOGETHER: usize = 16;
/// Registers that hold a stretch of the query while the rows go by.
const STRETCH: usize = 4;
/// How many rows ahead memory is asked for.
const AHEAD: usize = 8;

/// Dot products of `query` with the rows of `data` that begin at `rows`.
#[inline(always)]
pub(crate) fn dots<S: Simd>(simd: S, query: &[f32], data: &[f32], rows: &[usize], scores: &mut [f32]) {
    let width = query.len();
    let (query_vectors, query_rest) = S::as_simd_f32s(query);
    let (groups, last) = rows.as_chunks::<TOGETHER>();
    let (score_groups, last_scores) = scores.as_chunks_mut::<TOGETHER>();
    let (stretches, few) = query_vectors.as_chunks::<STRETCH>();
    for (number, (rows, scores)) in groups.iter().zip(score_groups).enumerate() {
        if let Some(next) = groups.get(number + 1) {
            for &row in next {
                prefetch(&data[row..row + width]);
            }
        }
        let mut sums = [simd.splat_f32s(0.0); TOGETHER];
        let mut at = 0;
        for query in stretches {
            let end = at + STRETCH * S::F32_LANES;
            for (sum, &row) in sums.iter_mut().zip(rows) {
                *sum = add_products(simd, *sum, query, &data[row + at..row + end]);
            }
            at = end;
        }
        if !few.is_empty() {
            for (sum, &row) in sums.iter_mut().zip(rows) {
                let (vectors, _) = S::as_simd_f32s(&data[row + at..row + width]);
                for (&query, &vector) in few.iter().zip(vectors) {
                    *sum = simd.mul_add_e_f32s(query, vector, *sum);
                }
            }
        }
        *scores = sum_each(simd, sums);
        if !query_rest.is_empty() {
            for (score, &row) in scores.iter_mut().zip(rows) {
                *score += dot_rest::<S>(query_rest, &data[row..row + width]);
            }
        }
    }
    for (score, &row) in last_scores.iter_mut().zip(last) {
        let row = &data[row..row + width];
        let (vectors, _) = S::as_simd_f32s(row);
        let mut sum = simd.splat_f32s(0.0);
        for (&query, &vector) in query_vectors.iter().zip(vectors) {
            sum = simd.mul_add_e_f32s(query, vector, sum);
        }
        *score = simd.reduce_sum_f32s(sum) + dot_rest::<S>(query_rest, row);
    }
}

/// `output += sum_i weights[i] row_i` over the rows of `data` that begin at `rows`.
#[inline(always)]
pub(crate) fn add<S: Simd>(simd: S, weights: &[f32], data: &[f32], rows: &[usize], output: &mut [f32]) {
    let stretch = STRETCH * S::F32_LANES;
    let width = output.len();
    let mut at = 0;
    while at + stretch <= width {
        let mut sums = [[simd.splat_f32s(0.0); STRETCH]; 2];
        sums[0].copy_from_slice(S::as_simd_f32s(&output[at..at + stretch]).0);
        let (pairs, last) = rows.as_chunks::<2>();
        let (weight_pairs, last_weight) = weights.as_chunks::<2>();
        for (number, (pair, weights)) in pairs.iter().zip(weight_pairs).enumerate() {
            if let Some(next) = pairs.get(number + AHEAD / 2) {
                for &row in next {
                    prefetch(&data[row + at..row + at + stretch]);
                }
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
    let (vectors, weight) = (S::as_simd_f32s(row).0, simd.splat_f32s(weight));
    for (sum, &vector) in sums.iter_mut().zip(vectors) {
        *sum = simd.mul_add_e_f32s(weight, vector, *sum);
    }
    sums
}

/// `sum + query row`, a stretch of each.
#[inline(always)]
fn add_products<S: Simd>(simd: S, mut sum: S::f32s, query: &[S::f32s; STRETCH], row: &[f32]) -> S::f32s {
    let (vectors, _) = S::as_simd_f32s(row);
    for (&query, &vector) in query.iter().zip(vectors) {
        sum = simd.mul_add_e_f32s(query, vector, sum);
    }
    sum
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
