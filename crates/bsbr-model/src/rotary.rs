//! Rotary position embedding, the two halves of a head paired (rotate-half), with every scaling of its frequencies.
//!
//! Su et al. 2021; scalings as Hugging Face transformers' `modeling_rope_utils` defines them.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{DecoderConfig, LayerRotary, Positions, RotaryScaling, ops::Packing};

/// Inverse frequencies `[rotary_dim / 2]` and the factor on cos and sin for texts of up to `length` tokens.
///
/// Only the `dynamic` and `longrope` scalings depend on `length`.
pub fn rotary_frequencies(
    theta: f64,
    rotary_dim: usize,
    scaling: Option<&RotaryScaling>,
    length: usize,
) -> (Vec<f64>, f64) {
    let dim = rotary_dim as f64;
    let base = |theta: f64| (0..rotary_dim / 2).map(move |i| theta.powf(-((2 * i) as f64) / dim)).collect::<Vec<_>>();
    match scaling {
        None => (base(theta), 1.0),
        Some(RotaryScaling::Linear { factor }) => (base(theta).iter().map(|f| f / factor).collect(), 1.0),
        Some(RotaryScaling::Proportional { rotating, factor }) => {
            // Pairs beyond stand still: a frequency of 0 turns nothing.
            let of = |(pair, frequency): (usize, f64)| if 2 * pair < *rotating { frequency / factor } else { 0.0 };
            (base(theta).into_iter().enumerate().map(of).collect(), 1.0)
        }
        Some(RotaryScaling::Dynamic { factor, original_max_positions }) => {
            let original = *original_max_positions as f64;
            let stretch = factor * (length as f64).max(original) / original - (factor - 1.0);
            (base(theta * stretch.powf(dim / (dim - 2.0))), 1.0)
        }
        Some(RotaryScaling::Yarn {
            factor,
            original_max_positions,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        }) => {
            // The dimension whose wavelength fits `rotations` times into the trained length.
            let dimension = |rotations: f64| {
                let length = *original_max_positions as f64;
                dim * (length / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let blend = |(i, frequency): (usize, f64)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * interpolated + frequency * (1.0 - interpolated)
            };
            (base(theta).into_iter().enumerate().map(blend).collect(), *attention_factor)
        }
        Some(RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }) => {
            let original = *original_max_positions as f64;
            let scale = |frequency: f64| {
                let wavelength = std::f64::consts::TAU / frequency;
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            };
            (base(theta).into_iter().map(scale).collect(), 1.0)
        }
        Some(RotaryScaling::Longrope {
            short_factor,
            long_factor,
            original_max_positions,
            attention_factor,
            long_attention_factor,
        }) => {
            let (factors, attention_factor) = if length > *original_max_positions {
                (long_factor, long_attention_factor.unwrap_or(*attention_factor))
            } else {
                (short_factor, *attention_factor)
            };
            (base(theta).iter().zip(factors).map(|(frequency, factor)| frequency / factor).collect(), attention_factor)
        }
    }
}

/// The frequencies of a text of up to `length` tokens, one entry for each way a layer of `decoder` rotates; see
/// [`rotary_set`].
pub(crate) fn rotary_sets(decoder: &DecoderConfig, length: usize) -> Vec<(Vec<f64>, f64)> {
    let Positions::Rotary { theta, rotary_dim, scaling } = &decoder.positions else { return Vec::new() };
    let global = rotary_frequencies(*theta, *rotary_dim, scaling.as_ref(), length);
    let local = local_bases(decoder).into_iter().map(|(theta, dim)| rotary_frequencies(theta, dim, None, length));
    std::iter::once(global).chain(local).collect()
}

/// Which entry of [`rotary_sets`] layer `layer` rotates by.
pub(crate) fn rotary_set(decoder: &DecoderConfig, layer: usize) -> Option<usize> {
    if !matches!(decoder.positions, Positions::Rotary { .. }) {
        return None;
    }
    match decoder.rotary(layer) {
        LayerRotary::Global => Some(0),
        LayerRotary::Local { .. } | LayerRotary::Whole { .. } => {
            let own = local_base(decoder, layer)?;
            local_bases(decoder).iter().position(|&base| base == own).map(|at| at + 1)
        }
        LayerRotary::Off => None,
    }
}

/// Base and rotating dimensions of a layer with its own.
fn local_base(decoder: &DecoderConfig, layer: usize) -> Option<(f64, usize)> {
    let Positions::Rotary { rotary_dim, .. } = decoder.positions else { return None };
    match decoder.rotary(layer) {
        LayerRotary::Local { theta } => Some((theta, rotary_dim)),
        LayerRotary::Whole { theta } => Some((theta, decoder.shape(layer).head_dim)),
        LayerRotary::Global | LayerRotary::Off => None,
    }
}

/// The distinct ones.
fn local_bases(decoder: &DecoderConfig) -> Vec<(f64, usize)> {
    let mut bases = Vec::new();
    for own in (0..decoder.layer_rotary.len()).filter_map(|layer| local_base(decoder, layer)) {
        if !bases.contains(&own) {
            bases.push(own);
        }
    }
    bases
}

/// What the positions of some tokens do to their queries and keys.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Places<'a> {
    /// Turns both, where the layer rotates.
    pub(crate) rotation: Option<&'a Rotation>,
    /// A factor on the query of each token, where any is not 1.
    pub(crate) temperature: Option<&'a [f32]>,
    /// How the tokens are packed.
    pub(crate) packing: Packing,
}

/// The factors on the queries at `positions`; `None` where all are 1.
pub(crate) fn temperatures(decoder: &DecoderConfig, positions: impl Iterator<Item = usize>) -> Option<Vec<f32>> {
    let temperature = decoder.query_temperature?;
    let factors: Vec<f32> = positions.map(|position| temperature.at(position) as f32).collect();
    factors.iter().any(|&factor| factor != 1.0).then_some(factors)
}

/// Cosines and sines of some positions, ready to rotate with.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// `[tokens, 1, rotary_dim / 2]`.
    pub(crate) cos: Tensor<3>,
    pub(crate) sin: Tensor<3>,
}

impl Rotation {
    /// Of the tokens at `positions`, one frequency set each (tokens of different texts may differ in it).
    pub(crate) fn new<'a>(
        tokens: impl ExactSizeIterator<Item = (usize, &'a (Vec<f64>, f64))>,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let count = tokens.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for (position, (frequencies, factor)) in tokens {
            for frequency in frequencies {
                let angle = position as f64 * frequency;
                cos.push((angle.cos() * factor) as f32);
                sin.push((angle.sin() * factor) as f32);
            }
        }
        let half = cos.len() / count.max(1);
        let tensor = |data| Tensor::from_data(TensorData::new(data, [count, 1, half]), (device, dtype));
        Self { cos: tensor(cos), sin: tensor(sin) }
    }

    /// Of some of the tokens.
    pub(crate) fn at(&self, tokens: Tensor<1, Int>) -> Self {
        let select = |rows: &Tensor<3>| rows.clone().select(0, tokens.clone());
        Self { cos: select(&self.cos), sin: select(&self.sin) }
    }

    /// Rotates the first `rotary_dim` dimensions of `[tokens, heads, head_dim]`.
    pub(crate) fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let width = x.dims()[2];
        let half = self.cos.dims()[2];
        let first = x.clone().narrow(2, 0, half);
        let second = x.clone().narrow(2, half, half);
        let mut parts = vec![
            first.clone() * self.cos.clone() - second.clone() * self.sin.clone(),
            second * self.cos.clone() + first * self.sin.clone(),
        ];
        if 2 * half < width {
            parts.push(x.narrow(2, 2 * half, width - 2 * half));
        }
        Tensor::cat(parts, 2)
    }
}
