//! The learning rate by step.

use super::TrainConfig;

/// Rises linearly over the warm-up and falls by half a cosine (Loshchilov and Hutter 2017) to `final_share` of its peak.
pub(super) fn learning_rate(config: &TrainConfig, step: usize) -> f64 {
    let peak = config.learning_rate;
    if step < config.warmup {
        return peak * (step + 1) as f64 / config.warmup as f64;
    }
    let left = config.steps.saturating_sub(config.warmup).max(1);
    let done = ((step - config.warmup) as f64 / left as f64).min(1.0);
    let share = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    peak * (config.final_share + (1.0 - config.final_share) * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_its_peak_and_falls_to_its_share() {
        let config =
            TrainConfig { steps: 110, warmup: 10, learning_rate: 2.0, final_share: 0.1, ..TrainConfig::default() };
        let close = |step: usize, expected: f64| {
            let found = learning_rate(&config, step);
            assert!((found - expected).abs() < 1e-12, "{step}: {found}, expected {expected}");
        };
        close(0, 0.2);
        close(4, 1.0);
        close(9, 2.0);
        close(10, 2.0);
        // Half way down: the mean of peak and end.
        close(60, 1.1);
        close(110, 0.2);
        close(500, 0.2);
        let without = TrainConfig { warmup: 0, ..config };
        assert_eq!(learning_rate(&without, 0), 2.0);
    }
}
