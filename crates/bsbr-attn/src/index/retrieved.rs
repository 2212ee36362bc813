//! How much was retrieved: counted as it happens, for it depends on the text.

use burn::tensor::{Int, Tensor};

/// What tokens retrieved through an index, summed over the sequences of a batch and over KV heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retrieved {
    /// How often a token chose keys: once for each KV head.
    pub tokens: u64,
    /// Keys that they read beyond what the settings alone say.
    pub keys: u64,
    /// How often more would have passed than [`max_keys`](crate::BlockAttentionConfig::max_keys).
    pub capped: u64,
}

/// What one tile chose.
pub(crate) struct Chosen {
    pub(super) tokens: u64,
    /// `[1]`.
    pub(super) keys: Tensor<1, Int>,
    /// Most that `keys` can be.
    pub(super) most: u64,
    pub(super) capped: u64,
}

/// Counts of a text so far. Keys are counted on the device, so that it need not be waited for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counter {
    counted: Retrieved,
    waiting: Option<Tensor<1, Int>>,
    /// Most that the waiting number can be.
    most: u64,
}

impl Counter {
    pub(crate) fn add(&mut self, chosen: Chosen) {
        if self.most + chosen.most > i32::MAX as u64 {
            self.counted = self.counts();
            (self.waiting, self.most) = (None, 0);
        }
        self.counted.tokens += chosen.tokens;
        self.counted.capped += chosen.capped;
        self.most += chosen.most;
        self.waiting = Some(match self.waiting.take() {
            Some(keys) => keys + chosen.keys,
            None => chosen.keys,
        });
    }

    /// Counts what was counted on the host.
    #[cfg(feature = "flex")]
    pub(crate) fn count(&mut self, retrieved: Retrieved) {
        self.counted.tokens += retrieved.tokens;
        self.counted.keys += retrieved.keys;
        self.counted.capped += retrieved.capped;
    }

    pub(crate) fn counts(&self) -> Retrieved {
        let keys = self.waiting.clone().map_or(0, |keys| keys.into_scalar::<i64>());
        Retrieved { keys: self.counted.keys + keys as u64, ..self.counted }
    }
}
