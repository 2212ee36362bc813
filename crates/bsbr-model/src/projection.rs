//! The linear layers of the blocks: each whole or in parts, and each at its place.

use std::{fmt, str::FromStr};

use bsbr_splitlinear::{SplitError, SplitLinear, Tap};
use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::Tensor,
};

use crate::{Decoder, DecoderConfig, ModelError};

/// A linear layer of a block.
#[derive(Module, Debug)]
pub enum Projection {
    /// One weight.
    Dense(Linear),
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
            Self::Split(split) => split.forward(x),
        }
    }

    /// The same of `[tokens, inputs]`, without showing it to anyone; `reduced` as for [`SplitLinear::forward_parts`].
    pub(crate) fn forward_with(&self, x: Tensor<2>, reduced: &mut Vec<(ParamId, Tensor<2>)>) -> Tensor<2> {
        match self {
            Self::Split(split) if !split.is_original() => split.forward_parts(x, reduced),
            Self::Split(split) => split.clone().with_tap(None).forward(x),
            Self::Dense(linear) => linear.forward(x),
        }
    }

    /// The weight `[inputs, outputs]`, made of its factors where there are any.
    pub fn dense_weight(&self) -> Tensor<2> {
        match self {
            Self::Dense(linear) => linear.weight.val(),
            Self::Split(split) => split.dense_weight(),
        }
    }

    /// The bias, `[outputs]`.
    pub fn bias(&self) -> Option<&Param<Tensor<1>>> {
        match self {
            Self::Dense(linear) => linear.bias.as_ref(),
            Self::Split(split) => split.bias.as_ref(),
        }
    }

    /// The layer in one part of this name, if it is not in parts already.
    ///
    /// # Errors
    ///
    /// None for a layer that has outputs.
    pub fn into_split(self, name: &str) -> Result<SplitLinear, SplitError> {
        match self {
            Self::Split(split) => Ok(split),
            Self::Dense(linear) => {
                let [_, outputs] = linear.weight.dims();
                SplitLinear::new(linear, vec![(name.to_owned(), 0..outputs)])
            }
        }
    }

    /// Who sees its inputs.
    pub(crate) fn tap(&self) -> Option<&Tap> {
        match self {
            Self::Dense(_) => None,
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
    /// The gate of a gated MLP.
    Gate,
    /// Into the MLP.
    Up,
    /// Back from the MLP to the stream.
    Down,
}

impl LinearRole {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    fn name(self) -> &'static str {
        match self {
            Self::Query => "attention.query",
            Self::Key => "attention.key",
            Self::Value => "attention.value",
            Self::Output => "attention.output",
            Self::Gate => "mlp.gate",
            Self::Up => "mlp.up",
            Self::Down => "mlp.down",
        }
    }

    /// What the layer reads.
    pub fn input(self) -> BlockInput {
        match self {
            Self::Query | Self::Key | Self::Value => BlockInput::Attention,
            Self::Output => BlockInput::Output,
            Self::Gate | Self::Up => BlockInput::Mlp,
            Self::Down => BlockInput::Down,
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
    /// Of gate and up projection, normed where there is a norm.
    Mlp,
    /// Of the down projection: the inner numbers of the MLP.
    Down,
}

impl BlockInput {
    /// All of them, in the order in which a block computes them.
    pub const ALL: [Self; 4] = [Self::Attention, Self::Output, Self::Mlp, Self::Down];
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
        write!(f, "layers.{}.{}", self.layer, self.role.name())
    }
}

impl FromStr for LinearPlace {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let place = || {
            let (layer, role) = name.strip_prefix("layers.")?.split_once('.')?;
            let role = LinearRole::ALL.into_iter().find(|known| known.name() == role)?;
            let place = Self { layer: layer.parse().ok()?, role };
            (place.to_string() == name).then_some(place)
        };
        place().ok_or_else(|| ModelError::Input(format!("`{name}` is no linear layer of a block")))
    }
}

impl DecoderConfig {
    /// Every linear layer of the blocks, block by block.
    pub fn linear_places(&self) -> Vec<LinearPlace> {
        let roles = LinearRole::ALL.into_iter().filter(|role| self.gated_mlp || *role != LinearRole::Gate);
        (0..self.layers).flat_map(|layer| roles.clone().map(move |role| LinearPlace { layer, role })).collect()
    }

    /// Inputs and outputs of a linear layer; `None` where the decoder has none.
    pub fn linear_shape(&self, place: LinearPlace) -> Option<[usize; 2]> {
        if place.layer >= self.layers {
            return None;
        }
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        Some(match place.role {
            LinearRole::Query => [self.hidden_size, queries],
            LinearRole::Key | LinearRole::Value => [self.hidden_size, keys],
            LinearRole::Output => [queries, self.hidden_size],
            LinearRole::Gate if !self.gated_mlp => return None,
            LinearRole::Gate | LinearRole::Up => [self.hidden_size, self.intermediate_size],
            LinearRole::Down => [self.intermediate_size, self.hidden_size],
        })
    }

    /// Whether a linear layer has a bias.
    pub fn linear_bias(&self, role: LinearRole) -> bool {
        match role {
            LinearRole::Query | LinearRole::Key | LinearRole::Value => self.qkv_bias,
            LinearRole::Output => self.attention_output_bias,
            LinearRole::Gate | LinearRole::Up | LinearRole::Down => self.mlp_bias,
        }
    }
}

impl Decoder {
    /// The linear layer at `place`; `None` where there is none.
    pub fn projection(&self, place: LinearPlace) -> Option<&Projection> {
        let block = self.blocks.get(place.layer)?;
        Some(match place.role {
            LinearRole::Query => &block.attention.query,
            LinearRole::Key => &block.attention.key,
            LinearRole::Value => &block.attention.value,
            LinearRole::Output => &block.attention.output,
            LinearRole::Gate => block.mlp.gate.as_ref()?,
            LinearRole::Up => &block.mlp.up,
            LinearRole::Down => &block.mlp.down,
        })
    }

    /// The same, to be replaced. What is put there must be of the same size.
    pub fn projection_mut(&mut self, place: LinearPlace) -> Option<&mut Projection> {
        self.blocks.get_mut(place.layer)?.projection_mut(place.role)
    }
}

impl crate::Block {
    /// One of the linear layers of the block; `None` where it has none.
    pub fn projection_mut(&mut self, role: LinearRole) -> Option<&mut Projection> {
        Some(match role {
            LinearRole::Query => &mut self.attention.query,
            LinearRole::Key => &mut self.attention.key,
            LinearRole::Value => &mut self.attention.value,
            LinearRole::Output => &mut self.attention.output,
            LinearRole::Gate => self.mlp.gate.as_mut()?,
            LinearRole::Up => &mut self.mlp.up,
            LinearRole::Down => &mut self.mlp.down,
        })
    }
}
