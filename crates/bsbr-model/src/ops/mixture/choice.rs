//! Which experts a token goes through, from the scores its router gives them.

use std::cmp::Ordering;

use crate::{ExpertGroups, RouterConfig, RouterKind};

/// The experts of one token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    /// Their numbers, the first choice first.
    pub(super) experts: Vec<usize>,
    /// For each the experts that its weight is a softmax over, where the router has such.
    pub(super) among: Vec<Vec<usize>>,
}

/// Chooses. Of equal scores that of the expert with the lower number comes first.
pub(super) fn choose(scores: &[f64], correction: Option<&[f32]>, chosen: usize, router: &RouterConfig) -> Choice {
    if let RouterKind::Sparsemixer { jitter } = router.kind {
        return sparse(scores, jitter);
    }
    let mut ranks = activated(scores, router.kind);
    for (rank, correction) in ranks.iter_mut().zip(correction.into_iter().flatten()) {
        *rank += f64::from(*correction);
    }
    if let Some(groups) = router.groups {
        leave_groups(&mut ranks, groups);
    }
    Choice { experts: highest(&ranks, chosen), among: Vec::new() }
}

impl Choice {
    /// The experts with their weights.
    pub(super) fn weights(&self, scores: &[f64], router: &RouterConfig) -> Vec<(usize, f64)> {
        let weights: Vec<f64> = if self.among.is_empty() {
            let all = activated(scores, router.kind);
            self.experts.iter().map(|&expert| all[expert]).collect()
        } else {
            let of = |(&expert, among): (&usize, &Vec<usize>)| {
                1.0 / among.iter().map(|&other| (scores[other] - scores[expert]).exp()).sum::<f64>()
            };
            self.experts.iter().zip(&self.among).map(of).collect()
        };
        let sum = router.normalised.map_or(1.0, |least| weights.iter().sum::<f64>().max(least));
        let factor = router.scale.unwrap_or(1.0) / sum;
        self.experts.iter().copied().zip(weights.into_iter().map(|weight| weight * factor)).collect()
    }
}

/// The scores as weights are made of them.
fn activated(scores: &[f64], kind: RouterKind) -> Vec<f64> {
    match kind {
        RouterKind::Sigmoid => scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect(),
        RouterKind::Softmax | RouterKind::Sparsemixer { .. } => {
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = powers.iter().sum();
            powers.into_iter().map(|power| power / sum).collect()
        }
    }
}

/// The places of the `count` highest numbers.
fn highest(numbers: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    let before =
        |&a: &usize, &b: &usize| numbers[b].partial_cmp(&numbers[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b));
    order.sort_by(before);
    order.truncate(count);
    order
}

/// Makes all experts but those of the best groups impossible.
fn leave_groups(ranks: &mut [f64], ExpertGroups { count, kept, by_highest }: ExpertGroups) {
    let size = ranks.len() / count;
    let counted = if by_highest { 1 } else { 2 };
    let best = |group: &[f64]| highest(group, counted).into_iter().map(|at| group[at]).sum::<f64>();
    let sums: Vec<f64> = ranks.chunks_exact(size).map(best).collect();
    let kept = highest(&sums, kept);
    for (group, ranks) in ranks.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            ranks.fill(f64::NEG_INFINITY);
        }
    }
}

/// The highest, and the highest of the others; each with those near it among what it was chosen from.
fn sparse(scores: &[f64], jitter: f64) -> Choice {
    let near = |best: usize, other: usize| {
        let (best, other) = (scores[best], scores[other]);
        // Against a NaN too, which is near nothing.
        (best - other) / other.abs().max(best) <= 2.0 * jitter
    };
    let first = highest(scores, 1)[0];
    let second = highest(scores, 2).into_iter().find(|&expert| expert != first).unwrap_or(first);
    let among = |best: usize, left_out: Option<usize>| {
        (0..scores.len()).filter(|&it| it == best || (Some(it) != left_out && near(best, it))).collect()
    };
    Choice { experts: vec![first, second], among: vec![among(first, None), among(second, Some(first))] }
}
