//! What is split, shared and compressed, as a user writes it.

mod parse;
mod values;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use values::{CalibrationMode, Form, Objective, RankAllocation, Refit, Ridge, Share, Split, Weighting};

use crate::SplitError;

/// Which linear layers are split and compressed, and how.
///
/// Read with [`SplitConfig::from_toml`], [`SplitConfig::from_yaml`] or [`SplitConfig::load`]. Unknown keys are errors.
///
/// ```
/// let config = bsbr_splitlinear::SplitConfig::from_toml(
///     r#"
///     block_pattern = 'h\.(\d+)'
///     group_size = 2
///     keep = 0.8
///     [weight_types.attn_c_attn]
///     pattern = '.*\.attn\.c_attn$'
///     split = "qkv"
///     [weight_types.attn_c_proj]
///     pattern = '.*\.attn\.c_proj$'
///     share = "output"
///     "#,
/// )
/// .unwrap();
/// assert_eq!(config.weight_types.len(), 2);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "parse::Written")]
pub struct SplitConfig {
    /// The kinds of linear layers, by a name of the user's choice.
    pub weight_types: BTreeMap<String, WeightType>,
    /// Regular expression searched for in a module's name; its first group is the number of the layer.
    pub block_pattern: Option<String>,
    /// How many adjacent layers share a basis, 2 unless given; the last group of a type may have fewer.
    pub group_size: Option<usize>,
    /// The layers of each group, in place of `group_size`.
    pub groups: Option<Vec<Vec<usize>>>,
    /// The fraction of the parameters of each group that is kept: above 0, at most 1.
    pub keep: f64,
    /// How factors are kept.
    pub form: Form,
    /// Layers that are left as they are.
    pub exclude_layers: Vec<usize>,
    /// What the error is measured on.
    pub objective: Objective,
    /// The text that shows which inputs matter.
    pub calibration: CalibrationSettings,
    /// Whether coefficients are fitted anew once the basis is known.
    pub refit: RefitSettings,
    /// How parameters are given to groups.
    pub rank: RankAllocation,
    /// What a layer's error counts beside that of others.
    pub weighting: Weighting,
}

/// One kind of linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightType {
    /// Regular expression matched from the start of a module's name, as Python's `re.match` does.
    pub pattern: String,
    /// Into what the outputs are cut.
    #[serde(default)]
    pub split: Split,
    /// The order in which queries, keys and values lie along the outputs.
    #[serde(default = "default_order")]
    pub qkv_order: String,
    /// Heads of the queries; needed for [`Split::Heads`].
    #[serde(default)]
    pub n_head: Option<usize>,
    /// Heads of the keys and values where they are fewer than those of the queries.
    #[serde(default)]
    pub n_kv_head: Option<usize>,
    /// The side whose basis the layers of a group share.
    #[serde(default)]
    pub share: Share,
    /// In place of [`SplitConfig::group_size`].
    #[serde(default)]
    pub group_size: Option<usize>,
    /// In place of [`SplitConfig::groups`].
    #[serde(default)]
    pub groups: Option<Vec<Vec<usize>>>,
    /// In place of [`SplitConfig::keep`].
    #[serde(default)]
    pub keep: Option<f64>,
}

fn default_order() -> String {
    "qkv".to_owned()
}

/// How inputs are gathered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationSettings {
    /// Windows of text, held-out ones included.
    pub samples: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Chooses the windows.
    pub seed: u64,
    /// What is added to the diagonal of the second moments.
    pub ridge: Ridge,
    /// The fraction of the windows that judges what was fitted on the others: 0 or more, below 1.
    pub holdout: f64,
    /// Whether a layer is fitted to the inputs that the compressed layers before it give.
    pub mode: CalibrationMode,
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self {
            samples: 64,
            length: 1024,
            seed: 2023,
            ridge: Ridge::Auto,
            holdout: 0.1,
            mode: CalibrationMode::Independent,
        }
    }
}

/// How coefficients are fitted to their own layer once the shared basis is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RefitSettings {
    /// Whether it is done.
    pub c: Refit,
    /// How strongly coefficients are drawn to what they were, in units of the mean energy of a basis direction.
    pub rho: f64,
    /// How often the basis is then fitted to the coefficients and these to the basis, at most: it ends where held-out text
    /// gains no more. 0: the basis stays.
    pub alternations: usize,
}

impl Default for RefitSettings {
    fn default() -> Self {
        Self { c: Refit::Guarded, rho: 1e-2, alternations: 4 }
    }
}

impl SplitConfig {
    /// Checks every value; reading a configuration has done it already.
    ///
    /// # Errors
    /// Where a value is outside its range, with its key.
    pub fn validate(&self) -> Result<(), SplitError> {
        if self.weight_types.is_empty() {
            return Err(SplitError::setting("weight_types", "at least one weight type", "none"));
        }
        if let Some(size) = self.group_size {
            positive("group_size", size)?;
            if self.groups.is_some() {
                return Err(SplitError::setting("groups", "absent where `group_size` is given", "both"));
            }
        }
        kept("keep", self.keep)?;
        check_groups("groups", self.groups.as_deref())?;
        self.calibration.validate()?;
        if self.rank == RankAllocation::Sensitivity && self.objective == Objective::Weights {
            let expected = "`uniform`, `d-rank` or `marginal-loss`, because `objective` is `weights` and needs no text";
            return Err(SplitError::setting("rank", expected, "`sensitivity`"));
        }
        if self.rank == RankAllocation::Sensitivity && self.calibration.holdout == 0.0 {
            let expected = "above 0, because `rank` is `sensitivity`: held-out text judges it";
            return Err(SplitError::setting("calibration.holdout", expected, 0));
        }
        if !(self.refit.rho.is_finite() && self.refit.rho >= 0.0) {
            return Err(SplitError::setting("refit.rho", "0 or more", self.refit.rho));
        }
        self.weight_types.iter().try_for_each(|(name, weight_type)| {
            weight_type.validate(name)?;
            if self.form == Form::Pivoted && weight_type.share == Share::Output {
                let expected = "`input` or `none`, because `form` is `pivoted`: pivots are inputs";
                return Err(SplitError::setting(format!("weight_types.{name}.share"), expected, "`output`"));
            }
            Ok(())
        })
    }

    /// What the solvers need of the configuration.
    pub fn solve_settings(&self) -> crate::SolveSettings {
        crate::SolveSettings {
            objective: self.objective,
            ridge: self.calibration.ridge,
            weighting: self.weighting,
            refit: self.refit.clone(),
        }
    }
}

impl CalibrationSettings {
    fn validate(&self) -> Result<(), SplitError> {
        positive("calibration.samples", self.samples)?;
        positive("calibration.length", self.length)?;
        if !(0.0..1.0).contains(&self.holdout) {
            return Err(SplitError::setting("calibration.holdout", "0 or more and below 1", self.holdout));
        }
        match self.ridge {
            Ridge::Relative(ridge) if !(ridge.is_finite() && ridge >= 0.0) => {
                Err(SplitError::setting("calibration.ridge", "`auto` or a number of 0 or more", ridge))
            }
            _ => Ok(()),
        }
    }
}

impl WeightType {
    fn validate(&self, name: &str) -> Result<(), SplitError> {
        let key = |field: &str| format!("weight_types.{name}.{field}");
        if name.is_empty() || name.contains(['.', '/']) || name.chars().any(char::is_whitespace) {
            let expected = "a name without dots, slashes and spaces, because groups are called after it";
            return Err(SplitError::setting(format!("weight_types.{name}"), expected, format!("`{name}`")));
        }
        self.order(name)?;
        if let Some(heads) = self.n_head {
            positive(&key("n_head"), heads)?;
        } else if self.split == Split::Heads {
            return Err(SplitError::setting(
                key("n_head"),
                "the number of heads, because `split` is `heads`",
                "nothing",
            ));
        }
        if let Some(kv_heads) = self.n_kv_head {
            positive(&key("n_kv_head"), kv_heads)?;
            match self.n_head {
                Some(heads) if heads % kv_heads == 0 => {}
                Some(heads) => {
                    let expected = format!("a divisor of `n_head`, which is {heads}");
                    return Err(SplitError::setting(key("n_kv_head"), expected, kv_heads));
                }
                None => {
                    let expected = "the number of heads, because `n_kv_head` is given";
                    return Err(SplitError::setting(key("n_head"), expected, "nothing"));
                }
            }
        }
        if let Some(size) = self.group_size {
            positive(&key("group_size"), size)?;
            if self.groups.is_some() {
                return Err(SplitError::setting(key("groups"), "absent where `group_size` is given", "both"));
            }
        }
        if let Some(keep) = self.keep {
            kept(&key("keep"), keep)?;
        }
        check_groups(&key("groups"), self.groups.as_deref())
    }

    /// Queries, keys and values in the order in which they are stored, in lower case.
    pub(crate) fn order(&self, name: &str) -> Result<[char; 3], SplitError> {
        let lower: Vec<char> = self.qkv_order.to_lowercase().chars().collect();
        let mut sorted = lower.clone();
        sorted.sort_unstable();
        match lower[..] {
            [first, second, third] if sorted == ['k', 'q', 'v'] => Ok([first, second, third]),
            _ => {
                let key = format!("weight_types.{name}.qkv_order");
                let expected = "the letters q, k and v, each once, such as `qkv`";
                Err(SplitError::setting(key, expected, format!("`{}`", self.qkv_order)))
            }
        }
    }
}

fn positive(key: &str, value: usize) -> Result<(), SplitError> {
    if value == 0 { Err(SplitError::setting(key, "1 or more", value)) } else { Ok(()) }
}

fn kept(key: &str, value: f64) -> Result<(), SplitError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(());
    }
    let expected = "the fraction of the parameters that is kept: above 0, at most 1 (0.8 keeps 80 %)";
    Err(SplitError::setting(key, expected, value))
}

/// No layer twice, no empty group. Whether the layers exist is seen when the model is.
fn check_groups(key: &str, groups: Option<&[Vec<usize>]>) -> Result<(), SplitError> {
    let mut seen = std::collections::BTreeSet::new();
    for group in groups.unwrap_or_default() {
        if group.is_empty() {
            return Err(SplitError::setting(key, "groups of at least one layer", "an empty group"));
        }
        if let Some(twice) = group.iter().find(|&&layer| !seen.insert(layer)) {
            return Err(SplitError::setting(key, "each layer in one group", format!("layer {twice} twice")));
        }
    }
    Ok(())
}
