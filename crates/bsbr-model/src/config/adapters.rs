//! Low-rank adapters, as data.

use serde::{Deserialize, Serialize};

use crate::{LinearPlace, LinearRole, ModelConfig, ModelError};

/// A projection that can have an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterTarget {
    /// Of queries.
    Query,
    /// Of keys.
    Key,
    /// Of values.
    Value,
    /// Of what the heads read.
    Output,
}

impl AdapterTarget {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Output => "output",
        }
    }

    /// The projection of layer `layer`.
    pub fn place(self, layer: usize) -> LinearPlace {
        let role = match self {
            Self::Query => LinearRole::Query,
            Self::Key => LinearRole::Key,
            Self::Value => LinearRole::Value,
            Self::Output => LinearRole::Output,
        };
        LinearPlace { layer, role }
    }
}

/// Low-rank adapters (LoRA, Hu et al. 2021) of every layer with BSBR attention: `alpha / rank * (x down) up` is added to
/// what a projection gives. A layer that runs the original attention does not use them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Width between the two factors.
    pub rank: usize,
    /// Factor on the adapters, times `rank`.
    pub alpha: f64,
    /// The projections that have one.
    pub targets: Vec<AdapterTarget>,
}

impl AdapterConfig {
    /// Factor on what the two matrices give.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    pub(crate) fn validate(&self) -> Result<(), ModelError> {
        let fail = |setting, problem: String| Err(ModelError::Config { setting, problem });
        if self.rank == 0 {
            return fail("adapters.rank", "is 0, expected at least 1".into());
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return fail("adapters.alpha", format!("is {}, expected a finite number above 0", self.alpha));
        }
        let mut targets = self.targets.clone();
        targets.sort_unstable();
        targets.dedup();
        if targets.is_empty() || targets.len() < self.targets.len() {
            let problem = "must name some of query, key, value, output, each once".to_owned();
            return fail("adapters.targets", problem);
        }
        Ok(())
    }
}

impl ModelConfig {
    /// Checks that `adapters` could be added to the weights of the model.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] with the first projection that is in parts, as compressed ones are: the product of an adapter
    /// has no place in their factors.
    pub fn check_mergeable(&self, adapters: &AdapterConfig) -> Result<(), ModelError> {
        let taken = self.split.as_ref().map(|split| split.taken()).unwrap_or_default();
        let layers = (0..self.decoder.layers).filter(|&layer| self.layer_attention(layer).is_some());
        let places =
            layers.flat_map(|layer| adapters.targets.iter().map(move |target| target.place(layer).to_string()));
        match places.into_iter().find(|place| taken.contains_key(place.as_str())) {
            Some(place) => {
                let problem =
                    format!("cannot be added to `{place}`, which is compressed in parts: keep them beside it");
                Err(ModelError::Config { setting: "adapters", problem })
            }
            None => Ok(()),
        }
    }
}
