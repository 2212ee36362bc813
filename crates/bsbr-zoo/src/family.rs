//! The families by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::ZooError;

/// An attention family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Causal softmax attention.
    Standard,
    /// Exact attention near a token, retrieval of blocks further back: [`bsbr_attn`].
    Bsbr,
    /// Normalised linear attention with the feature map `elu(x) + 1`.
    Linear,
    /// DeltaNet: a matrix of associations, corrected by the delta rule.
    Delta,
    /// Softmax attention to the last tokens and to the first ones.
    Window,
    /// Modern Hopfield network: queries are first moved to the stored patterns they are near.
    Hopfield,
    /// Gated attention unit: squared-ReLU attention within a chunk, linear attention across chunks.
    Gau,
}

impl Family {
    /// Every family, in the order of tables.
    pub const ALL: [Self; 7] =
        [Self::Standard, Self::Bsbr, Self::Linear, Self::Delta, Self::Window, Self::Hopfield, Self::Gau];

    /// The name in configurations and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Bsbr => "bsbr",
            Self::Linear => "linear",
            Self::Delta => "delta",
            Self::Window => "window",
            Self::Hopfield => "hopfield",
            Self::Gau => "gau",
        }
    }

    /// Where its formulas come from.
    pub fn source(self) -> &'static str {
        match self {
            Self::Standard => "Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762)",
            Self::Bsbr => "the crate bsbr-attn: exact local attention and retrieval of blocks in one softmax",
            Self::Linear => "Katharopoulos et al. 2020, Transformers are RNNs (arXiv 2006.16236)",
            Self::Delta => {
                "Schlag et al. 2021, Linear Transformers Are Secretly Fast Weight Programmers (arXiv 2102.11174); Yang et \
                 al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484)"
            }
            Self::Window => {
                "Beltagy et al. 2020, Longformer (arXiv 2004.05150); Xiao et al. 2023, Efficient Streaming Language \
                 Models with Attention Sinks (arXiv 2309.17453)"
            }
            Self::Hopfield => "Ramsauer et al. 2020, Hopfield Networks is All You Need (arXiv 2008.02217)",
            Self::Gau => "Hua et al. 2022, Transformer Quality in Linear Time (arXiv 2202.10447)",
        }
    }

    /// Whether [`Positions`](crate::Positions) apply: families whose scores are products of a query and a key. A rotation
    /// would break the positive scores of `linear`; `delta` carries order in its state.
    pub fn rotates(self) -> bool {
        !matches!(self, Self::Linear | Self::Delta)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Family {
    type Err = ZooError;

    fn from_str(name: &str) -> Result<Self, ZooError> {
        Self::ALL.into_iter().find(|family| family.name() == name).ok_or_else(|| ZooError::Family(name.to_owned()))
    }
}
