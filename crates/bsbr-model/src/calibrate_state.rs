//! Calibrating the compression of states: per layer and KV head the directions of the keys in which states have most.
//!
//! A centred state `C` of a chunk is read as `q^T C`. Of all bases `B` with a given number of orthonormal columns, the
//! leading eigenvectors of `sum C C^T` keep most of the states: they minimise `sum |C - B B^T C|^2`.

use burn::tensor::{Tensor, TensorData};
use faer::{Mat, Side};
use serde::{Deserialize, Serialize};

use crate::{Decoder, EXTRA_PREFIX, LayerShape, LayerTrace, ModelConfig, ModelError};

/// What to calibrate on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateCalibrationConfig {
    /// Tokens of a window; windows follow each other through the text.
    pub window: usize,
    /// Most windows to read.
    pub windows: usize,
}

/// The calibrated bases of a decoder.
#[derive(Debug)]
pub struct StateCalibration {
    /// Windows read.
    pub windows: usize,
    /// One entry for each layer with states.
    pub layers: Vec<StateLayer>,
    /// `[kv_heads, head_dim, head_dim]` of each of these layers, row by row.
    bases: Vec<Vec<f32>>,
}

/// What calibration found for one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateLayer {
    /// Number of the layer.
    pub layer: usize,
    /// Share of the states' squares that a quarter of the directions holds.
    pub held_by_a_quarter: f64,
}

impl StateCalibration {
    /// The configuration `config` with states compressed along these bases.
    pub fn configured(&self, config: &ModelConfig) -> ModelConfig {
        let mut config = config.clone();
        if let Some(attention) = &mut config.attention {
            attention.calibrated_states = true;
        }
        config
    }

    /// The decoder with these bases in use.
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] for a decoder without the layers that were calibrated; [`ModelError::Config`] if others need
    /// a basis.
    pub fn apply(&self, decoder: &Decoder) -> Result<Decoder, ModelError> {
        let mut decoder = decoder.clone();
        let device = decoder.device();
        for (layer, basis) in self.layers.iter().zip(&self.bases) {
            let LayerShape { kv_heads: heads, head_dim: width, .. } = decoder.config().decoder.shape(layer.layer);
            let block = decoder.blocks.get_mut(layer.layer);
            let block = block.filter(|_| basis.len() == heads * width * width);
            let block = block
                .ok_or_else(|| ModelError::Input(format!("the decoder has no layer {} like this", layer.layer)))?;
            let basis = TensorData::new(basis.clone(), [heads, width, width]);
            block.attention.state_basis = Some(burn::module::Param::from_tensor(Tensor::from_data(basis, &device)));
        }
        decoder.with_config(|config| *config = self.configured(config))
    }

    /// Names and numbers of the bases, in the layout of [`crate::WeightSpec::shape`].
    pub fn weights(&self) -> Vec<(String, Vec<f32>)> {
        let name = |layer: &StateLayer| format!("{EXTRA_PREFIX}layers.{}.state_basis", layer.layer);
        self.layers.iter().map(name).zip(self.bases.iter().cloned()).collect()
    }
}

/// Finds the basis of each layer whose settings keep states, from the keys and values that the original attention of
/// `decoder` reads in `tokens`. `each` hears after every window how many of how many are read.
///
/// Depends on nothing but its arguments: the same text gives the same numbers.
///
/// # Errors
///
/// [`ModelError::Config`] if the settings of `decoder` keep no states; [`ModelError::Input`] if the text is shorter than a
/// window, or a window than two chunks; [`ModelError::TooLong`] for a window past the learned positions.
pub fn calibrate_states(
    decoder: &Decoder,
    tokens: &[u32],
    config: StateCalibrationConfig,
    mut each: impl FnMut(usize, usize),
) -> Result<StateCalibration, ModelError> {
    let settings = decoder.config();
    let keeps = |&layer: &usize| settings.layer_attention(layer).is_some_and(|attention| attention.needs_states());
    let layers: Vec<usize> = (0..settings.decoder.layers).filter(keeps).collect();
    let Some(attention) = settings.attention.as_ref().filter(|_| !layers.is_empty()) else {
        let problem = "keeps no states in any layer: there is nothing to compress".to_owned();
        return Err(ModelError::Config { setting: "retrieval", problem });
    };
    let chunk = attention.chunk_size;
    let windows = (tokens.len() / config.window.max(1)).min(config.windows);
    if windows == 0 || config.window < 2 * chunk {
        let (found, window) = (tokens.len(), config.window);
        let problem = format!(
            "one window of at least two chunks of {chunk} tokens is needed; the text has {found} tokens, a window {window}"
        );
        return Err(ModelError::Input(problem));
    }
    decoder.check_length(config.window)?;
    let original = decoder.with_config(|config| config.attention = None)?;
    let empty = |&layer: &usize| {
        let LayerShape { kv_heads, head_dim: width, .. } = settings.decoder.shape(layer);
        vec![vec![0.0; width * width]; kv_heads]
    };
    let mut squares: Vec<Vec<Vec<f64>>> = layers.iter().map(empty).collect();
    for (done, text) in tokens.chunks_exact(config.window).take(windows).enumerate() {
        let mut cache = original.new_cache(&[text.len()])?;
        let mut result = Ok(());
        original.trace(text, &mut cache, &mut |trace: LayerTrace| {
            let Some(at) = layers.iter().position(|&layer| layer == trace.layer) else { return };
            if result.is_ok() {
                result = add_squares(&trace, chunk, &mut squares[at]);
            }
        })?;
        result?;
        each(done + 1, windows);
    }
    let mut calibration = StateCalibration { windows, layers: Vec::new(), bases: Vec::new() };
    for (&layer, squares) in layers.iter().zip(&squares) {
        let LayerShape { kv_heads, head_dim: width, .. } = settings.decoder.shape(layer);
        let (mut basis, mut shares) = (Vec::with_capacity(kv_heads * width * width), 0.0);
        for squares in squares {
            let (columns, share) = leading_directions(squares, width, layer)?;
            basis.extend(columns);
            shares += share;
        }
        calibration.layers.push(StateLayer { layer, held_by_a_quarter: shares / kv_heads as f64 });
        calibration.bases.push(basis);
    }
    Ok(calibration)
}

/// Adds `C C^T` of every chunk of `chunk` tokens but the first, for each KV head: sinks enter no states, and nothing is
/// like them.
fn add_squares(trace: &LayerTrace, chunk: usize, squares: &mut [Vec<f64>]) -> Result<(), ModelError> {
    let [_, heads, tokens, width] = trace.keys.dims();
    let chunks = tokens / chunk - 1;
    let centred = |rows: &Tensor<4>| {
        let rows = rows.clone().narrow(2, chunk, chunks * chunk).reshape([heads, chunks, chunk, width]);
        rows.clone() - rows.mean_dim(2)
    };
    let states = centred(&trace.keys).swap_dims(2, 3).matmul(centred(&trace.values)) / chunk as f64;
    let products = states.clone().matmul(states.swap_dims(2, 3)).sum_dim(1).reshape([heads, width * width]);
    let products = products.try_into_vec_as::<f32>();
    let products = products.map_err(|error| ModelError::Input(format!("numbers cannot be read back: {error:?}")))?;
    for (squares, products) in squares.iter_mut().zip(products.chunks(width * width)) {
        for (sum, product) in squares.iter_mut().zip(products) {
            *sum += f64::from(*product);
        }
    }
    Ok(())
}

/// Eigenvectors of a symmetric matrix as columns, those of the largest eigenvalues first, row by row; and the share of the
/// trace that the first quarter holds.
fn leading_directions(squares: &[f64], width: usize, layer: usize) -> Result<(Vec<f32>, f64), ModelError> {
    let matrix = Mat::from_fn(width, width, |row, column| squares[row * width + column]);
    let decomposition = matrix.self_adjoint_eigen(Side::Lower).map_err(|error| {
        ModelError::Input(format!("the states of layer {layer} have no principal directions ({error:?})"))
    })?;
    let (vectors, values) = (decomposition.U(), decomposition.S().column_vector());
    // Eigenvalues come in increasing order.
    let value = |at: usize| values[width - 1 - at].max(0.0);
    let columns = (0..width * width).map(|at| vectors[(at / width, width - 1 - at % width)] as f32).collect();
    let total: f64 = (0..width).map(value).sum();
    let quarter: f64 = (0..(width / 4).max(1)).map(value).sum();
    Ok((columns, if total > 0.0 { quarter / total } else { 1.0 }))
}
