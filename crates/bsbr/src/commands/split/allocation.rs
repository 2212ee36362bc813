//! Giving parameters to where they do most.

use anyhow::{Context, Result};
use bsbr_model::Decoder;
use bsbr_splitlinear::{
    BlockModel, CompressedGroup, MomentsFile, Plan, RankAllocation, SavedSplit, Spectrum, allocate,
    held_out_divergence, sensitivities, spectrum,
};
use serde::Serialize;

use super::{
    compress::alone,
    setup::{Setup, Windows},
};
use crate::output::{self, Progress};

/// Held-out windows that judge an allocation, at most.
const JUDGES: usize = 4;

/// A plan with its ranks.
pub(super) struct Allocation {
    pub(super) plan: Plan,
    /// What was solved on the way to it.
    pub(super) groups: Option<Vec<CompressedGroup>>,
    pub(super) measured: Option<Measured>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    /// The groups by themselves.
    groups: Vec<Sensitivity>,
    /// How far the predictions on held-out text are from the original ones with the same fraction kept of every group.
    uniform: f64,
    /// The same with parameters given to where they do most.
    allocated: f64,
    /// Whether the latter was smaller, and so kept.
    kept: bool,
}

#[derive(Debug, Serialize)]
struct Sensitivity {
    name: String,
    rank: usize,
    /// Divergence of the predictions with this group alone compressed to that rank.
    divergence: f64,
    /// The rank given to it; none where it stays as it is.
    allocated: Option<usize>,
}

/// The plan, its parameters given to where they do most if the configuration asks for it.
pub(super) fn of(
    setup: &Setup,
    decoder: &Decoder,
    moments: Option<&MomentsFile>,
    text: Option<&Windows>,
) -> Result<Allocation> {
    let plan = setup.plan.clone();
    match setup.config.rank {
        RankAllocation::Uniform => Ok(Allocation { plan, groups: None, measured: None }),
        RankAllocation::Sensitivity => {
            let text = text.context("there is no text")?;
            by_sensitivity(setup, plan, decoder, moments, text)
        }
        RankAllocation::DRank | RankAllocation::MarginalLoss => {
            let spectra = spectra(setup, &plan, decoder, moments)?;
            let mut plan = plan;
            allocate(&mut plan, &spectra, setup.config.rank)?;
            Ok(Allocation { plan, groups: None, measured: None })
        }
    }
}

/// The spectrum of every group, those that stay original among them.
fn spectra(setup: &Setup, plan: &Plan, decoder: &Decoder, moments: Option<&MomentsFile>) -> Result<Vec<Spectrum>> {
    let mut ranked = plan.clone();
    ranked.groups.iter_mut().for_each(|group| group.rank = group.rank.or(Some(1)));
    let groups = setup.draft(&ranked)?.groups;
    let settings = setup.config.solve_settings();
    let mut bar = Progress::new("spectra");
    let mut spectra: Vec<Spectrum> = Vec::new();
    for group in &groups {
        spectra.push(spectrum(decoder, group, moments, &settings)?);
        bar.set(spectra.len() as u64, groups.len() as u64);
    }
    Ok(spectra)
}

fn by_sensitivity(
    setup: &Setup,
    plan: Plan,
    decoder: &Decoder,
    moments: Option<&MomentsFile>,
    text: &Windows,
) -> Result<Allocation> {
    let windows = (&text.tokens[..], &text.windows[..]);
    let saved = setup.draft(&plan)?;
    let groups = alone(setup, decoder, &saved, moments)?;
    let divided = decoder.divided(&saved)?;
    let mut bar = Progress::new("measuring");
    let divergences = sensitivities(&divided, &groups, windows, &mut |done, total| bar.set(done as u64, total as u64))?;
    drop((bar, divided));
    let uniform = judged(decoder, &saved, &groups, windows)?;

    let measured: std::collections::HashMap<&str, f64> =
        groups.iter().map(|group| group.saved.name.as_str()).zip(divergences.iter().copied()).collect();
    let spectra: Vec<Spectrum> = spectra(setup, &plan, decoder, moments)?
        .iter()
        .zip(&plan.groups)
        .map(|(spectrum, group)| {
            let divergence = measured.get(group.name.as_str()).copied().unwrap_or(0.0);
            spectrum.scaled(group.rank.unwrap_or(0), divergence)
        })
        .collect();
    let mut given = plan.clone();
    allocate(&mut given, &spectra, RankAllocation::Sensitivity)?;
    let saved = setup.draft(&given)?;
    let better = alone(setup, decoder, &saved, moments)?;
    let allocated = judged(decoder, &saved, &better, windows)?;
    let kept = allocated < uniform;
    let of = |((group, given), divergence)| {
        let (group, given): (&CompressedGroup, Option<usize>) = (group, given);
        Sensitivity { name: group.saved.name.clone(), rank: group.saved.rank, divergence, allocated: given }
    };
    let ranks = plan.groups.iter().zip(&given.groups).filter(|(group, _)| group.rank.is_some());
    let ranks: Vec<Option<usize>> = ranks.map(|(_, given)| given.rank).collect();
    let list = groups.iter().zip(ranks).zip(divergences).map(of).collect();
    output::note(&format!(
        "held-out text: divergence {uniform:.4} with the same fraction of every group, {allocated:.4} with parameters \
         where they do most: {}",
        if kept { "kept" } else { "not kept" }
    ));
    let measured = Some(Measured { groups: list, uniform, allocated, kept });
    Ok(if kept {
        Allocation { plan: given, groups: Some(better), measured }
    } else {
        Allocation { plan, groups: Some(groups), measured }
    })
}

/// How far predictions on held-out text are from those of the original.
fn judged(
    decoder: &Decoder,
    saved: &SavedSplit,
    groups: &[CompressedGroup],
    windows: (&[u32], &[bsbr_splitlinear::Window]),
) -> Result<f64> {
    let mut compressed = decoder.divided(saved)?;
    for group in groups {
        compressed.install(&group.saved, &group.factors)?;
    }
    let divergence = held_out_divergence(decoder, &compressed, windows, JUDGES)?;
    divergence.context("no window of the text is held out")
}
