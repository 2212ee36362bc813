//! Loops over rows that lie anywhere: the tokens of the blocks that one query chose.

use pulp::Simd;

/// Rows whose sums are folded together.
const TOGETHER: usize = 16;
/// Registers that hold a stretch of the query while the rows go by.
const STRETCH: usize = 4;
/// Rows of a short block, and queries served together with one.
pub(crate) const FOUR: usize = 4;

/// Dot products of `query` with the rows of `data` that begin at `rows`.
#[inline(always)]
pub(crate) fn dots<S: Simd>(simd: S, query: &[f32], data: &[f32], rows: &[usize], scores: &mut [f32]) {
    let width = query.len();
    let (query_vectors, query_rest) = S::as_simd_f32s(query);
    let (groups, last) = rows.as_chunks::<TOGETHER>();
    let (score_groups, last_scores) = scores.as_chunks_mut::<TOGETHER>();
    let (stretches, few) = query_vectors.as_chunks::<STRETCH>();
    for (rows, scores) in groups.iter().zip(score_groups) {
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

/// Dot products of the queries that begin at `queries[i]` in `data` with four rows of `width` numbers that are `stride`
/// apart, into the four numbers that begin at `places[i]` in `scores`.
///
/// Four queries at a time: their sums fold like those of [`TOGETHER`] rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn dots_of_four<S: Simd>(
    simd: S,
    rows: &[f32],
    stride: usize,
    width: usize,
    data: &[f32],
    queries: &[usize],
    scores: &mut [f32],
    places: &[usize],
) {
    let rows: [&[f32]; FOUR] = std::array::from_fn(|row| &rows[row * stride..row * stride + width]);
    for (starts, places) in queries.chunks(FOUR).zip(places.chunks(FOUR)) {
        // Where fewer are left, the last stands for those missing.
        let start = |i: usize| starts[i.min(starts.len() - 1)];
        let queries: [&[f32]; FOUR] = std::array::from_fn(|i| &data[start(i)..start(i) + width]);
        let mut sums = [simd.splat_f32s(0.0); TOGETHER];
        for at in 0..width / S::F32_LANES {
            let vector = |row: &[f32]| S::as_simd_f32s(row).0[at];
            let (rows, queries) = (rows.map(vector), queries.map(vector));
            for i in 0..FOUR {
                for j in 0..FOUR {
                    sums[FOUR * i + j] = simd.mul_add_e_f32s(queries[i], rows[j], sums[FOUR * i + j]);
                }
            }
        }
        let totals = sum_each(simd, sums);
        for ((totals, query), &place) in totals.as_chunks::<FOUR>().0.iter().zip(queries).zip(places) {
            let scores = &mut scores[place..place + FOUR];
            scores.copy_from_slice(totals);
            let (_, rest) = S::as_simd_f32s(query);
            if !rest.is_empty() {
                for (score, row) in scores.iter_mut().zip(rows) {
                    *score += dot_rest::<S>(rest, row);
                }
            }
        }
    }
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
