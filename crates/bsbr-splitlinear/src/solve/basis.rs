//! The best basis of a group in closed form, without an inverse.
//!
//! For one layer: minimise `|| X (W - W') ||^2` over `W'` of rank `k`. With `X^T X = S^T S` the error of
//! `W' = W V V^T` is the tail of the squared singular values of `S W`, if `V` holds its `k` leading right singular
//! vectors, and no `W'` has less. So the basis is `W V` and the coefficients are `V^T`: nothing has to be inverted, and
//! directions the text does not show are kept as they are. It is the same optimum as whitening by a Cholesky factor and
//! taking its inverse back (SVD-LLM, arXiv 2403.07378; Basis Sharing, arXiv 2410.03765).

use faer::Mat;

use super::decompose::{Directions, leading, root, squared_singular_values};
use super::layer::Layer;
use super::matrix::{below, beside, square};
use crate::{Decomposition, Share, Spectrum, Weighting};

/// Directions that carry less of what the weights have left, in units of the weights, are rounding.
const NOTHING_LEFT: f64 = 1e-24;

/// Factors in `f64`, as [`crate::GroupFactors`] lays them out.
pub(super) struct Solution {
    pub(super) basis: Mat<f64>,
    pub(super) coefficients: Vec<Mat<f64>>,
    /// Squared singular values, falling.
    pub(super) values: Vec<f64>,
    /// The scale of each dimension, for storing it in equal parts on both sides.
    pub(super) scales: Vec<f64>,
    pub(super) how: Decomposition,
}

/// What each layer's error counts.
pub(super) fn weights_of(layers: &[Layer], weighting: Weighting) -> Vec<f64> {
    let weight = |layer: &Layer| match weighting {
        Weighting::Sum => 1.0,
        Weighting::Relative => {
            let energy = layer.fitted_energy();
            if energy > 0.0 { 1.0 / energy } else { 1.0 }
        }
    };
    layers.iter().map(weight).collect()
}

/// A group as one matrix whose truncation is its compression.
struct Stacked {
    /// Columns are outputs; its right singular vectors are wanted.
    weighted: Mat<f64>,
    /// The same without the moments.
    plain: Mat<f64>,
    /// By what each layer was multiplied.
    scales: Vec<f64>,
}

/// One layer alone has no side to share, and its moments are its own either way.
fn in_rows(layers: &[Layer], share: Share) -> bool {
    share != Share::Input || layers.len() == 1
}

/// Layers side by side share their inputs, layers one below the other their outputs.
fn stacked(layers: &[Layer], share: Share, weighting: Weighting) -> Result<Stacked, String> {
    let weights = weights_of(layers, weighting);
    let scaled = |(layer, &scale): (&Layer, &f64)| layer.target() * faer::Scale(scale);
    if in_rows(layers, share) {
        let scales: Vec<f64> = weights.iter().map(|weight| weight.sqrt()).collect();
        let plain: Vec<Mat<f64>> = layers.iter().zip(&scales).map(scaled).collect();
        let weighted = layers.iter().zip(&plain).map(|(layer, plain)| match &layer.gram {
            Some(gram) => Ok(root(gram.as_ref())? * plain),
            None => Ok(plain.clone()),
        });
        let weighted = weighted.collect::<Result<Vec<_>, String>>()?;
        return Ok(Stacked { weighted: below(&weighted), plain: below(&plain), scales });
    }
    // The inputs of the layers differ, so that one set of moments has to stand for all: their mean. As published, every
    // layer's columns then count the same; relative errors ask for the weight of each, where its inputs have a scale.
    let scales: Vec<f64> = match weighting {
        Weighting::Sum => vec![1.0; layers.len()],
        Weighting::Relative => {
            let scale = |(layer, weight): (&Layer, &f64)| (weight * layer.input_energy()).sqrt();
            layers.iter().zip(&weights).map(scale).map(|scale| if scale > 0.0 { scale } else { 1.0 }).collect()
        }
    };
    let plain = beside(&layers.iter().zip(&scales).map(scaled).collect::<Vec<_>>());
    let weighted = match pooled(layers, weighting) {
        Some(gram) => root(gram.as_ref())? * &plain,
        None => plain.clone(),
    };
    Ok(Stacked { weighted, plain, scales })
}

/// The mean of the layers' moments; for relative errors, of the moments in units of their own scale.
fn pooled(layers: &[Layer], weighting: Weighting) -> Option<Mat<f64>> {
    let mut sum: Option<Mat<f64>> = None;
    for layer in layers {
        let scale = match weighting {
            Weighting::Sum => 1.0,
            Weighting::Relative => layer.input_energy(),
        };
        let part =
            layer.gram.as_ref()? * faer::Scale(if scale > 0.0 { 1.0 / (scale * layers.len() as f64) } else { 0.0 });
        match &mut sum {
            Some(sum) => *sum += part,
            None => sum = Some(part),
        }
    }
    sum
}

/// The squared singular values of a group.
pub(super) fn spectrum(layers: &[Layer], share: Share, weighting: Weighting) -> Result<Spectrum, String> {
    let values = squared_singular_values(stacked(layers, share, weighting)?.weighted.as_ref())?;
    let energy = values.iter().sum();
    Ok(Spectrum { values, energy })
}

/// The best basis of width `rank` and its coefficients.
pub(super) fn solve(layers: &[Layer], share: Share, weighting: Weighting, rank: usize) -> Result<Solution, String> {
    let stacked = stacked(layers, share, weighting)?;
    let Directions { vectors, values, how } = leading(stacked.weighted.as_ref(), rank)?;
    let known = vectors.ncols();
    let vectors = filled(&stacked.plain, vectors, rank)?;
    let projected = &stacked.plain * &vectors;

    // The scale of a dimension is its singular value; where the text does not show it, its norm in the same units.
    let norms: Vec<f64> = (0..rank).map(|column| square(projected.subcols(column, 1)).sqrt()).collect();
    let shown: f64 = values.iter().take(known).map(|value| value.sqrt()).sum();
    let unit = if known > 0 { shown / norms.iter().take(known).sum::<f64>() } else { 1.0 };
    let scales = norms.iter().enumerate().map(|(column, norm)| match values.get(column) {
        Some(value) if column < known => value.sqrt(),
        _ => norm * unit,
    });
    let scales = scales.collect();

    let (inputs, outputs) = layers.first().map_or((0, 0), |layer| (layer.weight.nrows(), layer.weight.ncols()));
    let unscaled = stacked.scales.iter().map(|scale| faer::Scale(1.0 / scale)).enumerate();
    let (basis, coefficients) = if in_rows(layers, share) {
        let shared = vectors.transpose().to_owned();
        let mut own: Vec<Mat<f64>> =
            unscaled.map(|(index, unscale)| projected.subrows(index * inputs, inputs) * unscale).collect();
        match (share, own.pop()) {
            (Share::Input | Share::None, Some(only)) => (only, vec![shared]),
            (_, last) => {
                own.extend(last);
                (shared, own)
            }
        }
    } else {
        let own = |(index, unscale)| vectors.subrows(index * outputs, outputs).transpose() * unscale;
        (projected, unscaled.map(own).collect())
    };
    Ok(Solution { basis, coefficients, values, scales, how })
}

/// Adds directions, up to `rank`, that the text does not show but the weights have: the leading ones of what is left of
/// the weights. Without such directions the columns are 0.
fn filled(plain: &Mat<f64>, vectors: Mat<f64>, rank: usize) -> Result<Mat<f64>, String> {
    let known = vectors.ncols();
    if known >= rank {
        return Ok(vectors);
    }
    let mut left = plain.clone();
    left -= plain * &vectors * vectors.transpose();
    let mut all = Mat::zeros(plain.ncols(), rank);
    all.subcols_mut(0, known).copy_from(&vectors);
    if square(left.as_ref()) > NOTHING_LEFT * square(plain.as_ref()) {
        let more = leading(left.as_ref(), rank - known)?.vectors;
        all.subcols_mut(known, more.ncols()).copy_from(&more);
    }
    Ok(all)
}
