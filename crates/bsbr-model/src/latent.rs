//! The linear layers of latent attention: [`LatentAttention`].

use burn::{module::Module, tensor::Tensor};

use crate::{
    DecoderConfig, LatentAttention, LinearRole, Projection,
    modules::{Normalisation, Projections},
};

/// What is made of the vectors of latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LatentPart {
    /// What does not rotate of queries.
    Query,
    /// What rotates of queries.
    QueryRotary,
    /// What does not rotate of keys.
    Key,
    /// Values.
    Value,
}

impl LatentPart {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Query, Self::QueryRotary, Self::Key, Self::Value];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::QueryRotary => "query_rotary",
            Self::Key => "key",
            Self::Value => "value",
        }
    }
}

/// What latent attention has besides; see [`crate::LatentAttention`].
#[derive(Module, Debug)]
pub struct LatentProjections {
    /// `[hidden_size]` to the vector that queries are made of, if not of the stream.
    pub query_latent: Option<Projection>,
    /// Of that vector.
    pub query_latent_norm: Option<Normalisation>,
    /// To what rotates of queries, `[heads * rotary_dim]`.
    pub query_rotary: Projection,
    /// `[hidden_size]` to the vector that keys and values are made of.
    pub latent: Projection,
    /// Of that vector.
    pub latent_norm: Normalisation,
    /// `[hidden_size]` to what rotates of keys, `[rotary_dim]`.
    pub key_rotary: Projection,
    /// Dimensions of a head that rotate.
    #[module(skip)]
    pub rotary_dim: usize,
    /// Width of a value.
    #[module(skip)]
    pub value_dim: usize,
}

impl Projections {
    /// Whether queries are made of the stream.
    pub(crate) fn query_of_stream(&self) -> bool {
        self.latent.as_ref().is_none_or(|latent| latent.query_latent.is_none())
    }

    /// A linear layer that latent attention has besides the usual ones.
    pub(crate) fn latent_projection(&self, role: LinearRole) -> Option<&Projection> {
        let latent = self.latent.as_ref()?;
        let of_stream = latent.query_latent.is_none();
        match role {
            LinearRole::QueryRotary if of_stream => Some(&latent.query_rotary),
            LinearRole::QueryLatent => latent.query_latent.as_ref(),
            LinearRole::KeyRotary => Some(&latent.key_rotary),
            LinearRole::Latent => Some(&latent.latent),
            LinearRole::FromLatent(LatentPart::Query) if !of_stream => Some(&self.query),
            LinearRole::FromLatent(LatentPart::QueryRotary) if !of_stream => Some(&latent.query_rotary),
            LinearRole::FromLatent(LatentPart::Key) => self.key.as_ref(),
            LinearRole::FromLatent(LatentPart::Value) => self.value.as_ref(),
            _ => None,
        }
    }

    /// The same, to be replaced.
    pub(crate) fn latent_projection_mut(&mut self, role: LinearRole) -> Option<&mut Projection> {
        let latent = self.latent.as_mut()?;
        let of_stream = latent.query_latent.is_none();
        match role {
            LinearRole::QueryRotary if of_stream => Some(&mut latent.query_rotary),
            LinearRole::QueryLatent => latent.query_latent.as_mut(),
            LinearRole::KeyRotary => Some(&mut latent.key_rotary),
            LinearRole::Latent => Some(&mut latent.latent),
            LinearRole::FromLatent(LatentPart::Query) if !of_stream => Some(&mut self.query),
            LinearRole::FromLatent(LatentPart::QueryRotary) if !of_stream => Some(&mut latent.query_rotary),
            LinearRole::FromLatent(LatentPart::Key) => self.key.as_mut(),
            LinearRole::FromLatent(LatentPart::Value) => self.value.as_mut(),
            _ => None,
        }
    }

    /// What the heads read without the zeros that fill it up to the width of a head, `[1, heads, tokens, width]`.
    pub(crate) fn values_read(&self, read: Tensor<4>) -> Tensor<4> {
        match &self.latent {
            Some(latent) if latent.value_dim < read.dims()[3] => read.narrow(3, 0, latent.value_dim),
            _ => read,
        }
    }
}

impl DecoderConfig {
    /// The linear layers of latent attention before its output, in the order of their inputs; none where it is not latent.
    pub(crate) fn latent_roles(&self) -> Vec<LinearRole> {
        let Some(latent) = self.latent else { return Vec::new() };
        let queries = match latent.query_rank {
            Some(_) => vec![
                LinearRole::QueryLatent,
                LinearRole::FromLatent(LatentPart::Query),
                LinearRole::FromLatent(LatentPart::QueryRotary),
            ],
            None => vec![LinearRole::Query, LinearRole::QueryRotary],
        };
        let keys = [LatentPart::Key, LatentPart::Value].map(LinearRole::FromLatent);
        queries.into_iter().chain([LinearRole::Latent, LinearRole::KeyRotary]).chain(keys).collect()
    }

    /// [`DecoderConfig::linear_shape`] of a layer of latent attention.
    pub(crate) fn latent_shape(&self, latent: LatentAttention, role: LinearRole) -> Option<[usize; 2]> {
        let (rotary, still) = self.latent_parts()?;
        let (hidden, heads, whole) = (self.hidden_size, self.heads, latent.query_rank.is_none());
        match role {
            LinearRole::Query if whole => Some([hidden, heads * still]),
            LinearRole::QueryRotary if whole => Some([hidden, heads * rotary]),
            LinearRole::QueryLatent => Some([hidden, latent.query_rank?]),
            LinearRole::FromLatent(LatentPart::Query) => Some([latent.query_rank?, heads * still]),
            LinearRole::FromLatent(LatentPart::QueryRotary) => Some([latent.query_rank?, heads * rotary]),
            LinearRole::Latent => Some([hidden, latent.rank]),
            LinearRole::KeyRotary => Some([hidden, rotary]),
            LinearRole::FromLatent(LatentPart::Key) => Some([latent.rank, heads * still]),
            LinearRole::FromLatent(LatentPart::Value) => Some([latent.rank, heads * latent.value_dim]),
            LinearRole::Output => Some([heads * latent.value_dim, hidden]),
            _ => None,
        }
    }
}
