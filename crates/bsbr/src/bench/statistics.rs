//! What samples say: median and spread, and the exponent of growth.

use serde::Serialize;

/// From which interquartile range, as a share of the median, on a number should not be trusted to a digit.
const LARGE_SPREAD: f64 = 0.15;

/// Samples in a few numbers, in their own unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The middle.
    pub median: f64,
    /// A quarter of the samples is smaller.
    pub lower_quartile: f64,
    /// A quarter of the samples is larger.
    pub upper_quartile: f64,
    /// The smallest.
    pub min: f64,
}

impl Summary {
    /// Of at least one sample. Quartiles lie between samples where need be, at `(n - 1) / 4` and `3 (n - 1) / 4`.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let quantile = |share: f64| {
            let at = share * last as f64;
            let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
            below + (above - below) * at.fract()
        };
        Some(Self {
            median: quantile(0.5),
            lower_quartile: quantile(0.25),
            upper_quartile: quantile(0.75),
            min: sorted[0],
        })
    }

    /// Interquartile range as a share of the median.
    pub fn spread(&self) -> f64 {
        if self.median > 0.0 { (self.upper_quartile - self.lower_quartile) / self.median } else { 0.0 }
    }

    /// Whether samples spread so much that differences may be chance.
    pub fn is_noisy(&self) -> bool {
        self.spread() > LARGE_SPREAD
    }
}

/// The exponent `e` of `y = c x^e`, by least squares of the logarithms; `None` without two different `x`, or where a
/// number has no logarithm.
pub fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (x.ln(), y.ln())).collect();
    if logs.iter().any(|(x, y)| !(x.is_finite() && y.is_finite())) {
        return None;
    }
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / logs.len() as f64;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let covariance: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    (variance > 0.0).then(|| covariance / variance)
}

/// How far off an exponent from `from` to `to` may be by the spread of the samples at both ends: the width of what their quartiles
/// leave open.
pub fn exponent_spread((from, first): (f64, Summary), (to, last): (f64, Summary)) -> f64 {
    let width = |summary: Summary| (summary.upper_quartile / summary.lower_quartile.max(f64::MIN_POSITIVE)).ln();
    (width(first) + width(last)) / (to / from).ln()
}

/// An exponent whose spread is larger says nothing.
pub const LARGEST_EXPONENT_SPREAD: f64 = 0.3;

/// The longer half of points in ascending order, but at least two.
pub fn upper_half<T>(points: &[T]) -> &[T] {
    let count = points.len().div_ceil(2).max(2).min(points.len());
    &points[points.len() - count..]
}

/// From which `x` on one line lies below another and stays there: both are known at several `x`, ascending, and straight in
/// logarithms between those they have in common. `None` where it lies below from the first on, or never.
pub(crate) fn overtakes(line: &[(f64, f64)], other: &[(f64, f64)]) -> Option<f64> {
    let ratio = |&(x, y): &(f64, f64)| Some((x.ln(), (y / other.iter().find(|point| point.0 == x)?.1).ln()));
    let ratios: Vec<(f64, f64)> =
        line.iter().filter_map(ratio).filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let last_above = ratios.iter().rposition(|(_, ratio)| *ratio >= 0.0)?;
    let ((x, y), (next_x, next_y)) = (ratios[last_above], *ratios.get(last_above + 1)?);
    Some((x + (next_x - x) * y / (y - next_y)).exp())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quartiles_of_known_samples() {
        let odd = Summary::of(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!((odd.min, odd.lower_quartile, odd.median, odd.upper_quartile), (1.0, 2.0, 3.0, 4.0));
        let even = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((even.lower_quartile, even.median, even.upper_quartile), (1.75, 2.5, 3.25));
        let one = Summary::of(&[7.0]).unwrap();
        assert_eq!((one.min, one.median, one.upper_quartile, one.spread()), (7.0, 7.0, 7.0, 0.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn one_outlier_moves_neither_median_nor_noise() {
        let summary = Summary::of(&[1.0, 1.01, 0.99, 1.0, 50.0]).unwrap();
        assert!(summary.median < 1.02 && !summary.is_noisy(), "{summary:?}");
        assert!(Summary::of(&[1.0, 2.0, 3.0, 4.0]).unwrap().is_noisy());
    }

    #[test]
    fn the_exponent_of_three_points_is_that_of_the_normal_equations() {
        // ln y = 0, ln 2, ln 16 at ln x = 0, ln 2, ln 4: slope (4 - 0) ln 2 / (2 ln 2) by the two ends.
        let fitted = exponent(&[(1.0, 1.0), (2.0, 2.0), (4.0, 16.0)]).unwrap();
        assert!((fitted - 2.0).abs() < 1e-12, "{fitted}");
    }

    #[test]
    fn a_line_overtakes_another_where_their_logarithms_cross_for_the_last_time() {
        let constant = [1.0, 4.0, 16.0, 64.0].map(|x| (x, 1.0));
        // At ratios of 2 and 1/2 the crossing is half way between 4 and 16, in logarithms.
        let crossing = overtakes(&[(1.0, 8.0), (4.0, 2.0), (16.0, 0.5), (64.0, 0.1)], &constant).unwrap();
        assert!((crossing - 8.0).abs() < 1e-12, "{crossing}");
        let late = overtakes(&[(1.0, 0.5), (4.0, 0.5), (16.0, 1.0), (64.0, 0.5)], &constant).unwrap();
        assert!((late - 16.0).abs() < 1e-12, "{late}");
        assert_eq!(overtakes(&[(1.0, 0.5), (64.0, 0.4)], &constant), None);
        assert_eq!(overtakes(&[(1.0, 0.5), (64.0, 1.4)], &constant), None);
        assert_eq!(overtakes(&[(2.0, 5.0), (3.0, 0.5)], &constant), None);
        assert_eq!(overtakes(&[], &constant), None);
    }

    #[test]
    fn noise_at_the_ends_leaves_an_exponent_open() {
        let of = |samples: &[f64]| Summary::of(samples).unwrap();
        assert_eq!(exponent_spread((1.0, of(&[1.0])), (4.0, of(&[16.0]))), 0.0);
        // Quartiles a factor of 2 apart at one end, over lengths a factor of 4 apart.
        let spread = exponent_spread((1.0, of(&[1.0, 1.0, 2.0, 2.0])), (4.0, of(&[16.0])));
        assert!((spread - 0.5).abs() < 1e-12, "{spread}");
    }

    #[test]
    fn there_is_no_exponent_without_two_lengths_or_with_nothing_measured() {
        assert_eq!(exponent(&[]), None);
        assert_eq!(exponent(&[(512.0, 1.0)]), None);
        assert_eq!(exponent(&[(512.0, 1.0), (512.0, 2.0)]), None);
        assert_eq!(exponent(&[(512.0, 0.0), (1024.0, 2.0)]), None);
    }

    #[test]
    fn the_upper_half_is_the_longer_one_and_no_less_than_a_line() {
        assert_eq!(upper_half(&[1, 2, 3, 4, 5]), [3, 4, 5]);
        assert_eq!(upper_half(&[1, 2, 3, 4]), [3, 4]);
        assert_eq!(upper_half(&[1, 2]), [1, 2]);
        assert_eq!(upper_half(&[1]), [1]);
    }

    proptest! {
        #[test]
        fn the_exponent_of_a_power_law_is_its_exponent(
            factor in 1e-9_f64..1e3, power in -1.0_f64..3.0, lengths in 2_usize..10,
        ) {
            let points: Vec<_> = (0..lengths).map(|at| {
                let x = 512.0 * f64::from(1 << at);
                (x, factor * x.powf(power))
            }).collect();
            prop_assert!((exponent(&points).unwrap() - power).abs() < 1e-9);
        }

        #[test]
        fn a_summary_is_in_order(samples in prop::collection::vec(0.0_f64..1e6, 1..50)) {
            let s = Summary::of(&samples).unwrap();
            prop_assert!(s.min <= s.lower_quartile && s.lower_quartile <= s.median && s.median <= s.upper_quartile);
            prop_assert!(samples.contains(&s.min));
        }
    }
}
