//! Closed-form solutions, on moments and weights in `f64`.

mod basis;
mod decompose;
mod layer;
mod matrix;
mod pivot;
mod refit;
mod store;

use std::time::Instant;

use faer::Mat;

use self::basis::{Solution, weights_of};
use self::layer::{Judge, Layer};
use self::refit::product;
use crate::{
    Form, Group, GroupFactors, GroupReport, Member, MemberReport, Objective, Refit, RefitOutcome, RefitReport, Share,
    SolveSettings, Spectrum, SplitError,
};

/// Basis and coefficients of a group.
pub(crate) fn compress(group: &Group<'_>, settings: &SolveSettings) -> Result<(GroupFactors, GroupReport), SplitError> {
    let start = Instant::now();
    let layers = layers_of(group, settings)?;
    let rank = usable_rank(group)?;
    let solved = basis::solve(&layers, group.share, settings.weighting, rank);
    let Solution { mut basis, mut coefficients, values, scales, how } =
        solved.map_err(|problem| failed(group, problem))?;

    let before = error_of(&layers, group.share, &basis, &coefficients, true);
    let outcome = refit(&layers, group.share, settings, &mut basis, &mut coefficients);
    let factors = store::factors((group.share, group.form), basis, coefficients, &scales);
    let (basis, coefficients) = store::read(&factors);

    let after = error_of(&layers, group.share, &basis, &coefficients, true);
    let refit = match outcome {
        RefitOutcome::Accepted => RefitReport { outcome, before, after },
        _ => RefitReport { outcome, before, after: before },
    };
    let spectrum = Spectrum { energy: values.iter().sum(), values };
    let report = GroupReport {
        name: group.name.to_owned(),
        share: group.share,
        form: group.form,
        inputs: group.inputs,
        outputs: group.outputs,
        rank,
        parameters_before: group.size().dense(),
        parameters_after: group.size().parameters(rank),
        flop_ratio: group.size().flop_ratio(rank),
        effective_rank: spectrum.effective_rank(),
        error: error_of(&layers, group.share, &basis, &coefficients, false).unwrap_or(0.0),
        held_out_error: after,
        largest_factor: factors.largest(),
        decomposition: how,
        refit,
        members: member_reports(group, &layers, &basis, &coefficients),
        seconds: start.elapsed().as_secs_f64(),
    };
    Ok((factors, report))
}

/// The spectrum of a group.
pub(crate) fn spectrum(group: &Group<'_>, settings: &SolveSettings) -> Result<Spectrum, SplitError> {
    let layers = layers_of(group, settings)?;
    basis::spectrum(&layers, group.share, settings.weighting).map_err(|problem| failed(group, problem))
}

/// The coefficients of one member anew, the basis as it is.
pub(crate) fn refit_member(
    factors: &mut GroupFactors,
    index: usize,
    member: &Member<'_>,
    settings: &SolveSettings,
) -> Result<RefitReport, SplitError> {
    let layer = Layer::new(member, factors.inputs, factors.outputs, settings)?;
    let (share, members) = (factors.share, factors.coefficients.len());
    let (basis, coefficients) = store::read(factors);
    let Some(own) = coefficients.into_iter().nth(index) else {
        return Err(SplitError::shape(
            member.name,
            format!("one of the {members} members of its group"),
            index.to_string(),
        ));
    };
    let error = |own: &Mat<f64>| relative_error(&layer, layer.held_out.as_ref()?, &product(share, &basis, own));
    let before = error(&own);
    let report = |outcome, after| Ok(RefitReport { outcome, before, after });
    if settings.refit.c == Refit::Off {
        return report(RefitOutcome::Off, before);
    }
    let Some(before_error) = before else { return report(RefitOutcome::NoHeldOut, None) };

    let (even_basis, even_own, scales) = store::evened(share, basis.clone(), own);
    let new = refit::fitted(&layer, share, &even_basis, &even_own, settings.refit.rho);
    let new = new.map(|new| store::restored(share, new, &scales));
    let after = new.as_ref().and_then(error);
    match (new, after) {
        (Some(new), Some(after_error)) if after_error < before_error => {
            if let Some(slot) = factors.coefficients.get_mut(index) {
                *slot = matrix::to_rows(new.as_ref());
            }
            report(RefitOutcome::Accepted, after)
        }
        _ => report(RefitOutcome::Rejected, before),
    }
}

/// The product of the factors.
pub(crate) fn weight(factors: &GroupFactors, member: usize) -> Option<Vec<f32>> {
    let (basis, coefficients) = store::read(factors);
    let own = coefficients.get(member)?;
    Some(matrix::to_rows(product(factors.share, &basis, own).as_ref()))
}

fn failed(group: &Group<'_>, problem: String) -> SplitError {
    let size = format!("{} of {} x {}", group.members.len(), group.inputs, group.outputs);
    SplitError::Decomposition { group: group.name.to_owned(), size, problem }
}

fn layers_of(group: &Group<'_>, settings: &SolveSettings) -> Result<Vec<Layer>, SplitError> {
    let members = group.members.len();
    if members == 0 || group.inputs == 0 || group.outputs == 0 {
        let found = format!("{members} of {} x {}", group.inputs, group.outputs);
        return Err(SplitError::shape(group.name, "at least one layer with inputs and outputs", found));
    }
    if group.share == Share::None && members > 1 {
        return Err(SplitError::shape(group.name, "one layer, because nothing is shared", members.to_string()));
    }
    if group.share == Share::Output && group.form == Form::Pivoted {
        return Err(SplitError::shape(group.name, "two factors, because its outputs are shared", "pivoted ones"));
    }
    group.members.iter().map(|member| Layer::new(member, group.inputs, group.outputs, settings)).collect()
}

/// The rank asked for, cut to what a product of the factors can have.
fn usable_rank(group: &Group<'_>) -> Result<usize, SplitError> {
    if group.rank == 0 {
        return Err(SplitError::shape(group.name, "a rank of 1 or more", "0"));
    }
    Ok(group.rank.min(group.size().largest_rank()))
}

/// Fits to the layers' own inputs where the closed form had to pool them.
fn refit(
    layers: &[Layer],
    share: Share,
    settings: &SolveSettings,
    basis: &mut Mat<f64>,
    coefficients: &mut [Mat<f64>],
) -> RefitOutcome {
    let pooled = share == Share::Input && layers.len() > 1 && layers.iter().all(|layer| layer.gram.is_some());
    if settings.refit.c == Refit::Off {
        RefitOutcome::Off
    } else if !pooled || settings.objective == Objective::Weights {
        RefitOutcome::NotNeeded
    } else if layers.iter().any(|layer| layer.held_out.is_none()) {
        RefitOutcome::NoHeldOut
    } else {
        let rho = settings.refit.rho;
        let fitted = refit::fit_coefficients(layers, share, basis, coefficients, rho);
        let weights = weights_of(layers, settings.weighting);
        let alternated = refit::alternate(layers, &weights, basis, coefficients, rho, settings.refit.alternations);
        if fitted || alternated { RefitOutcome::Accepted } else { RefitOutcome::Rejected }
    }
}

fn judge_of(layer: &Layer, held_out: bool) -> Option<&Judge> {
    if held_out { layer.held_out.as_ref() } else { Some(&layer.judge) }
}

/// Squared error of the outputs of all layers in units of their energy.
fn error_of(layers: &[Layer], share: Share, basis: &Mat<f64>, own: &[Mat<f64>], held_out: bool) -> Option<f64> {
    let (mut errors, mut energies) = (0.0, 0.0);
    for (layer, own) in layers.iter().zip(own) {
        let judge = judge_of(layer, held_out)?;
        errors += judge.error(layer.weight.as_ref(), product(share, basis, own).as_ref());
        energies += judge.energy(layer.weight.as_ref());
    }
    Some(quotient(errors, energies))
}

fn relative_error(layer: &Layer, judge: &Judge, approximation: &Mat<f64>) -> Option<f64> {
    let weight = layer.weight.as_ref();
    Some(quotient(judge.error(weight, approximation.as_ref()), judge.energy(weight)))
}

/// Outputs without energy are reproduced by anything that gives none either. Never infinite: reports are JSON.
fn quotient(error: f64, energy: f64) -> f64 {
    if error == 0.0 { 0.0 } else { (error / energy).min(f64::MAX) }
}

fn member_reports(group: &Group<'_>, layers: &[Layer], basis: &Mat<f64>, own: &[Mat<f64>]) -> Vec<MemberReport> {
    let members = group.members.iter().zip(layers).zip(own);
    let report = |((member, layer), own): ((&Member<'_>, &Layer), &Mat<f64>)| {
        let approximation = product(group.share, basis, own);
        let (condition, input_rank) = layer.condition();
        MemberReport {
            name: member.name.to_owned(),
            error: relative_error(layer, &layer.judge, &approximation).unwrap_or(0.0),
            held_out_error: layer.held_out.as_ref().and_then(|judge| relative_error(layer, judge, &approximation)),
            tokens: layer.tokens,
            tokens_per_input: layer.tokens as f64 / group.inputs as f64,
            condition,
            input_rank,
            ridge: layer.ridge,
        }
    };
    members.map(report).collect()
}

#[cfg(test)]
mod tests;
