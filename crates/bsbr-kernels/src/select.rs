//! The largest numbers of a row.

use pulp::Simd;

use crate::vector;

/// Indices of the `count` largest numbers of `row`, ascending, into `chosen`; of equal numbers the first. Numbers at or
/// below `hidden` are never chosen, so that there can be fewer.
///
/// Finds the bound that `count` numbers reach by bisection, each step one pass of vector comparisons.
#[inline(always)]
pub(crate) fn largest<S: Simd>(simd: S, row: &[f32], count: usize, hidden: f32, chosen: &mut Vec<u32>) {
    chosen.clear();
    if count == 0 {
        return;
    }
    let mut high = vector::max(simd, row);
    if high <= hidden {
        return;
    }
    // `count` numbers reach `low`, or fewer are visible at all; fewer than that lie above `high`.
    let mut low = lower_bound(simd, row, count, hidden);
    let mut bound = low;
    let mut reach = vector::count_from(simd, row, bound);
    while reach > count {
        let Some(middle) = between(low, high) else { break };
        let above = vector::count_from(simd, row, middle);
        if above >= count {
            (low, bound, reach) = (middle, middle, above);
        } else {
            high = middle;
        }
    }
    if reach > count {
        return largest_with_ties(row, bound, count, hidden, chosen);
    }
    collect(row, chosen, |value| value >= bound && value > hidden);
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

/// A number that `count` of the row reach, if so many are visible.
#[inline(always)]
fn lower_bound<S: Simd>(simd: S, row: &[f32], count: usize, hidden: f32) -> f32 {
    const MOST_SETS: usize = 4;
    let lanes = S::F32_LANES;
    let (vectors, rest) = S::as_simd_f32s(row);
    let sets = count / lanes;
    let divides = lanes > 1 && count.is_multiple_of(lanes) && sets <= MOST_SETS && vectors.len() >= 2 * sets;
    if divides {
        // The largest of each of `count` disjoint sets; every one of them reaches the smallest of these.
        let mut highest = [simd.splat_f32s(f32::NEG_INFINITY); MOST_SETS];
        for (at, &vector) in vectors.iter().enumerate() {
            let set = at % sets;
            highest[set] = simd.max_f32s(highest[set], vector);
        }
        let mut lowest = highest[0];
        for &set in &highest[1..sets] {
            lowest = simd.min_f32s(lowest, set);
        }
        let bound = simd.reduce_min_f32s(lowest);
        if bound > hidden {
            return bound;
        }
    }
    let (limit, none) = (simd.splat_f32s(hidden), simd.splat_f32s(f32::INFINITY));
    let mut lowest = none;
    for &vector in vectors {
        let shown = simd.less_than_f32s(limit, vector);
        lowest = simd.min_f32s(lowest, simd.select_f32s(shown, vector, none));
    }
    rest.iter().copied().filter(|&value| value > hidden).fold(simd.reduce_min_f32s(lowest), f32::min)
}

/// Equal numbers lie on the bound: the first of them are taken.
fn largest_with_ties(row: &[f32], low: f32, count: usize, hidden: f32, chosen: &mut Vec<u32>) {
    let mut order: Vec<u32> = Vec::new();
    collect(row, &mut order, |value| value >= low && value > hidden);
    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    chosen.extend_from_slice(&order);
}

/// Indices of the numbers that `wanted` holds for, ascending.
#[inline(always)]
fn collect(row: &[f32], chosen: &mut Vec<u32>, wanted: impl Fn(f32) -> bool) {
    const STRETCH: usize = 16;
    for (at, stretch) in row.chunks(STRETCH).enumerate() {
        let mut any = false;
        for &value in stretch {
            any |= wanted(value);
        }
        if any {
            let numbered = stretch.iter().enumerate().filter(|&(_, &value)| wanted(value));
            chosen.extend(numbered.map(|(i, _)| (at * STRETCH + i) as u32));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use pulp::{Arch, WithSimd};

    use super::*;

    struct Largest<'a>(&'a [f32], usize, f32);

    impl WithSimd for Largest<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let mut chosen = Vec::new();
            largest(simd, self.0, self.1, self.2, &mut chosen);
            chosen
        }
    }

    proptest! {
        #[test]
        fn the_largest_are_those_of_a_stable_sort(
            values in prop::collection::vec(prop_oneof![-3.0f32..3.0, (0..4u8).prop_map(f32::from), Just(-1e30)], 0..300),
            count in 0usize..80,
        ) {
            let mut order: Vec<u32> = (0..values.len() as u32).filter(|&i| values[i as usize] > -1e29).collect();
            order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
            order.truncate(count);
            order.sort_unstable();
            prop_assert_eq!(Arch::new().dispatch(Largest(&values, count, -1e29)), order.clone());
            prop_assert_eq!(Arch::Scalar.dispatch(Largest(&values, count, -1e29)), order);
        }
    }
}
