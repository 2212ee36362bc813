//! Fitting a sweep into a time: what a run is expected to take, and how many runs there is time for.

use std::time::{Duration, Instant};

/// Time that is left for a number of things of known weight.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    end: Instant,
}

impl Budget {
    /// That many seconds from now on.
    pub fn new(seconds: f64) -> Self {
        let longest = Duration::from_secs(10 * 365 * 24 * 3600);
        Self { end: Instant::now() + Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(longest).min(longest) }
    }

    /// Seconds left.
    pub fn left(&self) -> f64 {
        self.end.saturating_duration_since(Instant::now()).as_secs_f64()
    }

    /// A budget for `weight` of what is left, of `total` still to do.
    pub fn share(&self, weight: f64, total: f64) -> Self {
        Self::new(self.left() * weight / total.max(weight))
    }
}

/// What one arm did so far: seconds of a run by tokens, shorter first.
#[derive(Debug, Clone, Default)]
pub struct History(Vec<(usize, f64)>);

impl History {
    /// Adds a run.
    pub fn push(&mut self, tokens: usize, seconds: f64) {
        self.0.push((tokens, seconds));
    }

    /// The longest text so far and its seconds.
    pub fn last(&self) -> Option<(usize, f64)> {
        self.0.last().copied()
    }

    /// Seconds that a run with `tokens` tokens should take if it grows with this power, or faster where it did so last,
    /// but no faster than quadratically; `None` if nothing is known.
    pub fn expected(&self, tokens: usize, power: f64) -> Option<f64> {
        let &(last, seconds) = self.0.last()?;
        let grown = match self.0.len().checked_sub(2).map(|at| self.0[at]) {
            Some((before, earlier)) if before < last => (seconds / earlier).ln() / (last as f64 / before as f64).ln(),
            _ => power,
        };
        let power = grown.clamp(power, 2.0_f64.max(power));
        Some(seconds * (tokens as f64 / last as f64).powf(power))
    }
}

/// What an arm costs at one point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Seconds before anything is timed.
    pub fixed: f64,
    /// Seconds of a run.
    pub run: f64,
}

/// How often to run an arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounds {
    /// Untimed runs.
    pub warmup: usize,
    /// Timed runs.
    pub runs: usize,
    /// Whether there is time for one more run that measures memory.
    pub memory: bool,
}

/// Divides `seconds` among arms: cheap ones get all runs asked for, what they leave goes to the others, and what is left
/// in the end to single runs of those that got none. An arm that cannot run even once gets nothing.
pub fn divide(costs: &[Cost], asked: Rounds, seconds: f64) -> Vec<Option<Rounds>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    let whole = asked.warmup + asked.runs + usize::from(asked.memory);
    let total = |cost: &Cost| cost.fixed + cost.run * whole as f64;
    order.sort_by(|&a, &b| total(&costs[a]).total_cmp(&total(&costs[b])));
    let mut rounds = vec![None; costs.len()];
    let mut left = seconds;
    for (done, &arm) in order.iter().enumerate() {
        let Cost { fixed, run } = costs[arm];
        let share = left / (costs.len() - done) as f64;
        let affordable = ((share - fixed) / run.max(1e-9)).min(whole as f64);
        if affordable < 1.0 {
            continue;
        }
        let given = fit(asked, affordable as usize);
        let used = given.warmup + given.runs + usize::from(given.memory);
        left -= fixed + run * used as f64;
        rounds[arm] = Some(given);
    }
    for arm in order {
        let Cost { fixed, run } = costs[arm];
        if rounds[arm].is_none() && fixed + run <= left {
            left -= fixed + run;
            rounds[arm] = Some(fit(asked, 1));
        }
    }
    rounds
}

/// `asked`, cut to `count` runs in all: first a timed one, then memory, then warm-up, then the rest.
fn fit(asked: Rounds, count: usize) -> Rounds {
    let mut left = count.saturating_sub(1);
    let memory = asked.memory && left > 0;
    left -= usize::from(memory);
    let warmup = asked.warmup.min(left.div_ceil(4));
    Rounds { warmup, runs: asked.runs.min(1 + left - warmup), memory }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Rounds = Rounds { warmup: 1, runs: 5, memory: true };

    fn cost(run: f64) -> Cost {
        Cost { fixed: 0.0, run }
    }

    #[test]
    fn with_time_enough_everything_asked_for_is_run() {
        assert_eq!(divide(&[cost(1.0), cost(2.0)], ASKED, 100.0), [Some(ASKED); 2]);
    }

    #[test]
    fn what_cheap_arms_leave_goes_to_the_expensive_one() {
        let rounds = divide(&[cost(8.0), cost(0.1)], ASKED, 10.0);
        assert_eq!(rounds, [Some(Rounds { warmup: 0, runs: 1, memory: false }), Some(ASKED)]);
    }

    #[test]
    fn an_arm_that_cannot_run_once_is_left_out_and_the_others_run() {
        assert_eq!(divide(&[cost(0.1), cost(1000.0)], ASKED, 10.0), [Some(ASKED), None]);
        let preparing = Cost { fixed: 100.0, run: 0.1 };
        assert_eq!(divide(&[preparing], ASKED, 10.0), [None]);
    }

    #[test]
    fn time_that_one_arm_cannot_use_goes_to_another() {
        let single = Rounds { warmup: 0, runs: 1, memory: false };
        assert_eq!(divide(&[cost(6.0), cost(50.0)], ASKED, 10.0), [Some(single), None]);
    }

    #[test]
    fn no_more_runs_are_given_than_there_is_time_for() {
        for count in 1..20 {
            let given = divide(&[cost(1.0)], ASKED, count as f64 + 0.5)[0].unwrap();
            let used = given.warmup + given.runs + usize::from(given.memory);
            assert!(used <= count && given.runs >= 1 && given.runs <= 5, "{count}: {given:?}");
            assert!(used == count.min(7), "{count}: {given:?}");
        }
    }

    #[test]
    fn a_run_is_expected_to_grow_as_it_grew_last_but_no_slower_than_it_must() {
        let mut history = History::default();
        assert_eq!(history.expected(1024, 2.0), None);
        history.push(512, 1.0);
        assert_eq!(history.expected(1024, 2.0), Some(4.0));
        history.push(1024, 2.0);
        assert_eq!(history.expected(2048, 2.0), Some(8.0));
        assert_eq!(history.expected(2048, 1.0), Some(4.0));
        history.push(2048, 6.0);
        let grown = history.expected(4096, 1.0).unwrap();
        assert!((grown - 18.0).abs() < 1e-9, "{grown}");
        history.push(4096, 600.0);
        assert_eq!(history.expected(8192, 1.0), Some(2400.0));
    }

    #[test]
    fn a_share_is_of_what_is_left_and_endless_is_allowed() {
        let budget = Budget::new(100.0);
        assert!((budget.share(1.0, 4.0).left() - 25.0).abs() < 1.0);
        assert_eq!([0.0, -1.0].map(|seconds| Budget::new(seconds).left()), [0.0, 0.0]);
        assert!(Budget::new(f64::INFINITY).left() > 1e8);
    }
}
