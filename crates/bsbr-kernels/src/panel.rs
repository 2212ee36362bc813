//! Products of many queries with the few keys of one block, and of their weights with its values.
//!
//! A matrix product of general shape spends most of its time packing when one side has 8 or 16 rows. Here the keys of a
//! block are turned once, so that a register holds one number of each key; then every query takes one multiplication for
//! each of its numbers and no sum across a register.

use pulp::Simd;

/// Queries multiplied together, one register of sums each.
const TOGETHER: usize = 8;
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
pub(crate) fn turn<S: Simd>(rows: &[f32], stride: usize, block: usize, width: usize, panel: &mut [f32]) {
    let lanes = S::F32_LANES;
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
    let (query_groups, last_queries) = queries.as_chunks::<TOGETHER>();
    let (score_groups, last_scores) = scores.as_chunks::<TOGETHER>();
    for (queries, scores) in query_groups.iter().zip(score_groups) {
        if pairs {
            dots_of_pairs(simd, panel, width, data, queries, output, scores);
        } else {
            dots_of_whole(simd, panel, width, data, queries, output, scores);
        }
    }
    for (query, score) in last_queries.iter().zip(last_scores) {
        if pairs {
            dots_of_pairs(simd, panel, width, data, &[*query], output, &[*score]);
        } else {
            dots_of_whole(simd, panel, width, data, &[*query], output, &[*score]);
        }
    }
}

#[inline(always)]
fn dots_of_whole<S: Simd, const N: usize>(
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
        let mut sums = [simd.splat_f32s(0.0); N];
        for (at, &key) in keys.iter().enumerate().take(width) {
            for i in 0..N {
                sums[i] = simd.mul_add_e_f32s(simd.splat_f32s(rows[i][at]), key, sums[i]);
            }
        }
        for (&sum, &score) in sums.iter().zip(scores) {
            let start = score + part * lanes;
            S::as_mut_simd_f32s(&mut output[start..start + lanes]).0[0] = sum;
        }
    }
}

#[inline(always)]
fn dots_of_pairs<S: Simd, const N: usize>(
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
    let mut sums = [simd.splat_f32s(0.0); N];
    for (at, &key) in keys.iter().enumerate().take(width / 2) {
        for i in 0..N {
            // Both numbers at once: a pair of f32 has the size of an f64.
            let pair: S::f32s = pulp::bytemuck::cast(simd.splat_f64s(pulp::cast(rows[i][at])));
            sums[i] = simd.mul_add_e_f32s(pair, key, sums[i]);
        }
    }
    for (&sum, &score) in sums.iter().zip(scores) {
        let sums: &[f32] = pulp::bytemuck::cast_slice(std::slice::from_ref(&sum));
        for (score, pair) in output[score..score + block].iter_mut().zip(sums.as_chunks::<2>().0) {
            *score = pair[0] + pair[1];
        }
    }
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
