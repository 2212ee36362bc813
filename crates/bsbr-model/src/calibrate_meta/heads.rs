//! Queries and keys of one layer over one window, and the attention they make.

use std::ops::Range;

use bsbr_attn::{AttentionOptions, BlockAttentionConfig};
use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

use super::numbers;
use crate::{Decoder, DecoderCache, LayerTrace, ModelError, rotary::rotary_set};

/// One token in so many is a reader whose attention is computed: neighbours read much the same.
const READER_STEP: usize = 4;

/// One layer over one window.
pub(super) struct Heads<'a> {
    pub(super) attention: &'a BlockAttentionConfig,
    pub(super) options: AttentionOptions,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) tokens: usize,
    /// Inputs of the projections, `[tokens, hidden_size]`.
    pub(super) normed: Tensor<2>,
    /// `[heads, tokens, head_dim]`, rotated.
    pub(super) query: Vec<f32>,
    /// `[kv_heads, tokens, head_dim]`, rotated.
    pub(super) keys: Vec<f32>,
    /// Frequencies and factor of the rotation, where there is one.
    pub(super) rotation: Option<(Vec<f64>, f64)>,
}

/// The attention each chunk pays to each block: `[chunk][head][block]`, the mean over its readers; blocks are numbered
/// from 0, only [candidates](Heads::candidates) count.
pub(super) type ChunkShares = Vec<Vec<Vec<f64>>>;

impl<'a> Heads<'a> {
    pub(super) fn new(decoder: &'a Decoder, cache: &DecoderCache, trace: LayerTrace) -> Result<Self, ModelError> {
        let layer = trace.layer;
        let config = decoder.config();
        let attention = config.layer_attention(layer);
        let attention = attention.ok_or_else(|| ModelError::Input(format!("layer {layer} is not converted")))?;
        let text = &cache.texts[0];
        let shape = config.decoder.shape(layer);
        let set = rotary_set(&config.decoder, layer);
        Ok(Self {
            attention,
            options: text.layers[layer].config().options.clone(),
            heads: config.decoder.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            tokens: trace.normed.dims()[0],
            normed: trace.normed,
            query: numbers(trace.query)?,
            keys: numbers(trace.keys)?,
            rotation: set.and_then(|set| text.frequencies.get(set).cloned()),
        })
    }

    /// Tokens of a block.
    pub(super) fn block(&self) -> usize {
        self.attention.statistics_block()
    }

    /// First token of the local region of the token at `position`.
    pub(super) fn local_start(&self, position: usize) -> usize {
        self.attention.local_start(position / self.attention.chunk_size)
    }

    fn first_visible(&self, position: usize) -> usize {
        self.options.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Blocks that a chunk can choose from.
    pub(super) fn candidates(&self, chunk: usize) -> Range<usize> {
        let start = chunk * self.attention.chunk_size;
        let first = self.attention.sink_tokens.max(self.first_visible(start)) / self.block();
        first..(self.attention.local_start(chunk) / self.block()).max(first)
    }

    /// Rows of the inputs, `[rows, hidden_size]`.
    pub(super) fn inputs(&self, rows: &[usize]) -> Tensor<2> {
        let index: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let index = TensorData::new(index, [rows.len()]);
        self.normed.clone().select(0, Tensor::<1, Int>::from_data(index, &self.normed.device()))
    }

    /// Rotates one head's numbers by `position` tokens, or back.
    pub(super) fn rotate(&self, x: &mut [f64], position: usize, back: bool) {
        let Some((frequencies, factor)) = &self.rotation else { return };
        let half = frequencies.len();
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (cos, sin) = if back { (cos / factor, -sin / factor) } else { (cos * factor, sin * factor) };
            let (a, b) = (x[i], x[half + i]);
            x[i] = a * cos - b * sin;
            x[half + i] = b * cos + a * sin;
        }
    }

    /// Query of `head` at `position`.
    pub(super) fn query(&self, head: usize, position: usize) -> &[f32] {
        &self.query[(head * self.tokens + position) * self.head_dim..][..self.head_dim]
    }

    /// Key that `head` reads at `position`.
    pub(super) fn key(&self, head: usize, position: usize) -> &[f32] {
        let kv_head = head * self.kv_heads / self.heads;
        &self.keys[(kv_head * self.tokens + position) * self.head_dim..][..self.head_dim]
    }

    /// The positions whose attention is computed.
    fn readers(&self, range: Range<usize>) -> impl Iterator<Item = usize> + use<> {
        range.step_by(READER_STEP)
    }

    /// What `head` at `position` pays to each position up to its own.
    fn attention_of(&self, head: usize, position: usize, slope: f64, out: &mut Vec<f64>) {
        let query = self.query(head, position);
        let first = self.first_visible(position);
        out.clear();
        out.resize(position + 1, 0.0);
        let mut highest = f64::NEG_INFINITY;
        for (at, score) in out.iter_mut().enumerate().skip(first) {
            let dot: f32 = query.iter().zip(self.key(head, at)).map(|(a, b)| a * b).sum();
            let mut logit = dot as f64 * self.options.scale;
            if let Some(cap) = self.options.softcap {
                logit = cap * (logit / cap).tanh();
            }
            logit -= slope * (position - at) as f64;
            *score = logit;
            highest = highest.max(logit);
        }
        // A sink takes its share and gives it to no position.
        let sink = self.options.sink_logits.as_ref().map(|sinks| f64::from(sinks[head]));
        highest = sink.map_or(highest, |sink| highest.max(sink));
        let mut sum = sink.map_or(0.0, |sink| (sink - highest).exp());
        for score in &mut out[first..] {
            *score = (*score - highest).exp();
            sum += *score;
        }
        for score in &mut out[first..] {
            *score /= sum;
        }
    }

    /// ALiBi slope of `head`.
    fn slope(&self, head: usize) -> f64 {
        self.options.alibi.map_or(0.0, |factor| factor * AttentionOptions::alibi_slopes(self.heads)[head])
    }

    /// The attention that each position receives from readers of which it is before the local region, `[heads][tokens]`.
    pub(super) fn received(&self) -> Vec<Vec<f64>> {
        let each = |head: usize| {
            let (slope, mut received, mut paid) = (self.slope(head), vec![0.0; self.tokens], Vec::new());
            for reader in self.readers(0..self.tokens) {
                let far = self.attention.sink_tokens..self.local_start(reader);
                if !far.is_empty() {
                    self.attention_of(head, reader, slope, &mut paid);
                    received[far.clone()].iter_mut().zip(&paid[far]).for_each(|(sum, paid)| *sum += paid);
                }
            }
            received
        };
        (0..self.heads).into_par_iter().map(each).collect()
    }

    /// What every complete chunk pays to every block.
    pub(super) fn shares_by_chunk(&self) -> ChunkShares {
        let chunk_size = self.attention.chunk_size;
        let each = |chunk: usize| {
            let candidates = self.candidates(chunk);
            let one = |head: usize| {
                let (slope, mut shares, mut paid) = (self.slope(head), vec![0.0; candidates.end], Vec::new());
                let readers: Vec<usize> = self.readers(chunk * chunk_size..(chunk + 1) * chunk_size).collect();
                for &reader in readers.iter().filter(|_| !candidates.is_empty()) {
                    self.attention_of(head, reader, slope, &mut paid);
                    for block in candidates.clone() {
                        let first = (block * self.block()).max(self.attention.sink_tokens);
                        let sum: f64 = paid[first..(block + 1) * self.block()].iter().sum();
                        shares[block] += sum / readers.len() as f64;
                    }
                }
                shares
            };
            (0..self.heads).map(one).collect()
        };
        (0..self.tokens / chunk_size).into_par_iter().map(each).collect()
    }
}
