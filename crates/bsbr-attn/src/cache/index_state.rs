//! The index of the keys of a cache, in the form of what reads it.

#[cfg(feature = "flex")]
use burn::tensor::DType;
use burn::tensor::{Device, Tensor};

use super::CacheConfig;
use crate::{BlockAttentionConfig, buffer::RowBuffer, index::PlainIndex, statistics::Sizes};
#[cfg(feature = "flex")]
use crate::{Kernel, fused};

/// An index of keys.
#[derive(Debug, Clone)]
pub(super) enum IndexState {
    /// In plain tensors.
    Plain(Box<PlainIndex>),
    /// In the memory of the fused kernel.
    #[cfg(feature = "flex")]
    Fused(fused::FusedIndex),
}

/// The same call of whichever index there is.
macro_rules! of_index {
    ($state:expr, $index:ident => $call:expr) => {
        match $state {
            IndexState::Plain($index) => $call,
            #[cfg(feature = "flex")]
            IndexState::Fused($index) => $call,
        }
    };
}

impl IndexState {
    #[cfg_attr(not(feature = "flex"), allow(unused_variables))]
    pub(super) fn new(config: &CacheConfig, attention: &BlockAttentionConfig, sizes: Sizes, device: &Device) -> Self {
        #[cfg(feature = "flex")]
        if config.kernel == Kernel::Fastest && *device == Device::flex() && sizes.dtype == DType::F32 {
            return Self::Fused(fused::FusedIndex::new(sizes, attention));
        }
        Self::Plain(Box::new(PlainIndex::new(sizes, attention, device)))
    }

    /// Takes note of the queries of the tokens from `start` on, `[batch, heads, tokens, head_dim]`, as the model made them.
    pub(super) fn see(&mut self, queries: &Tensor<4>, start: usize) {
        of_index!(self, index => index.see(queries, start));
    }

    /// Indexes every section that ends by `end`, from the rows of all tokens.
    pub(super) fn extend(&mut self, keys: &RowBuffer, values: &RowBuffer, end: usize) {
        of_index!(self, index => index.extend(keys, values, end));
    }

    /// Forgets everything but what is known of queries: the keys are no longer where they were.
    pub(super) fn forget(&mut self) {
        of_index!(self, index => index.forget());
    }

    /// The index when `tokens` tokens were in, of which those before `end` could be indexed; `None` where that is not known any
    /// more.
    pub(super) fn first(&self, tokens: usize, end: usize) -> Option<Self> {
        match self {
            Self::Plain(_) => None,
            #[cfg(feature = "flex")]
            Self::Fused(index) => index.first(tokens, end).map(Self::Fused),
        }
    }

    /// Makes room for the index of `tokens` tokens.
    pub(super) fn reserve(&mut self, tokens: usize) {
        of_index!(self, index => index.reserve(tokens));
    }

    pub(super) fn bytes(&self) -> usize {
        of_index!(self, index => index.bytes())
    }

    /// How many tokens must come with their queries before others can come without.
    pub(super) fn founding_tokens(&self) -> usize {
        of_index!(self, index => index.founding_tokens())
    }

    pub(super) fn plain(&self) -> Option<&PlainIndex> {
        match self {
            Self::Plain(index) => Some(index.as_ref()),
            #[cfg(feature = "flex")]
            Self::Fused(_) => None,
        }
    }

    #[cfg(feature = "flex")]
    pub(super) fn fused(&self) -> Option<&bsbr_kernels::index::KeyIndex> {
        match self {
            Self::Plain(_) => None,
            Self::Fused(index) => Some(index.keys()),
        }
    }
}
