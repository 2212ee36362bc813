//! Configurations as they are written: defaults, older names of keys, TOML, YAML and JSON.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use serde::Deserialize;

use super::{CalibrationSettings, Form, Objective, RankAllocation, RefitSettings, SplitConfig, WeightType, Weighting};
use crate::SplitError;

/// Kept where neither `keep` nor `remove` says otherwise.
const DEFAULT_KEEP: f64 = 0.8;

/// The keys of a configuration file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    weight_types: BTreeMap<String, WeightType>,
    #[serde(default, alias = "layer_pattern")]
    block_pattern: Option<String>,
    #[serde(default)]
    group_size: Option<usize>,
    #[serde(default)]
    groups: Option<Vec<Vec<usize>>>,
    #[serde(default, alias = "compression_rate")]
    keep: Option<f64>,
    /// In percent.
    #[serde(default)]
    remove: Option<f64>,
    #[serde(default)]
    form: Form,
    #[serde(default)]
    exclude_layers: Vec<usize>,
    #[serde(default)]
    objective: Objective,
    #[serde(default)]
    calibration: CalibrationSettings,
    #[serde(default)]
    refit: RefitSettings,
    #[serde(default)]
    rank: RankAllocation,
    #[serde(default)]
    weighting: Weighting,
}

impl TryFrom<Written> for SplitConfig {
    type Error = SplitError;

    fn try_from(written: Written) -> Result<Self, SplitError> {
        let keep = match (written.keep, written.remove) {
            (Some(_), Some(_)) => {
                let expected = "absent where `keep` (or `compression_rate`) is given: they say the same thing";
                return Err(SplitError::setting("remove", expected, "both"));
            }
            (Some(keep), None) => keep,
            (None, Some(remove)) if (0.0..100.0).contains(&remove) => (100.0 - remove) / 100.0,
            (None, Some(remove)) => {
                let expected = "the percentage of the parameters that is removed: 0 or more, below 100";
                return Err(SplitError::setting("remove", expected, remove));
            }
            (None, None) => DEFAULT_KEEP,
        };
        let config = Self {
            weight_types: written.weight_types,
            block_pattern: written.block_pattern,
            group_size: written.group_size,
            groups: written.groups,
            keep,
            form: written.form,
            exclude_layers: written.exclude_layers,
            objective: written.objective,
            calibration: written.calibration,
            refit: written.refit,
            rank: written.rank,
            weighting: written.weighting,
        };
        config.validate()?;
        Ok(config)
    }
}

impl SplitConfig {
    /// Reads TOML.
    ///
    /// # Errors
    /// Where the text is no TOML, a key is unknown, or a value is not what its key asks for.
    pub fn from_toml(text: &str) -> Result<Self, SplitError> {
        toml::from_str(text).map_err(|error| parse_error("TOML", &error))
    }

    /// Reads YAML, such as the Python original is configured with.
    ///
    /// # Errors
    /// As [`SplitConfig::from_toml`].
    pub fn from_yaml(text: &str) -> Result<Self, SplitError> {
        serde_saphyr::from_str(text).map_err(|error| parse_error("YAML", &error))
    }

    /// Reads JSON, the form in which reports and compressed models keep their configuration.
    ///
    /// # Errors
    /// As [`SplitConfig::from_toml`].
    pub fn from_json(text: &str) -> Result<Self, SplitError> {
        serde_json::from_str(text).map_err(|error| parse_error("JSON", &error))
    }

    /// Reads a file: `.toml`, `.yaml`, `.yml` or `.json`.
    ///
    /// # Errors
    /// Where the file cannot be read or is called otherwise, and as [`SplitConfig::from_toml`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, SplitError> {
        let path = path.as_ref();
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        let read = match extension.as_deref() {
            Some("toml") => Self::from_toml,
            Some("yaml" | "yml") => Self::from_yaml,
            Some("json") => Self::from_json,
            _ => {
                let message = "the name must end in .toml, .yaml, .yml or .json".to_owned();
                return Err(SplitError::Parse { origin: path.display().to_string(), message });
            }
        };
        let text = std::fs::read_to_string(path).map_err(SplitError::io("read", path))?;
        read(&text).map_err(|error| match error {
            SplitError::Parse { message, .. } => SplitError::Parse { origin: path.display().to_string(), message },
            other => other,
        })
    }
}

fn parse_error(format: &str, error: &dyn Display) -> SplitError {
    SplitError::Parse { origin: format.to_owned(), message: error.to_string() }
}
