//! Building a decoder from weights, one tensor at a time.

mod parts;

use std::{collections::HashMap, sync::Arc};

use bsbr_attn::Kernel;
use bsbr_splitlinear::{
    Factors, Pivots, SavedGroup, SavedPart, SavedSplit, Share, ShareLinear, SplitLinear, checked_pivots,
};
use bsbr_weights::{Arithmetic, StoredMatrix};
use burn::{
    module::Param,
    nn::{Embedding, LayerNormConfig, Linear, RmsNorm},
    tensor::{DType, Device, Tensor, TensorData},
};

use crate::{
    Activation, AdapterConfig, AdapterTarget, Decoder, DecoderConfig, EXTRA_PREFIX, HeadNorm, LatentPart, LayerKeys,
    LinearPlace, LinearRole, MlpPart, ModelConfig, ModelError, Norm, Projection, StoredLinear, StoredTable, Table,
    WeightSpec,
    modules::{
        Adapter, Adapters, Block, EachHeadNorm, HeadNormalisation, LayerNormalisation, Mlp, Normalisation, Projections,
        Xielu,
    },
    ops,
    split::rest,
    weight_specs,
    weights::XIELU,
};

/// Where weights come from.
pub trait WeightSource {
    /// The numbers of one weight, in the layout of [`WeightSpec::shape`], as f32.
    ///
    /// # Errors
    ///
    /// Whatever keeps the source from delivering.
    fn read(&mut self, spec: &WeightSpec) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;

    /// The same weight, a matrix, as it is stored; `None` where it can be had in f32 alone. A decoder on the CPU keeps it so: the
    /// weights of linear layers and the table of embeddings.
    ///
    /// # Errors
    ///
    /// Whatever keeps the source from delivering.
    fn stored(&mut self, spec: &WeightSpec) -> Result<Option<StoredMatrix>, Box<dyn std::error::Error + Send + Sync>> {
        let _ = spec;
        Ok(None)
    }
}

/// Reads weights by name with their shapes from the one list there is.
struct Loader<'a> {
    specs: HashMap<String, WeightSpec>,
    source: &'a mut dyn WeightSource,
    device: &'a Device,
    split: Option<SavedSplit>,
    /// The bases read so far: layers that share one hold the same tensor.
    bases: HashMap<String, Param<Tensor<2>>>,
    /// The inputs that bases pass on, by the name of their tensor.
    pivots: HashMap<String, Pivots>,
}

impl Loader<'_> {
    fn tensor<const D: usize>(&mut self, name: &str) -> Result<Tensor<D>, ModelError> {
        let (numbers, shape) = self.numbers(name)?;
        Ok(Tensor::from_data(TensorData::new(numbers, shape), self.device))
    }

    fn numbers(&mut self, name: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
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
        Ok((numbers, spec.shape.clone()))
    }

    fn optional<const D: usize>(&mut self, name: &str) -> Result<Option<Param<Tensor<D>>>, ModelError> {
        self.specs.contains_key(name).then(|| self.tensor(name).map(Param::from_tensor)).transpose()
    }

    /// The weight as its source stores it, if this device computes with such.
    fn stored(&mut self, name: &str) -> Result<Option<StoredMatrix>, ModelError> {
        if !ops::computes_stored(self.device) {
            return Ok(None);
        }
        let Some(spec) = self.specs.get(name) else { return Ok(None) };
        let stored =
            self.source.stored(spec).map_err(|source| ModelError::WeightSource { tensor: name.to_owned(), source })?;
        match stored {
            Some(stored) if stored.shape()[..] != spec.shape[..] => Err(ModelError::WeightShape {
                tensor: name.to_owned(),
                expected: spec.shape.clone(),
                found: stored.shape().to_vec(),
            }),
            stored => Ok(stored),
        }
    }

    /// A linear layer, as it is stored where that can be.
    fn whole(&mut self, name: &str) -> Result<Projection, ModelError> {
        match self.stored(&format!("{name}.weight"))? {
            Some(weight) => Ok(Projection::Stored(StoredLinear {
                weight,
                arithmetic: Arithmetic::F32,
                bias: self.optional(&format!("{name}.bias"))?,
            })),
            None => self.linear(name).map(Into::into),
        }
    }

    /// Files keep `[out, in]`, burn's layer multiplies by `[in, out]`: the same memory, seen transposed.
    fn linear(&mut self, name: &str) -> Result<Linear, ModelError> {
        let weight = self.tensor::<2>(&format!("{name}.weight"))?.transpose();
        Ok(Linear { weight: Param::from_tensor(weight), bias: self.optional(&format!("{name}.bias"))? })
    }

    fn optional_linear(&mut self, name: &str) -> Result<Option<Linear>, ModelError> {
        self.specs.contains_key(&format!("{name}.weight")).then(|| self.linear(name)).transpose()
    }

    /// A linear layer of a block, in parts where some are compressed.
    fn projection(&mut self, layer: usize, role: LinearRole, outputs: usize) -> Result<Projection, ModelError> {
        let name = LinearPlace { layer, role }.to_string();
        let Some(split) = self.split.take() else { return self.whole(&name) };
        let parts = split.parts_of(&name);
        let projection = if parts.is_empty() { self.whole(&name) } else { self.split(&name, outputs, &parts) };
        self.split = Some(split);
        projection
    }

    fn split(&mut self, name: &str, outputs: usize, saved: &[SavedPart<'_>]) -> Result<Projection, ModelError> {
        let inputs = saved[0].group.inputs;
        let original = self.optional::<2>(&format!("{name}.weight"))?;
        let original = original.map(|weight| Param::from_tensor(weight.val().transpose()));
        let (mut parts, mut end) = (Vec::new(), 0);
        let rest = |from: usize, to: usize| ShareLinear::original(rest(name, from), from..to);
        for part in saved {
            if part.columns.start > end {
                parts.push(rest(end, part.columns.start));
            }
            end = part.columns.end;
            parts.push(ShareLinear::compressed(&part.member.part, part.columns.clone(), self.factors(part)?));
        }
        if end < outputs {
            parts.push(rest(end, outputs));
        }
        let bias = self.optional(&format!("{name}.bias"))?;
        Ok(Projection::Split(SplitLinear::of_parts(inputs, original, parts, bias)?))
    }

    /// The factors of a part. Basis and coefficient are read once, whatever the layers that have some of their outputs.
    fn factors(&mut self, part: &SavedPart<'_>) -> Result<Factors, ModelError> {
        let share = part.group.share;
        let basis = self.factor(&part.group.basis())?;
        let coefficient = self.factor(&part.member.coefficient())?;
        let (left, right) = if share == Share::Output { (coefficient, basis) } else { (basis, coefficient) };
        let whole = part.from == (0..part.group.outputs);
        let (start, width) = (part.from.start, part.from.len());
        let right = if whole { right } else { Param::from_tensor(right.val().narrow(1, start, width)) };
        Ok(Factors { left, right, pivots: self.pivots(part.group)?, share })
    }

    /// The inputs that the basis of a group passes on, if it does.
    fn pivots(&mut self, group: &SavedGroup) -> Result<Option<Pivots>, ModelError> {
        let Some(name) = group.pivots() else { return Ok(None) };
        if let Some(known) = self.pivots.get(&name) {
            return Ok(Some(known.clone()));
        }
        let (numbers, _) = self.numbers(&name)?;
        let pivots = checked_pivots(&name, &numbers, group.rank, group.inputs)?;
        let pivots = Pivots::new(&name, &pivots, group.inputs, self.device)?;
        self.pivots.insert(name, pivots.clone());
        Ok(Some(pivots))
    }

    fn factor(&mut self, name: &str) -> Result<Param<Tensor<2>>, ModelError> {
        if let Some(known) = self.bases.get(name) {
            return Ok(known.clone());
        }
        let factor = Param::from_tensor(self.tensor::<2>(name)?.transpose());
        self.bases.insert(name.to_owned(), factor.clone());
        Ok(factor)
    }

    /// A normalisation of `width` numbers with whatever parameters its kind has.
    fn norm(&mut self, name: &str, kind: Norm, epsilon: f64, width: usize) -> Result<Normalisation, ModelError> {
        let gamma = self.optional(&format!("{name}.weight"))?;
        Ok(match kind {
            Norm::Layer | Norm::LayerWeight | Norm::LayerPlain | Norm::LayerPlusOne => {
                let mut norm = LayerNormConfig::new(width).with_epsilon(epsilon).with_bias(false).init(self.device);
                norm.gamma = gamma.unwrap_or(norm.gamma);
                norm.beta = self.optional(&format!("{name}.bias"))?;
                let norm = LayerNormalisation { norm, epsilon };
                if kind == Norm::LayerPlusOne { Normalisation::LayerPlusOne(norm) } else { Normalisation::Layer(norm) }
            }
            Norm::Rms | Norm::RmsPlusOne | Norm::RmsPlain => {
                let gamma = gamma.unwrap_or_else(|| Param::from_tensor(Tensor::ones([width], self.device)));
                let norm = RmsNorm { gamma, epsilon };
                if kind == Norm::RmsPlusOne { Normalisation::RmsPlusOne(norm) } else { Normalisation::Rms(norm) }
            }
        })
    }

    /// A normalisation of the residual stream, where `there` is one.
    fn stream_norm(
        &mut self,
        name: &str,
        there: bool,
        decoder: &DecoderConfig,
    ) -> Result<Option<Normalisation>, ModelError> {
        there.then(|| self.norm(name, decoder.norm, decoder.norm_eps, decoder.hidden_size)).transpose()
    }

    /// The normalisation of queries or keys, where the decoder has one.
    fn head_norm(
        &mut self,
        name: &str,
        (heads, head_dim): (usize, usize),
        decoder: &DecoderConfig,
    ) -> Result<Option<HeadNormalisation>, ModelError> {
        let Some(over) = decoder.block.head_norm else { return Ok(None) };
        let kind = decoder.norm.without_bias();
        Ok(Some(match over {
            HeadNorm::Head => HeadNormalisation::Head(self.norm(name, kind, decoder.norm_eps, head_dim)?),
            HeadNorm::AllHeads => {
                let width = heads * head_dim;
                HeadNormalisation::AllHeads(self.norm(name, kind, decoder.norm_eps, width)?)
            }
            HeadNorm::EachHead => {
                let weight = Param::from_tensor(self.tensor::<2>(&format!("{name}.weight"))?);
                let plain = if kind.is_layer() { Norm::LayerPlain } else { Norm::Rms };
                // A name without weights, so that nothing is read.
                let plain = self.norm("", plain, decoder.norm_eps, head_dim)?;
                HeadNormalisation::EachHead(EachHeadNorm { plain, weight, plus_one: kind == Norm::RmsPlusOne })
            }
        }))
    }

    /// The adapters of a layer, where the list of weights has them.
    fn adapters(&mut self, layer: usize, adapters: &AdapterConfig) -> Result<Adapters, ModelError> {
        Adapters::new(|target: AdapterTarget| {
            let name = format!("{EXTRA_PREFIX}{}", target.place(layer));
            let down = format!("{name}.adapter_down");
            if !adapters.targets.contains(&target) || !self.specs.contains_key(&down) {
                return Ok(None);
            }
            let mut factor = |part: &str| {
                let weight = self.tensor::<2>(&format!("{name}.{part}"))?.transpose();
                Ok::<_, ModelError>(Param::from_tensor(weight))
            };
            Ok(Some(Adapter { down: factor("adapter_down")?, up: factor("adapter_up")?, scale: adapters.scale() }))
        })
    }

    fn block(&mut self, layer: usize, config: &ModelConfig) -> Result<Block, ModelError> {
        let decoder = &config.decoder;
        let adapters = config.adapters.as_ref().filter(|_| config.layer_attention(layer).is_some());
        let at = |part: &str| format!("layers.{layer}.{part}");
        let extra = |part: &str| format!("{EXTRA_PREFIX}{}", at(part));
        let projection = |loader: &mut Self, role| loader.layer_projection(layer, role, decoder);
        let form = decoder.block.form;
        let shape = decoder.shape(layer);
        let recurrent = decoder.layer_recurrent(layer);
        let own_keys = !matches!(shape.keys, LayerKeys::Of { .. });
        let width = shape.head_dim;
        let value_norm = decoder.block.value_norm && own_keys;
        let [query, key, value] = match decoder.latent {
            None => [LinearRole::Query, LinearRole::Key, LinearRole::Value],
            Some(latent) => {
                let from = [LatentPart::Query, LatentPart::Key, LatentPart::Value].map(LinearRole::FromLatent);
                if latent.query_rank.is_some() { from } else { [LinearRole::Query, from[1], from[2]] }
            }
        };
        let (before_attention, before_mlp) = form.norms_before();
        Ok(Block {
            attention_norm: self.stream_norm(&at("attention_norm"), before_attention, decoder)?,
            attention: Projections {
                query: projection(self, query)?,
                key: own_keys.then(|| projection(self, key)).transpose()?,
                value: (shape.keys == LayerKeys::Own).then(|| projection(self, value)).transpose()?,
                latent: decoder.latent.map(|latent| self.latent(layer, latent, decoder)).transpose()?,
                gate: (decoder.attention_gate || recurrent.is_some())
                    .then(|| projection(self, LinearRole::AttentionGate))
                    .transpose()?,
                recurrent: recurrent.map(|recurrent| self.recurrent(layer, recurrent, decoder)).transpose()?,
                output: projection(self, LinearRole::Output)?,
                query_norm: match recurrent {
                    None => self.head_norm(&at("attention.query_norm"), (decoder.heads, width), decoder)?,
                    Some(_) => None,
                },
                key_norm: match own_keys && recurrent.is_none() {
                    true => self.head_norm(&at("attention.key_norm"), (shape.kv_heads, width), decoder)?,
                    false => None,
                },
                // A name without weights, so that nothing is read.
                value_norm: value_norm
                    .then(|| self.norm("", Norm::RmsPlain, decoder.norm_eps, width).map(HeadNormalisation::Head))
                    .transpose()?,
                norm_after_rotary: decoder.block.head_norm_after_rotary,
                sink_logits: decoder.sink_logits.then(|| self.sink_logits(layer)).transpose()?,
                meta_query: self.optional_linear(&extra("meta_query"))?,
                meta_key: self.optional_linear(&extra("meta_key"))?,
                state_basis: self.optional(&extra("state_basis"))?,
                gates: self.optional(&extra("gates"))?,
                adapters: adapters.map(|adapters| self.adapters(layer, adapters)).transpose()?,
            },
            attention_post_norm: self.stream_norm(&at("attention_post_norm"), form.norms_after(), decoder)?,
            mlp_norm: self.stream_norm(&at("mlp_norm"), before_mlp, decoder)?,
            mlp: self.block_mlp(layer, decoder)?,
            mlp_post_norm: self.stream_norm(&at("mlp_post_norm"), form.norms_after(), decoder)?,
            per_layer: decoder.embedding.per_layer.map(|_| self.per_layer(layer, decoder)).transpose()?,
            scalar: self.optional(&at("scalar"))?,
            config: decoder.block,
        })
    }

    fn layer_projection(
        &mut self,
        layer: usize,
        role: LinearRole,
        decoder: &DecoderConfig,
    ) -> Result<Projection, ModelError> {
        let [_, outputs] = decoder.linear_shape(LinearPlace { layer, role }).unwrap_or_default();
        self.projection(layer, role, outputs)
    }

    /// The MLP whose parts have the roles that `role` gives.
    fn mlp(
        &mut self,
        layer: usize,
        role: impl Fn(MlpPart) -> LinearRole,
        decoder: &DecoderConfig,
    ) -> Result<Mlp, ModelError> {
        let mut part = |part| self.layer_projection(layer, role(part), decoder);
        Ok(Mlp {
            gate: decoder.gated_mlp.then(|| part(MlpPart::Gate)).transpose()?,
            up: part(MlpPart::Up)?,
            down: part(MlpPart::Down)?,
            activation: decoder.activation,
            xielu: (decoder.activation == Activation::Xielu).then(|| self.xielu(layer)).transpose()?,
            clamped_gate: decoder.clamped_gate,
        })
    }

    fn sink_logits(&mut self, layer: usize) -> Result<Arc<[f32]>, ModelError> {
        Ok(self.numbers(&format!("layers.{layer}.attention.sink_logits"))?.0.into())
    }

    fn xielu(&mut self, layer: usize) -> Result<Xielu, ModelError> {
        let mut stored = [0.0; 4];
        for (part, number) in XIELU.iter().zip(&mut stored) {
            // One number, as the loader has checked.
            *number = self.numbers(&format!("layers.{layer}.mlp.xielu.{part}"))?.0[0];
        }
        Ok(Xielu::of_stored(stored))
    }

    fn table(&mut self, name: &str) -> Result<Table, ModelError> {
        if let Some(rows) = self.stored(name)? {
            return Ok(Table::Stored(StoredTable { rows, arithmetic: Arithmetic::F32 }));
        }
        let weight = Param::from_tensor(self.tensor::<2>(name)?);
        Ok(Table::Dense(Embedding { weight }))
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
        let split = config.split.clone();
        let mut loader = Loader { specs, source, device, split, bases: HashMap::new(), pivots: HashMap::new() };
        let decoder = &config.decoder;
        let embed = loader.table("embed.weight")?;
        let position = loader.optional("position.weight")?;
        let embed_norm = loader.stream_norm("embed_norm", decoder.embedding.norm, decoder)?;
        let project_in = loader.optional_linear("project_in")?;
        let per_layer_inputs = decoder.embedding.per_layer.map(|inputs| loader.per_layer_inputs(inputs, decoder));
        let per_layer_inputs = per_layer_inputs.transpose()?;
        let mut blocks = Vec::with_capacity(decoder.layers);
        for layer in 0..decoder.layers {
            blocks.push(loader.block(layer, &config)?);
        }
        let final_norm = loader.stream_norm("final_norm", decoder.block.form.final_norm(), decoder)?;
        let project_out = loader.optional_linear("project_out")?;
        let head = if decoder.tied_head { None } else { Some(loader.whole("head")?) };
        // An own head brings its bias with it.
        let head_bias = if head.is_none() { loader.optional("head.bias")? } else { None };
        Ok(Self {
            embed,
            position,
            embed_norm,
            project_in,
            per_layer_inputs,
            blocks,
            final_norm,
            project_out,
            head,
            head_bias,
            config,
            kernel: Kernel::default(),
            stored: DType::F32,
        })
    }
}
