//! Compression of each group by itself, from the inputs that its layers have in the original model.

use super::{BlockModel, CompressedGroup, member_weight, read_moments};
use crate::{
    Calibration, Group, Member, Moments, MomentsFile, SavedGroup, SolveSettings, Spectrum, SplitError, compress_group,
    group_spectrum,
};

/// What is known of one member.
struct Known {
    weight: Vec<f32>,
    moments: Option<(Moments, Option<Moments>)>,
}

impl Known {
    fn view<'a>(&'a self, name: &'a str) -> Member<'a> {
        let (calibration, held_out) = match &self.moments {
            None => (Calibration::Nothing, None),
            Some((moments, held_out)) => (Calibration::Inputs(moments), held_out.as_ref().map(Calibration::Inputs)),
        };
        Member { name, weight: &self.weight, calibration, held_out }
    }
}

/// Reads what is known of the members of a group and gives it to `work`.
fn with_group<M: BlockModel, T>(
    model: &M,
    saved: &SavedGroup,
    moments: Option<&MomentsFile>,
    work: impl FnOnce(&Group<'_>) -> Result<T, SplitError>,
) -> Result<T, M::Error> {
    let mut known = Vec::new();
    for member in &saved.members {
        let linear = member.targets.first().map_or("", |target| target.linear.as_str());
        let (_, input) = super::anchored::block_of(model, linear)?;
        let moments = moments.map(|file| read_moments(file, &input)).transpose()?;
        known.push(Known { weight: member_weight(model, saved, member)?, moments });
    }
    let members: Vec<Member<'_>> =
        known.iter().zip(&saved.members).map(|(known, member)| known.view(&member.part)).collect();
    let SavedGroup { name, share, form, inputs, outputs, rank, .. } = saved;
    let group =
        Group { name, share: *share, form: *form, inputs: *inputs, outputs: *outputs, rank: *rank, members: &members };
    Ok(work(&group)?)
}

/// Solves a group from the moments of its layers' inputs; without moments all inputs count the same.
///
/// # Errors
///
/// Those of the model, of the file and of the solvers.
pub fn compress_alone<M: BlockModel>(
    model: &M,
    saved: &SavedGroup,
    moments: Option<&MomentsFile>,
    settings: &SolveSettings,
) -> Result<CompressedGroup, M::Error> {
    let (factors, report) = with_group(model, saved, moments, |group| compress_group(group, settings))?;
    Ok(CompressedGroup { saved: saved.clone(), factors, report, refits: Vec::new() })
}

/// The spectrum of a group, which its rank may depend on.
///
/// # Errors
///
/// As [`compress_alone`].
pub fn spectrum<M: BlockModel>(
    model: &M,
    saved: &SavedGroup,
    moments: Option<&MomentsFile>,
    settings: &SolveSettings,
) -> Result<Spectrum, M::Error> {
    with_group(model, saved, moments, |group| group_spectrum(group, settings))
}
