//! What happened.

use serde::{Deserialize, Serialize};

/// The two stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Layer by layer, from the original's inputs of each.
    Layers,
    /// The whole model.
    Logits,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// Its stage.
    pub stage: Stage,
    /// Its number in the stage, from 0.
    pub step: usize,
    /// Mean loss of its windows before it, over the trained layers in the first stage.
    pub loss: f64,
    /// Its learning rate, before that of each layer is made of it.
    pub learning_rate: f64,
    /// Seconds since the start when it was done, those before an interruption included.
    pub seconds: f64,
}

/// One measurement on windows that are never trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOutRecord {
    /// Its stage.
    pub stage: Stage,
    /// Steps of the stage done before it.
    pub step: usize,
    /// Mean loss, over the trained layers in the first stage.
    pub loss: f64,
    /// Loss of each trained layer, in the first stage.
    pub layers: Vec<f64>,
}

/// Why tuning ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// Every step was done, or the held-out loss no longer fell.
    Done,
    /// The time was over.
    Time,
    /// Whoever watched asked for it.
    Asked,
}

/// Everything that was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuneLog {
    /// The layers trained.
    pub layers: Vec<usize>,
    /// Numbers trained.
    pub parameters: usize,
    /// Steps.
    pub steps: Vec<StepRecord>,
    /// Measurements.
    pub held_out: Vec<HeldOutRecord>,
    /// Why it ended; none while it runs.
    pub ending: Option<Ending>,
}

impl TuneLog {
    /// Held-out loss at the start of a stage and of what is kept of it: of each layer the best, or the best whole.
    pub fn held_out_change(&self, stage: Stage) -> Option<(f64, f64)> {
        let of_stage = || self.held_out.iter().filter(|record| record.stage == stage);
        let first = of_stage().next()?;
        let least = |of: &dyn Fn(&HeldOutRecord) -> f64| of_stage().map(of).fold(f64::INFINITY, f64::min);
        let kept = match first.layers.len() {
            0 => least(&|record| record.loss),
            layers => (0..layers).map(|at| least(&|record| record.layers[at])).sum::<f64>() / layers as f64,
        };
        Some((first.loss, kept))
    }
}
