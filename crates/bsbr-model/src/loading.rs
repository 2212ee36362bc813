//! Building a decoder from weights, one tensor at a time.

use burn::{
    module::Param,
    nn::{Embedding, LayerNormConfig, Linear, RmsNorm},
    tensor::{Device, Tensor, TensorData},
};

use crate::{
    Decoder, EXTRA_PREFIX, ModelConfig, ModelError, Norm, WeightSpec,
    modules::{Block, Mlp, Normalisation, Projections},
    weight_specs,
};

/// Where weights come from.
pub trait WeightSource {
    /// The numbers of one weight, in the layout of [`WeightSpec::shape`], as f32.
    ///
    /// # Errors
    ///
    /// Whatever keeps the source from delivering.
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;
}

/// Reads weights by name with their shapes from the one list there is.
struct Loader<'a> {
    specs: std::collections::HashMap<String, WeightSpec>,
    source: &'a mut dyn WeightSource,
    device: &'a Device,
}

impl Loader<'_> {
    fn tensor<const D: usize>(&mut self, name: &str) -> Result<Tensor<D>, ModelError> {
        let spec = self.specs.get(name).ok_or_else(|| ModelError::Input(format!("no weight is called `{name}`")))?;
        let numbers =
            self.source.read(spec).map_err(|source| ModelError::WeightSource { tensor: name.to_owned(), source })?;
        if numbers.len() != spec.shape.iter().product::<usize>() {
            return Err(ModelError::WeightShape {
                tensor: name.to_owned(),
                expected: spec.shape.clone(),
                found: vec![numbers.len()],
            });
        }
        Ok(Tensor::from_data(TensorData::new(numbers, spec.shape.clone()), self.device))
    }

    fn optional<const D: usize>(&mut self, name: &str) -> Result<Option<Param<Tensor<D>>>, ModelError> {
        self.specs.contains_key(name).then(|| self.tensor(name).map(Param::from_tensor)).transpose()
    }

    /// Files keep `[out, in]`, burn's layer multiplies by `[in, out]`: the same memory, seen transposed.
    fn linear(&mut self, name: &str) -> Result<Linear, ModelError> {
        let weight = self.tensor::<2>(&format!("{name}.weight"))?.transpose();
        Ok(Linear { weight: Param::from_tensor(weight), bias: self.optional(&format!("{name}.bias"))? })
    }

    fn optional_linear(&mut self, name: &str) -> Result<Option<Linear>, ModelError> {
        self.specs.contains_key(&format!("{name}.weight")).then(|| self.linear(name)).transpose()
    }

    fn norm(&mut self, name: &str, kind: Norm, epsilon: f64) -> Result<Normalisation, ModelError> {
        let gamma = Param::from_tensor(self.tensor::<1>(&format!("{name}.weight"))?);
        Ok(match kind {
            Norm::Layer => {
                let width = gamma.dims()[0];
                let mut norm = LayerNormConfig::new(width).with_epsilon(epsilon).init(self.device);
                norm.gamma = gamma;
                norm.beta = self.optional(&format!("{name}.bias"))?;
                Normalisation::Layer(norm)
            }
            Norm::Rms => Normalisation::Rms(RmsNorm { gamma, epsilon }),
        })
    }

    fn table(&mut self, name: &str) -> Result<Embedding, ModelError> {
        let weight = Param::from_tensor(self.tensor::<2>(name)?);
        Ok(Embedding { weight })
    }
}

impl Decoder {
    /// Builds the decoder `config` describes from `source`, reading each weight of [`weight_specs`] once.
    ///
    /// # Errors
    ///
    /// [`ModelError`] if the configuration is impossible or a weight cannot be read.
    pub fn load(config: ModelConfig, source: &mut dyn WeightSource, device: &Device) -> Result<Self, ModelError> {
        config.validate()?;
        let specs = weight_specs(&config).into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        let mut loader = Loader { specs, source, device };
        let decoder = &config.decoder;
        let embed = loader.table("embed.weight")?;
        let position = loader.optional("position.weight")?;
        let mut blocks = Vec::with_capacity(decoder.layers);
        for layer in 0..decoder.layers {
            let at = |part: &str| format!("layers.{layer}.{part}");
            let extra = |part: &str| format!("{EXTRA_PREFIX}{}", at(part));
            blocks.push(Block {
                attention_norm: loader.norm(&at("attention_norm"), decoder.norm, decoder.norm_eps)?,
                attention: Projections {
                    query: loader.linear(&at("attention.query"))?,
                    key: loader.linear(&at("attention.key"))?,
                    value: loader.linear(&at("attention.value"))?,
                    output: loader.linear(&at("attention.output"))?,
                    meta_query: loader.optional_linear(&extra("meta_query"))?,
                    meta_key: loader.optional_linear(&extra("meta_key"))?,
                },
                mlp_norm: loader.norm(&at("mlp_norm"), decoder.norm, decoder.norm_eps)?,
                mlp: Mlp {
                    gate: loader.optional_linear(&at("mlp.gate"))?,
                    up: loader.linear(&at("mlp.up"))?,
                    down: loader.linear(&at("mlp.down"))?,
                    activation: decoder.activation,
                },
            });
        }
        let final_norm = loader.norm("final_norm", decoder.norm, decoder.norm_eps)?;
        let head = loader.optional_linear("head")?;
        Ok(Self { embed, position, blocks, final_norm, head, config })
    }
}
