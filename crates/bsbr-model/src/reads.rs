//! How much of the keys the tokens of a text read.

use std::ops::AddAssign;

use bsbr_attn::{AttentionCache, KeysRead};

use crate::DecoderCache;

/// What tokens read in all layers, for each KV head: what the settings fix, and what an index was measured to retrieve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reads {
    /// Keys read exactly.
    pub keys: u64,
    /// Statistics of blocks, sections and chunks that were read or scored.
    pub summaries: u64,
    /// Keys that the original attention reads.
    pub all: u64,
    /// How often keys were chosen: once for each token and KV head of a layer that had a choice.
    pub choices: u64,
    /// How many of these had more keys above the threshold than `max_keys`.
    pub capped: u64,
}

impl AddAssign for Reads {
    fn add_assign(&mut self, other: Self) {
        self.keys += other.keys;
        self.summaries += other.summaries;
        self.all += other.all;
        self.choices += other.choices;
        self.capped += other.capped;
    }
}

impl Reads {
    /// Keys read exactly as a share of those the original reads.
    pub fn keys_share(&self) -> f64 {
        share(self.keys, self.all)
    }

    /// Statistics as a share of the same number.
    pub fn summaries_share(&self) -> f64 {
        share(self.summaries, self.all)
    }

    /// Share of the choices that `max_keys` cut.
    pub fn capped_share(&self) -> f64 {
        share(self.capped, self.choices)
    }

    /// What an index retrieved into a cache.
    pub(crate) fn retrieved(cache: &AttentionCache) -> Self {
        let found = cache.retrieved();
        Self { keys: found.keys, choices: found.tokens, capped: found.capped, ..Self::default() }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl DecoderCache {
    /// What the tokens read so far have read.
    pub fn reads(&self) -> Reads {
        let mut sum = Reads::default();
        for text in &self.texts {
            sum += text.retrieved;
            for (layer, state) in text.layers.iter().zip(&text.states) {
                if state.is_some() {
                    continue;
                }
                sum += Reads::retrieved(layer);
                let config = layer.config();
                let fixed = |attention| KeysRead::of_text(attention, config.options.window, text.length);
                let (found, all) = (fixed(config.attention.as_ref()), fixed(None));
                let heads = config.kv_heads as u64;
                sum += Reads {
                    keys: heads * found.exact,
                    summaries: heads * found.summaries,
                    all: heads * all.exact,
                    ..Reads::default()
                };
            }
        }
        sum
    }
}
