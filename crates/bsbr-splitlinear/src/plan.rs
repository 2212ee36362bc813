//! Which parts of which layers are compressed together, and to what rank: arithmetic on shapes, no weights.

mod groups;
mod parts;
mod size;

use std::fmt;
use std::ops::Range;

use serde::Serialize;

pub use size::GroupSize;

use crate::{Form, Share, SplitConfig, SplitError};

/// A linear layer as a model names it. Its weight is `[inputs, outputs]`: `y = x W + b`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinearShape {
    /// The name, such as `transformer.h.0.attn.c_attn`.
    pub path: String,
    /// Width of what it reads.
    pub inputs: usize,
    /// Width of what it gives.
    pub outputs: usize,
    /// Whether it adds a bias.
    pub bias: bool,
    /// What lies along the outputs and how wide it is, in the order stored: `[('q', 768), ('k', 192), ('v', 192)]`, or
    /// `[('q', 768)]` for a layer that gives queries alone. Empty where the model does not say; then the configuration
    /// is believed.
    pub fused: Vec<(char, usize)>,
}

/// A run of the outputs of a linear layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedPart {
    /// The name, such as `transformer.h.0.attn.c_attn.q.0`; that of the layer where it is not split.
    pub name: String,
    /// What follows the name of the layer: `q.0`, `q`, or nothing.
    pub label: String,
    /// Which outputs.
    pub columns: Range<usize>,
}

/// A linear layer and its parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedLinear {
    /// The layer.
    pub shape: LinearShape,
    /// The weight type that matches its name.
    pub weight_type: String,
    /// The number of its block.
    pub layer: usize,
    /// Its parts in the order of the outputs, which they cover.
    pub parts: Vec<PlannedPart>,
}

/// Parts of equal shape, one of each of several layers, that are compressed together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedGroup {
    /// The name, such as `attn_c_attn.q.g0`.
    pub name: String,
    /// The weight type.
    pub weight_type: String,
    /// The side whose basis is shared.
    pub share: Share,
    /// How its factors are kept.
    pub form: Form,
    /// Indices into [`Plan::linears`] and into the parts of that layer, by rising layer.
    pub members: Vec<(usize, usize)>,
    /// Width of what a member reads.
    pub inputs: usize,
    /// Width of what a member gives.
    pub outputs: usize,
    /// The fraction of the parameters to keep.
    pub keep: f64,
    /// Width of the basis; `None` where the factors would be no smaller than the weights, which then stay.
    pub rank: Option<usize>,
}

/// What is split and what is compressed together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The layers that a weight type matches, in the order given, without those excluded.
    pub linears: Vec<PlannedLinear>,
    /// By weight type, part and layer.
    pub groups: Vec<PlannedGroup>,
    /// Names of layers that a weight type matches and `exclude_layers` takes out.
    pub excluded: Vec<String>,
}

/// Something the user should know before compressing.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub enum PlanWarning {
    /// Factors that need more multiplications than the weights they replace.
    SlowerThanDense {
        /// The weight type and the label of the part, such as `attn_c_attn.q`.
        part: String,
        /// How many groups of it.
        groups: usize,
        /// Multiplications in units of those of the dense layer, of the costliest.
        flop_ratio: f64,
    },
    /// Factors that would be no smaller than the weights they replace.
    StaysOriginal {
        /// The weight type and the label of the part.
        part: String,
        /// How many groups of it.
        groups: usize,
    },
}

impl fmt::Display for PlanWarning {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SlowerThanDense { part, groups, flop_ratio } => write!(
                formatter,
                "{part}: sharing saves parameters, not time: {groups} group(s) cost up to {flop_ratio:.2} times the \
                 multiplications of the dense layer; keep less, share among fewer layers, or fold"
            ),
            Self::StaysOriginal { part, groups } => write!(
                formatter,
                "{part}: {groups} group(s) stay original: their factors would be no smaller than their weights"
            ),
        }
    }
}

/// Plans the compression of a model's linear layers.
///
/// # Errors
/// Every inconsistency of the configuration with the model: a pattern that matches nothing, two patterns on one module,
/// a module without a layer number, sizes that do not divide, parts that differ within a group, layers that do not
/// exist, a rank of 0.
///
/// ```
/// use bsbr_splitlinear::{LinearShape, SplitConfig, plan};
///
/// let config = SplitConfig::from_toml(
///     "keep = 0.8\nblock_pattern = 'h\\.(\\d+)'\n[weight_types.fc]\npattern = '.*\\.c_fc$'",
/// )?;
/// let layer = |number| LinearShape {
///     path: format!("h.{number}.mlp.c_fc"), inputs: 768, outputs: 3072, bias: true, fused: Vec::new(),
/// };
/// let plan = plan(&config, &[layer(0), layer(1), layer(2)])?;
/// // Layers 0 and 1 share a basis; layer 2 has one of its own, and so a smaller rank.
/// assert_eq!(plan.groups.iter().map(|group| group.rank).collect::<Vec<_>>(), [Some(546), Some(491)]);
/// # Ok::<(), bsbr_splitlinear::SplitError>(())
/// ```
pub fn plan(config: &SplitConfig, linears: &[LinearShape]) -> Result<Plan, SplitError> {
    config.validate()?;
    let (linears, excluded) = parts::planned_linears(config, linears)?;
    let groups = groups::planned_groups(config, &linears)?;
    Ok(Plan { linears, groups, excluded })
}

impl PlannedGroup {
    /// Its sizes.
    pub fn size(&self) -> GroupSize {
        let (layers, inputs, outputs) = (self.members.len(), self.inputs, self.outputs);
        GroupSize { form: self.form, share: self.share, layers, inputs, outputs }
    }

    /// Numbers in the weights of all members.
    pub fn parameters_before(&self) -> usize {
        self.size().dense()
    }

    /// Numbers in the factors, or in the weights where these stay.
    pub fn parameters_after(&self) -> usize {
        self.rank.map_or_else(|| self.parameters_before(), |rank| self.size().parameters(rank))
    }

    /// Multiplications of a member in units of those of the dense layer, when it runs by itself.
    pub fn flop_ratio(&self) -> f64 {
        self.rank.map_or(1.0, |rank| self.size().flop_ratio(rank))
    }

    /// Sets the rank, or `None` where the factors would be no smaller than the weights.
    pub(crate) fn set_rank(&mut self, rank: usize) {
        let rank = rank.min(self.size().largest_rank());
        self.rank = (self.size().parameters(rank) < self.parameters_before()).then_some(rank);
    }
}

impl Plan {
    /// Numbers in the weights of all planned layers, without biases.
    pub fn parameters_before(&self) -> usize {
        self.groups.iter().map(PlannedGroup::parameters_before).sum()
    }

    /// Numbers in what takes the place of those weights.
    pub fn parameters_after(&self) -> usize {
        self.groups.iter().map(PlannedGroup::parameters_after).sum()
    }

    /// Multiplications of all planned layers for a token in units of those of the dense ones.
    pub fn flop_ratio(&self) -> f64 {
        let dense = self.parameters_before() as f64;
        self.groups.iter().map(|group| group.flop_ratio() * group.parameters_before() as f64 / dense).sum()
    }

    /// What the user should know, part by part.
    pub fn warnings(&self) -> Vec<PlanWarning> {
        let mut warnings: Vec<PlanWarning> = Vec::new();
        for run in self.groups.chunk_by(|left, right| left.part() == right.part()) {
            let part = run.first().map(|group| group.part().to_owned()).unwrap_or_default();
            let original = run.iter().filter(|group| group.rank.is_none()).count();
            if original > 0 {
                warnings.push(PlanWarning::StaysOriginal { part: part.clone(), groups: original });
            }
            let slow = || run.iter().map(PlannedGroup::flop_ratio).filter(|&ratio| ratio > 1.0);
            if slow().next().is_some() {
                let flop_ratio = slow().fold(0.0, f64::max);
                warnings.push(PlanWarning::SlowerThanDense { part, groups: slow().count(), flop_ratio });
            }
        }
        warnings
    }
}

impl PlannedGroup {
    /// The weight type and the label of the part: the name without the number of the group.
    pub fn part(&self) -> &str {
        self.name.rsplit_once('.').map_or(self.name.as_str(), |(part, _)| part)
    }
}
