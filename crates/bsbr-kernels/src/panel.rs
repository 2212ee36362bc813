//! Products of many queries with the few keys of one block, and of their weights with its values.
//!
//! A matrix product of general shape spends most of its time packing when one side has 8 or 16 rows. Here the keys of a
//! block are turned once, so that a register holds one number of each key; then every query takes one multiplication for
//! each of its numbers and no sum across a register.

use pulp::Simd;

/// Registers that hold a stretch of an output.
const STRETCH: usize = 4;

/// How the keys of a block are laid out for registers of `lanes` numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// A register holds one number of each of `lanes` keys.
    Whole,
    /// A register holds two neighbouring numbers of each of `lanes / 2` keys: the block is half as long as a register.
    Pairs,
}

fn layout(lanes: usize, block: usize, width: usize) -> Option<Layout> {
    match () {
        () if lanes > 1 && block.is_multiple_of(lanes) => Some(Layout::Whole),
        () if lanes == 2 * block && width.is_multiple_of(2) => Some(Layout::Pairs),
        () => None,
    }
}

/// Whether blocks of this size can be turned on this machine.
pub(crate) fn fits<S: Simd>(block: usize, width: usize) -> bool {
    layout(S::F32_LANES, block, width).is_some()
}

/// Turns the `block` rows of `rows` that are `stride` apart. `panel` takes `block * width` numbers.
#[inline(always)]
pub(crate) fn turn<S: Simd>(simd: S, rows: &[f32], stride: usize, block: usize, width: usize, panel: &mut [f32]) {
    let lanes = S::F32_LANES;
    #[cfg(target_arch = "x86_64")]
    if let Some(&wide) = (&simd as &dyn std::any::Any).downcast_ref::<pulp::x86::V4>()
        && width.is_multiple_of(lanes)
    {
        return match layout(lanes, block, width) {
            Some(Layout::Whole) => sixteen::turn(wide, rows, stride, width, panel),
            Some(Layout::Pairs) => sixteen::turn_pairs(wide, rows, stride, width, panel),
            None => {}
        };
    }
    let _ = simd;
    match layout(lanes, block, width) {
        Some(Layout::Whole) => {
            for (part, panel) in panel.chunks_exact_mut(lanes * width).enumerate() {
                for lane in 0..lanes {
                    let row = &rows[(part * lanes + lane) * stride..][..width];
                    for (at, &value) in row.iter().enumerate() {
                        panel[at * lanes + lane] = value;
                    }
                }
            }
        }
        Some(Layout::Pairs) => {
            for key in 0..block {
                let (pairs, _) = rows[key * stride..][..width].as_chunks::<2>();
                for (at, pair) in pairs.iter().enumerate() {
                    panel[at * lanes + 2 * key] = pair[0];
                    panel[at * lanes + 2 * key + 1] = pair[1];
                }
            }
        }
        None => {}
    }
}

/// Turning with registers of sixteen, a square at a time.
#[cfg(target_arch = "x86_64")]
mod sixteen {
    use std::arch::x86_64::{__m512, __m512d};

    use pulp::{Simd, cast, x86::V4};

    const LANES: usize = 16;

    #[inline(always)]
    fn load(row: &[f32], at: usize) -> __m512 {
        cast(V4::as_simd_f32s(&row[at..at + LANES]).0[0])
    }

    /// Quarters `0 2` of `a` and of `b`, or `1 3`: the second half of every turn.
    #[inline(always)]
    fn quarters(simd: V4, a: __m512, b: __m512) -> (__m512, __m512) {
        let f = simd.avx512f;
        (f._mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), f._mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    }

    /// Four registers whose quarters are the rows of a 4 x 4 square of quarters, turned.
    #[inline(always)]
    fn turn_quarters(simd: V4, rows: [__m512; 4]) -> [__m512; 4] {
        let (even_low, odd_low) = quarters(simd, rows[0], rows[1]);
        let (even_high, odd_high) = quarters(simd, rows[2], rows[3]);
        let (first, third) = quarters(simd, even_low, even_high);
        let (second, fourth) = quarters(simd, odd_low, odd_high);
        [first, second, third, fourth]
    }

    #[inline(always)]
    pub(super) fn turn(simd: V4, rows: &[f32], stride: usize, width: usize, panel: &mut [f32]) {
        let f = simd.avx512f;
        let panels = panel.chunks_exact_mut(LANES * width);
        for (part, panel) in panels.enumerate() {
            let rows = &rows[part * LANES * stride..];
            let (out, _) = V4::as_mut_simd_f32s(panel);
            for at in (0..width).step_by(LANES) {
                // Quarter q of fours[4 g + n]: number 4 q + n of the keys 4 g to 4 g + 3.
                let mut fours = [simd.splat_f32s(0.0); LANES];
                for g in 0..4 {
                    let [a, b, c, d] = [0, 1, 2, 3].map(|i| 4 * g + i);
                    let (a, b) = (load(&rows[a * stride..], at), load(&rows[b * stride..], at));
                    let (c, d) = (load(&rows[c * stride..], at), load(&rows[d * stride..], at));
                    let ab: [__m512d; 2] = [cast(f._mm512_unpacklo_ps(a, b)), cast(f._mm512_unpackhi_ps(a, b))];
                    let cd: [__m512d; 2] = [cast(f._mm512_unpacklo_ps(c, d)), cast(f._mm512_unpackhi_ps(c, d))];
                    fours[4 * g] = cast(f._mm512_unpacklo_pd(ab[0], cd[0]));
                    fours[4 * g + 1] = cast(f._mm512_unpackhi_pd(ab[0], cd[0]));
                    fours[4 * g + 2] = cast(f._mm512_unpacklo_pd(ab[1], cd[1]));
                    fours[4 * g + 3] = cast(f._mm512_unpackhi_pd(ab[1], cd[1]));
                }
                for n in 0..4 {
                    let square = [cast(fours[n]), cast(fours[4 + n]), cast(fours[8 + n]), cast(fours[12 + n])];
                    let turned = turn_quarters(simd, square);
                    out[at + n] = cast(turned[0]);
                    out[at + 4 + n] = cast(turned[1]);
                    out[at + 8 + n] = cast(turned[2]);
                    out[at + 12 + n] = cast(turned[3]);
                }
            }
        }
    }

    /// Eight keys, pairs of numbers kept together.
    #[inline(always)]
    pub(super) fn turn_pairs(simd: V4, rows: &[f32], stride: usize, width: usize, panel: &mut [f32]) {
        let f = simd.avx512f;
        let (out, _) = V4::as_mut_simd_f32s(panel);
        for at in (0..width).step_by(LANES) {
            // Quarter q of twos[2 g + n]: pair 2 q + n of the keys 2 g and 2 g + 1.
            let mut twos = [simd.splat_f32s(0.0); 8];
            for g in 0..4 {
                let a: __m512d = cast(load(&rows[2 * g * stride..], at));
                let b: __m512d = cast(load(&rows[(2 * g + 1) * stride..], at));
                twos[2 * g] = cast(f._mm512_unpacklo_pd(a, b));
                twos[2 * g + 1] = cast(f._mm512_unpackhi_pd(a, b));
            }
            for n in 0..2 {
                let square = [cast(twos[n]), cast(twos[2 + n]), cast(twos[4 + n]), cast(twos[6 + n])];
                let turned = turn_quarters(simd, square);
                out[at / 2 + n] = cast(turned[0]);
                out[at / 2 + 2 + n] = cast(turned[1]);
                out[at / 2 + 4 + n] = cast(turned[2]);
                out[at / 2 + 6 + n] = cast(turned[3]);
            }
        }
    }
}

/// Dot products of the queries that begin at `queries[i]` in `data` with the keys of a turned block, into the `block`
/// numbers that begin at `scores[i]` in `output`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn dots<S: Simd>(
    simd: S,
    panel: &[f32],
    block: usize,
    width: usize,
    data: &[f32],
    queries: &[usize],
    output: &mut [f32],
    scores: &[usize],
) {
    let pairs = layout(S::F32_LANES, block, width) == Some(Layout::Pairs);
    let mut at = 0;
    // Few queries take several sums each, so that an addition need not wait for the one before it.
    macro_rules! together {
        ($queries:literal, $sums:literal) => {
            while let (Some(queries), Some(scores)) =
                (queries[at..].first_chunk::<$queries>(), scores[at..].first_chunk::<$queries>())
            {
                if pairs {
                    dots_of_pairs::<S, $queries, $sums>(simd, panel, width, data, queries, output, scores);
                } else {
                    dots_of_whole::<S, $queries, $sums>(simd, panel, width, data, queries, output, scores);
                }
                at += $queries;
            }
        };
    }
    together!(8, 1);
    together!(4, 2);
    together!(2, 4);
    together!(1, 4);
}

#[inline(always)]
fn dots_of_whole<S: Simd, const N: usize, const SUMS: usize>(
    simd: S,
    panel: &[f32],
    width: usize,
    data: &[f32],
    queries: &[usize; N],
    output: &mut [f32],
    scores: &[usize; N],
) {
    let lanes = S::F32_LANES;
    let mut rows: [&[f32]; N] = [&[]; N];
    for (row, &query) in rows.iter_mut().zip(queries) {
        *row = &data[query..query + width];
    }
    for (part, panel) in panel.chunks_exact(lanes * width).enumerate() {
        let (keys, _) = S::as_simd_f32s(panel);
        let mut sums = [[simd.splat_f32s(0.0); SUMS]; N];
        let (groups, last) = keys[..width].as_chunks::<SUMS>();
        for (at, keys) in groups.iter().enumerate() {
            for j in 0..SUMS {
                for i in 0..N {
                    sums[i][j] = simd.mul_add_e_f32s(simd.splat_f32s(rows[i][at * SUMS + j]), keys[j], sums[i][j]);
                }
            }
        }
        for (j, &key) in last.iter().enumerate() {
            for i in 0..N {
                sums[i][0] = simd.mul_add_e_f32s(simd.splat_f32s(rows[i][groups.len() * SUMS + j]), key, sums[i][0]);
            }
        }
        for (sums, &score) in sums.iter().zip(scores) {
            let start = score + part * lanes;
            S::as_mut_simd_f32s(&mut output[start..start + lanes]).0[0] = total(simd, sums);
        }
    }
}

#[inline(always)]
fn dots_of_pairs<S: Simd, const N: usize, const SUMS: usize>(
    simd: S,
    panel: &[f32],
    width: usize,
    data: &[f32],
    queries: &[usize; N],
    output: &mut [f32],
    scores: &[usize; N],
) {
    let block = S::F32_LANES / 2;
    let mut rows: [&[[f32; 2]]; N] = [&[]; N];
    for (row, &query) in rows.iter_mut().zip(queries) {
        *row = data[query..query + width].as_chunks::<2>().0;
    }
    let (keys, _) = S::as_simd_f32s(panel);
    let mut sums = [[simd.splat_f32s(0.0); SUMS]; N];
    let (groups, last) = keys[..width / 2].as_chunks::<SUMS>();
    for (at, keys) in groups.iter().enumerate() {
        for j in 0..SUMS {
            for i in 0..N {
                sums[i][j] = simd.mul_add_e_f32s(splat_pair(simd, rows[i][at * SUMS + j]), keys[j], sums[i][j]);
            }
        }
    }
    for (j, &key) in last.iter().enumerate() {
        for i in 0..N {
            let pair = splat_pair(simd, rows[i][groups.len() * SUMS + j]);
            sums[i][0] = simd.mul_add_e_f32s(pair, key, sums[i][0]);
        }
    }
    for (sums, &score) in sums.iter().zip(scores) {
        let sum = total(simd, sums);
        let sums: &[f32] = pulp::bytemuck::cast_slice(std::slice::from_ref(&sum));
        for (score, pair) in output[score..score + block].iter_mut().zip(sums.as_chunks::<2>().0) {
            *score = pair[0] + pair[1];
        }
    }
}

/// A pair of numbers in every pair of lanes: it has the size of one f64.
#[inline(always)]
fn splat_pair<S: Simd>(simd: S, pair: [f32; 2]) -> S::f32s {
    pulp::bytemuck::cast(simd.splat_f64s(pulp::cast(pair)))
}

#[inline(always)]
fn total<S: Simd, const SUMS: usize>(simd: S, sums: &[S::f32s; SUMS]) -> S::f32s {
    let mut total = sums[0];
    for &sum in &sums[1..] {
        total = simd.add_f32s(total, sum);
    }
    total
}

/// Adds `sum_c weight_c value_c` over the rows of a block to the outputs that begin at `outputs[i]`; the weights of output
/// `i` begin at `starts[i]` in `weights`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn add_weighted<S: Simd>(
    simd: S,
    weights: &[f32],
    starts: &[usize],
    values: &[f32],
    stride: usize,
    block: usize,
    width: usize,
    output: &mut [f32],
    outputs: &[usize],
) {
    let (start_pairs, last_start) = starts.as_chunks::<2>();
    let (output_pairs, last_output) = outputs.as_chunks::<2>();
    for (starts, outputs) in start_pairs.iter().zip(output_pairs) {
        add_weighted_of(simd, weights, starts, values, stride, block, width, output, outputs);
    }
    if let (Some(&start), Some(&at)) = (last_start.first(), last_output.first()) {
        add_weighted_of(simd, weights, &[start], values, stride, block, width, output, &[at]);
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn add_weighted_of<S: Simd, const N: usize>(
    simd: S,
    weights: &[f32],
    starts: &[usize; N],
    values: &[f32],
    stride: usize,
    block: usize,
    width: usize,
    output: &mut [f32],
    outputs: &[usize; N],
) {
    let stretch = STRETCH * S::F32_LANES;
    let mut rows: [&[f32]; N] = [&[]; N];
    for (row, &start) in rows.iter_mut().zip(starts) {
        *row = &weights[start..start + block];
    }
    let mut at = 0;
    while at + stretch <= width {
        let mut sums = [[simd.splat_f32s(0.0); STRETCH]; N];
        for key in 0..block {
            let (vectors, _) = S::as_simd_f32s(&values[key * stride + at..key * stride + at + stretch]);
            for i in 0..N {
                let weight = simd.splat_f32s(rows[i][key]);
                for j in 0..STRETCH {
                    sums[i][j] = simd.mul_add_e_f32s(weight, vectors[j], sums[i][j]);
                }
            }
        }
        for (sums, &start) in sums.iter().zip(outputs) {
            let (vectors, _) = S::as_mut_simd_f32s(&mut output[start + at..start + at + stretch]);
            for (vector, &sum) in vectors.iter_mut().zip(sums) {
                *vector = simd.add_f32s(*vector, sum);
            }
        }
        at += stretch;
    }
    for (row, &start) in rows.iter().zip(outputs) {
        for (key, &weight) in row.iter().enumerate() {
            let rest = &values[key * stride + at..key * stride + width];
            for (sum, value) in output[start + at..start + width].iter_mut().zip(rest) {
                *sum += weight * value;
            }
        }
    }
}
