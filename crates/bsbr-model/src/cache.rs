//! What a decoder remembers of the texts it is reading.

use std::sync::Arc;

use bsbr_attn::{AttentionCache, AttentionOptions, CacheConfig, FarPositions, Kernel};
use burn::tensor::{DType, Device, Tensor};

use crate::{
    ModelConfig, ModelError, PositionPolicy, Positions, Reads,
    recurrent::RecurrentState,
    rotary::{rotary_set, rotary_sets},
};

/// Most tokens that room is made for before they come: who allows a million new tokens rarely means them.
const MOST_RESERVED: usize = 1 << 17;

/// The state of a batch of texts, each of its own length.
#[derive(Debug, Clone)]
pub struct DecoderCache {
    pub(crate) texts: Vec<TextCache>,
}

/// The state of one text.
#[derive(Debug, Clone)]
pub(crate) struct TextCache {
    /// One per layer.
    pub(crate) layers: Vec<AttentionCache>,
    /// Those of the recurrent layers, whose caches above stay empty.
    pub(crate) states: Vec<Option<RecurrentState>>,
    /// The same as they were behind an earlier token, and how many tokens there were.
    pub(crate) marked: Option<(usize, Vec<Option<RecurrentState>>)>,
    /// Tokens read so far.
    pub(crate) length: usize,
    /// The first of them that the layers no longer hold, under the `slide` policy.
    pub(crate) forgotten: usize,
    /// The others, under the `slide` policy.
    pub(crate) held: Vec<u32>,
    /// Length the text is expected to reach.
    pub(crate) expected: usize,
    /// What was retrieved for tokens whose layers are no longer held, under the `slide` policy.
    pub(crate) retrieved: Reads,
    /// Rotary frequencies and their factor, for each way a layer rotates.
    pub(crate) frequencies: Vec<(Vec<f64>, f64)>,
}

impl TextCache {
    /// Where the next token stands.
    pub(crate) fn position(&self) -> usize {
        self.length - self.forgotten
    }

    /// The states behind the first `tokens` tokens, if they are known still.
    pub(crate) fn states_at(&self, tokens: usize) -> Option<Vec<Option<RecurrentState>>> {
        if tokens == self.length || self.states.iter().all(Option::is_none) {
            return Some(self.states.clone());
        }
        self.marked.as_ref().filter(|(length, _)| *length == tokens).map(|(_, states)| states.clone())
    }
}

impl DecoderCache {
    /// Empty caches, one text for each entry of `expected_lengths`.
    ///
    /// The lengths are what the texts are expected to reach. They are no limit: room is made for as many tokens, up to a
    /// bound, and more as they come; the `dynamic` and `longrope` rotary scalings and the `interpolate` position policy take
    /// their positions from them. A decoder with [sinks](crate::DecoderConfig::sink_logits) takes caches of
    /// [`Decoder::new_cache`](crate::Decoder::new_cache) alone, which have them.
    ///
    /// # Errors
    ///
    /// [`ModelError`] if the configuration is impossible.
    pub fn new(config: &ModelConfig, expected_lengths: &[usize], device: &Device) -> Result<Self, ModelError> {
        Self::with_kernel(config, expected_lengths, (Kernel::default(), DType::F32), device)
    }

    pub(crate) fn with_kernel(
        config: &ModelConfig,
        expected_lengths: &[usize],
        (kernel, stored): (Kernel, DType),
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        let decoder = &config.decoder;
        let text = |&expected: &usize| {
            // Under the policy no distance is longer than trained, whatever the length of the text.
            let groups = config.position_policy == PositionPolicy::Grouped && config.attention.is_some();
            let reached = if groups { expected.min(decoder.max_positions) } else { expected };
            let frequencies = rotary_sets(decoder, reached);
            let layers = (0..decoder.layers).map(|layer| {
                let shape = decoder.shape(layer);
                let cache = CacheConfig {
                    batch: 1,
                    heads: decoder.heads,
                    kv_heads: shape.kv_heads,
                    head_dim: shape.head_dim,
                    options: AttentionOptions {
                        scale: decoder.layer_scale(layer),
                        softcap: decoder.attention_softcap,
                        window: decoder.window(layer),
                        alibi: match decoder.positions {
                            Positions::Alibi { factor } => Some(factor),
                            Positions::Learned | Positions::Rotary { .. } => None,
                        },
                        // Weights, which a decoder brings.
                        sink_logits: None,
                    },
                    attention: config.calibrated_attention(layer),
                    dtype: DType::F32,
                    stored,
                    kernel,
                };
                let cache = AttentionCache::new(cache, device)?;
                match (rotary_set(decoder, layer), config.trained_length(layer)) {
                    (Some(set), Some(trained)) => {
                        cache.with_far_positions(FarPositions { trained, frequencies: frequencies[set].0.clone() })
                    }
                    _ => Ok(cache),
                }
            });
            Ok(TextCache {
                layers: layers.collect::<Result<_, bsbr_attn::AttentionError>>()?,
                states: (0..decoder.layers)
                    .map(|layer| decoder.layer_recurrent(layer).map(|recurrent| RecurrentState::new(recurrent, device)))
                    .collect(),
                marked: None,
                length: 0,
                forgotten: 0,
                held: Vec::new(),
                expected,
                retrieved: Reads::default(),
                frequencies,
            })
        };
        Ok(Self { texts: expected_lengths.iter().map(text).collect::<Result<_, ModelError>>()? })
    }

    /// The empty caches with the sinks of each layer that has some.
    pub(crate) fn with_sinks(mut self, sinks: impl Fn(usize) -> Option<Arc<[f32]>>) -> Result<Self, ModelError> {
        for text in &mut self.texts {
            for (layer, cache) in text.layers.iter_mut().enumerate() {
                if let Some(sinks) = sinks(layer) {
                    *cache = cache.clone().with_sink_logits(sinks)?;
                }
            }
        }
        Ok(self)
    }

    /// The empty caches with the basis of each layer that uses one.
    pub(crate) fn with_state_bases(mut self, basis: impl Fn(usize) -> Option<Tensor<3>>) -> Result<Self, ModelError> {
        for text in &mut self.texts {
            for (layer, cache) in text.layers.iter_mut().enumerate() {
                let uses = cache.config().attention.as_ref().is_some_and(|attention| attention.needs_state_basis());
                if let Some(basis) = basis(layer).filter(|_| uses) {
                    *cache = cache.clone().with_state_basis(basis)?;
                }
            }
        }
        Ok(self)
    }

    /// The empty caches with the gates of each layer that uses them.
    pub(crate) fn with_gates(mut self, gates: impl Fn(usize) -> Option<Tensor<1>>) -> Result<Self, ModelError> {
        for text in &mut self.texts {
            for (layer, cache) in text.layers.iter_mut().enumerate() {
                let uses = cache.config().attention.as_ref().is_some_and(|attention| attention.needs_gates());
                if let Some(gates) = gates(layer).filter(|_| uses) {
                    *cache = cache.clone().with_gates(gates)?;
                }
            }
        }
        Ok(self)
    }

    /// Makes room, in a layer that text `text` has nothing in yet, for what the text is expected to reach; `new` are the tokens
    /// that come now.
    pub(crate) fn make_room(&mut self, text: usize, layer: usize, new: usize) {
        let text = &mut self.texts[text];
        let cache = &mut text.layers[layer];
        if cache.is_empty() {
            cache.reserve((text.expected - text.forgotten.min(text.expected)).min(MOST_RESERVED).max(new));
        }
    }

    /// Number of texts.
    pub fn batch(&self) -> usize {
        self.texts.len()
    }

    /// Tokens of text `text` read so far.
    pub fn length(&self, text: usize) -> usize {
        self.texts[text].length
    }

    /// Bytes kept for all texts, room for growth included.
    pub fn bytes(&self) -> usize {
        (0..self.batch()).map(|text| self.bytes_of(text)).sum()
    }

    /// Bytes kept for text `text`, room for growth included.
    pub fn bytes_of(&self, text: usize) -> usize {
        let text = &self.texts[text];
        let marked = text.marked.iter().flat_map(|(_, states)| states);
        let states = text.states.iter().chain(marked).flatten().map(RecurrentState::bytes);
        text.layers.iter().map(AttentionCache::bytes).sum::<usize>() + states.sum::<usize>()
    }

    /// Keeps the states that recurrent layers have now besides those to come, so that the tokens up to here can be
    /// [taken over](crate::Decoder::begin_with); what was kept before is let go of. Nothing for decoders without such layers.
    ///
    /// # Panics
    ///
    /// If there is no such text.
    pub fn mark(&mut self, text: usize) {
        let text = &mut self.texts[text];
        if text.states.iter().any(Option::is_some) {
            text.marked = Some((text.length, text.states.clone()));
        }
    }

    /// Adds the texts of another cache of the same decoder behind those that are here.
    pub fn join(&mut self, others: Self) {
        self.texts.extend(others.texts);
    }

    /// Takes text `text` out, as a cache of its own; those behind it move up.
    ///
    /// # Panics
    ///
    /// If there is no such text.
    pub fn leave(&mut self, text: usize) -> Self {
        Self { texts: vec![self.texts.remove(text)] }
    }
}
