//! What is trained, and its place in a decoder.

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    AdapterConfig, AdapterTarget, Decoder, ModelError, Projection,
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
            let meta = config.layer_attention(layer).is_some_and(|attention| attention.needs_meta());
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
            LayerParameters { adapters, meta_query, meta_key, layer }
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

    /// Tensors that gradients are asked of.
    pub(super) fn tracked(self) -> Self {
        self.map(&mut Tracked)
    }
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
            let there = adapters.targets.contains(&target);
            let shape = decoder.config.decoder.linear_shape(target.place(layer)).unwrap_or_default();
            Ok::<_, std::convert::Infallible>(there.then(|| fresh(shape, adapters, (seed, layer, target), &device)))
        });
        decoder.blocks[layer].attention.adapters = Some(made.unwrap_or_else(|never| match never {}));
    }
    decoder.config.adapters = Some(adapters.clone());
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
        let mut decoder = self.clone();
        if let Some(adapters) = decoder.config.adapters.take() {
            self.config.check_mergeable(&adapters)?;
        }
        let mut changed = Vec::new();
        for (layer, block) in decoder.blocks.iter_mut().enumerate() {
            let Some(adapters) = block.attention.adapters.take() else { continue };
            for target in AdapterTarget::ALL {
                let (Some(adapter), place) = (adapters.of(target), target.place(layer)) else { continue };
                let Some(Projection::Dense(linear)) = block.projection_mut(place.role) else {
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
