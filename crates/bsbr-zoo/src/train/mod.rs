//! Training small models alike: the same sequences in the same order, the same steps, the same seeds.
//!
//! AdamW (Loshchilov and Hutter 2019) with a warm-up, a cosine and a bound on the norm of all gradients together; the loss
//! is the mean cross-entropy over the questions of a batch. A run is a function of its [`RunSpec`] alone: each computes in one
//! thread, however many run at once, so that sums are added up in the same order everywhere.
//!
//! A [`RunStore`] keeps finished runs. A comparison that was interrupted does those again that had not finished: the unit is one
//! run, of half a minute or so.

mod evaluate;
mod plan;
mod schedule;
mod score;
mod step;
mod store;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use plan::{Event, run_all};
pub use score::{OverSeeds, Score, distance_range, merged};
pub use step::train;
pub use store::RunStore;

use crate::{DecoderConfig, Positions, ZooError, tasks::Task, tasks::TaskError};

/// How a model is trained and asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Tokens of a sequence.
    pub length: usize,
    /// Share of the steps, at first, on sequences of a quarter of `length`, where the task fits into them: what must be found is
    /// found sooner in a short sequence.
    pub quarter_share: f64,
    /// Share of the steps, after those, on sequences of half of `length`.
    pub half_share: f64,
    /// Sequences of a step.
    pub batch: usize,
    /// Steps.
    pub steps: usize,
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// Steps in which the learning rate rises.
    pub warmup: usize,
    /// Learning rate of the last step, as a share of the peak.
    pub final_share: f64,
    /// Decoupled weight decay, on everything but vectors.
    pub weight_decay: f64,
    /// Largest norm of all gradients together.
    pub clip: f64,
    /// Sequences of each size that are asked in the end.
    pub evaluation_rows: usize,
    /// Tokens of a chunk, in which distances are counted.
    pub chunk_size: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            length: 256,
            quarter_share: 0.6,
            half_share: 0.2,
            batch: 16,
            steps: 400,
            learning_rate: 1e-2,
            warmup: 20,
            final_share: 0.05,
            weight_decay: 0.01,
            clip: 1.0,
            evaluation_rows: 48,
            chunk_size: 16,
        }
    }
}

impl TrainConfig {
    /// The settings of a task: the same for every family.
    pub fn of(task: Task) -> Self {
        let base = Self::default();
        match task {
            Task::Recall => Self { steps: 800, ..base },
            Task::Copy | Task::Passkey => base,
            Task::Text => Self { quarter_share: 0.5, half_share: 0.3, ..base },
        }
    }

    /// Tokens of the sequences of a step, where the task fits into them.
    fn length_at(&self, step: usize) -> usize {
        let done = step as f64 / self.steps as f64;
        match self {
            _ if done < self.quarter_share => self.length / 4,
            _ if done < self.quarter_share + self.half_share => self.length / 2,
            _ => self.length,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// [`TrainError::Setting`] with the setting, its value and what it must be.
    pub fn validate(&self) -> Result<(), TrainError> {
        let counts = [
            ("batch", self.batch),
            ("steps", self.steps),
            ("evaluation_rows", self.evaluation_rows),
            ("chunk_size", self.chunk_size),
        ];
        for (setting, value) in counts {
            if value == 0 {
                return Err(TrainError::Setting { setting, value: "0".into(), expected: "at least 1" });
            }
        }
        let fail =
            |setting, value: f64, expected| Err(TrainError::Setting { setting, value: value.to_string(), expected });
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let share = |value: f64| (0.0..=1.0).contains(&value);
        match self {
            _ if !positive(self.learning_rate) => fail("learning_rate", self.learning_rate, "more than 0"),
            _ if !positive(self.clip) => fail("clip", self.clip, "more than 0"),
            _ if !share(self.final_share) => fail("final_share", self.final_share, "0 to 1"),
            _ if !share(self.weight_decay) => fail("weight_decay", self.weight_decay, "0 to 1"),
            _ if !share(self.quarter_share) => fail("quarter_share", self.quarter_share, "0 to 1"),
            _ if !share(self.half_share) => fail("half_share", self.half_share, "0 to 1"),
            _ => Ok(()),
        }
    }
}

/// The decoder of the comparison, in which all families stand. No family has positions but for the order that its mask and the
/// short convolution give: `linear` and `delta` could not use any, and what has to be found here is found by what it is.
pub fn compared() -> DecoderConfig {
    DecoderConfig { positions: Positions::None, ..DecoderConfig::default() }
}

/// Everything that one run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// The task.
    pub task: Task,
    /// Of the start values and of the sequences.
    pub seed: u64,
    /// The model.
    pub decoder: DecoderConfig,
    /// How it is trained.
    pub train: TrainConfig,
    /// Which text the task is made of, if it is.
    pub text: Option<String>,
}

/// A loss on the way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossPoint {
    /// Steps done.
    pub step: usize,
    /// Mean loss in nats over the steps since the point before.
    pub loss: f64,
}

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// What it was a run of.
    pub spec: RunSpec,
    /// Numbers that were trained.
    pub parameters: usize,
    /// Bytes of the recurrent state of one sequence behind its last token.
    pub state_bytes: u64,
    /// The loss at twenty points.
    pub losses: Vec<LossPoint>,
    /// The step whose loss was no number, where training ended; there are no scores then.
    pub diverged: Option<usize>,
    /// What it answers.
    pub scores: Vec<Score>,
    /// Seconds of training and of asking.
    pub seconds: f64,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting makes no sense.
    #[error("{setting} is {value}, expected {expected}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// As found.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// The task cannot be set.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The model cannot be made, or fails.
    #[error(transparent)]
    Decoder(#[from] ZooError),
    /// A tensor could not be read back.
    #[error("the device gave no numbers: {0}")]
    Device(String),
    /// The file of finished runs cannot be read or written.
    #[error("{}: cannot keep finished runs: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of it is no run.
    #[error(
        "{} line {number} is no finished run of this version ({source}): delete the line or use another directory",
        path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        number: usize,
        /// Why.
        source: serde_json::Error,
    },
}
