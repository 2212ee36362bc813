//! The largest numbers of a row.

use pulp::Simd;

use crate::vector;

/// Numbers of the widest register.
const ROOM: usize = 16;

/// What of a row may still be among the largest; kept between calls for its memory.
#[derive(Default)]
pub(crate) struct Contest {
    values: Vec<f32>,
    indices: Vec<u32>,
}

/// Indices of the `count` largest numbers of `row`, ascending, into `chosen`; of equal numbers the first. Numbers at or
/// below `hidden` are never chosen, so that there can be fewer.
///
/// One pass finds a bound that `count` numbers reach, a second keeps those that do: a few times `count`. Among them the
/// bound that exactly `count` reach is found by bisection, each step one pass of vector comparisons.
#[inline(always)]
pub(crate) fn largest<S: Simd>(
    simd: S,
    row: &[f32],
    count: usize,
    hidden: f32,
    contest: &mut Contest,
    chosen: &mut Vec<u32>,
) {
    chosen.clear();
    if count == 0 {
        return;
    }
    // `count` numbers reach `low`, or fewer are visible at all; none lies above `high`.
    let (mut low, mut high) = bounds(simd, row, count, hidden);
    if high <= hidden {
        return;
    }
    let Contest { values, indices } = contest;
    // Whole registers are written, and overwritten by what follows.
    let room = row.len() + ROOM;
    if values.len() < room {
        values.resize(room, 0.0);
        indices.resize(room, 0);
    }
    let mut reach = keep_from(simd, row, None, low, values, indices);
    let (values, indices) = (&values[..reach], &indices[..reach]);
    if reach <= count {
        chosen.extend_from_slice(indices);
        return;
    }
    while reach > count {
        let Some(middle) = between(low, high) else { break };
        let above = vector::count_from(simd, values, middle);
        if above >= count {
            (low, reach) = (middle, above);
        } else {
            high = middle;
        }
    }
    chosen.resize(values.len() + ROOM, 0);
    let kept = keep_from(simd, values, Some(indices), low, &mut [], chosen);
    chosen.truncate(kept);
    if reach > count {
        // Equal numbers lie on the bound: the first of them are taken.
        chosen.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        chosen.truncate(count);
        chosen.sort_unstable();
    }
}

/// The number half way between two in the order of all f32, `None` between neighbours. Shares of attention differ by powers
/// of ten: half of their sum would be reached by one alone, again and again.
#[inline(always)]
fn between(low: f32, high: f32) -> Option<f32> {
    // Flips the numbers below zero, whose bits are in reverse order; its own inverse.
    let ordered = |bits: i32| bits ^ (((bits >> 31) as u32) >> 1) as i32;
    let (low, high) = (ordered(low.to_bits() as i32), ordered(high.to_bits() as i32));
    let middle = (i64::from(low) + i64::from(high)).div_euclid(2) as i32;
    (middle > low && middle < high).then(|| f32::from_bits(ordered(middle) as u32))
}

/// A number that `count` of the row reach, if so many are visible, and the highest.
#[inline(always)]
fn bounds<S: Simd>(simd: S, row: &[f32], count: usize, hidden: f32) -> (f32, f32) {
    const MOST_SETS: usize = 8;
    let lanes = S::F32_LANES;
    let (vectors, rest) = S::as_simd_f32s(row);
    let sets = count.div_ceil(lanes);
    if lanes > 1 && sets <= MOST_SETS && vectors.len() >= 2 * sets {
        // The largest of each of at least `count` disjoint sets; every one of them reaches the smallest of these.
        let mut highest = [simd.splat_f32s(f32::NEG_INFINITY); MOST_SETS];
        for (at, &vector) in vectors.iter().enumerate() {
            let set = at % sets;
            highest[set] = simd.max_f32s(highest[set], vector);
        }
        let (mut lowest, mut most) = (highest[0], highest[0]);
        for &set in &highest[1..sets] {
            (lowest, most) = (simd.min_f32s(lowest, set), simd.max_f32s(most, set));
        }
        let bound = simd.reduce_min_f32s(lowest);
        if bound > hidden {
            return (bound, rest.iter().copied().fold(simd.reduce_max_f32s(most), f32::max));
        }
    }
    let (limit, none) = (simd.splat_f32s(hidden), simd.splat_f32s(f32::INFINITY));
    let mut lowest = none;
    for &vector in vectors {
        let shown = simd.less_than_f32s(limit, vector);
        lowest = simd.min_f32s(lowest, simd.select_f32s(shown, vector, none));
    }
    let shown = rest.iter().copied().filter(|&value| value > hidden);
    (shown.fold(simd.reduce_min_f32s(lowest), f32::min), vector::max(simd, row))
}

/// Those of `row` that are at least `bound`, in their order, to the front of `kept`: their `numbers`, which are their places
/// unless given; and to the front of `values`, if there are any, themselves. Both have room for the row and [`ROOM`] more.
/// Returns how many.
#[inline(always)]
fn keep_from<S: Simd>(
    simd: S,
    row: &[f32],
    numbers: Option<&[u32]>,
    bound: f32,
    values: &mut [f32],
    kept: &mut [u32],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if let Some(&simd) = (&simd as &dyn std::any::Any).downcast_ref::<pulp::x86::V4>() {
        return sixteen::keep_from(simd, row, numbers, bound, values, kept);
    }
    let mut count = 0;
    let mut keep = |at: usize| {
        kept[count] = numbers.map_or(at as u32, |numbers| numbers[at]);
        if let Some(value) = values.get_mut(count) {
            *value = row[at];
        }
        count += 1;
    };
    let (vectors, rest) = S::as_simd_f32s(row);
    let bounds = simd.splat_f32s(bound);
    for (at, &vector) in vectors.iter().enumerate() {
        let mut left = bits(simd, simd.greater_than_or_equal_f32s(vector, bounds));
        while left != 0 {
            keep(at * S::F32_LANES + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
    let before = row.len() - rest.len();
    rest.iter().enumerate().filter(|&(_, &value)| value >= bound).for_each(|(at, _)| keep(before + at));
    count
}

/// [`keep_from`] for registers of sixteen, which can move what a mask selects to their front.
// Functions, not closures: only what is always inlined is compiled for the wide registers.
#[cfg(target_arch = "x86_64")]
mod sixteen {
    use pulp::{Simd, cast, f32x16, u32x16, x86::V4};

    const LANES: usize = super::ROOM;

    #[inline(always)]
    pub(super) fn keep_from(
        simd: V4,
        row: &[f32],
        numbers: Option<&[u32]>,
        bound: f32,
        values: &mut [f32],
        kept: &mut [u32],
    ) -> usize {
        let bounds = simd.splat_f32s(bound);
        let (vectors, rest) = row.as_chunks::<LANES>();
        let mut places: u32x16 = cast(std::array::from_fn::<u32, LANES, _>(|lane| lane as u32));
        let mut count = 0;
        for (at, vector) in vectors.iter().enumerate() {
            let vector: f32x16 = cast(*vector);
            let mask = simd.greater_than_or_equal_f32s(vector, bounds).0;
            let of_places = match numbers.and_then(|numbers| numbers[at * LANES..].first_chunk::<LANES>()) {
                Some(numbers) => cast(*numbers),
                None => places,
            };
            count +=
                write(simd, vector, of_places, mask, values.get_mut(count..).unwrap_or_default(), &mut kept[count..]);
            places = simd.add_u32s(places, simd.splat_u32s(LANES as u32));
        }
        if !rest.is_empty() {
            let vector = simd.partial_load_f32s(rest);
            let of_places = match numbers {
                Some(numbers) => simd.partial_load_u32s(&numbers[row.len() - rest.len()..]),
                None => places,
            };
            let mask = simd.greater_than_or_equal_f32s(vector, bounds).0 & ((1 << rest.len()) - 1);
            count +=
                write(simd, vector, of_places, mask, values.get_mut(count..).unwrap_or_default(), &mut kept[count..]);
        }
        count
    }

    /// Writes what a mask selects, and how many that is.
    #[inline(always)]
    fn write(simd: V4, vector: f32x16, numbers: u32x16, mask: u16, values: &mut [f32], kept: &mut [u32]) -> usize {
        let f = simd.avx512f;
        let numbers: [u32; LANES] = cast(f._mm512_maskz_compress_epi32(mask, cast(numbers)));
        kept[..LANES].copy_from_slice(&numbers);
        if let Some(values) = values.first_chunk_mut::<LANES>() {
            *values = cast(f._mm512_maskz_compress_ps(mask, cast(vector)));
        }
        mask.count_ones() as usize
    }
}

/// A bit for each lane of a mask, the first lane lowest.
#[inline(always)]
fn bits<S: Simd>(simd: S, mask: S::m32s) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(mask) = (&mask as &dyn std::any::Any).downcast_ref::<pulp::b16>() {
        return mask.0.into();
    }
    let ones = simd.select_f32s(mask, simd.splat_f32s(1.0), simd.splat_f32s(0.0));
    let lanes: &[f32] = pulp::bytemuck::cast_slice(std::slice::from_ref(&ones));
    lanes.iter().enumerate().fold(0, |bits, (at, &lane)| bits | (u32::from(lane == 1.0) << at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use pulp::WithSimd;

    use super::*;

    struct Largest<'a>(&'a [f32], usize, f32);

    impl WithSimd for Largest<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let mut chosen = Vec::new();
            largest(simd, self.0, self.1, self.2, &mut Contest::default(), &mut chosen);
            chosen
        }
    }

    proptest! {
        #[test]
        fn the_largest_are_those_of_a_stable_sort(
            values in prop::collection::vec(prop_oneof![-3.0f32..3.0, (0..4u8).prop_map(f32::from), Just(-1e30)], 0..600),
            count in 0usize..140,
        ) {
            let mut order: Vec<u32> = (0..values.len() as u32).filter(|&i| values[i as usize] > -1e29).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
            order.truncate(count);
            order.sort_unstable();
            for level in crate::layer::levels() {
                prop_assert_eq!(&level.dispatch(Largest(&values, count, -1e29)), &order);
            }
        }
    }
}
