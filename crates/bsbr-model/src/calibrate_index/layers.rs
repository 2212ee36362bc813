//! Thresholds of single layers.
//!
//! Layers differ in what a key is worth. For each the error of its output behind the projection, against full attention on
//! what the original gives it, is measured with a few thresholds around the one of all, and the keys these read. One price of
//! an error then says which factor each layer should have; the price itself is found by whole-model trials, as the highest
//! loss that stays within the target.

use bsbr_attn::{AttentionCache, CacheConfig};

use super::{IndexTrial, Search};
use crate::{
    Decoder, LayerTrace, ModelError,
    calibrate_far::{squares, through},
};

/// What a threshold may be multiplied by.
const FACTORS: [f64; 5] = [0.25, 0.5, 1.0, 2.0, 4.0];

/// Prices that are tried.
pub(super) const TRIALS: usize = 5;

/// Thresholds of their own have to save this share of the cost.
const LEAST_GAIN: f64 = 0.02;

/// What a layer does with one factor.
#[derive(Debug, Clone, Copy)]
struct Choice {
    factor: f64,
    keys: f64,
    error: f64,
}

/// Factors for all layers that are cheaper than `found` and within the target; none where there are not.
pub(super) fn factors(
    search: &mut Search<'_>,
    original: &Decoder,
    window: &[u32],
    found: IndexTrial,
) -> Result<Vec<f64>, ModelError> {
    let base = super::with_settings(search.decoder.config(), found.settings);
    let layers: Vec<usize> =
        (0..base.decoder.layers).filter(|&layer| base.layer_attention(layer).is_some_and(super::has_index)).collect();
    if layers.len() < 2 {
        return Ok(Vec::new());
    }
    let decoder = search.decoder.with_config(|config| config.clone_from(&base))?;
    let mut choices: Vec<Vec<Choice>> = Vec::with_capacity(layers.len());
    through(original, window, &layers, |trace, _| {
        choices.push(of_layer(&decoder, &trace)?);
        Ok(())
    })?;
    let assigned = |price: f64| {
        let mut factors = vec![1.0; base.decoder.layers];
        for (&layer, choices) in layers.iter().zip(&choices) {
            let cost = |choice: &&Choice| choice.keys + price * choice.error;
            if let Some(best) = choices.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))) {
                factors[layer] = best.factor;
            }
        }
        factors
    };
    // The price at which half of an average error is worth half of the average keys, and far to both sides of it.
    let mean = |of: fn(&Choice) -> f64| choices.iter().flatten().map(of).sum::<f64>().max(f64::MIN_POSITIVE);
    let middle = (mean(|choice| choice.keys) / mean(|choice| choice.error)).ln();
    let (mut low, mut high) = (middle - 8.0, middle + 8.0);
    let mut best: Option<(f64, Vec<f64>)> = None;
    for _ in 0..TRIALS {
        let price = low.midpoint(high);
        let factors = assigned(price.exp());
        let mut config = base.clone();
        config.threshold_factors.clone_from(&factors);
        let trial = search.run(&config, found.settings)?;
        if trial.kl <= search.target {
            high = price;
            if best.as_ref().is_none_or(|(cost, _)| trial.cost < *cost) {
                best = Some((trial.cost, factors));
            }
        } else {
            low = price;
        }
    }
    Ok(best.filter(|(cost, _)| *cost < (1.0 - LEAST_GAIN) * found.cost).map(|(_, factors)| factors).unwrap_or_default())
}

/// What one layer does with each factor.
fn of_layer(decoder: &Decoder, trace: &LayerTrace) -> Result<Vec<Choice>, ModelError> {
    let made = decoder.new_cache(&[1])?.texts[0].layers[trace.layer].config().clone();
    let projections = &decoder.blocks[trace.layer].attention;
    let projection = projections.output.dense_weight(&decoder.device());
    let gate = projections.opening(&trace.normed, made.heads);
    let whole = squares(trace.read.clone(), gate.as_ref(), &projection)?.max(f64::MIN_POSITIVE);
    let with = |factor: f64| -> Result<Choice, ModelError> {
        let mut attention = made.attention.clone();
        if let Some(attention) = &mut attention {
            attention.threshold *= factor;
        }
        let mut cache = AttentionCache::new(CacheConfig { attention, ..made.clone() }, &decoder.device())?;
        let read = cache.prefill(trace.query.clone(), trace.keys.clone(), trace.values.clone(), None)?;
        let error = squares(read - trace.read.clone(), gate.as_ref(), &projection)? / whole;
        Ok(Choice { factor, keys: cache.retrieved().keys as f64, error })
    };
    FACTORS.into_iter().map(with).collect()
}
