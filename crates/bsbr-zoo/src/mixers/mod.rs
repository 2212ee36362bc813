//! The attention families, each in a parallel and a recurrent form.

mod standard;

use bsbr_attn::AttentionCache;
use burn::{module::Module, tensor::Tensor};

use crate::{DecoderConfig, Family, ZooError, heads::Rotation, init::Init};
use standard::Softmax;

/// What a layer attends with.
#[derive(Module, Debug)]
pub(crate) enum Mixer {
    /// `standard` and `bsbr`.
    Softmax(Softmax),
}

/// What a layer keeps of the tokens it has seen.
#[derive(Debug, Clone)]
pub(crate) enum MixerState {
    Softmax(Box<AttentionCache>),
}

impl Mixer {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Result<Self, ZooError> {
        Ok(match config.family {
            Family::Standard => Self::Softmax(Softmax::new(config, None, name, init)),
            Family::Bsbr => Self::Softmax(Softmax::new(config, Some(config.bsbr.clone()), name, init)),
            other => return Err(ZooError::Family(other.name().into())),
        })
    }

    /// The parallel form: whole texts `[batch, tokens, width]`.
    pub(crate) fn forward(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Result<Tensor<3>, ZooError> {
        match self {
            Self::Softmax(mixer) => mixer.forward(x, rotation),
        }
    }

    /// Nothing seen yet; of the device and type of `like`.
    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> Result<MixerState, ZooError> {
        Ok(match self {
            Self::Softmax(mixer) => MixerState::Softmax(Box::new(mixer.start(batch, like)?)),
        })
    }

    /// The recurrent form: the next tokens `[batch, tokens, width]`; `None` if the state is of another family.
    pub(crate) fn step(
        &self,
        x: Tensor<3>,
        rotation: Option<&Rotation>,
        state: &mut MixerState,
    ) -> Result<Tensor<3>, ZooError> {
        match (self, state) {
            (Self::Softmax(mixer), MixerState::Softmax(cache)) => mixer.step(x, rotation, cache),
        }
    }
}

impl MixerState {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Softmax(cache) => cache.bytes(),
        }
    }
}
