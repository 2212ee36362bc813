//! Products of integers of 8 bits: codes of queries with panels of codes of keys.
//!
//! A register takes four channels of sixteen items (of eight in AVX2) at a time. Processors that know VNNI have one instruction
//! for that; other forms multiply and add in more steps. All give the same sums, since a sum of integers is not rounded.
#![allow(unsafe_code)]

use std::ops::Range;

use super::head::{OFFSET, QUAD, TOGETHER};
use crate::level::{Level, limit};

/// Rows of queries that a step takes at most.
pub(crate) const ROWS: usize = 16;
/// Bytes that a panel has for four channels.
const STEP: usize = TOGETHER * QUAD;

/// Codes of up to [`ROWS`] queries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueryCodes<'a> {
    /// Four channels of a row in each word, the first in the lowest byte: `[channels / 4, ROWS]`.
    pub(crate) words: &'a [i32],
    /// Rows that count.
    pub(crate) rows: usize,
}

/// The largest code.
pub(crate) const LARGEST: f32 = 127.0;
/// No sum of products is as large.
const BEYOND: f32 = 1e9;

/// The largest integer up to `x`, within bounds that no sum of products reaches; the upper bound for what is no number.
#[inline(always)]
pub(crate) fn floor(x: f32) -> i32 {
    let x = if x < BEYOND { x } else { BEYOND };
    let x = if x > -BEYOND { x } else { -BEYOND };
    // SAFETY: a number between the bounds, which an integer of 32 bits holds. (A cast that saturates is not vectorised.)
    unsafe { x.floor().to_int_unchecked() }
}

/// Codes of numbers: `x factor`, rounded half to even. 0 for what is no number.
#[inline(always)]
pub(crate) fn encode(numbers: &[f32], factor: f32, codes: &mut [i8]) {
    for (code, number) in codes.iter_mut().zip(numbers) {
        let x = (number * factor).round_ties_even();
        let x = if x.abs() <= LARGEST { x } else { 0.0 };
        // SAFETY: a number between -127 and 127, which an integer of 32 bits holds.
        *code = unsafe { x.to_int_unchecked::<i32>() } as i8;
    }
}

/// Panels of codes: of keys, which have the [`OFFSET`], or of radii, which have none.
#[derive(Debug, Clone)]
pub(crate) struct Panels<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) range: Range<usize>,
    pub(crate) offset: bool,
}

impl<'a> Panels<'a> {
    /// Panels of keys.
    pub(crate) fn keys(codes: &'a [u8], range: Range<usize>) -> Self {
        Self { codes, range, offset: true }
    }

    fn bytes(&self, quads: usize) -> &[u8] {
        &self.codes[self.range.start * quads * STEP..self.range.end * quads * STEP]
    }
}

/// What turns the sum of products of a row and an item into a score: `row_base + sum (item_scale row_scale)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scales<'a> {
    /// One for each item, from the first item of all panels on.
    pub(crate) items: &'a [f32],
    pub(crate) rows: &'a [f32],
    pub(crate) bases: &'a [f32],
    /// What the offset of the codes adds to the sums of each row; as many as rows.
    pub(crate) offsets: &'a [i32],
}

/// Scores of each row and item, into rows of `scores` that begin `stride` apart, at the first item of the panels.
pub(crate) fn score(query: QueryCodes<'_>, panels: &Panels<'_>, scales: Scales<'_>, scores: &mut [f32], stride: usize) {
    let count = panels.range.len() * TOGETHER;
    let quads = query.words.len() / ROWS;
    if query.rows == 0 || count == 0 || quads == 0 {
        return;
    }
    assert!(query.words.len() == quads * ROWS && query.rows <= ROWS);
    assert!(count <= stride && scores.len() >= (query.rows - 1) * stride + count);
    let rows = query.rows;
    assert!(scales.rows.len() >= rows && scales.bases.len() >= rows && scales.offsets.len() >= rows);
    let items = &scales.items[panels.range.start * TOGETHER..panels.range.end * TOGETHER];
    let job =
        Score { words: query.words, rows, codes: panels.bytes(quads), scales: Scales { items, ..scales }, stride };
    run(panels.offset, Job::Score(job, scores));
}

/// Which items of each panel have a sum above the threshold of the row, as bits of `masks`; thresholds, which hold the offset
/// of the codes, and masks are `[rows, stride]`, at the first of the panels.
pub(crate) fn compare(
    query: QueryCodes<'_>,
    panels: &Panels<'_>,
    thresholds: &[i32],
    masks: &mut [u16],
    stride: usize,
) {
    let (rows, count, quads) = (query.rows, panels.range.len(), query.words.len() / ROWS);
    if rows == 0 || count == 0 {
        return;
    }
    assert!(query.words.len() == quads * ROWS && rows <= ROWS && count <= stride);
    assert!(thresholds.len() >= (rows - 1) * stride + count && masks.len() >= (rows - 1) * stride + count);
    let job = Compare { words: query.words, rows, codes: panels.bytes(quads), thresholds, stride };
    run(panels.offset, Job::Compare(job, masks));
}

/// Adds the positions of the bits of `masks`, one mask for each block from the one of the token `first` on.
pub(crate) fn push_positions(masks: &[u16], first: usize, positions: &mut Vec<u32>) {
    #[cfg(target_arch = "x86_64")]
    if limit() == Level::Best && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        // SAFETY: the features that the function is compiled for were found just now.
        return unsafe { wide::push_positions(masks, first, positions) };
    }
    for (at, &mask) in masks.iter().enumerate() {
        let mut mask = mask;
        while mask != 0 {
            positions.push((first + at * TOGETHER) as u32 + mask.trailing_zeros());
            mask &= mask - 1;
        }
    }
}

struct Score<'a> {
    words: &'a [i32],
    rows: usize,
    codes: &'a [u8],
    scales: Scales<'a>,
    stride: usize,
}

struct Compare<'a> {
    words: &'a [i32],
    rows: usize,
    codes: &'a [u8],
    thresholds: &'a [i32],
    stride: usize,
}

enum Job<'a> {
    Score(Score<'a>, &'a mut [f32]),
    Compare(Compare<'a>, &'a mut [u16]),
}

/// Runs a job with the best instructions there are up to the level asked for.
fn run(offset: bool, job: Job<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        let level = limit();
        if level == Level::Best
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
        {
            // SAFETY: the features that the function is compiled for were found just now.
            return unsafe { wide::run(job) };
        }
        if level == Level::Best && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni") {
            // SAFETY: as above.
            return unsafe { half_vnni::run(offset, job) };
        }
        if level != Level::Scalar && is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { half::run(offset, job) };
        }
    }
    let _ = limit;
    scalar::run(offset, job);
}

/// One number at a time.
mod scalar {
    use super::{Job, OFFSET, QUAD, ROWS, STEP, TOGETHER};

    fn sum(words: &[i32], row: usize, panel: &[u8], lane: usize) -> i32 {
        let steps = panel.chunks_exact(STEP).zip(words.chunks_exact(ROWS));
        let products = steps.map(|(step, words)| {
            let query = words[row].to_le_bytes().map(|byte| i32::from(byte as i8));
            let codes = &step[lane * QUAD..(lane + 1) * QUAD];
            query.iter().zip(codes).map(|(query, &code)| query * i32::from(code)).sum::<i32>()
        });
        products.sum()
    }

    pub(super) fn run(_: bool, job: Job<'_>) {
        const { assert!(OFFSET == 128) };
        match job {
            Job::Score(job, scores) => {
                let panel = job.words.len() / ROWS * STEP;
                for (at, panel) in job.codes.chunks_exact(panel).enumerate() {
                    for row in 0..job.rows {
                        for lane in 0..TOGETHER {
                            let item = at * TOGETHER + lane;
                            let sum = sum(job.words, row, panel, lane) - job.scales.offsets[row];
                            let scale = job.scales.items[item] * job.scales.rows[row];
                            scores[row * job.stride + item] = sum as f32 * scale + job.scales.bases[row];
                        }
                    }
                }
            }
            Job::Compare(job, masks) => {
                let panel = job.words.len() / ROWS * STEP;
                for (at, panel) in job.codes.chunks_exact(panel).enumerate() {
                    for row in 0..job.rows {
                        let threshold = job.thresholds[row * job.stride + at];
                        let above = |lane: &usize| sum(job.words, row, panel, *lane) > threshold;
                        masks[row * job.stride + at] = (0..TOGETHER).filter(above).map(|lane| 1 << lane).sum();
                    }
                }
            }
        }
    }
}

/// AVX-512 with VNNI: a register holds four channels of all items of a panel.
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m512i, _mm512_add_epi32, _mm512_add_ps, _mm512_cmpgt_epi32_mask, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_compress_epi32, _mm512_mul_ps, _mm512_set1_epi32,
        _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_storeu_si512,
        _mm512_sub_epi32, _mm512_test_epi16_mask,
    };

    use super::{Compare, Job, ROWS, STEP, Score, TOGETHER};

    /// Finds the masks that have a bit, and stores the positions of one without looking at each.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn push_positions(masks: &[u16], first: usize, positions: &mut Vec<u32>) {
        const MASKS: usize = 32;
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let (steps, rest) = masks.as_chunks::<MASKS>();
        let mut last = [0; MASKS];
        last[..rest.len()].copy_from_slice(rest);
        for (step, masks) in steps.iter().chain(std::iter::once(&last)).enumerate() {
            // SAFETY: 32 masks are the 64 bytes of a register, which are read wherever they lie.
            let all = unsafe { _mm512_loadu_si512(masks.as_ptr().cast()) };
            let mut some = _mm512_test_epi16_mask(all, all);
            positions.reserve(TOGETHER * some.count_ones() as usize);
            while some != 0 {
                let at = some.trailing_zeros() as usize;
                some &= some - 1;
                let start = _mm512_set1_epi32((first + (step * MASKS + at) * TOGETHER) as i32);
                let own = _mm512_maskz_compress_epi32(masks[at], _mm512_add_epi32(start, lanes));
                let length = positions.len();
                let place = positions.spare_capacity_mut();
                assert!(place.len() >= TOGETHER);
                // SAFETY: there is room for 16 numbers, and as many are written as the mask has bits, all others beyond.
                unsafe {
                    _mm512_storeu_si512(place.as_mut_ptr().cast(), own);
                    positions.set_len(length + masks[at].count_ones() as usize);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn run(job: Job<'_>) {
        match job {
            Job::Score(job, scores) => match job.rows {
                1 => score::<1>(&job, scores),
                2 => score::<2>(&job, scores),
                3 | 4 => score::<4>(&job, scores),
                5..=8 => score::<8>(&job, scores),
                _ => score::<ROWS>(&job, scores),
            },
            Job::Compare(job, masks) => match job.rows {
                1 => compare::<1>(&job, masks),
                2 => compare::<2>(&job, masks),
                3 | 4 => compare::<4>(&job, masks),
                5..=8 => compare::<8>(&job, masks),
                _ => compare::<ROWS>(&job, masks),
            },
        }
    }

    /// Sums of `R` rows with the items of a panel.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sums<const R: usize>(words: &[i32], panel: &[u8]) -> [__m512i; R] {
        let mut sums = [_mm512_setzero_si512(); R];
        for (step, words) in panel.as_chunks::<STEP>().0.iter().zip(words.as_chunks::<ROWS>().0) {
            // SAFETY: a step has 64 bytes, which are read wherever they lie.
            let codes = unsafe { _mm512_loadu_si512(step.as_ptr().cast()) };
            for row in 0..R {
                sums[row] = _mm512_dpbusd_epi32(sums[row], codes, _mm512_set1_epi32(words[row]));
            }
        }
        sums
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn score<const R: usize>(job: &Score<'_>, scores: &mut [f32]) {
        let panel = job.words.len() / ROWS * STEP;
        let items = job.scales.items.as_chunks::<TOGETHER>().0;
        for (at, (panel, items)) in job.codes.chunks_exact(panel).zip(items).enumerate() {
            let sums = sums::<R>(job.words, panel);
            // SAFETY: an array of 16 numbers is read wherever it lies.
            let items = unsafe { _mm512_loadu_ps(items.as_ptr()) };
            for row in 0..R.min(job.rows) {
                let sum = _mm512_sub_epi32(sums[row], _mm512_set1_epi32(job.scales.offsets[row]));
                let scale = _mm512_mul_ps(items, _mm512_set1_ps(job.scales.rows[row]));
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
                let score = _mm512_add_ps(product, _mm512_set1_ps(job.scales.bases[row]));
                let place = &mut scores[row * job.stride + at * TOGETHER..][..TOGETHER];
                // SAFETY: the slice has room for 16 numbers.
                unsafe { _mm512_storeu_ps(place.as_mut_ptr(), score) };
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn compare<const R: usize>(job: &Compare<'_>, masks: &mut [u16]) {
        let panel = job.words.len() / ROWS * STEP;
        for (at, panel) in job.codes.chunks_exact(panel).enumerate() {
            let sums = sums::<R>(job.words, panel);
            for (row, &sum) in sums.iter().enumerate().take(job.rows) {
                let place = row * job.stride + at;
                masks[place] = _mm512_cmpgt_epi32_mask(sum, _mm512_set1_epi32(job.thresholds[place]));
            }
        }
    }
}

/// The form for registers of 256 bits: two of them hold four channels of all items of a panel.
#[cfg(target_arch = "x86_64")]
macro_rules! half_form {
    ($name:ident, $features:literal, $what:literal, $products:item) => {
        #[doc = $what]
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;

            use super::{Compare, Job, ROWS, STEP, Score, TOGETHER};

            /// Items of a register.
            const LANES: usize = 8;
            /// Rows whose sums fit into the registers.
            const FEW: usize = 4;

            #[target_feature(enable = $features)]
            pub(super) fn run(offset: bool, job: Job<'_>) {
                match (job, offset) {
                    (Job::Score(job, scores), true) => score::<true>(&job, scores),
                    (Job::Score(job, scores), false) => score::<false>(&job, scores),
                    (Job::Compare(job, masks), true) => compare::<true>(&job, masks),
                    (Job::Compare(job, masks), false) => compare::<false>(&job, masks),
                }
            }

            $products

            /// Sums of the rows from `first` on with the items of a panel.
            #[inline]
            #[target_feature(enable = $features)]
            fn sums<const OFFSET: bool>(words: &[i32], first: usize, panel: &[u8]) -> [[__m256i; 2]; FEW] {
                let mut sums = [[_mm256_setzero_si256(); 2]; FEW];
                for (step, words) in panel.as_chunks::<STEP>().0.iter().zip(words.as_chunks::<ROWS>().0) {
                    // SAFETY: a step has 64 bytes, which are read wherever they lie.
                    let codes = unsafe {
                        [_mm256_loadu_si256(step.as_ptr().cast()), _mm256_loadu_si256(step[STEP / 2..].as_ptr().cast())]
                    };
                    for row in 0..FEW {
                        let query = _mm256_set1_epi32(words[first + row]);
                        for part in 0..2 {
                            sums[row][part] = add_products::<OFFSET>(sums[row][part], codes[part], query);
                        }
                    }
                }
                sums
            }

            #[target_feature(enable = $features)]
            fn score<const OFFSET: bool>(job: &Score<'_>, scores: &mut [f32]) {
                let panel = job.words.len() / ROWS * STEP;
                let items = job.scales.items.as_chunks::<TOGETHER>().0;
                for (at, (panel, items)) in job.codes.chunks_exact(panel).zip(items).enumerate() {
                    for first in (0..job.rows).step_by(FEW) {
                        let sums = sums::<OFFSET>(job.words, first, panel);
                        for row in first..job.rows.min(first + FEW) {
                            for part in 0..2 {
                                let offset = _mm256_set1_epi32(job.scales.offsets[row]);
                                let sum = _mm256_sub_epi32(sums[row - first][part], offset);
                                // SAFETY: an array of 16 numbers, of which one half is read wherever it lies.
                                let items = unsafe { _mm256_loadu_ps(items[part * LANES..].as_ptr()) };
                                let scale = _mm256_mul_ps(items, _mm256_set1_ps(job.scales.rows[row]));
                                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
                                let score = _mm256_add_ps(product, _mm256_set1_ps(job.scales.bases[row]));
                                let place = row * job.stride + at * TOGETHER + part * LANES;
                                let place = &mut scores[place..place + LANES];
                                // SAFETY: the slice has room for 8 numbers.
                                unsafe { _mm256_storeu_ps(place.as_mut_ptr(), score) };
                            }
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn compare<const OFFSET: bool>(job: &Compare<'_>, masks: &mut [u16]) {
                let panel = job.words.len() / ROWS * STEP;
                for (at, panel) in job.codes.chunks_exact(panel).enumerate() {
                    for first in (0..job.rows).step_by(FEW) {
                        let sums = sums::<OFFSET>(job.words, first, panel);
                        for row in first..job.rows.min(first + FEW) {
                            let place = row * job.stride + at;
                            let threshold = _mm256_set1_epi32(job.thresholds[place]);
                            let [low, high] = sums[row - first].map(|sums| {
                                let above = _mm256_cmpgt_epi32(sums, threshold);
                                _mm256_movemask_ps(_mm256_castsi256_ps(above)) as u16
                            });
                            masks[place] = low | high << LANES;
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
half_form!(
    half_vnni,
    "avx2,avxvnni",
    "AVX2 with VNNI.",
    #[inline]
    #[target_feature(enable = "avx2,avxvnni")]
    fn add_products<const OFFSET: bool>(sum: __m256i, codes: __m256i, query: __m256i) -> __m256i {
        _mm256_dpbusd_avx_epi32(sum, codes, query)
    }
);

#[cfg(target_arch = "x86_64")]
half_form!(
    half,
    "avx2",
    "AVX2: pairs of products of magnitudes up to 127 fit into 16 bits.",
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add_products<const OFFSET: bool>(sum: __m256i, codes: __m256i, query: __m256i) -> __m256i {
        let ones = _mm256_set1_epi16(1);
        if !OFFSET {
            return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, query), ones));
        }
        // Without its offset a code has a sign; it takes over that of the query, whose magnitude has none.
        let codes = _mm256_xor_si256(codes, _mm256_set1_epi8(i8::MIN));
        let products = _mm256_maddubs_epi16(_mm256_abs_epi8(query), _mm256_sign_epi8(codes, query));
        let signed = _mm256_madd_epi16(products, ones);
        // The sums of all forms hold the offset.
        let offset = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), query), ones);
        _mm256_add_epi32(_mm256_add_epi32(sum, signed), _mm256_slli_epi32::<7>(offset))
    }
);
