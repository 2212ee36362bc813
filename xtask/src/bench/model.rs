//! Whole models: from the tokens of a text to the scores of the next one.

use std::{
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bsbr_attn::{BlockAttentionConfig, Kernel};
use bsbr_model::{Decoder, DecoderCache, EvaluateConfig, check_windows, evaluate, prefill};
use burn::tensor::Device;
use serde::Serialize;

use super::{Arm, DECODE_TOKENS, Phase, Subject, sync};
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

/// A model at one length.
pub(crate) struct ModelSubject {
    decoder: Decoder,
    tokens: Rc<[u32]>,
    length: usize,
    cache: Option<DecoderCache>,
    next: usize,
}

impl ModelSubject {
    /// Reads the first `length` of `tokens`, over and over where there are fewer.
    pub(crate) fn new(decoder: Decoder, tokens: Rc<[u32]>, length: usize) -> Self {
        Self { decoder, tokens, length, cache: None, next: length }
    }

    fn token(&self, at: usize) -> u32 {
        self.tokens[at % self.tokens.len()]
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
                let text: Vec<u32> = (0..self.length).map(|at| self.token(at)).collect();
                self.cache = None;
                let start = Instant::now();
                let mut cache = self.decoder.new_cache(&[self.length])?;
                let scores = self.decoder.logits(prefill(&self.decoder, &text, &mut cache)?);
                sync(&device)?;
                let elapsed = start.elapsed();
                drop(scores);
                (self.cache, self.next) = (Some(cache), self.length);
                Ok(elapsed)
            }
            Phase::Decode => {
                let tokens: Vec<u32> = (self.next..self.next + DECODE_TOKENS).map(|at| self.token(at)).collect();
                self.next += DECODE_TOKENS;
                let cache = self.cache.as_mut().context("decoding was not prepared")?;
                let start = Instant::now();
                for token in tokens {
                    drop(self.decoder.logits(self.decoder.hidden(&[vec![token]], cache)?));
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
    let original = as_arm(decoder, attention, Arm::Dense)?;
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
