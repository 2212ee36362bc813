//! Calibrating the meta projections: closed form, from a few thousand tokens of text.
//!
//! The meta query of a chunk is fitted to the mean of the queries of its tokens, the meta key of a block to the mean of
//! its keys weighted by the attention that later chunks pay to each: to first order the log-mass of a block is the product
//! of the two. Both are taken as they stand at the token whose input predicts them (rotations are undone up to there), and
//! both are linear in that input: ridge regressions, solved in f64.
//!
//! Every position of the text serves as the beginning of a chunk and as the end of a block, not only those at their
//! borders. The last windows of the text are not fitted to: they choose the ridge, and a layer whose start values read
//! them better keeps those.

mod heads;
mod ridge;
mod score;
mod targets;

use burn::{module::Param, nn::Linear, tensor::Tensor};
use serde::{Deserialize, Serialize};

use crate::{Decoder, EXTRA_PREFIX, LayerTrace, ModelError};
use heads::Heads;
use ridge::NormalEquations;
use score::Score;

/// Ridges tried for the meta keys, relative to the mean square of an input.
const KEY_RIDGES: [f64; 3] = [1e-3, 1e-2, 1e-1];

/// Ridge of the meta queries, likewise: they hardly depend on it.
const QUERY_RIDGE: f64 = 1e-2;

/// One window in so many is kept for choosing.
const HELD_OUT: usize = 4;

/// Bytes of normal equations held at once; where a model has more, its layers take turns.
const MEMORY: usize = 1 << 30;

/// What to calibrate on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaCalibrationConfig {
    /// Tokens of a window; windows follow each other through the text.
    pub window: usize,
    /// Most windows to read, at least two: one in four is kept for choosing.
    pub windows: usize,
}

/// The calibrated meta projections of a decoder.
#[derive(Debug)]
pub struct MetaCalibration {
    /// Windows fitted to.
    pub windows: usize,
    /// Windows kept for choosing.
    pub held_out: usize,
    /// One entry for each layer with meta projections.
    pub layers: Vec<MetaLayer>,
    accepted: Vec<(usize, Linear, Linear)>,
}

/// What calibration did for one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaLayer {
    /// Number of the layer.
    pub layer: usize,
    /// Share of the attention to far blocks in the held-out windows that the start values catch: that of the blocks they
    /// choose, or under `retrieval = state` and `additive` what their weights have in common with the true ones.
    pub before: f64,
    /// The same of the fitted projections.
    pub after: f64,
    /// Whether the fitted ones replace the start values.
    pub accepted: bool,
    /// Ridge of the meta query, relative to the mean square of an input.
    pub query_ridge: f64,
    /// Ridge of the meta key.
    pub key_ridge: f64,
}

impl MetaCalibration {
    /// The decoder with the accepted projections.
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] for a decoder without the layers that were calibrated.
    pub fn apply(&self, decoder: &Decoder) -> Result<Decoder, ModelError> {
        let mut decoder = decoder.clone();
        for (layer, query, key) in &self.accepted {
            let block = decoder.blocks.get_mut(*layer);
            let block = block.ok_or_else(|| ModelError::Input(format!("the decoder has no layer {layer}")))?;
            block.attention.meta_query = Some(query.clone());
            block.attention.meta_key = Some(key.clone());
        }
        Ok(decoder)
    }

    /// Names and numbers of the accepted weights, in the layout of [`crate::WeightSpec::shape`].
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] if the device does not give the numbers back.
    pub fn weights(&self) -> Result<Vec<(String, Vec<f32>)>, ModelError> {
        let mut weights = Vec::with_capacity(4 * self.accepted.len());
        for (layer, query, key) in &self.accepted {
            for (part, linear) in [("meta_query", query), ("meta_key", key)] {
                let name = format!("{EXTRA_PREFIX}layers.{layer}.{part}");
                weights.push((format!("{name}.weight"), numbers(linear.weight.val().transpose())?));
                if let Some(bias) = &linear.bias {
                    weights.push((format!("{name}.bias"), numbers(bias.val())?));
                }
            }
        }
        Ok(weights)
    }
}

/// Fits the meta projections of every layer that has them to the original attention of `decoder` on `tokens`. `each` hears
/// after every window how many of how many are read.
///
/// Depends on nothing but its arguments: the same text gives the same numbers.
///
/// # Errors
///
/// [`ModelError::Config`] if nothing reads meta projections under the settings of `decoder`; [`ModelError::Input`] if
/// the text is shorter than two windows, or a window so short that there is nothing to choose in it;
/// [`ModelError::TooLong`] for a window past the learned positions.
pub fn calibrate_meta(
    decoder: &Decoder,
    tokens: &[u32],
    config: MetaCalibrationConfig,
    mut each: impl FnMut(usize, usize),
) -> Result<MetaCalibration, ModelError> {
    let layers = meta_layers(decoder)?;
    let available = (tokens.len() / config.window.max(1)).min(config.windows);
    check(decoder, tokens.len(), available, config)?;
    let held_out = (available / HELD_OUT).max(1);
    let fitted = available - held_out;
    let windows: Vec<&[u32]> = tokens.chunks_exact(config.window).take(available).collect();
    let original = decoder.with_config(|config| config.attention = None)?;

    let at_once = (MEMORY / NormalEquations::bytes(decoder).max(1)).clamp(1, layers.len());
    let total = windows.len() * layers.len().div_ceil(at_once);
    let mut done = 0;
    let mut calibration = MetaCalibration { windows: fitted, held_out, layers: Vec::new(), accepted: Vec::new() };
    for group in layers.chunks(at_once) {
        let mut equations: Vec<[NormalEquations; 2]> =
            group.iter().map(|&layer| [(); 2].map(|()| NormalEquations::new(decoder, layer))).collect();
        for text in &windows[..fitted] {
            trace(&original, decoder, text, group, |at, heads| {
                targets::meta_queries(heads, &mut equations[at][0])?;
                targets::meta_keys(heads, &mut equations[at][1])
            })?;
            done += 1;
            each(done, total);
        }
        let candidates: Result<Vec<Vec<Candidate>>, ModelError> =
            group.iter().zip(&equations).map(|(&layer, equations)| candidates(decoder, layer, equations)).collect();
        let candidates = candidates?;
        drop(equations);
        let mut scores: Vec<Vec<Score>> = candidates.iter().map(|list| vec![Score::default(); list.len()]).collect();
        for text in &windows[fitted..] {
            trace(&original, decoder, text, group, |at, heads| {
                let shares = heads.shares_by_chunk();
                let mut pairs = candidates[at].iter().zip(&mut scores[at]);
                pairs.try_for_each(|(candidate, score)| score.add(heads, &shares, &candidate.query, &candidate.key))
            })?;
            done += 1;
            each(done, total);
        }
        for ((&layer, candidates), scores) in group.iter().zip(candidates).zip(scores) {
            calibration.choose(layer, candidates, &scores);
        }
    }
    Ok(calibration)
}

/// Two projections that may be taken; the first of a layer are its start values.
struct Candidate {
    query: Linear,
    key: Linear,
    key_ridge: f64,
}

impl MetaCalibration {
    fn choose(&mut self, layer: usize, mut candidates: Vec<Candidate>, scores: &[Score]) {
        let shares: Vec<f64> = scores.iter().map(Score::share).collect();
        let best = (1..shares.len()).fold(1, |best, at| if shares[at] > shares[best] { at } else { best });
        let (before, after) = (shares[0], shares.get(best).copied().unwrap_or(shares[0]));
        let accepted = after > before;
        let key_ridge = candidates.get(best).map_or(0.0, |candidate| candidate.key_ridge);
        self.layers.push(MetaLayer { layer, before, after, accepted, query_ridge: QUERY_RIDGE, key_ridge });
        if accepted {
            let Candidate { query, key, .. } = candidates.swap_remove(best);
            self.accepted.push((layer, query, key));
        }
    }
}

/// The start values of a layer and what the equations give for each ridge.
fn candidates(
    decoder: &Decoder,
    layer: usize,
    [queries, keys]: &[NormalEquations; 2],
) -> Result<Vec<Candidate>, ModelError> {
    let attention = &decoder.blocks[layer].attention;
    let (Some(query), Some(key)) = (&attention.meta_query, &attention.meta_key) else {
        return Err(ModelError::Input(format!("layer {layer} has no meta projections")));
    };
    let mut list = vec![Candidate { query: query.clone(), key: key.clone(), key_ridge: 0.0 }];
    let Some(query) = queries.solve(QUERY_RIDGE) else { return Ok(list) };
    let query = linear((decoder, layer), query);
    for key_ridge in KEY_RIDGES {
        if let Some(key) = keys.solve(key_ridge) {
            list.push(Candidate { query: query.clone(), key: linear((decoder, layer), key), key_ridge });
        }
    }
    Ok(list)
}

/// A layer of a solution, weights `[out, in]`.
fn linear((decoder, layer): (&Decoder, usize), solution: ridge::Solution) -> Linear {
    let device = decoder.device();
    let outputs = decoder.config().decoder.heads * decoder.config().decoder.shape(layer).head_dim;
    let inputs = decoder.config().decoder.hidden_size;
    let weight = burn::tensor::TensorData::new(solution.weight, [outputs, inputs]);
    Linear {
        weight: Param::from_tensor(Tensor::<2>::from_data(weight, &device).transpose()),
        bias: solution.bias.map(|bias| Param::from_tensor(Tensor::from_data(bias.as_slice(), &device))),
    }
}

/// Runs the original attention over `text` and shows `visit` the layers `group`, numbered as there.
fn trace(
    original: &Decoder,
    decoder: &Decoder,
    text: &[u32],
    group: &[usize],
    mut visit: impl FnMut(usize, &Heads<'_>) -> Result<(), ModelError> + Send,
) -> Result<(), ModelError> {
    let mut cache = original.new_cache(&[text.len()])?;
    let caches = cache.clone();
    let mut result = Ok(());
    original.trace(text, &mut cache, &mut |layer: LayerTrace| {
        let Some(at) = group.iter().position(|&wanted| wanted == layer.layer) else { return };
        if result.is_ok() {
            result = Heads::new(decoder, &caches, layer).and_then(|heads| visit(at, &heads));
        }
    })?;
    result
}

/// Layers with meta projections that something reads.
fn meta_layers(decoder: &Decoder) -> Result<Vec<usize>, ModelError> {
    let config = decoder.config();
    let needs = |&layer: &usize| config.layer_attention(layer).is_some_and(|attention| attention.needs_meta());
    let layers: Vec<usize> = (0..config.decoder.layers).filter(needs).collect();
    if layers.is_empty() {
        let problem = "is not `meta` in any layer: there are no meta projections to calibrate".to_owned();
        return Err(ModelError::Config { setting: "selector", problem });
    }
    Ok(layers)
}

fn check(decoder: &Decoder, tokens: usize, available: usize, config: MetaCalibrationConfig) -> Result<(), ModelError> {
    let MetaCalibrationConfig { window, windows } = config;
    let Some(attention) = &decoder.config().attention else { return Ok(()) };
    let block = attention.statistics_block();
    // The last chunk has to have more blocks before its local region than are chosen.
    let blocks =
        if attention.retrieval == bsbr_attn::Retrieval::Blocks { attention.meta_blocks.saturating_add(1) } else { 2 };
    let behind = attention.sink_tokens.saturating_add(blocks.saturating_mul(block));
    let far = behind.div_ceil(attention.chunk_size);
    let least = far.saturating_add(attention.local_chunks).saturating_add(1).saturating_mul(attention.chunk_size);
    let problem = if window < least {
        format!("a window of {window} tokens leaves no block to choose, {least} are needed under these settings")
    } else if windows < 2 {
        format!("{windows} windows are asked for, at least 2 are needed: one to fit to and one to choose by")
    } else if available < 2 {
        let needed = 2 * window;
        format!("the text has {tokens} tokens, two windows need {needed}: give a longer text or a shorter window")
    } else {
        return decoder.check_length(window);
    };
    Err(ModelError::Input(problem))
}

/// The numbers of a tensor.
fn numbers<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| ModelError::Input(format!("numbers cannot be read back: {error:?}")))
}
