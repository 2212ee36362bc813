//! What it cost to give weights another number format.

use std::collections::BTreeMap;
use std::fmt;

use bsbr_weights::Format;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::tensors::{CastLoss, is_weight_dtype};

/// A weight of a converted model that has another format than in the source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedCast {
    /// The weight, by its name in the converted model.
    pub tensor: String,
    /// Format in the source.
    pub from: String,
    /// Format in the converted model.
    pub to: String,
    /// Numbers that are not what they were; an export is bit for bit only where there are none.
    pub changed: u64,
    /// Those of them that became zero.
    pub underflowed: u64,
    /// Largest change of a number, relative to it; 1 for one that became zero.
    pub largest_relative_error: f64,
    /// Of codes, the root of the mean squared error over that of the mean square.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rms_error: Option<f64>,
}

impl RecordedCast {
    pub(crate) fn new(tensor: &str, [from, to]: [Format; 2], loss: CastLoss) -> Self {
        let CastLoss { changed, underflowed, largest_relative_error, squares, squared_errors } = loss;
        let rms_error = to.is_quantised().then(|| if squares > 0.0 { (squared_errors / squares).sqrt() } else { 0.0 });
        let (tensor, from, to) = (tensor.to_owned(), from.to_string(), to.to_string());
        Self { tensor, from, to, changed, underflowed, largest_relative_error, rms_error }
    }

    /// Whether the bits of the source are gone. Those of codes are: that they stand for the same numbers would be chance.
    pub fn is_lossy(&self) -> bool {
        self.changed > 0 || Format::of_name(&self.to).is_some_and(Format::is_quantised)
    }

    /// Whether this is a cast between two formats of weights.
    pub(crate) fn between(&self, from: Dtype, to: Dtype) -> bool {
        is_weight_dtype(from) && is_weight_dtype(to) && self.from == from.to_string() && self.to == to.to_string()
    }
}

/// All casts of a conversion in one sentence.
#[derive(Debug)]
pub(crate) struct CastSummary<'a>(pub(crate) &'a [RecordedCast]);

impl fmt::Display for CastSummary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(casts) = self;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        casts.iter().for_each(|cast| *counts.entry(&cast.to).or_default() += 1);
        let to: Vec<String> = counts.iter().map(|(to, count)| format!("{count} weights were cast to {to}")).collect();
        write!(f, "{}", to.join(", "))?;
        let lossy = || casts.iter().filter(|cast| cast.is_lossy());
        if lossy().next().is_none() {
            return f.write_str(" without loss: an export gives the original bits back");
        }
        if let Some(error) = lossy().filter_map(|cast| cast.rms_error).reduce(f64::max) {
            write!(f, "; codes are off by at most {:.2} % of a weight's root mean square", 100.0 * error)?;
        }
        let plain = || lossy().filter(|cast| cast.rms_error.is_none());
        if plain().next().is_some() {
            let changed: u64 = plain().map(|cast| cast.changed).sum();
            let underflowed: u64 = plain().map(|cast| cast.underflowed).sum();
            let error = plain().map(|cast| cast.largest_relative_error).fold(0.0, f64::max);
            write!(
                f,
                "; in {} of them {changed} numbers changed, by at most {error:.2e} of themselves, and {underflowed} became zero",
                plain().count()
            )?;
        }
        f.write_str(": the original bits are gone and an export is refused")
    }
}
