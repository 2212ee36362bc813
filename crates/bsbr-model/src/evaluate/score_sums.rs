//! The sums of scores in f64, where the loops of the kernels are left out.

/// As `bsbr_kernels::layer::ScoreSums`.
#[derive(Debug, Clone)]
pub(super) struct ScoreSums {
    highest: f64,
    weight: f64,
    gaps: Vec<f64>,
}

impl ScoreSums {
    pub(super) fn new(others: usize) -> Self {
        Self { highest: f64::NEG_INFINITY, weight: 0.0, gaps: vec![0.0; others] }
    }

    pub(super) fn push(&mut self, scores: &[f32], others: &[&[f32]]) {
        for (at, &score) in scores.iter().enumerate() {
            let score = f64::from(score);
            if score == f64::NEG_INFINITY {
                continue;
            }
            if score > self.highest {
                let fade = (self.highest - score).exp();
                self.weight *= fade;
                self.gaps.iter_mut().for_each(|gap| *gap *= fade);
                self.highest = score;
            }
            let weight = (score - self.highest).exp();
            self.weight += weight;
            for (gap, other) in self.gaps.iter_mut().zip(others).filter(|_| weight != 0.0) {
                *gap += weight * (score - f64::from(other[at]));
            }
        }
    }

    pub(super) fn log_sum(&self) -> f64 {
        self.highest + self.weight.ln()
    }

    pub(super) fn mean_gap(&self, other: usize) -> f64 {
        self.gaps[other] / self.weight
    }
}
