//! Which number format the weights of a converted model get.

use bsbr_model::{EXTRA_PREFIX, WeightSpec};
use bsbr_weights::Format;
use serde::{Deserialize, Serialize};

/// The number format of the weights of a converted model.
///
/// The weights that BSBR adds are F32 in any case, and tensors kept aside for an export stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsPolicy {
    /// The one of the source, tensor by tensor: also codes of a GGUF file.
    #[default]
    Keep,
    /// F32: holds every number of the other plain two.
    F32,
    /// F16: up to 65504, with 11 bits.
    F16,
    /// BF16: the range of F32, with 8 bits.
    Bf16,
    /// Q8_0: blocks of 32 codes of 8 bits with a scale, 8.5 bits a number. Linear weights and tables of embeddings alone; those whose rows
    /// are no whole blocks are F16, all others stay as they are.
    Int8,
    /// Q4_0: the same with codes of 4 bits, 4.5 bits a number. Tables of embeddings and heads are Q8_0: every token goes through
    /// them, and at 4 bits they lose more than all blocks.
    Int4,
}

impl WeightsPolicy {
    /// The format of a weight that can be had in `own`.
    pub(crate) fn apply(self, spec: &WeightSpec, own: Format) -> Format {
        let codes = takes_codes(spec);
        // As it is, or the numbers that its codes stand for.
        let kept = if own.is_quantised() && !codes { Format::F32 } else { own };
        match (self.codes(), self) {
            (_, Self::F16) => Format::F16,
            (_, Self::Bf16) => Format::Bf16,
            (_, Self::F32) => Format::F32,
            (Some(format), _) if codes => {
                let table = ["embed.weight", "head.weight"].contains(&spec.name.as_str());
                let format = if table { Format::Q8_0 } else { format };
                let whole = spec.shape.last().is_some_and(|&inputs| format.row_bytes(inputs).is_some());
                if whole { format } else { Format::F16 }
            }
            _ => kept,
        }
    }

    /// The format of codes that it asks for.
    pub(crate) fn codes(self) -> Option<Format> {
        match self {
            Self::Int8 => Some(Format::Q8_0),
            Self::Int4 => Some(Format::Q4_0),
            Self::Keep | Self::F32 | Self::F16 | Self::Bf16 => None,
        }
    }

    /// The format of factors that are made of weights in `own`. No codes: as those of a group of weights, factors are few.
    pub(crate) fn of_factors(self, own: Format) -> Format {
        match self {
            Self::Keep if own.is_quantised() => Format::F32,
            Self::Keep => own,
            Self::F32 => Format::F32,
            Self::F16 | Self::Int8 | Self::Int4 => Format::F16,
            Self::Bf16 => Format::Bf16,
        }
    }

    pub(crate) fn keeps(&self) -> bool {
        *self == Self::Keep
    }
}

/// Whether a weight may be codes: linear weights and tables of embeddings, but not norms, routers, gates of experts, decays and rates of
/// recurrent layers, tables of positions and what BSBR adds, of which little would be saved.
pub(crate) fn takes_codes(spec: &WeightSpec) -> bool {
    let Some(name) = spec.name.strip_suffix(".weight") else { return false };
    let part = name.rsplit('.').next().unwrap_or(name);
    let other = part.ends_with("norm") || ["router", "shared_gate", "position", "decay", "rate"].contains(&part);
    spec.shape.len() == 2 && !spec.whole && !name.starts_with(EXTRA_PREFIX) && !other
}
