//! Which number format converted weights get, and what that costs.

use std::fmt;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::tensors::{CastLoss, is_weight_dtype};

/// The number format of the weights of a converted model.
///
/// The weights that BSBR adds are F32 in any case, and tensors kept aside for an export stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypePolicy {
    /// The one of the source, tensor by tensor.
    #[default]
    Keep,
    /// F32: holds every number of the other two.
    F32,
    /// F16: up to 65504, with 11 bits.
    F16,
    /// BF16: the range of F32, with 8 bits.
    Bf16,
}

impl DtypePolicy {
    /// The format of a weight that comes in `dtype`.
    pub fn apply(self, dtype: Dtype) -> Dtype {
        match self {
            Self::Keep => dtype,
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    pub(crate) fn keeps(&self) -> bool {
        *self == Self::Keep
    }
}

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
}

impl RecordedCast {
    pub(crate) fn new(tensor: &str, [from, to]: [Dtype; 2], loss: CastLoss) -> Self {
        let CastLoss { changed, underflowed, largest_relative_error } = loss;
        let (tensor, from, to) = (tensor.to_owned(), from.to_string(), to.to_string());
        Self { tensor, from, to, changed, underflowed, largest_relative_error }
    }

    /// Whether the bits of the source are gone.
    pub fn is_lossy(&self) -> bool {
        self.changed > 0
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
        let to = casts.first().map_or("another format", |cast| cast.to.as_str());
        write!(f, "{} weights were cast to {to}", casts.len())?;
        let lossy = || casts.iter().filter(|cast| cast.is_lossy());
        if lossy().next().is_none() {
            return f.write_str(" without loss: an export gives the original bits back");
        }
        let changed: u64 = lossy().map(|cast| cast.changed).sum();
        let underflowed: u64 = lossy().map(|cast| cast.underflowed).sum();
        let error = lossy().map(|cast| cast.largest_relative_error).fold(0.0, f64::max);
        write!(
            f,
            "; in {} of them {changed} numbers changed, by at most {error:.2e} of themselves, and {underflowed} became \
             zero: the original bits are gone and an export is refused",
            lossy().count()
        )
    }
}
