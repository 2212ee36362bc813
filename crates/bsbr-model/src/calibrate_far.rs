//! Calibrating how much blocks that are not retrieved count: one number for each layer.
//!
//! A block's mean key gives the least mass it can have (Jensen), and its mean value stands for values that a softmax would
//! weigh differently. In nearly every layer of nearly every model the mean is right as it is; where heads read many alike
//! tokens, as the first layer of a model can, it is not, and one such layer can cost more than all others together. The
//! number is found by trying: attention runs on a text with several shifts, and the one wins that leaves the output of the
//! layer, behind its projection, nearest to that of full attention. Another window of the text has to agree.

use bsbr_attn::{BlockAttentionConfig, Far, attend, index::BLOCK};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Decoder, LayerTrace, ModelConfig, ModelError};

/// Nats between the shifts that are tried.
const STEP: f64 = 0.5;
/// The furthest shift that is tried: what counts a five-hundredth is as good as nothing.
const FURTHEST: f64 = 6.0;
/// A shift has to take this share of the error, in the window it was found in and in the other one.
const LEAST_GAIN: f64 = 0.05;

/// How much the far part of each layer should count.
#[derive(Debug, Clone, PartialEq)]
pub struct FarCalibration {
    /// One entry for each layer with a far part.
    pub layers: Vec<FarLayer>,
}

/// What calibration found for one layer. Errors are of the layer's output behind its projection against that of full
/// attention, squared and relative, in the window that did not choose.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FarLayer {
    /// Number of the layer.
    pub layer: usize,
    /// Nats that are added to the layer's far log-masses; 0 where no shift was better in both windows.
    pub shift: f64,
    /// Error without a shift.
    pub before: f64,
    /// Error with it.
    pub after: f64,
}

impl FarCalibration {
    /// The configuration `config` with these shifts.
    pub fn configured(&self, config: &ModelConfig) -> ModelConfig {
        let mut config = config.clone();
        config.far_shifts = vec![0.0; config.decoder.layers];
        for layer in &self.layers {
            if let Some(shift) = config.far_shifts.get_mut(layer.layer) {
                *shift = layer.shift;
            }
        }
        config
    }
}

/// Whether these settings have a far part that a shift can be found for.
pub fn has_far_shift(attention: &BlockAttentionConfig) -> bool {
    attention.uses_index() && attention.far != Far::None
}

/// Finds the shift of each layer whose far part is read beside retrieved blocks, on two windows of `window` tokens of the
/// text: the first chooses, the second has to agree. `each` hears after every layer of each how many of how many are done.
///
/// Shifts that `decoder` has already are replaced, not refined. Depends on nothing but its arguments.
///
/// # Errors
///
/// [`ModelError::Config`] if no layer has such a far part; [`ModelError::Input`] if the text is shorter than two windows, or
/// a window too short for anything to be far; [`ModelError::TooLong`] for a window past the learned positions.
pub fn calibrate_far(
    decoder: &Decoder,
    tokens: &[u32],
    window: usize,
    mut each: impl FnMut(usize, usize) + Send,
) -> Result<FarCalibration, ModelError> {
    let config = decoder.config();
    let layers: Vec<usize> =
        (0..config.decoder.layers).filter(|&layer| config.layer_attention(layer).is_some_and(has_far_shift)).collect();
    let Some(attention) = config.attention.as_ref().filter(|_| !layers.is_empty()) else {
        let problem =
            "reads nothing by its mean beside retrieved blocks in any layer: there is no shift to find".into();
        return Err(ModelError::Config { setting: "far", problem });
    };
    let least = least_window(attention);
    if window < least || tokens.len() < 2 * window {
        let found = tokens.len();
        let problem = format!(
            "two windows of at least {least} tokens are needed under these settings; the text has {found} tokens, a window {window}"
        );
        return Err(ModelError::Input(problem));
    }
    decoder.check_length(window)?;
    let original = decoder.with_config(|config| config.attention = None)?;
    let total = 2 * layers.len();
    let mut done = 0;
    let mut found: Vec<f64> = Vec::with_capacity(layers.len());
    through(&original, &tokens[..window], &layers, |trace, _| {
        let mut errors = Errors::new(decoder, &trace)?;
        found.push(best_shift(|shift| errors.of(shift))?);
        done += 1;
        each(done, total);
        Ok(())
    })?;
    let mut calibration = FarCalibration { layers: Vec::with_capacity(layers.len()) };
    through(&original, &tokens[window..2 * window], &layers, |trace, at| {
        let (mut errors, shift) = (Errors::new(decoder, &trace)?, found[at]);
        let before = errors.of(0.0)?;
        let after = if shift == 0.0 { before } else { errors.of(shift)? };
        let agrees = after < (1.0 - LEAST_GAIN) * before;
        let (shift, after) = if agrees { (shift, after) } else { (0.0, before) };
        calibration.layers.push(FarLayer { layer: trace.layer, shift, before, after });
        done += 1;
        each(done, total);
        Ok(())
    })?;
    Ok(calibration)
}

/// The shortest text of which a token reads something by its mean.
pub(crate) fn least_window(attention: &BlockAttentionConfig) -> usize {
    // A block behind the sinks has to end before the local region of the last chunk.
    let behind = attention.sink_tokens.saturating_add(BLOCK).div_ceil(attention.chunk_size);
    let far = behind.saturating_add(attention.local_chunks).saturating_add(1).saturating_mul(attention.chunk_size);
    far.max(attention.exact_tokens.saturating_add(attention.chunk_size))
}

/// Reads one window and shows `visit` what each of `layers` made of it, with its place among them.
pub(crate) fn through(
    decoder: &Decoder,
    tokens: &[u32],
    layers: &[usize],
    mut visit: impl FnMut(LayerTrace, usize) -> Result<(), ModelError> + Send,
) -> Result<(), ModelError> {
    let mut cache = decoder.new_cache(&[tokens.len()])?;
    let mut result = Ok(());
    decoder.trace(tokens, &mut cache, &mut |trace: LayerTrace| {
        let Some(at) = layers.iter().position(|&layer| layer == trace.layer) else { return };
        if result.is_ok() {
            result = visit(trace, at);
        }
    })?;
    result
}

/// The shift of the least error: from 0 downwards, or upwards, for as long as it falls.
fn best_shift(mut error: impl FnMut(f64) -> Result<f64, ModelError>) -> Result<f64, ModelError> {
    let start = error(0.0)?;
    let (mut least, mut best) = (start, 0.0);
    for direction in [-STEP, STEP] {
        let mut steps = 1i32;
        while f64::from(steps) * STEP <= FURTHEST {
            let shift = f64::from(steps) * direction;
            let found = error(shift)?;
            if found >= least {
                break;
            }
            (least, best) = (found, shift);
            steps += 1;
        }
        if best != 0.0 {
            break;
        }
    }
    Ok(if least < (1.0 - LEAST_GAIN) * start { best } else { 0.0 })
}

/// Errors of one layer on one text.
struct Errors<'a> {
    trace: &'a LayerTrace,
    attention: BlockAttentionConfig,
    options: bsbr_attn::AttentionOptions,
    projection: Tensor<2>,
    /// On what the heads read.
    gate: Option<Tensor<4>>,
    whole: f64,
}

impl<'a> Errors<'a> {
    fn new(decoder: &Decoder, trace: &'a LayerTrace) -> Result<Self, ModelError> {
        let (config, layer) = (decoder.config(), trace.layer);
        let without = ModelConfig { far_shifts: Vec::new(), ..config.clone() };
        let attention = without.calibrated_attention(layer);
        let attention = attention.ok_or_else(|| ModelError::Input(format!("layer {layer} is not converted")))?;
        let mut errors = Self {
            trace,
            attention,
            options: decoder.new_cache(&[1])?.texts[0].layers[layer].config().options.clone(),
            projection: decoder.blocks[layer].attention.output.dense_weight(&decoder.device()),
            gate: decoder.blocks[layer].attention.opening(&trace.normed, config.decoder.heads),
            whole: 1.0,
        };
        errors.whole = squares(trace.read.clone(), errors.gate.as_ref(), &errors.projection)?.max(f64::MIN_POSITIVE);
        Ok(errors)
    }

    /// The error of attention with this shift.
    fn of(&mut self, shift: f64) -> Result<f64, ModelError> {
        let LayerTrace { query, keys, values, read, .. } = self.trace;
        let far_shift = self.attention.far_shift + shift;
        let attention = BlockAttentionConfig { far_shift, ..self.attention.clone() };
        let output = attend(query.clone(), keys.clone(), values.clone(), None, Some(&attention), self.options.clone())?;
        Ok(squares(output - read.clone(), self.gate.as_ref(), &self.projection)? / self.whole)
    }
}

/// Sum of squares behind the gate, where there is one, and the projection of what heads read.
pub(crate) fn squares(read: Tensor<4>, gate: Option<&Tensor<4>>, projection: &Tensor<2>) -> Result<f64, ModelError> {
    let read = match gate {
        Some(gate) => read * gate.clone(),
        None => read,
    };
    let [_, heads, tokens, width] = read.dims();
    // What fills values up to the width of a head is no input of the projection.
    let values = projection.dims()[0] / heads;
    let (read, width) = if values < width { (read.narrow(3, 0, values), values) } else { (read, width) };
    let output = read.swap_dims(1, 2).reshape([tokens, heads * width]).matmul(projection.clone());
    let sums = output.powi_scalar(2).sum_dim(1).try_into_vec_as::<f32>();
    let sums = sums.map_err(|error| ModelError::Input(format!("numbers cannot be read back: {error:?}")))?;
    Ok(sums.into_iter().map(f64::from).sum())
}
