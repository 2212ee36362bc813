//! An axis: what it counts, where a value stands on it, and which values are labelled.

/// How values lie on it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    /// In equal steps of a factor; it fits its values.
    Log,
    /// In equal steps, over this range.
    Linear(f64, f64),
}

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    name: String,
    label: fn(f64) -> String,
    scale: Scale,
}

/// An axis over its values.
#[derive(Debug)]
pub(super) struct Fitted<'a> {
    pub(super) name: &'a str,
    label: fn(f64) -> String,
    log: bool,
    low: f64,
    high: f64,
}

impl Axis {
    /// Logarithmic, over the values there are; `label` writes one of them.
    pub fn log(name: &str, label: fn(f64) -> String) -> Self {
        Self { name: name.to_owned(), label, scale: Scale::Log }
    }

    /// Linear, over a range.
    pub fn linear(name: &str, label: fn(f64) -> String, (low, high): (f64, f64)) -> Self {
        Self { name: name.to_owned(), label, scale: Scale::Linear(low, high) }
    }

    /// A value as it is written.
    pub(crate) fn written(&self, value: f64) -> String {
        (self.label)(value)
    }

    /// What it counts.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Over these values.
    pub(super) fn fitted(&self, values: impl Iterator<Item = f64>) -> Fitted<'_> {
        let fitted = |log, low, high| Fitted { name: &self.name, label: self.label, log, low, high };
        let (low, high) = match self.scale {
            Scale::Linear(low, high) if high > low => return fitted(false, low, high),
            Scale::Linear(low, _) => return fitted(false, low - 0.5, low + 0.5),
            Scale::Log => values.filter(|value| value.is_finite() && *value > 0.0).fold(None, |range, value| {
                let (low, high) = range.unwrap_or((value, value));
                Some((f64::min(low, value), f64::max(high, value)))
            }),
        }
        .unwrap_or((1.0, 1.0));
        fitted(true, low / 1.2, high * 1.2)
    }
}

impl Fitted<'_> {
    /// Where a value stands, from 0 to 1.
    pub(super) fn place(&self, value: f64) -> f64 {
        let place = if self.log {
            (value.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        place.clamp(-0.02, 1.02)
    }

    /// About so many values with a line and a label, ascending. `points` are values that stand on the axis: few enough are labelled
    /// themselves.
    pub(super) fn ticks(&self, most: usize, points: Option<&[f64]>) -> Vec<(f64, String)> {
        let mut values = match points {
            Some(points) if self.log && points.len() <= most => points.to_vec(),
            _ if self.log => self.log_ticks(most),
            _ => self.linear_ticks(most),
        };
        values.retain(|value| (self.low..=self.high).contains(value));
        let mut ticks: Vec<(f64, String)> = values.into_iter().map(|value| (value, (self.label)(value))).collect();
        ticks.dedup_by(|a, b| a.1 == b.1);
        ticks
    }

    /// 1, 2 and 5 of each power of ten, or the powers alone, or some of them.
    fn log_ticks(&self, most: usize) -> Vec<f64> {
        let powers = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let within = |values: Vec<f64>| -> Vec<f64> {
            values.into_iter().filter(|value| (self.low..=self.high).contains(value)).collect()
        };
        let each = |factors: &[f64], step: usize| {
            let of = powers.clone().step_by(step).flat_map(|power| factors.iter().map(move |x| x * 10_f64.powi(power)));
            within(of.collect())
        };
        let fine = each(&[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], 1);
        let choices =
            [fine, each(&[1.0, 2.0, 5.0], 1), each(&[1.0, 3.0], 1), each(&[1.0], 1), each(&[1.0], 2), each(&[1.0], 3)];
        let fits = choices.into_iter().find(|values| values.len() <= most).unwrap_or_default();
        // Between two neighbours of the finest choice nothing is left to choose.
        if fits.len() < 2 { self.linear_ticks(most.min(4)) } else { fits }
    }

    fn linear_ticks(&self, most: usize) -> Vec<f64> {
        let rough = (self.high - self.low) / most.max(1) as f64;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|x| x * power).into_iter().find(|step| *step >= rough * 0.999);
        let step = step.unwrap_or(10.0 * power);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|at| at as f64 * step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: f64) -> String {
        format!("{value}")
    }

    #[test]
    fn equal_factors_are_equal_steps_of_a_logarithmic_axis() {
        let axis = Axis::log("x", plain);
        let fitted = axis.fitted([1.0, 100.0].into_iter());
        let places = [1.0, 10.0, 100.0].map(|value| fitted.place(value));
        assert!((places[1] - places[0] - (places[2] - places[1])).abs() < 1e-12);
        assert!(places[0] > 0.0 && places[2] < 1.0, "{places:?}");
    }

    #[test]
    fn labels_are_round_numbers_few_and_within_the_axis() {
        let ticks = |axis: &Axis, values: &[f64], most| {
            axis.fitted(values.iter().copied()).ticks(most, None).into_iter().map(|tick| tick.0).collect::<Vec<_>>()
        };
        let log = Axis::log("x", plain);
        assert_eq!(ticks(&log, &[1.0, 1000.0], 5), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(ticks(&log, &[10.0, 60.0], 5), [10.0, 20.0, 50.0]);
        assert!(ticks(&log, &[20.5, 20.6], 5).len() >= 2);
        assert_eq!(ticks(&log, &[], 5).len(), 3);
        assert_eq!(ticks(&Axis::linear("x", plain, (0.0, 1.0)), &[], 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(&Axis::linear("x", plain, (3.0, 3.0)), &[], 2), [2.5, 3.0, 3.5]);
    }
}
