//! The number formats of factors, and numbers written in them.

use std::collections::{BTreeSet, HashMap};

use bsbr_splitlinear::{SavedGroup, SavedSplit};
use bsbr_weights::Format;
use safetensors::Dtype;

use crate::ConvertError;
use crate::converted::ConvertedModel;
use crate::policy::WeightsPolicy;
use crate::tensors::{CastLoss, TensorFileWriter, cast, plain_dtype};

/// The format of every factor of `split`, by its name: the one asked for, else that of the weights of `model` its group is
/// made of, F32 where those differ. Factors hold their numbers no more exactly than the weights did, and a compressed
/// model should not be larger than its original.
pub(super) fn factor_formats(
    model: &ConvertedModel,
    split: &SavedSplit,
    policy: WeightsPolicy,
) -> HashMap<String, Dtype> {
    let mut formats = HashMap::new();
    for group in &split.groups {
        let dtype = plain_dtype(policy.of_factors(source_format(model, group)));
        let names = std::iter::once(group.basis()).chain(group.members.iter().map(|member| member.coefficient()));
        formats.extend(names.map(|name| (name, dtype)));
        // Whole numbers.
        formats.extend(group.pivots().map(|name| (name, Dtype::I32)));
    }
    formats
}

fn source_format(model: &ConvertedModel, group: &SavedGroup) -> Format {
    let targets = group.members.iter().flat_map(|member| &member.targets);
    let weights = targets.filter_map(|target| model.recipe(&format!("{}.weight", target.linear)));
    let formats: BTreeSet<Format> = weights.filter_map(|weight| weight.format()).collect();
    match formats.into_iter().collect::<Vec<_>>()[..] {
        [one] => one,
        _ => Format::F32,
    }
}

/// Writes the numbers of `tensor` in the format `dtype`, in pieces.
pub(super) fn write_numbers(
    writer: &mut TensorFileWriter,
    (tensor, dtype): (&str, Dtype),
    numbers: &[f32],
) -> Result<(), ConvertError> {
    const PIECE: usize = 1 << 20;
    let (mut loss, mut out) = (CastLoss::default(), Vec::new());
    for (piece, numbers) in numbers.chunks(PIECE).enumerate() {
        let bytes: Vec<u8> = if dtype == Dtype::I32 {
            numbers.iter().flat_map(|&number| (number as i32).to_le_bytes()).collect()
        } else {
            numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
        };
        if [Dtype::F32, Dtype::I32].contains(&dtype) {
            writer.write(&bytes)?;
            continue;
        }
        out.clear();
        cast([Dtype::F32, dtype], &bytes, &mut out, &mut loss).map_err(|overflow| ConvertError::Factor {
            tensor: tensor.to_owned(),
            problem: format!(
                "holds {:e} at element {}, which is beyond the largest {dtype}: choose a number format with a larger \
                 range (BF16, F32)",
                overflow.value,
                piece * PIECE + overflow.index
            ),
        })?;
        writer.write(&out)?;
    }
    Ok(())
}
