//! What the layers of these names computed in the Python original.

use serde::Serialize;

use crate::Family;

/// A layer of the Python original, by its code, beside the one here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Original {
    /// Whether no output depended on a later token.
    pub causal: bool,
    /// What it computed otherwise.
    pub there: &'static str,
    /// What is computed instead.
    pub here: &'static str,
}

/// How a family differs from the layer of that name in the Python original; `None` for the yardstick.
pub fn original(family: Family) -> Option<Original> {
    let (causal, there, here) = match family {
        Family::Standard => return None,
        Family::Bsbr => (
            false,
            "reads later tokens of its chunk and later chunks, not earlier ones",
            "reads itself and earlier tokens, by blocks that each token chooses",
        ),
        Family::Linear => (
            true,
            "no features, no normaliser, a number in the place of each outer product",
            "the published formula, normalised",
        ),
        Family::Delta => (
            true,
            "constant rate, clipped, noise added to a state that is passed on",
            "the published rule, learned rates",
        ),
        Family::Window => (true, "all scores of all tokens, no state", "scores of the window alone, sinks, a state"),
        Family::Hopfield => (
            true,
            "one step at a constant temperature, which is standard attention",
            "more steps, each over the token's own past, learned temperatures",
        ),
        Family::Gau => (
            true,
            "softmax within the chunk, all pairs of chunks, no state",
            "squared ReLU within the chunk, running sums, a state",
        ),
    };
    Some(Original { causal, there, here })
}
