//! A mixture of experts, as data.

use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Far above every mixture there is.
const MOST_EXPERTS: usize = 1 << 12;
const LARGEST_SIZE: usize = 1 << 30;

/// Several MLPs in the place of one, of which each token goes through a few: their outputs are added, each times a weight.
///
/// [`crate::DecoderConfig::mlp_bias`] is of dense layers and of the shared expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub chosen: usize,
    /// Inner width of each.
    pub intermediate_size: usize,
    /// Which they are, and their weights.
    pub router: RouterConfig,
    /// Their projections have biases.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
    /// One more that every token goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedExpert>,
    /// The layer has its MLP beside them: the sum of both is what it adds to the stream, each normalised behind, and the experts
    /// read the stream through a norm of their own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub beside_mlp: bool,
    /// Layers that have one MLP, of [`crate::DecoderConfig::intermediate_size`], in ascending order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dense_layers: Vec<usize>,
}

/// From the scores `z = W x + b` of the experts to those a token goes through, and their weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// What becomes of `z`, and how the choice is made.
    pub kind: RouterKind,
    /// The scores have a bias.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
    /// A number for each expert is added to its score for the choice, not for its weight.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub correction: bool,
    /// Experts are chosen within some groups of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<ExpertGroups>,
    /// The weights of a token are divided by their sum, or by this if that is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalised: Option<f64>,
    /// Factor on the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// A factor of its own on the weight of each expert, behind everything else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expert_scale: bool,
    /// The router does not read what the experts read, but the stream divided by its root mean square and by
    /// `sqrt(hidden_size)`, each number times a weight.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_norm: bool,
}

/// What becomes of the scores of the experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "name")]
pub enum RouterKind {
    /// Softmax over all experts; the highest are chosen. [Normalised](RouterConfig::normalised), that is the softmax over the
    /// chosen alone.
    Softmax,
    /// Sigmoid of each; the highest are chosen.
    Sigmoid,
    /// SparseMixer (Liu et al. 2023) as it runs without training, two experts a token: the highest, and the highest of the
    /// others. The weight of each is its softmax over those of the experts it was chosen from that lie within `2 jitter` of
    /// it, relative to the larger of the two.
    Sparsemixer {
        /// Half of the relative distance.
        jitter: f64,
    },
}

/// Groups of neighbouring experts, equally many in each: the groups whose two highest scores have the highest sums are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertGroups {
    /// How many groups.
    pub count: usize,
    /// How many are kept.
    pub kept: usize,
    /// They are ranked by their highest score in place of the sum of two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_highest: bool,
}

/// An expert that every token goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Inner width.
    pub intermediate_size: usize,
    /// Its output is multiplied by the sigmoid of one more score of the token.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gate: bool,
}

impl ExpertsConfig {
    pub(super) fn validate(&self, layers: usize) -> Result<(), ModelError> {
        let fail = |setting: &'static str, problem: String| Err(ModelError::Config { setting, problem });
        for (setting, value, largest) in [
            ("experts.count", self.count, MOST_EXPERTS),
            ("experts.chosen", self.chosen, self.count),
            ("experts.intermediate_size", self.intermediate_size, LARGEST_SIZE),
            ("experts.shared.intermediate_size", self.shared.map_or(1, |it| it.intermediate_size), LARGEST_SIZE),
        ] {
            if value == 0 || value > largest {
                return fail(setting, format!("is {value}, expected 1 to {largest}"));
            }
        }
        if let Some(groups) = self.router.groups {
            let ExpertGroups { count, kept, .. } = groups;
            if count == 0 || !self.count.is_multiple_of(count) {
                let problem = format!("is {count}, expected a divisor of experts.count = {}", self.count);
                return fail("experts.router.groups.count", problem);
            }
            let enough = self.chosen.div_ceil(self.count / count);
            if !(enough..=count).contains(&kept) {
                let problem = format!("is {kept}, expected {enough} to {count}, as {} are chosen", self.chosen);
                return fail("experts.router.groups.kept", problem);
            }
        }
        for (setting, value) in [
            ("experts.router.normalised", self.router.normalised),
            ("experts.router.scale", self.router.scale),
            ("experts.router.kind.jitter", self.jitter()),
        ] {
            if let Some(value) = value
                && !(value.is_finite() && value > 0.0)
            {
                return fail(setting, format!("is {value}, expected a positive number"));
            }
        }
        if self.beside_mlp && self.shared.is_some() {
            return fail("experts.shared", "is set beside experts.beside_mlp, expected one of them".into());
        }
        if self.jitter().is_some() && (self.chosen != 2 || self.router.correction || self.router.groups.is_some()) {
            let problem = "is sparsemixer, expected 2 experts a token, no correction and no groups";
            return fail("experts.router.kind", problem.into());
        }
        let ascending = self.dense_layers.is_sorted_by(|a, b| a < b);
        if !ascending || self.dense_layers.last().is_some_and(|&layer| layer >= layers) {
            let problem = format!("is {:?}, expected numbers below layers = {layers} that ascend", self.dense_layers);
            return fail("experts.dense_layers", problem);
        }
        Ok(())
    }

    fn jitter(&self) -> Option<f64> {
        match self.router.kind {
            RouterKind::Sparsemixer { jitter } => Some(jitter),
            RouterKind::Softmax | RouterKind::Sigmoid => None,
        }
    }
}
