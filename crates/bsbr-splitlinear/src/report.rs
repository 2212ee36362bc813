//! What was done to a group, for tables and files.

use serde::{Deserialize, Serialize};

use crate::{Form, Share};

/// How a decomposition was computed. Every one is checked; the second is the fallback of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decomposition {
    /// The eigenvectors of the product of the matrix with itself.
    Gram,
    /// A singular value decomposition, because the first did not pass its checks.
    SingularValues,
}

/// What became of a refit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefitOutcome {
    /// The settings do not ask for it.
    Off,
    /// There is nothing to gain: the factors are optimal for every layer of the group.
    NotNeeded,
    /// There is no held-out text to judge it.
    NoHeldOut,
    /// The error on held-out text was not smaller.
    Rejected,
    /// The error on held-out text was smaller, so that it was kept.
    Accepted,
}

/// What a refit did to the errors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RefitReport {
    /// What became of it.
    pub outcome: RefitOutcome,
    /// Relative squared error on held-out text before, where there is such text.
    pub before: Option<f64>,
    /// The same after.
    pub after: Option<f64>,
}

/// One layer of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberReport {
    /// The name of the part.
    pub name: String,
    /// Squared error of the outputs in units of their energy, on calibration text; on the weights without such text.
    pub error: f64,
    /// The same on held-out text.
    pub held_out_error: Option<f64>,
    /// Tokens of calibration text; 0 without.
    pub tokens: u64,
    /// Tokens for each input. Below 5 the basis fits the text rather than the model.
    pub tokens_per_input: f64,
    /// Largest eigenvalue of the inputs' second moments in units of the smallest; `None` where that is 0.
    pub condition: Option<f64>,
    /// Eigenvalues of the second moments that are not rounding.
    pub input_rank: usize,
    /// What was added to the diagonal of the second moments, for each token.
    pub ridge: f64,
}

/// One group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Its name.
    pub name: String,
    /// The side whose basis is shared.
    pub share: Share,
    /// How its factors are kept.
    #[serde(default)]
    pub form: Form,
    /// Width of what a member reads.
    pub inputs: usize,
    /// Width of what a member gives.
    pub outputs: usize,
    /// Width of the basis.
    pub rank: usize,
    /// Numbers in the weights.
    pub parameters_before: usize,
    /// Numbers in the factors.
    pub parameters_after: usize,
    /// Multiplications in units of those of the dense layers.
    pub flop_ratio: f64,
    /// Exponential of the entropy of the squared singular values: how many directions matter.
    pub effective_rank: f64,
    /// Squared error of all outputs in units of their energy, on calibration text.
    pub error: f64,
    /// The same on held-out text.
    pub held_out_error: Option<f64>,
    /// Largest number of a factor: those above 65,504 do not fit into 16-bit floats.
    pub largest_factor: f32,
    /// How the basis was computed.
    pub decomposition: Decomposition,
    /// What became of the refit.
    pub refit: RefitReport,
    /// Its layers.
    pub members: Vec<MemberReport>,
    /// Time it took.
    pub seconds: f64,
}
