//! What a model prescribes for its attention, whatever reads the far part.

use burn::tensor::Tensor;

/// The model's own attention: factor, softcap and window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// Factor on `q . k`.
    pub scale: f64,
    /// `cap tanh(x / cap)` on scaled scores, before masking.
    pub softcap: Option<f64>,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
}

impl AttentionOptions {
    /// The usual `1 / sqrt(head_dim)`, no softcap, no window.
    pub fn new(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f64).sqrt(), softcap: None, window: None }
    }

    /// The first position that the token at `position` sees.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Applies the softcap to scaled scores.
    pub(crate) fn capped<const D: usize>(&self, scores: Tensor<D>) -> Tensor<D> {
        match self.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        }
    }
}
