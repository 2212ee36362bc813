//! Configurations for a model that none was written for.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bsbr_model::{BlockInput, LinearRole};
use bsbr_splitlinear::{SplitConfig, SplitError};
use serde::Deserialize;

use super::CheckpointLinear;

/// A way to compress, for models of every kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SplitPreset {
    /// Every layer by itself in pivoted factors, whose rank costs less, and parameters given to where an error changes what
    /// the model predicts most: what measured best on every model tried.
    #[default]
    Pivoted,
    /// Every layer by itself in two factors, from its inputs in the original model.
    Each,
    /// As Basis Sharing was published (arXiv 2410.03765): two layers share a basis on the input side, projections back to
    /// the stream have their own; every layer from its inputs in the original model, no coefficient is fitted again.
    Published,
    /// Every layer by itself, front to back, fitted to what the compressed layers before it give. Better than `each` on a
    /// small GPT-2, far worse on SmolLM2.
    Anchored,
    /// Truncated singular value decomposition of every weight; no text.
    Svd,
}

impl SplitPreset {
    fn settings(self) -> &'static str {
        match self {
            Self::Anchored => "[calibration]\nmode = \"sequential-anchored\"\n[refit]\nc = \"off\"\n",
            Self::Pivoted => "form = \"pivoted\"\nrank = \"sensitivity\"\n[refit]\nc = \"off\"\n",
            Self::Published | Self::Each => "[refit]\nc = \"off\"\n",
            Self::Svd => "objective = \"weights\"\n[refit]\nc = \"off\"\n",
        }
    }

    fn share(self, role: LinearRole) -> &'static str {
        let back = matches!(
            role.input(),
            BlockInput::Output | BlockInput::Down | BlockInput::ExpertDown(_) | BlockInput::SharedDown
        );
        match self {
            Self::Published if back => "none",
            Self::Published => "input",
            Self::Pivoted | Self::Each | Self::Anchored | Self::Svd => "none",
        }
    }

    /// The configuration for the layers of a model, as TOML: a weight type for each kind of layer, called after the end
    /// of its name, and for each of its shapes where blocks differ in them: what shares a basis is of one shape.
    pub fn toml(self, linears: &[CheckpointLinear]) -> String {
        type Shapes = Vec<([usize; 2], Vec<usize>)>;
        let mut kinds: BTreeMap<&str, (LinearRole, Shapes)> = BTreeMap::new();
        let mut block = "";
        for linear in linears {
            let (place, _) = linear.targets[0];
            // The number of the block stands between the list of blocks and the name of the layer.
            if let Some((before, after)) = linear.shape.path.split_once(&format!(".{}.", place.layer)) {
                block = before.rsplit('.').next().unwrap_or_default();
                let (_, shapes) = kinds.entry(after).or_insert_with(|| (place.role, Vec::new()));
                let own = [linear.shape.inputs, linear.shape.outputs];
                match shapes.iter_mut().find(|(shape, _)| *shape == own) {
                    Some((_, blocks)) => blocks.push(place.layer),
                    None => shapes.push((own, vec![place.layer])),
                }
            }
        }
        let mut text = format!("block_pattern = '{block}\\.(\\d+)'\ngroup_size = 2\nkeep = 0.8\n{}", self.settings());
        for (name, (role, shapes)) in kinds {
            let (key, pattern) = (name.replace('.', "_"), name.replace('.', "\\."));
            let share = self.share(role);
            for (shape, blocks) in &shapes {
                let (own, of) = if shapes.len() == 1 {
                    (String::new(), String::new())
                } else {
                    let blocks: Vec<String> = blocks.iter().map(ToString::to_string).collect();
                    (format!("_{}_to_{}", shape[0], shape[1]), format!("({})\\.", blocks.join("|")))
                };
                let pattern = format!(".*\\.{of}{pattern}$");
                let _ = write!(text, "[weight_types.{key}{own}]\npattern = '{pattern}'\nshare = \"{share}\"\n");
            }
        }
        text
    }

    /// The same, read.
    ///
    /// # Errors
    ///
    /// None for layers that [`super::checkpoint_linears`] gives.
    pub fn config(self, linears: &[CheckpointLinear]) -> Result<SplitConfig, SplitError> {
        SplitConfig::from_toml(&self.toml(linears))
    }
}
