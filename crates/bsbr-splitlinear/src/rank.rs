//! How many dimensions a basis has: from the fraction kept, or by giving the same parameters to where they do most.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::plan::parameters_per_rank;
use crate::{Plan, PlannedGroup, RankAllocation, Share, Spectrum, SplitError};

/// What is added before rounding down, so that `0.3 = 1 - 0.7` gives what 0.3 means.
const ROUNDING: f64 = 1e-9;

/// The largest rank at which a group keeps at most the fraction `keep` of its parameters. May be 0, and may be more than
/// the group can use.
///
/// A basis shared by `layers` weights of `inputs x outputs` costs `inputs + layers * outputs` for each dimension when it
/// is on the input side, `layers * inputs + outputs` on the output side.
///
/// ```
/// use bsbr_splitlinear::{Share, rank_for};
///
/// assert_eq!(rank_for(0.5, 4, 768, 768, Share::Input), 307);
/// ```
pub fn rank_for(keep: f64, layers: usize, inputs: usize, outputs: usize, share: Share) -> usize {
    let dense = layers as f64 * inputs as f64 * outputs as f64;
    let per_rank = parameters_per_rank(share, layers, inputs, outputs) as f64;
    // A negative or undefined quotient becomes 0.
    (keep * dense / per_rank + ROUNDING).floor() as usize
}

/// Gives the parameters of a plan to its groups anew; their sum does not grow.
///
/// `spectra` holds one for each group, in order ([`crate::group_spectrum`]). With [`RankAllocation::Uniform`] nothing
/// changes. Groups that stay original give their parameters to nobody and take none.
///
/// # Errors
/// Where there are not as many spectra as groups.
pub fn allocate(plan: &mut Plan, spectra: &[Spectrum], allocation: RankAllocation) -> Result<(), SplitError> {
    if spectra.len() != plan.groups.len() {
        let expected = format!("a spectrum for each of the {} groups of the plan", plan.groups.len());
        return Err(SplitError::shape("rank allocation", expected, spectra.len().to_string()));
    }
    match allocation {
        RankAllocation::Uniform => {}
        RankAllocation::DRank => by_effective_rank(&mut plan.groups, spectra),
        RankAllocation::MarginalLoss => by_marginal_loss(&mut plan.groups, spectra),
    }
    Ok(())
}

/// D-Rank (arXiv 2509.25622): minimises the sum of `R_g / k_g` at a given sum of `k_g w_g`, where `R_g` is the effective
/// rank of a group and `w_g` what a dimension costs: `k_g` is proportional to `sqrt(R_g / w_g)`.
fn by_effective_rank(groups: &mut [PlannedGroup], spectra: &[Spectrum]) {
    let mut open: Vec<(usize, f64)> = Vec::new();
    for (index, (group, spectrum)) in groups.iter().zip(spectra).enumerate() {
        if group.rank.is_some() {
            open.push((index, (spectrum.effective_rank().max(1.0) / group.parameters_per_rank() as f64).sqrt()));
        }
    }
    let mut budget: f64 =
        open.iter().filter_map(|&(index, _)| groups.get(index)).map(|g| g.parameters_after() as f64).sum();
    // A group whose share exceeds what it can use keeps the most it can, and the rest is shared among the others.
    loop {
        let unit: f64 = open
            .iter()
            .filter_map(|&(index, factor)| groups.get(index).map(|group| factor * group.parameters_per_rank() as f64))
            .sum();
        let scale = budget / unit;
        let (mut spent, before) = (0.0, open.len());
        open.retain(|&(index, factor)| {
            let Some(group) = groups.get_mut(index) else { return false };
            let (least, most) = (1.0, most_useful(group) as f64);
            let rank = factor * scale;
            if rank >= least && rank <= most {
                return true;
            }
            let rank = rank.clamp(least, most);
            group.rank = Some(rank as usize);
            spent += rank * group.parameters_per_rank() as f64;
            false
        });
        budget -= spent;
        if open.len() == before || open.is_empty() {
            for (index, factor) in open {
                if let Some(group) = groups.get_mut(index) {
                    group.rank = Some(((factor * scale + ROUNDING) as usize).max(1));
                }
            }
            return;
        }
    }
}

/// The largest rank at which the factors are smaller than the weights.
fn most_useful(group: &PlannedGroup) -> usize {
    let smaller = (group.parameters_before() - 1) / group.parameters_per_rank();
    smaller.min(group.largest_rank()).max(1)
}

/// A step of a group: what its error shrinks by for each parameter.
struct Step {
    gain: f64,
    group: usize,
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Step {}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        // Equal gains go to the earlier group, so that the outcome is one.
        self.gain.total_cmp(&other.gain).then_with(|| other.group.cmp(&self.group))
    }
}

/// Gives dimension after dimension to the group whose error shrinks most for each parameter. Spectra fall, so this is the
/// least sum of errors that the parameters can buy, but for the last few of them and for groups that reach the size of
/// their weights.
fn by_marginal_loss(groups: &mut [PlannedGroup], spectra: &[Spectrum]) {
    let gain = |group: &PlannedGroup, spectrum: &Spectrum, rank: usize| {
        let value = spectrum.values.get(rank).copied().unwrap_or(0.0);
        value / group.parameters_per_rank() as f64
    };
    let mut budget: usize = groups.iter().filter(|g| g.rank.is_some()).map(PlannedGroup::parameters_after).sum();
    let mut steps = BinaryHeap::new();
    for (index, (group, spectrum)) in groups.iter_mut().zip(spectra).enumerate() {
        if group.rank.is_some() {
            group.rank = Some(1);
            budget = budget.saturating_sub(group.parameters_per_rank());
            steps.push(Step { gain: gain(group, spectrum, 1), group: index });
        }
    }
    while let Some(Step { group: index, .. }) = steps.pop() {
        let (Some(group), Some(spectrum)) = (groups.get_mut(index), spectra.get(index)) else { continue };
        let rank = group.rank.unwrap_or(0) + 1;
        if rank > most_useful(group) || budget < group.parameters_per_rank() {
            continue;
        }
        budget -= group.parameters_per_rank();
        group.rank = Some(rank);
        steps.push(Step { gain: gain(group, spectrum, rank), group: index });
    }
}
