//! One group at a time: from weights and moments to factors.

use crate::{
    Form, GroupReport, GroupSize, Moments, Objective, PairedMoments, RefitReport, RefitSettings, Ridge, Share,
    SplitError, Weighting,
};

/// What is known of the inputs of a layer.
#[derive(Debug, Clone, Copy)]
pub enum Calibration<'a> {
    /// Nothing: all directions count the same.
    Nothing,
    /// Their second moments in the original model.
    Inputs(&'a Moments),
    /// Their second moments in the original and in the compressed model: outputs are drawn to those of the original.
    Paired(&'a PairedMoments),
}

/// One layer of a group.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// Its name, for messages and the report.
    pub name: &'a str,
    /// `[inputs, outputs]`, row by row.
    pub weight: &'a [f32],
    /// What the factors are fitted to.
    pub calibration: Calibration<'a>,
    /// What judges them; of the same kind as `calibration`.
    pub held_out: Option<Calibration<'a>>,
}

/// Layers of one shape that share a basis.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Its name, for messages and the report.
    pub name: &'a str,
    /// The side whose basis is shared; [`Share::None`] takes one member.
    pub share: Share,
    /// How the factors are kept; [`Form::Pivoted`] not with [`Share::Output`].
    pub form: Form,
    /// Width of what a member reads.
    pub inputs: usize,
    /// Width of what a member gives.
    pub outputs: usize,
    /// Width of the basis; more than the group can use is cut.
    pub rank: usize,
    /// The layers.
    pub members: &'a [Member<'a>],
}

impl Group<'_> {
    /// Its sizes.
    pub fn size(&self) -> GroupSize {
        let Self { form, share, inputs, outputs, members, .. } = *self;
        GroupSize { form, share, layers: members.len(), inputs, outputs }
    }
}

/// How groups are solved.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SolveSettings {
    /// What the error is measured on.
    pub objective: Objective,
    /// What is added to the diagonal of the second moments.
    pub ridge: Ridge,
    /// What a layer's error counts beside that of others.
    pub weighting: Weighting,
    /// Whether coefficients are fitted anew.
    pub refit: RefitSettings,
}

/// The factors of a group, row by row: `W_i` is about `basis coefficients[i]` for [`Share::Input`] and [`Share::None`],
/// `coefficients[i] basis` for [`Share::Output`]. Of pivoted factors the basis is the identity in the rows of the pivots,
/// which are not kept.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupFactors {
    /// The side whose basis is shared.
    pub share: Share,
    /// Width of the basis.
    pub rank: usize,
    /// Width of what a member reads.
    pub inputs: usize,
    /// Width of what a member gives.
    pub outputs: usize,
    /// The input that each dimension passes on, where factors are pivoted; else none.
    pub pivots: Vec<u32>,
    /// `[inputs, rank]`, of pivoted factors without the rows of the pivots; `[rank, outputs]` for [`Share::Output`].
    pub basis: Vec<f32>,
    /// `[rank, outputs]` for each member, or `[inputs, rank]` for [`Share::Output`].
    pub coefficients: Vec<Vec<f32>>,
}

impl GroupFactors {
    /// The largest number in absolute value.
    pub fn largest(&self) -> f32 {
        let values = self.coefficients.iter().chain([&self.basis]).flatten();
        values.fold(0.0, |largest, value| largest.max(value.abs()))
    }

    /// What takes the place of the weight of a member, `[inputs, outputs]` row by row; `None` where there is no such
    /// member.
    pub fn weight(&self, member: usize) -> Option<Vec<f32>> {
        crate::solve::weight(self, member)
    }
}

/// What each direction of a group's outputs contributes.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Squared singular values for each token, falling: what the error shrinks by with each dimension of the basis.
    pub values: Vec<f64>,
    /// Their sum: the energy of the outputs.
    pub energy: f64,
}

impl Spectrum {
    /// The spectrum in other units: those in which what is lost from rank `rank` on comes to `loss`.
    pub fn scaled(&self, rank: usize, loss: f64) -> Self {
        let lost: f64 = self.values.iter().skip(rank).sum();
        let unit = if lost > 0.0 { loss / lost } else { 0.0 };
        Self { values: self.values.iter().map(|value| value * unit).collect(), energy: self.energy * unit }
    }

    /// Exponential of the entropy of the squared singular values: how many directions matter.
    pub fn effective_rank(&self) -> f64 {
        let total: f64 = self.values.iter().sum();
        let shares = self.values.iter().map(|value| value / total).filter(|&share| share > 0.0);
        shares.map(|share| -share * share.ln()).sum::<f64>().exp()
    }
}

/// Replaces the weights of a group by a shared basis and coefficients.
///
/// # Errors
/// Where sizes disagree, a number is not finite, or no decomposition passes its checks.
pub fn compress_group(group: &Group<'_>, settings: &SolveSettings) -> Result<(GroupFactors, GroupReport), SplitError> {
    crate::solve::compress(group, settings)
}

/// The spectrum of a group, which [`crate::allocate`] needs. The rank of the group does not matter.
///
/// # Errors
/// As [`compress_group`].
pub fn group_spectrum(group: &Group<'_>, settings: &SolveSettings) -> Result<Spectrum, SplitError> {
    crate::solve::spectrum(group, settings)
}

/// Fits the coefficients of one member anew while the basis stays, for a layer whose inputs became known only after its
/// group was solved: with [`Calibration::Paired`], to what the compressed layers before it give. Kept if the error on
/// held-out text is smaller for it.
///
/// # Errors
/// As [`compress_group`], and where the factors have no such member.
pub fn refit_member(
    factors: &mut GroupFactors,
    index: usize,
    member: &Member<'_>,
    settings: &SolveSettings,
) -> Result<RefitReport, SplitError> {
    crate::solve::refit_member(factors, index, member, settings)
}
