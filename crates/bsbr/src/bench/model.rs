//! Whole models: from the tokens of a text to the scores of the next one.

use std::{
    ops::Range,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bsbr_attn::{BlockAttentionConfig, Kernel};
use bsbr_model::{Decoder, DecoderCache, EvaluateConfig, PREFILL_PIECE, check_windows, evaluate};
use burn::tensor::{DType, Device, Tensor};
use serde::Serialize;

use super::{Arm, DECODE_ROOM, DECODE_TOKENS, Phase, Subject, sync};
use crate::{
    model::LocalModel,
    running::{load, open},
};

/// Loads the model in a directory to run as `arm`.
pub(crate) fn decoder(dir: &Path, attention: &BlockAttentionConfig, arm: Arm, device: &Device) -> Result<Decoder> {
    as_arm(&load(open(&LocalModel::at(dir))?.with_attention(Some(attention.clone()))?, device)?, attention, arm)
}

/// The same weights as another arm.
pub(crate) fn as_arm(decoder: &Decoder, attention: &BlockAttentionConfig, arm: Arm) -> Result<Decoder> {
    let attention = arm.is_bsbr().then(|| attention.clone());
    let kernel = if arm == Arm::BsbrPlain { Kernel::Plain } else { Kernel::Fastest };
    Ok(decoder.with_config(|config| config.attention = attention)?.with_kernel(kernel))
}

/// Tokens a model knows.
pub(crate) fn vocabulary(decoder: &Decoder) -> u32 {
    decoder.config().decoder.vocab_size as u32
}

/// Why a model cannot read texts of this length, if it cannot.
pub(crate) fn obstacle(decoder: &Decoder, tokens: usize) -> Option<String> {
    let window = EvaluateConfig { window: tokens.max(3), windows: 1, skip: 0 };
    check_windows(decoder, usize::MAX, window).err().map(|error| {
        // What it then advises is not for here.
        let text = error.to_string();
        text.split_once(": ").map_or(text.clone(), |(reason, _)| reason.to_owned())
    })
}

/// Lengths of `batch` texts that are read together: equal steps up to `longest`.
pub(crate) fn lengths(longest: usize, batch: usize) -> impl Iterator<Item = usize> {
    (1..=batch).map(move |text| (longest * text / batch).max(1))
}

/// A model with texts up to one length.
pub(crate) struct ModelSubject {
    decoder: Decoder,
    tokens: Rc<[u32]>,
    lengths: Vec<usize>,
    cache: Option<DecoderCache>,
    decoded: usize,
}

impl ModelSubject {
    /// Reads `batch` texts of [`lengths`] up to `longest`. Each begins `tokens` elsewhere, and again where they end.
    pub(crate) fn new(decoder: Decoder, tokens: Rc<[u32]>, longest: usize, batch: usize) -> Self {
        Self { decoder, tokens, lengths: lengths(longest, batch).collect(), cache: None, decoded: 0 }
    }

    /// Tokens `range` of a text.
    fn text(&self, text: usize, range: Range<usize>) -> Vec<u32> {
        let first = text * self.tokens.len() / self.lengths.len();
        range.map(|at| self.tokens[(first + at) % self.tokens.len()]).collect()
    }

    /// Reads all texts together, in pieces; the hidden state of the last token of each, `[batch, hidden_size]`.
    fn read(&self, cache: &mut DecoderCache) -> Result<Tensor<2>> {
        let batch = self.lengths.len();
        let piece = PREFILL_PIECE.div_ceil(batch);
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let mut last = vec![None; batch];
        for start in (0..longest).step_by(piece) {
            let ranges = self.lengths.iter().map(|&length| start.min(length)..(start + piece).min(length));
            let new: Vec<Vec<u32>> = ranges.enumerate().map(|(text, range)| self.text(text, range)).collect();
            let hidden = self.decoder.hidden(&new, cache)?;
            let mut end = 0;
            for (new, last) in new.iter().zip(&mut last).filter(|(new, _)| !new.is_empty()) {
                end += new.len();
                *last = Some(hidden.clone().narrow(0, end - 1, 1));
            }
        }
        Ok(Tensor::cat(last.into_iter().flatten().collect(), 0))
    }
}

impl Subject for ModelSubject {
    fn prepare(&mut self, phase: Phase) -> Result<()> {
        if phase == Phase::Decode && self.cache.is_none() {
            self.run(Phase::Prefill)?;
        }
        Ok(())
    }

    fn run(&mut self, phase: Phase) -> Result<Duration> {
        let device = self.decoder.device();
        match phase {
            Phase::Prefill => {
                self.cache = None;
                let start = Instant::now();
                let lengths: Vec<usize> = self.lengths.iter().map(|length| length + DECODE_ROOM).collect();
                let mut cache = self.decoder.new_cache(&lengths)?;
                let scores = self.decoder.logits(self.read(&mut cache)?);
                sync(&device)?;
                let elapsed = start.elapsed();
                drop(scores);
                (self.cache, self.decoded) = (Some(cache), 0);
                Ok(elapsed)
            }
            Phase::Decode => {
                let step = |at: usize| -> Vec<Vec<u32>> {
                    let text = |(text, length): (usize, &usize)| self.text(text, length + at..length + at + 1);
                    self.lengths.iter().enumerate().map(text).collect()
                };
                let steps: Vec<_> = (self.decoded..self.decoded + DECODE_TOKENS).map(step).collect();
                self.decoded += DECODE_TOKENS;
                let cache = self.cache.as_mut().context("decoding was not prepared")?;
                let start = Instant::now();
                for tokens in steps {
                    drop(self.decoder.logits(self.decoder.hidden(&tokens, cache)?));
                }
                sync(&device)?;
                Ok(start.elapsed() / DECODE_TOKENS as u32)
            }
            Phase::Training => anyhow::bail!("training is measured on attention alone"),
        }
    }

    fn kept_bytes(&self) -> Option<u64> {
        self.cache.as_ref().map(|cache| cache.bytes() as u64)
    }
}

/// What an arm keeps of the original model at one length; for the original itself, only perplexity.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Quality {
    /// Windows of text of that length.
    pub(crate) windows: usize,
    pub(crate) perplexity: f64,
    pub(crate) original_perplexity: f64,
    /// Share of tokens with the same best next token, after the first chunk.
    pub(crate) top1: Option<f64>,
    /// Mean Kullback-Leibler divergence from the original in nats, after the first chunk.
    pub(crate) kl: Option<f64>,
}

/// Measures the quality of arms of this project on windows of `tokens` tokens of a text.
pub(crate) fn quality(
    decoder: &Decoder,
    attention: &BlockAttentionConfig,
    arms: &[Arm],
    text: &[u32],
    (tokens, windows): (usize, usize),
) -> Result<Vec<(Arm, Quality)>> {
    let config = EvaluateConfig { window: tokens, windows, skip: attention.chunk_size.min(tokens.saturating_sub(2)) };
    check_windows(decoder, text.len(), config)?;
    let original = as_arm(decoder, attention, Arm::Dense)?.with_cache_type(DType::F32);
    let bsbr: Vec<(Arm, Decoder)> = arms
        .iter()
        .filter(|arm| arm.is_bsbr())
        .map(|&arm| Ok((arm, as_arm(decoder, attention, arm)?)))
        .collect::<Result<_>>()?;
    let variants: Vec<(&str, &Decoder)> = bsbr.iter().map(|(arm, decoder)| (arm.name(), decoder)).collect();
    let report = evaluate(&original, &variants, text, config, |_, _| ())?;
    let (windows, original_perplexity) = (report.windows, report.original.all);
    let original = Quality { windows, perplexity: original_perplexity, original_perplexity, top1: None, kl: None };
    let measured = bsbr.iter().zip(&report.variants).map(|((arm, _), variant)| {
        let (perplexity, agreement) = (variant.perplexity.all, &variant.agreement);
        let (top1, kl) = (Some(agreement.top1), Some(agreement.kl));
        (*arm, Quality { windows, perplexity, original_perplexity, top1, kl })
    });
    Ok(std::iter::once((Arm::Dense, original)).chain(measured).collect())
}
