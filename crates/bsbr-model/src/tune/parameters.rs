//! What is trained, and its place in a decoder.

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    AdapterConfig, AdapterTarget, Decoder, ModelError,
    modules::{Adapter, Adapters, Projections},
};

/// Names of weights and their numbers, in the layout of [`crate::WeightSpec::shape`].
pub type NamedNumbers = Vec<(String, Vec<f32>)>;

/// The trained parts of one layer.
#[derive(Module, Debug)]
pub(super) struct LayerParameters {
    pub(super) adapters: Option<Adapters>,
    pub(super) meta_query: Option<Linear>,
    pub(super) meta_key: Option<Linear>,
    /// `[kv_heads, head_dim, head_dim]`, orthonormal columns.
    pub(super) state_basis: Option<Param<Tensor<3>>>,
    /// `[heads]`.
    pub(super) gates: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(super) layer: usize,
}

/// The trained parts of a model.
#[derive(Module, Debug)]
pub(super) struct Parameters {
    pub(super) layers: Vec<LayerParameters>,
}

impl LayerParameters {
    /// Puts them where they belong.
    pub(super) fn place(&self, projections: &mut Projections) {
        if self.adapters.is_some() {
            projections.adapters.clone_from(&self.adapters);
        }
        if self.meta_query.is_some() {
            projections.meta_query.clone_from(&self.meta_query);
            projections.meta_key.clone_from(&self.meta_key);
        }
        if self.state_basis.is_some() {
            projections.state_basis.clone_from(&self.state_basis);
        }
        if self.gates.is_some() {
            projections.gates.clone_from(&self.gates);
        }
    }
}

impl Parameters {
    /// Of the layers to train, at the values the decoder has, all numbered alike in every run.
    pub(super) fn of(decoder: &Decoder, layers: Option<&[usize]>, device: &Device) -> Self {
        let config = decoder.config();
        let all = (0..config.decoder.layers).filter(|&layer| config.layer_attention(layer).is_some());
        let chosen = all.filter(|layer| layers.is_none_or(|layers| layers.contains(layer)));
        let layers = chosen.map(|layer| {
            let projections = &decoder.blocks[layer].attention;
            let attention = config.layer_attention(layer);
            let meta = attention.is_some_and(|attention| attention.needs_meta());
            let based = attention.is_some_and(trains_basis);
            let mut next = layer as u64 * 64;
            let mut id = || {
                next += 1;
                ParamId::from(next)
            };
            let adapters = projections.adapters.as_ref().map(|adapters| {
                let made = Adapters::new(|target| {
                    let adapter = adapters.of(target).map(|adapter| Adapter {
                        down: trained(&adapter.down, id(), device),
                        up: trained(&adapter.up, id(), device),
                        scale: adapter.scale,
                    });
                    Ok::<_, std::convert::Infallible>(adapter)
                });
                made.unwrap_or_else(|never| match never {})
            });
            let mut linear = |linear: &Option<Linear>| {
                let linear = linear.as_ref().filter(|_| meta)?;
                let bias = linear.bias.as_ref().map(|bias| trained(bias, id(), device));
                Some(Linear { weight: trained(&linear.weight, id(), device), bias })
            };
            let (meta_query, meta_key) = (linear(&projections.meta_query), linear(&projections.meta_key));
            let basis = projections.state_basis.as_ref().filter(|_| based);
            let state_basis = basis.map(|basis| trained(basis, id(), device));
            let gates =
                projections.gates.as_ref().filter(|_| attention.is_some_and(|attention| attention.needs_gates()));
            let gates = gates.map(|gates| trained(gates, id(), device));
            LayerParameters { adapters, meta_query, meta_key, state_basis, gates, layer }
        });
        Self { layers: layers.collect() }
    }

    /// The decoder with these values.
    pub(super) fn placed(&self, decoder: &Decoder) -> Decoder {
        let mut decoder = decoder.clone();
        for layer in &self.layers {
            layer.place(&mut decoder.blocks[layer.layer].attention);
        }
        decoder
    }

    /// Tensors outside any graph.
    pub(super) fn plain(&self) -> Self {
        self.valid()
    }

    /// With bases whose columns are orthonormal again, as a step of an optimiser leaves none.
    pub(super) fn orthonormal(mut self) -> Result<Self, ModelError> {
        for basis in self.layers.iter_mut().filter_map(|layer| layer.state_basis.as_mut()) {
            let (id, value) = (basis.id, basis.val().inner());
            let [heads, width, _] = value.dims();
            let mut numbers = numbers(value.clone())?;
            numbers.chunks_exact_mut(width * width).for_each(|numbers| orthonormalise(numbers, width));
            let data = TensorData::new(numbers, [heads, width, width]);
            let value = Tensor::<3>::from_data(data, &value.device());
            *basis = Param::initialized(id, value.autodiff().require_grad());
        }
        Ok(self)
    }

    /// Tensors that gradients are asked of.
    pub(super) fn tracked(self) -> Self {
        self.map(&mut Tracked)
    }
}

/// Whether states are stored along a basis that matters: whole states are the same in any.
pub(super) fn trains_basis(attention: &BlockAttentionConfig) -> bool {
    attention.needs_state_basis() && attention.compression_factor > 1
}

/// Makes the columns of a square matrix, row by row in `numbers`, orthonormal, each in turn beside those before it: modified
/// Gram-Schmidt, twice, in f64. Where a column holds nothing of its own it becomes a unit vector that does.
fn orthonormalise(numbers: &mut [f32], width: usize) {
    let mut columns: Vec<Vec<f64>> = Vec::with_capacity(width);
    for at in 0..width {
        let own: Vec<f64> = (0..width).map(|row| f64::from(numbers[row * width + at])).collect();
        let unit = |axis: usize| (0..width).map(|row| if row == axis { 1.0 } else { 0.0 }).collect::<Vec<f64>>();
        let candidates = std::iter::once(own).chain((0..width).map(unit));
        let column = candidates.filter_map(|candidate| beside(&columns, candidate)).next();
        columns.extend(column);
    }
    for (at, column) in columns.iter().enumerate() {
        for (row, number) in column.iter().enumerate() {
            numbers[row * width + at] = *number as f32;
        }
    }
}

/// What of a vector is orthogonal to orthonormal ones, of length 1; `None` if that is next to nothing.
fn beside(columns: &[Vec<f64>], mut vector: Vec<f64>) -> Option<Vec<f64>> {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let before = dot(&vector, &vector).sqrt();
    for column in columns.iter().chain(columns) {
        let part = dot(column, &vector);
        vector.iter_mut().zip(column).for_each(|(x, y)| *x -= part * y);
    }
    let length = dot(&vector, &vector).sqrt();
    let enough = length.is_finite() && length > 1e-6 * before && length > 0.0;
    enough.then(|| vector.iter().map(|x| x / length).collect())
}

/// Asks gradients of every parameter.
struct Tracked;

impl ModuleMapper for Tracked {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, _) = param.consume();
        Param::initialized(id, value.inner().autodiff().require_grad())
    }
}

/// A copy with a number of its own that gradients are asked of.
fn trained<const D: usize>(param: &Param<Tensor<D>>, id: ParamId, device: &Device) -> Param<Tensor<D>> {
    let value = param.val().inner().to_device(&device.clone().inner());
    Param::initialized(id, value.autodiff().require_grad())
}

/// The decoder with adapters that change nothing yet, where it has none: `down` as in a layer without training, `up` 0.
pub(super) fn with_adapters(decoder: &Decoder, adapters: Option<&AdapterConfig>, seed: u64) -> Decoder {
    let mut decoder = decoder.clone();
    let Some(adapters) = adapters.filter(|_| decoder.config.adapters.is_none()) else { return decoder };
    let device = decoder.device();
    for layer in 0..decoder.blocks.len() {
        if decoder.config.layer_attention(layer).is_none() {
            continue;
        }
        let made = Adapters::new(|target| {
            // A layer may lack a projection.
            let shape = decoder.config.decoder.linear_shape(target.place(layer));
            let shape = shape.filter(|_| adapters.targets.contains(&target));
            let made = shape.map(|shape| fresh(shape, adapters, (seed, layer, target), &device));
            Ok::<_, std::convert::Infallible>(made)
        });
        decoder.blocks[layer].attention.adapters = Some(made.unwrap_or_else(|never| match never {}));
    }
    decoder.config.adapters = Some(adapters.clone());
    decoder
}

/// The decoder with gates that change nothing yet, where it has none.
pub(super) fn with_gates(decoder: &Decoder) -> Decoder {
    let mut decoder = decoder.clone();
    let Some(attention) = decoder.config.attention.as_mut().filter(|attention| !attention.head_gates) else {
        return decoder;
    };
    attention.head_gates = true;
    let start = if attention.retrieval == Retrieval::Additive { attention.additive_gate as f32 } else { 0.0 };
    let (heads, device) = (decoder.config.decoder.heads, decoder.device());
    for layer in 0..decoder.blocks.len() {
        if decoder.config.layer_attention(layer).is_some() {
            let gates = Tensor::<1>::from_data(TensorData::new(vec![start; heads], [heads]), &device);
            decoder.blocks[layer].attention.gates = Some(Param::from_tensor(gates));
        }
    }
    decoder
}

/// An adapter at its start values: the same on every device.
fn fresh(
    [inputs, outputs]: [usize; 2],
    adapters: &AdapterConfig,
    (seed, layer, target): (u64, usize, AdapterTarget),
    device: &Device,
) -> Adapter {
    let mut random = StdRng::seed_from_u64(seed ^ ((layer as u64) << 8) ^ ((target as u64 + 1) << 40));
    let bound = 1.0 / (inputs as f32).sqrt();
    let down: Vec<f32> = (0..inputs * adapters.rank).map(|_| random.random_range(-bound..bound)).collect();
    // In the memory order of files, `[outputs, inputs]`, as every loaded weight is.
    let of = |numbers, shape: [usize; 2]| {
        Param::from_tensor(Tensor::<2>::from_data(TensorData::new(numbers, shape), device).transpose())
    };
    Adapter {
        down: of(down, [adapters.rank, inputs]),
        up: of(vec![0.0; outputs * adapters.rank], [outputs, adapters.rank]),
        scale: adapters.scale(),
    }
}

impl Decoder {
    /// The weights that BSBR added, by the names and in the layout of [`crate::weight_specs`].
    ///
    /// # Errors
    ///
    /// [`ModelError::Input`] if a weight is missing or cannot be read back from the device.
    pub fn extra_weights(&self) -> Result<Vec<(String, Vec<f32>)>, ModelError> {
        let mut weights = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let projections = &block.attention;
            let name = |part: &str| format!("{}layers.{layer}.{part}", crate::EXTRA_PREFIX);
            for (part, linear) in [("meta_query", &projections.meta_query), ("meta_key", &projections.meta_key)] {
                let Some(linear) = linear else { continue };
                weights.push((name(&format!("{part}.weight")), numbers(linear.weight.val().transpose())?));
                if let Some(bias) = &linear.bias {
                    weights.push((name(&format!("{part}.bias")), numbers(bias.val())?));
                }
            }
            if let Some(basis) = &projections.state_basis {
                weights.push((name("state_basis"), numbers(basis.val())?));
            }
            if let Some(gates) = &projections.gates {
                weights.push((name("gates"), numbers(gates.val())?));
            }
            for target in AdapterTarget::ALL {
                let Some(adapter) = projections.adapters.as_ref().and_then(|adapters| adapters.of(target)) else {
                    continue;
                };
                for (part, factor) in [("adapter_down", &adapter.down), ("adapter_up", &adapter.up)] {
                    let name = format!("{}{}.{part}", crate::EXTRA_PREFIX, target.place(layer));
                    weights.push((name, numbers(factor.val().transpose())?));
                }
            }
        }
        Ok(weights)
    }

    /// The same model with its adapters added to the projections, which are then no longer the original's, and the names
    /// and numbers of the weights that changed.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] as [`crate::ModelConfig::check_mergeable`], [`ModelError::Input`] if a weight cannot be read back from
    /// the device.
    pub fn merged(&self) -> Result<(Self, NamedNumbers), ModelError> {
        let (mut decoder, device) = (self.clone(), self.device());
        if let Some(adapters) = decoder.config.adapters.take() {
            self.config.check_mergeable(&adapters)?;
        }
        let mut changed = Vec::new();
        for (layer, block) in decoder.blocks.iter_mut().enumerate() {
            let Some(adapters) = block.attention.adapters.take() else { continue };
            for target in AdapterTarget::ALL {
                let (Some(adapter), place) = (adapters.of(target), target.place(layer)) else { continue };
                let projection = block.projection_mut(place.role);
                let Some(linear) = projection.and_then(|projection| projection.dense_mut(&device)) else {
                    return Err(ModelError::Input(format!("`{place}` is in parts: nothing can be added to it")));
                };
                // Rows of outputs, as in files.
                let sum = (linear.weight.val() + adapter.product()).transpose();
                let (shape, numbers, device) = (sum.dims(), numbers(sum.clone())?, sum.device());
                changed.push((format!("{place}.weight"), numbers.clone()));
                let sum = Tensor::<2>::from_data(TensorData::new(numbers, shape), &device);
                linear.weight = Param::from_tensor(sum.transpose());
            }
        }
        Ok((decoder, changed))
    }
}

/// The numbers of a tensor.
pub(super) fn numbers<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    let read = tensor.try_into_vec_as::<f32>();
    read.map_err(|error| ModelError::Input(format!("a weight cannot be read back from the device: {error}")))
}
