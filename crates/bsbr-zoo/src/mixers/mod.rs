//! The attention families, each in a parallel and a recurrent form.

mod bsbr;
mod chunks;
mod delta;
mod gau;
mod hopfield;
mod linear;
mod standard;
mod window;

use bsbr_attn::AttentionCache;
use burn::{module::Module, tensor::Tensor};
use delta::Delta;
use gau::{Gau, GauState};
use hopfield::Hopfield;
use linear::Linear;
use standard::Softmax;
use window::{Window, WindowState};

use crate::{DecoderConfig, Family, ZooError, heads::Rotation, init::Init, layer::bytes, rows::Rows};

/// What a layer attends with.
#[derive(Module, Debug)]
pub(crate) enum Mixer {
    /// `standard` and `bsbr`.
    Softmax(Softmax),
    Linear(Linear),
    Delta(Delta),
    Window(Window),
    Hopfield(Hopfield),
    Gau(Gau),
}

/// What a layer keeps of the tokens it has seen.
#[derive(Debug, Clone)]
pub(crate) enum MixerState {
    Softmax(Box<AttentionCache>),
    /// One matrix for each text and head: `linear` and `delta`.
    Matrix(Tensor<3>),
    Window(WindowState),
    Rows(Rows),
    Gau(GauState),
}

impl Mixer {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        match config.family {
            Family::Standard => Self::Softmax(Softmax::new(config, None, name, init)),
            Family::Bsbr => Self::Softmax(bsbr::new(config, name, init)),
            Family::Linear => Self::Linear(Linear::new(config, name, init)),
            Family::Delta => Self::Delta(Delta::new(config, name, init)),
            Family::Window => Self::Window(Window::new(config, name, init)),
            Family::Hopfield => Self::Hopfield(Hopfield::new(config, name, init)),
            Family::Gau => Self::Gau(Gau::new(config, name, init)),
        }
    }

    /// The parallel form: whole texts `[batch, tokens, width]`. `like` is any tensor of the decoder.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        rotation: Option<&Rotation>,
        like: &Tensor<2>,
    ) -> Result<Tensor<3>, ZooError> {
        let batch = x.dims()[0];
        Ok(match self {
            Self::Softmax(mixer) => mixer.forward(x, rotation)?,
            Self::Linear(mixer) => mixer.forward(x, mixer.start(batch, like)).0,
            Self::Delta(mixer) => mixer.forward(x, mixer.start(batch, like)).0,
            Self::Window(mixer) => mixer.forward(x, rotation),
            Self::Hopfield(mixer) => mixer.forward(x, rotation)?,
            Self::Gau(mixer) => mixer.forward(x, rotation),
        })
    }

    /// Nothing seen yet; of the device and type of `like`.
    pub(crate) fn start(&self, batch: usize, like: &Tensor<2>) -> Result<MixerState, ZooError> {
        Ok(match self {
            Self::Softmax(mixer) => MixerState::Softmax(Box::new(mixer.start(batch, like)?)),
            Self::Linear(mixer) => MixerState::Matrix(mixer.start(batch, like)),
            Self::Delta(mixer) => MixerState::Matrix(mixer.start(batch, like)),
            Self::Window(_) => MixerState::Window(WindowState::default()),
            Self::Hopfield(_) => MixerState::Rows(Rows::default()),
            Self::Gau(mixer) => MixerState::Gau(mixer.start(batch, like)),
        })
    }

    /// The recurrent form: the next tokens `[batch, tokens, width]`.
    pub(crate) fn step(
        &self,
        x: Tensor<3>,
        rotation: Option<&Rotation>,
        state: &mut MixerState,
    ) -> Result<Tensor<3>, ZooError> {
        Ok(match (self, state) {
            (Self::Softmax(mixer), MixerState::Softmax(cache)) => mixer.step(x, rotation, cache)?,
            (Self::Linear(mixer), MixerState::Matrix(state)) => mixer.step(x, state),
            (Self::Delta(mixer), MixerState::Matrix(state)) => mixer.step(x, state),
            (Self::Window(mixer), MixerState::Window(state)) => mixer.step(x, rotation, state),
            (Self::Hopfield(mixer), MixerState::Rows(rows)) => mixer.step(x, rotation, rows)?,
            (Self::Gau(mixer), MixerState::Gau(state)) => mixer.step(x, rotation, state),
            _ => {
                let [expected, found] = ["this family", "another family"].map(str::to_owned);
                return Err(ZooError::State { expected, found });
            }
        })
    }
}

impl MixerState {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Softmax(cache) => cache.bytes(),
            Self::Matrix(state) => bytes(state),
            Self::Window(state) => state.bytes(),
            Self::Rows(rows) => rows.bytes(),
            Self::Gau(state) => state.bytes(),
        }
    }
}
