//! The linear layers of the blocks: each whole or in parts, and each at its place.

use std::{fmt, str::FromStr};

use bsbr_splitlinear::{SplitError, SplitLinear, Tap};
use bsbr_weights::Arithmetic;
use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor},
};

use crate::{BlockMlp, Decoder, DecoderConfig, LatentPart, LayerKeys, ModelError, StoredLinear, stored::Weight};

/// A linear layer of a block.
#[derive(Module, Debug)]
pub enum Projection {
    /// One weight in f32.
    Dense(Linear),
    /// One weight in the format of its file.
    Stored(StoredLinear),
    /// Parts, some of which may be compressed.
    Split(SplitLinear),
}

impl From<Linear> for Projection {
    fn from(linear: Linear) -> Self {
        Self::Dense(linear)
    }
}

impl Projection {
    /// `[.., inputs]` to `[.., outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Dense(linear) => linear.forward(x),
            Self::Stored(linear) => linear.forward(x),
            Self::Split(split) => split.forward(x),
        }
    }

    /// The same of `[tokens, inputs]`, without showing it to anyone; `reduced` as for [`SplitLinear::forward_parts`].
    pub(crate) fn forward_with(&self, x: Tensor<2>, reduced: &mut Vec<(ParamId, Tensor<2>)>) -> Tensor<2> {
        match self {
            Self::Split(split) if !split.is_original() => split.forward_parts(x, reduced),
            Self::Split(split) => split.clone().with_tap(None).forward(x),
            Self::Dense(linear) => linear.forward(x),
            Self::Stored(linear) => linear.forward(x),
        }
    }

    /// The layer as a whole: its weight, whatever holds it, and its bias. A split layer has no such weight before it is made.
    pub(crate) fn as_weight(&self) -> (Weight, Option<Tensor<1>>) {
        let weight = match self {
            Self::Stored(linear) => Weight::Stored(linear.weight.clone(), linear.arithmetic),
            Self::Dense(linear) => Weight::Tensor(linear.weight.val()),
            Self::Split(split) => Weight::Tensor(split.dense_weight()),
        };
        (weight, self.bias().map(Param::val))
    }

    /// The weight `[inputs, outputs]`, made of its factors where there are any, and where it is stored in another format widened
    /// on `device`.
    pub fn dense_weight(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(linear) => linear.weight.val(),
            Self::Stored(linear) => linear.widened(device).weight.val(),
            Self::Split(split) => split.dense_weight(),
        }
    }

    /// The weight in f32, to be changed: one that is stored in another format is widened on `device`. `None` for a layer in parts.
    pub(crate) fn dense_mut(&mut self, device: &Device) -> Option<&mut Linear> {
        if let Self::Stored(linear) = self {
            *self = Self::Dense(linear.widened(device));
        }
        match self {
            Self::Dense(linear) => Some(linear),
            Self::Stored(_) | Self::Split(_) => None,
        }
    }

    /// The same weights multiplied in another arithmetic, where they are stored as codes.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        if let Self::Stored(linear) = self {
            linear.arithmetic = arithmetic;
        }
    }

    /// The bias, `[outputs]`.
    pub fn bias(&self) -> Option<&Param<Tensor<1>>> {
        match self {
            Self::Dense(linear) => linear.bias.as_ref(),
            Self::Stored(linear) => linear.bias.as_ref(),
            Self::Split(split) => split.bias.as_ref(),
        }
    }

    /// The layer in one part of this name, if it is not in parts already. One that is stored in another format is widened on
    /// `device`.
    ///
    /// # Errors
    ///
    /// None for a layer that has outputs.
    pub fn into_split(self, name: &str, device: &Device) -> Result<SplitLinear, SplitError> {
        match self {
            Self::Split(split) => Ok(split),
            Self::Stored(linear) => Self::Dense(linear.widened(device)).into_split(name, device),
            Self::Dense(linear) => {
                let [_, outputs] = linear.weight.dims();
                SplitLinear::new(linear, vec![(name.to_owned(), 0..outputs)])
            }
        }
    }

    /// Who sees its inputs.
    pub(crate) fn tap(&self) -> Option<&Tap> {
        match self {
            Self::Dense(_) | Self::Stored(_) => None,
            Self::Split(split) => split.tap(),
        }
    }
}

/// Which linear layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearRole {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Back from the heads to the stream.
    Output,
    /// The gate on what the heads read.
    AttentionGate,
    /// The gate of a gated MLP.
    Gate,
    /// Into the MLP.
    Up,
    /// Back from the MLP to the stream.
    Down,
    /// A part of the expert of this number.
    Expert(usize, MlpPart),
    /// A part of the expert that every token goes through.
    Shared(MlpPart),
    /// What rotates of queries, in latent attention.
    QueryRotary,
    /// The vector that queries are made of.
    QueryLatent,
    /// What rotates of keys, for all heads.
    KeyRotary,
    /// The vector that keys and values are made of.
    Latent,
    /// What is made of these two vectors.
    FromLatent(LatentPart),
    /// From the stream to the inputs of the layer, which it gates.
    PerLayerGate,
    /// Back from the gated inputs of the layer to the stream.
    PerLayerDown,
}

/// Which linear layer of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MlpPart {
    /// The gate.
    Gate,
    /// Into the expert.
    Up,
    /// Back to the stream.
    Down,
}

impl MlpPart {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }
}

impl LinearRole {
    /// The four of attention.
    pub const ATTENTION: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];
    /// The three of a block with one MLP.
    pub const MLP: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
    /// Those of latent attention besides, made of the stream.
    const LATENT: [Self; 4] = [Self::QueryRotary, Self::QueryLatent, Self::KeyRotary, Self::Latent];
    /// The two of a block with inputs of its own.
    pub const PER_LAYER: [Self; 2] = [Self::PerLayerGate, Self::PerLayerDown];

    fn of_name(name: &str) -> Option<Self> {
        if let Some((expert, part)) = name.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.')) {
            return Some(Self::Expert(expert.parse().ok()?, MlpPart::of_name(part)?));
        }
        if let Some(part) = name.strip_prefix("mlp.shared.") {
            return Some(Self::Shared(MlpPart::of_name(part)?));
        }
        let attention = Self::ATTENTION.into_iter().chain([Self::AttentionGate]);
        let known = attention.chain(Self::MLP).chain(Self::PER_LAYER).chain(Self::LATENT);
        known.chain(LatentPart::ALL.map(Self::FromLatent)).find(|known| known.to_string() == name)
    }

    /// Which part of an MLP it is, if it is one.
    pub fn mlp_part(self) -> Option<MlpPart> {
        match self {
            Self::Query
            | Self::Key
            | Self::Value
            | Self::Output
            | Self::AttentionGate
            | Self::QueryRotary
            | Self::QueryLatent
            | Self::KeyRotary
            | Self::Latent
            | Self::FromLatent(_)
            | Self::PerLayerGate
            | Self::PerLayerDown => None,
            Self::Gate => Some(MlpPart::Gate),
            Self::Up => Some(MlpPart::Up),
            Self::Down => Some(MlpPart::Down),
            Self::Expert(_, part) | Self::Shared(part) => Some(part),
        }
    }

    /// What the layer reads.
    pub fn input(self) -> BlockInput {
        match self {
            Self::Query | Self::Key | Self::Value | Self::AttentionGate => BlockInput::Attention,
            Self::QueryRotary | Self::QueryLatent | Self::KeyRotary | Self::Latent => BlockInput::Attention,
            Self::FromLatent(LatentPart::Query | LatentPart::QueryRotary) => BlockInput::QueryLatent,
            Self::FromLatent(LatentPart::Key | LatentPart::Value) => BlockInput::Latent,
            Self::Output => BlockInput::Output,
            Self::Gate | Self::Up | Self::Shared(MlpPart::Gate | MlpPart::Up) => BlockInput::Mlp,
            Self::Down => BlockInput::Down,
            Self::Expert(expert, MlpPart::Gate | MlpPart::Up) => BlockInput::Expert(expert),
            Self::Expert(expert, MlpPart::Down) => BlockInput::ExpertDown(expert),
            Self::Shared(MlpPart::Down) => BlockInput::SharedDown,
            Self::PerLayerGate => BlockInput::PerLayer,
            Self::PerLayerDown => BlockInput::PerLayerDown,
        }
    }
}

impl fmt::Display for LinearRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Query => f.write_str("attention.query"),
            Self::Key => f.write_str("attention.key"),
            Self::Value => f.write_str("attention.value"),
            Self::Output => f.write_str("attention.output"),
            Self::AttentionGate => f.write_str("attention.gate"),
            Self::Gate => f.write_str("mlp.gate"),
            Self::Up => f.write_str("mlp.up"),
            Self::Down => f.write_str("mlp.down"),
            Self::Expert(expert, part) => write!(f, "mlp.experts.{expert}.{}", part.name()),
            Self::Shared(part) => write!(f, "mlp.shared.{}", part.name()),
            Self::QueryRotary => f.write_str("attention.query_rotary"),
            Self::QueryLatent => f.write_str("attention.query_latent"),
            Self::KeyRotary => f.write_str("attention.key_rotary"),
            Self::Latent => f.write_str("attention.latent"),
            Self::FromLatent(part) => write!(f, "attention.from_latent.{}", part.name()),
            Self::PerLayerGate => f.write_str("per_layer.gate"),
            Self::PerLayerDown => f.write_str("per_layer.down"),
        }
    }
}

/// An input that linear layers of a block share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlockInput {
    /// Of queries, keys and values, normed where there is a norm.
    Attention,
    /// Of the output projection: what the heads read.
    Output,
    /// Of gate and up projection, normed where there is a norm; of the expert that every token goes through too.
    Mlp,
    /// Of the down projection: the inner numbers of the MLP.
    Down,
    /// Of gate and up projection of an expert: the tokens that go through it.
    Expert(usize),
    /// Of the down projection of an expert.
    ExpertDown(usize),
    /// Of the down projection of the expert that every token goes through.
    SharedDown,
    /// The vector that queries are made of, normed.
    QueryLatent,
    /// The vector that keys and values are made of, normed.
    Latent,
    /// Of the gate of the inputs of the layer: the stream behind the MLP.
    PerLayer,
    /// The inputs of the layer times their gate.
    PerLayerDown,
}

/// A linear layer of a decoder. Its name is that of its weights: `layers.3.attention.query`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearPlace {
    /// Number of the block.
    pub layer: usize,
    /// Which of its layers.
    pub role: LinearRole,
}

impl fmt::Display for LinearPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layers.{}.{}", self.layer, self.role)
    }
}

impl FromStr for LinearPlace {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let place = || {
            let (layer, role) = name.strip_prefix("layers.")?.split_once('.')?;
            let place = Self { layer: layer.parse().ok()?, role: LinearRole::of_name(role)? };
            (place.to_string() == name).then_some(place)
        };
        place().ok_or_else(|| ModelError::Input(format!("`{name}` is no linear layer of a block")))
    }
}

impl DecoderConfig {
    /// Every linear layer of the blocks, block by block.
    pub fn linear_places(&self) -> Vec<LinearPlace> {
        let of_layer = |layer| self.linear_roles(layer).into_iter().map(move |role| LinearPlace { layer, role });
        (0..self.layers).flat_map(of_layer).collect()
    }

    /// The linear layers of block `layer`, in the order of their inputs.
    pub fn linear_roles(&self, layer: usize) -> Vec<LinearRole> {
        let mut roles = match self.latent {
            Some(_) => self.latent_roles().into_iter().chain([LinearRole::Output]).collect(),
            None => LinearRole::ATTENTION.to_vec(),
        };
        if self.attention_gate || self.layer_recurrent(layer).is_some() {
            // Before the output, which reads something else.
            roles.insert(roles.len() - 1, LinearRole::AttentionGate);
        }
        let keys = self.shape(layer).keys;
        roles.retain(|role| match role {
            LinearRole::Key => !matches!(keys, LayerKeys::Of { .. }),
            LinearRole::Value => keys == LayerKeys::Own,
            _ => true,
        });
        match self.layer_experts(layer) {
            None => roles.extend(LinearRole::MLP),
            Some(experts) => {
                if experts.beside_mlp {
                    roles.extend(LinearRole::MLP);
                }
                let each =
                    (0..experts.count).flat_map(|expert| MlpPart::ALL.map(|part| LinearRole::Expert(expert, part)));
                roles.extend(each);
                roles.extend(experts.shared.into_iter().flat_map(|_| MlpPart::ALL.map(LinearRole::Shared)));
            }
        }
        roles.retain(|role| self.gated_mlp || role.mlp_part() != Some(MlpPart::Gate));
        roles.extend(self.embedding.per_layer.into_iter().flat_map(|_| LinearRole::PER_LAYER));
        roles
    }

    /// Inputs and outputs of a linear layer; `None` where the decoder has none.
    pub fn linear_shape(&self, place: LinearPlace) -> Option<[usize; 2]> {
        if place.layer >= self.layers {
            return None;
        }
        let of_mlp = place.role.mlp_part().is_some();
        let of_inputs = matches!(place.role, LinearRole::PerLayerGate | LinearRole::PerLayerDown);
        if let Some(latent) = self.latent.filter(|_| !of_mlp && !of_inputs) {
            return self.latent_shape(latent, place.role);
        }
        if let Some(recurrent) = self.layer_recurrent(place.layer) {
            let (hidden, keys, values) = (self.hidden_size, recurrent.keys_width(), recurrent.values_width());
            match place.role {
                LinearRole::Query | LinearRole::Key => return Some([hidden, keys]),
                LinearRole::Value | LinearRole::AttentionGate => return Some([hidden, values]),
                LinearRole::Output => return Some([values, hidden]),
                _ => {}
            }
        }
        let shape = self.shape(place.layer);
        let (queries, keys) = (self.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let experts = self.layer_experts(place.layer);
        let inner = match (place.role, experts) {
            (LinearRole::Query, _) => return Some([self.hidden_size, queries]),
            (LinearRole::Key, _) if !matches!(shape.keys, LayerKeys::Of { .. }) => {
                return Some([self.hidden_size, keys]);
            }
            (LinearRole::Value, _) if shape.keys == LayerKeys::Own => return Some([self.hidden_size, keys]),
            (LinearRole::Output, _) => return Some([queries, self.hidden_size]),
            (LinearRole::AttentionGate, _) if self.attention_gate => return Some([self.hidden_size, queries]),
            (LinearRole::PerLayerGate, _) => return Some([self.hidden_size, self.embedding.per_layer?.width]),
            (LinearRole::PerLayerDown, _) => return Some([self.embedding.per_layer?.width, self.hidden_size]),
            (LinearRole::Gate | LinearRole::Up | LinearRole::Down, experts)
                if experts.is_none_or(|experts| experts.beside_mlp) =>
            {
                shape.intermediate_size
            }
            (LinearRole::Expert(expert, _), Some(experts)) if expert < experts.count => experts.intermediate_size,
            (LinearRole::Shared(_), Some(experts)) => experts.shared?.intermediate_size,
            _ => return None,
        };
        match place.role.mlp_part()? {
            MlpPart::Gate if !self.gated_mlp => None,
            MlpPart::Gate | MlpPart::Up => Some([self.hidden_size, inner]),
            MlpPart::Down => Some([inner, self.hidden_size]),
        }
    }

    /// Whether a linear layer has a bias.
    pub fn linear_bias(&self, role: LinearRole) -> bool {
        match role {
            LinearRole::Query | LinearRole::Key | LinearRole::Value | LinearRole::AttentionGate => self.qkv_bias,
            LinearRole::Output => self.attention_output_bias,
            LinearRole::QueryLatent | LinearRole::KeyRotary | LinearRole::Latent => {
                self.latent.is_some_and(|latent| latent.bias)
            }
            LinearRole::QueryRotary | LinearRole::FromLatent(_) => false,
            LinearRole::Gate | LinearRole::Up | LinearRole::Down | LinearRole::Shared(_) => self.mlp_bias,
            LinearRole::Expert(..) => self.experts.as_ref().is_some_and(|experts| experts.bias),
            LinearRole::PerLayerGate | LinearRole::PerLayerDown => false,
        }
    }
}

impl Decoder {
    /// The linear layer at `place`; `None` where there is none.
    pub fn projection(&self, place: LinearPlace) -> Option<&Projection> {
        let block = self.blocks.get(place.layer)?;
        match place.role {
            LinearRole::Query => Some(&block.attention.query).filter(|_| block.attention.query_of_stream()),
            LinearRole::Key => block.attention.key.as_ref().filter(|_| block.attention.latent.is_none()),
            LinearRole::Value => block.attention.value.as_ref().filter(|_| block.attention.latent.is_none()),
            LinearRole::QueryRotary
            | LinearRole::QueryLatent
            | LinearRole::KeyRotary
            | LinearRole::Latent
            | LinearRole::FromLatent(_) => block.attention.latent_projection(place.role),
            LinearRole::Output => Some(&block.attention.output),
            LinearRole::AttentionGate => block.attention.gate.as_ref(),
            LinearRole::PerLayerGate => block.per_layer.as_ref().map(|own| &own.gate),
            LinearRole::PerLayerDown => block.per_layer.as_ref().map(|own| &own.down),
            role => {
                let mlp = match (role, &block.mlp) {
                    (LinearRole::Gate | LinearRole::Up | LinearRole::Down, BlockMlp::Dense(mlp)) => mlp,
                    (LinearRole::Gate | LinearRole::Up | LinearRole::Down, BlockMlp::Mixture(mixture)) => {
                        &mixture.beside.as_ref()?.mlp
                    }
                    (LinearRole::Expert(expert, _), BlockMlp::Mixture(mixture)) => mixture.experts.get(expert)?,
                    (LinearRole::Shared(_), BlockMlp::Mixture(mixture)) => mixture.shared.as_ref()?,
                    _ => return None,
                };
                match role.mlp_part()? {
                    MlpPart::Gate => mlp.gate.as_ref(),
                    MlpPart::Up => Some(&mlp.up),
                    MlpPart::Down => Some(&mlp.down),
                }
            }
        }
    }

    /// The same, to be replaced. What is put there must be of the same size.
    pub fn projection_mut(&mut self, place: LinearPlace) -> Option<&mut Projection> {
        self.blocks.get_mut(place.layer)?.projection_mut(place.role)
    }
}

impl crate::Block {
    /// One of the linear layers of the block; `None` where it has none.
    pub fn projection_mut(&mut self, role: LinearRole) -> Option<&mut Projection> {
        match role {
            LinearRole::Query if self.attention.query_of_stream() => Some(&mut self.attention.query),
            LinearRole::Key if self.attention.latent.is_none() => self.attention.key.as_mut(),
            LinearRole::Value if self.attention.latent.is_none() => self.attention.value.as_mut(),
            LinearRole::Query | LinearRole::Key | LinearRole::Value => None,
            LinearRole::QueryRotary
            | LinearRole::QueryLatent
            | LinearRole::KeyRotary
            | LinearRole::Latent
            | LinearRole::FromLatent(_) => self.attention.latent_projection_mut(role),
            LinearRole::Output => Some(&mut self.attention.output),
            LinearRole::AttentionGate => self.attention.gate.as_mut(),
            LinearRole::PerLayerGate => self.per_layer.as_mut().map(|own| &mut own.gate),
            LinearRole::PerLayerDown => self.per_layer.as_mut().map(|own| &mut own.down),
            role => {
                let mlp = match (role, &mut self.mlp) {
                    (LinearRole::Gate | LinearRole::Up | LinearRole::Down, BlockMlp::Dense(mlp)) => mlp,
                    (LinearRole::Gate | LinearRole::Up | LinearRole::Down, BlockMlp::Mixture(mixture)) => {
                        &mut mixture.beside.as_mut()?.mlp
                    }
                    (LinearRole::Expert(expert, _), BlockMlp::Mixture(mixture)) => mixture.experts.get_mut(expert)?,
                    (LinearRole::Shared(_), BlockMlp::Mixture(mixture)) => mixture.shared.as_mut()?,
                    _ => return None,
                };
                match role.mlp_part()? {
                    MlpPart::Gate => mlp.gate.as_mut(),
                    MlpPart::Up => Some(&mut mlp.up),
                    MlpPart::Down => Some(&mut mlp.down),
                }
            }
        }
    }
}
