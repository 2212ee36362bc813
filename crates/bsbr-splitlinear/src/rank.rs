//! Giving the same parameters to where they do most.

use crate::{Plan, PlannedGroup, RankAllocation, Spectrum, SplitError};

/// What is added before rounding down.
const ROUNDING: f64 = 1e-9;

/// Gives the parameters of a plan to its groups anew; their sum does not grow.
///
/// `spectra` holds one for each group, in order ([`crate::group_spectrum`]); what they are multiplied with says what an
/// error of the group counts beside that of others. With [`RankAllocation::Uniform`] nothing changes. Groups that stay
/// original give their parameters to nobody and take none; others may become original.
///
/// # Errors
/// Where there are not as many spectra as groups.
pub fn allocate(plan: &mut Plan, spectra: &[Spectrum], allocation: RankAllocation) -> Result<(), SplitError> {
    if spectra.len() != plan.groups.len() {
        let expected = format!("a spectrum for each of the {} groups of the plan", plan.groups.len());
        return Err(SplitError::shape("rank allocation", expected, spectra.len().to_string()));
    }
    let mut open: Vec<(&mut PlannedGroup, &Spectrum)> =
        plan.groups.iter_mut().zip(spectra).filter(|(group, _)| group.rank.is_some()).collect();
    match allocation {
        RankAllocation::Uniform => {}
        RankAllocation::DRank => by_effective_rank(&mut open),
        RankAllocation::MarginalLoss | RankAllocation::Sensitivity => by_marginal_loss(&mut open),
    }
    Ok(())
}

/// The largest rank at which the factors are smaller than the weights.
fn most_useful(group: &PlannedGroup) -> usize {
    group.size().largest_within(group.parameters_before() - 1).max(1)
}

/// D-Rank (arXiv 2509.25622): minimises the sum of `R_g / k_g` at a given sum of `k_g w_g`, where `R_g` is the effective
/// rank of a group and `w_g` what a dimension costs: `k_g` is proportional to `sqrt(R_g / w_g)`. A group whose share
/// exceeds what it can use keeps the most it can, and the rest is shared among the others.
fn by_effective_rank(groups: &mut [(&mut PlannedGroup, &Spectrum)]) {
    let budget: usize = groups.iter().map(|(group, _)| group.parameters_after()).sum();
    let factor = |(group, spectrum): &(&mut PlannedGroup, &Spectrum)| {
        let cost = group.parameters_after() as f64 / group.rank.unwrap_or(1) as f64;
        (spectrum.effective_rank().max(1.0) / cost).sqrt()
    };
    let shares: Vec<(f64, usize)> = groups.iter().map(|group| (factor(group), most_useful(group.0))).collect();
    let rank = |&(factor, most): &(f64, usize), scale: f64| ((factor * scale + ROUNDING) as usize).clamp(1, most);
    let spent = |scale: f64| -> usize {
        groups.iter().zip(&shares).map(|((group, _), share)| group.size().parameters(rank(share, scale))).sum()
    };
    let (mut fits, mut over) = (0.0, f64::MAX.sqrt());
    for _ in 0..1100 {
        let scale = f64::midpoint(fits, over);
        if spent(scale) <= budget { fits = scale } else { over = scale }
    }
    for ((group, _), share) in groups.iter_mut().zip(&shares) {
        group.rank = Some(rank(share, fits));
    }
}

/// What a group may be: its parameters, the error it then has, and its rank; `None` for the weights as they are.
struct Choice {
    parameters: usize,
    error: f64,
    rank: Option<usize>,
}

/// The choices that are best for some price of a parameter, by rising parameters: on the lower convex hull.
fn choices(group: &PlannedGroup, spectrum: &Spectrum) -> Vec<Choice> {
    let (size, most) = (group.size(), most_useful(group));
    let mut left: f64 = spectrum.values.iter().sum();
    let mut all = Vec::with_capacity(most + 1);
    for rank in 1..=most {
        left = (left - spectrum.values.get(rank - 1).copied().unwrap_or(0.0)).max(0.0);
        all.push(Choice { parameters: size.parameters(rank), error: left, rank: Some(rank) });
    }
    all.push(Choice { parameters: size.dense(), error: 0.0, rank: None });
    let mut hull: Vec<Choice> = Vec::new();
    for choice in all {
        while let [.., before, last] = &hull[..] {
            if gain(before, last) > gain(last, &choice) {
                break;
            }
            hull.pop();
        }
        hull.push(choice);
    }
    hull
}

/// What the error shrinks by for each parameter.
fn gain(from: &Choice, to: &Choice) -> f64 {
    (from.error - to.error) / (to.parameters - from.parameters) as f64
}

/// Takes step after step of the groups' choices, the one with the largest gain for each parameter first. That is the least
/// sum of errors that the parameters can buy, but for the last few of them.
fn by_marginal_loss(groups: &mut [(&mut PlannedGroup, &Spectrum)]) {
    let mut budget: usize = groups.iter().map(|(group, _)| group.parameters_after()).sum();
    let mut steps: Vec<(f64, usize, usize, Option<usize>)> = Vec::new();
    for (index, (group, spectrum)) in groups.iter_mut().enumerate() {
        let choices = choices(group, spectrum);
        let pairs = choices.windows(2).filter_map(|pair| match pair {
            [from, to] => Some((gain(from, to), index, to.parameters - from.parameters, to.rank)),
            _ => None,
        });
        steps.extend(pairs);
        group.rank = Some(1);
        budget = budget.saturating_sub(group.parameters_after());
    }
    // Equal gains go to the earlier group, so that the outcome is one. Gains of a group fall, so that its steps stay in
    // their order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut ended = vec![false; groups.len()];
    for (_, index, parameters, rank) in steps {
        let (Some((group, _)), Some(ended)) = (groups.get_mut(index), ended.get_mut(index)) else { continue };
        if *ended {
            continue;
        }
        if parameters <= budget {
            budget -= parameters;
            group.rank = rank;
            continue;
        }
        // Part of the step, and no more of this group.
        *ended = true;
        let before = group.parameters_after();
        let most = group.size().largest_within(before + budget).min(most_useful(group));
        group.rank = group.rank.max(Some(most));
        budget -= group.parameters_after() - before;
    }
}
