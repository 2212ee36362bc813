//! `conversion.json`: what a converted model was made of, enough to give the original back bit for bit.

use bsbr_attn::BlockAttentionConfig;
use serde::{Deserialize, Serialize};

use crate::calibrated::RecordedCalibration;
use crate::casts::RecordedCast;
use crate::policy::WeightsPolicy;
use crate::tensors::FileFormat;
use crate::tie::HeadForm;

/// Prefix of the tensors of a converted model that are no weights and only wait for an export.
pub const IGNORED_PREFIX: &str = "source.ignored.";

/// The content of `conversion.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConversionRecord {
    /// Version of this format; see [`ConversionRecord::FORMAT_VERSION`].
    pub format_version: u32,
    /// Name of the source: a hub id or the name of a directory.
    pub source: String,
    /// Which revision of a hub's repository the source is, if it comes from a hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubOrigin>,
    /// Rules used.
    pub rules: String,
    /// Their version.
    pub rules_version: u32,
    /// Prefix in the names of the source.
    pub prefix: String,
    /// How the source stores its output head.
    pub head: HeadForm,
    /// BSBR settings; none for the original attention.
    pub settings: Option<BlockAttentionConfig>,
    /// What was asked for as the number format of the weights.
    #[serde(default, skip_serializing_if = "WeightsPolicy::keeps", alias = "dtype")]
    pub weights: WeightsPolicy,
    /// The weights that have another number format than in the source, and what that cost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub casts: Vec<RecordedCast>,
    /// Whether weights of the original were changed after converting: an export then gives the changed ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub changed: bool,
    /// Numbers in the weights of the original model.
    pub parameters_before: usize,
    /// Numbers in the weights of the converted model.
    pub parameters_after: usize,
    /// What the added weights were calibrated on, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<RecordedCalibration>,
    /// Every tensor of the source.
    pub tensors: Vec<RecordedTensor>,
    /// The weight files of the source.
    pub files: Vec<RecordedFile>,
}

impl ConversionRecord {
    /// The only version this code reads and writes.
    pub const FORMAT_VERSION: u32 = 1;

    /// Whether tensors of `file` were quantised, so that what was converted are their decoded numbers.
    pub(crate) fn is_decoded(&self, file: &str) -> bool {
        let quantised = |tensor: &RecordedTensor| tensor.stored.as_ref().is_some_and(|stored| *stored != tensor.dtype);
        self.tensors.iter().any(|tensor| tensor.file == file && quantised(tensor))
    }
}

/// Where on a hub a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubOrigin {
    /// The repository, as `organisation/model`.
    pub repository: String,
    /// The branch, tag or commit asked for.
    pub revision: String,
    /// The commit it was.
    pub commit: String,
}

impl std::fmt::Display for HubOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at commit {}", self.repository, self.commit)
    }
}

/// One tensor of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedTensor {
    /// Name.
    pub name: String,
    /// File.
    pub file: String,
    /// Number format once it is read; the one of the tensors it becomes as well, unless [`ConversionRecord::casts`] names them, they
    /// keep the codes that `stored` says, or are made of codes and scales, or of F64.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Number format in a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// Tensors of the converted model that hold its numbers.
    pub becomes: Vec<String>,
}

/// One weight file of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedFile {
    /// Name.
    pub name: String,
    /// Its format.
    #[serde(default, skip_serializing_if = "FileFormat::is_safetensors")]
    pub format: FileFormat,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The header as it stands in the file, `__metadata__` and padding included: with the tensors it makes up the
    /// whole file. For a file of another format, the header of the safetensors file that an export writes instead.
    pub header: String,
    /// For a file of another format, the safetensors file that an export writes instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<RecordedExport>,
}

impl RecordedFile {
    /// Name and SHA-256 of the file that an export writes.
    pub fn exported(&self) -> (&str, &str) {
        let other = self.export.as_ref().map(|export| (export.name.as_str(), export.sha256.as_str()));
        other.unwrap_or((&self.name, &self.sha256))
    }
}

/// A safetensors file that holds the tensors of a file of another format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedExport {
    /// Name.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: String,
}
