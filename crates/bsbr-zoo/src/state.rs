//! What the recurrent form carries from token to token.

use burn::tensor::Tensor;

use crate::{DecoderConfig, ZooError, layer::bytes, mixers::MixerState};

/// Everything a decoder keeps of the tokens of a batch of texts.
#[derive(Debug, Clone)]
pub struct State {
    pub(crate) config: DecoderConfig,
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) layers: Vec<LayerState>,
}

#[derive(Debug, Clone)]
pub(crate) struct LayerState {
    /// The last inputs of the short convolution; `None` for zeros.
    pub(crate) convolution: Option<Tensor<3>>,
    pub(crate) mixer: MixerState,
}

impl State {
    /// Tokens seen of each text.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token was seen yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Texts.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Bytes of every tensor kept, room for growth included.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerState| layer.convolution.as_ref().map_or(0, bytes) + layer.mixer.bytes();
        self.layers.iter().map(layer).sum()
    }

    pub(crate) fn check(&self, config: &DecoderConfig, batch: usize) -> Result<(), ZooError> {
        if self.batch != batch {
            let [expected, found] = [batch, self.batch].map(|batch| format!("{batch} texts"));
            return Err(ZooError::State { expected, found });
        }
        if self.config != *config {
            let [expected, found] = [config, &self.config].map(|config| format!("a decoder with {config:?}"));
            return Err(ZooError::State { expected, found });
        }
        Ok(())
    }
}
