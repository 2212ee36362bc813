//! Causal attention: over all keys, and over the keys near a token plus those it retrieves.

mod backward;
mod block_tile;
mod blocks;
mod candidates;
mod chosen;
mod dense;
mod limits;
mod mean_gradient;
mod opened;
mod reading;
mod retrieval;
mod sums;
mod tasks;
mod tile;
mod tile_gradient;

pub use backward::{Forward, Gradients, block_attention_backward, causal_attention_backward};
pub use blocks::{
    BlockInput, BlockOptions, IndexOptions, Near, Retrieved, Sinks, block_attention, block_attention_into,
};
pub use dense::causal_attention;

/// What a model prescribes for its attention.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalOptions {
    /// Factor on `q . k`.
    pub scale: f32,
    /// `cap tanh(x / cap)` on scaled scores.
    pub softcap: Option<f32>,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// ALiBi: `slope (i - t)` is added to the score of position `i` for the token at `t`; one slope for each query head.
    pub slopes: Option<Vec<f32>>,
    /// A score of each query head that stands beside those of the keys in every softmax, with a value of 0: it is not scaled,
    /// capped or masked. Each is finite.
    pub sink_logits: Option<Vec<f32>>,
}

impl CausalOptions {
    /// The first position that the token at `position` sees.
    fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
