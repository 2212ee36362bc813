//! Low-rank adapters, as data.

use serde::{Deserialize, Serialize};

use crate::ModelError;

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
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Output => "output",
        }
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
