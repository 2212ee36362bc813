//! A text with a place.

use std::{collections::BTreeMap, time::Instant};

use bsbr_model::{Decoder, DecoderCache, ModelError, PREFILL_PIECE, Reads, Sampler, next_piece};
use burn::tensor::Tensor;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    request::{Ended, Ending, Event, Request, TokenScore},
    scores::{scored, scored_rows},
};

/// Tokens of a prompt whose scores are held at once.
const SLAB: usize = 128;

/// A text on its way.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) request: Request,
    sampler: Sampler,
    events: UnboundedSender<Event>,
    /// Reserved for its cache.
    pub(super) bytes: usize,
    /// Tokens of the prompt that are in the cache.
    pub(super) read: usize,
    /// Tokens of the prompt that were known.
    known: usize,
    /// What the cache counted for them already.
    reads_before: Reads,
    stage: Stage,
    written: usize,
    /// How often each token was written, where that matters.
    counts: BTreeMap<u32, u32>,
    began: Instant,
    first_token: Option<Instant>,
}

/// What a text does next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// The rest of its prompt is read.
    Reading,
    /// This token is read.
    Writing(u32),
    /// Nothing.
    Ended(Ending),
    Failed,
}

impl Running {
    pub(super) fn new(
        (request, sampler, events): (Request, Sampler, UnboundedSender<Event>),
        bytes: usize,
        cache: &DecoderCache,
    ) -> Self {
        let known = cache.length(0);
        // Nobody has to listen.
        let _ = events.send(Event::Begun { known });
        Self {
            request,
            sampler,
            events,
            bytes,
            read: known,
            known,
            reads_before: if known > 0 { cache.reads() } else { Reads::default() },
            stage: Stage::Reading,
            written: 0,
            counts: BTreeMap::new(),
            began: Instant::now(),
            first_token: None,
        }
    }

    /// The tokens to read next, of a prompt no more than fit into what is left of a step; none if that is not enough.
    pub(super) fn next(&self, left: &mut usize, first: bool) -> Vec<u32> {
        match self.stage {
            Stage::Writing(token) => vec![token],
            Stage::Reading => {
                let rest = &self.request.prompt[self.read..];
                let piece = next_piece(self.read, rest.len());
                if piece > *left && !first {
                    return Vec::new();
                }
                *left = left.saturating_sub(piece);
                rest[..piece].to_vec()
            }
            Stage::Ended(_) | Stage::Failed => Vec::new(),
        }
    }

    /// Whether it is being read.
    pub(super) fn is_reading(&self) -> bool {
        self.stage == Stage::Reading
    }

    /// Whether it needs its place no longer.
    pub(super) fn is_over(&self) -> bool {
        self.is_gone() || matches!(self.stage, Stage::Ended(_) | Stage::Failed)
    }

    /// Whether nobody listens any more.
    pub(super) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Takes note that `count` tokens were read, with these states, `[count, hidden_size]`. Whether a token is to be chosen
    /// behind them.
    pub(super) fn has_read(&mut self, decoder: &Decoder, states: &Tensor<2>, count: usize) -> Result<bool, ModelError> {
        if self.stage != Stage::Reading {
            return Ok(true);
        }
        let from = self.read;
        self.read += count;
        if let (Some(best), true) = (self.request.logprobs, self.request.score_prompt) {
            // The last token of the prompt is followed by a new one.
            let scored = (self.read.min(self.request.prompt.len() - 1)).saturating_sub(from);
            for at in (0..scored).step_by(SLAB) {
                let rows = SLAB.min(scored - at);
                let scores = numbers(decoder.logits(states.clone().narrow(0, at, rows)))?;
                let following = &self.request.prompt[from + at + 1..][..rows];
                let _ = self.events.send(Event::Prompt(scored_rows(&scores, following, best)));
            }
        }
        if self.read < self.request.prompt.len() {
            return Ok(false);
        }
        self.sampler.see(&self.request.prompt);
        self.first_token = Some(Instant::now());
        if self.request.max_new_tokens == 0 {
            self.stage = Stage::Ended(Ending::Length);
        }
        Ok(self.request.max_new_tokens > 0)
    }

    /// Chooses the next token from scores `[vocab_size]`.
    pub(super) fn choose(&mut self, scores: &[f32]) -> Result<(), ModelError> {
        let bias = &self.request.bias;
        let token = if bias.is_none() {
            self.sampler.choose(scores)?
        } else {
            let mut biased = scores.to_vec();
            bias.apply(&mut biased, &self.counts);
            let token = self.sampler.choose(&biased)?;
            *self.counts.entry(token).or_default() += 1;
            token
        };
        if self.request.stop_tokens.contains(&token) {
            self.stage = Stage::Ended(Ending::StopToken);
            return Ok(());
        }
        let score = match self.request.logprobs {
            Some(best) => scored(scores, token, best),
            None => TokenScore { token, logprob: 0.0, best: Vec::new() },
        };
        let _ = self.events.send(Event::Token(score));
        self.written += 1;
        let enough = self.written == self.request.max_new_tokens;
        self.stage = if enough { Stage::Ended(Ending::Length) } else { Stage::Writing(token) };
        Ok(())
    }

    /// Tells the end, where there was one.
    pub(super) fn tell_end(&self, cache: &DecoderCache, reads: Reads) {
        if let Stage::Ended(ending) = self.stage {
            let first = self.first_token.unwrap_or_else(Instant::now);
            let _ = self.events.send(Event::Ended(Ended {
                ending,
                known: self.known,
                cache_bytes: cache.bytes(),
                reads,
                prefill: first - self.began,
                decode: first.elapsed(),
            }));
        }
    }

    /// What its own tokens read.
    pub(super) fn reads(&self, cache: &DecoderCache) -> Reads {
        let (all, before) = (cache.reads(), self.reads_before);
        Reads {
            keys: all.keys.saturating_sub(before.keys),
            summaries: all.summaries.saturating_sub(before.summaries),
            all: all.all.saturating_sub(before.all),
            choices: all.choices.saturating_sub(before.choices),
            capped: all.capped.saturating_sub(before.capped),
        }
    }

    /// Tokens of the prompt that were read for it.
    pub(super) fn own(&self) -> usize {
        self.read - self.known
    }

    /// Tells that the model failed.
    pub(super) fn fail(&mut self, problem: &str) {
        let _ = self.events.send(Event::Failed(problem.to_owned()));
        self.stage = Stage::Failed;
    }

    pub(super) fn has_failed(&self) -> bool {
        self.stage == Stage::Failed
    }

    /// Tokens of its prompt that stand in whole pieces.
    pub(super) fn whole_pieces(&self) -> usize {
        self.request.prompt.len() / PREFILL_PIECE * PREFILL_PIECE
    }

    /// Most tokens its cache will hold.
    pub(super) fn expected(&self) -> usize {
        expected_length(&self.request)
    }

    pub(super) fn written(&self) -> usize {
        self.written
    }
}

/// The length that the cache of a text is made for: as one who has it continued alone would.
pub(super) fn expected_length(request: &Request) -> usize {
    request.prompt.len().saturating_add(request.max_new_tokens)
}

pub(super) fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    tensor
        .try_into_vec_as::<f32>()
        .map_err(|error| ModelError::Input(format!("the scores cannot be read back: {error:?}")))
}
