//! What a model still finds in a long text: prompts read and answered under the attention that is measured.

use serde::{Deserialize, Serialize};

use super::{
    prompts::{DEPTHS, Prompt, RecallTask},
    rows::{Row, numbers},
};
use crate::{Decoder, DecoderCache, ModelError, Reads, prefill};

/// How a model answered one question. The answer is forced on it token by token, so that each digit is judged behind the
/// right ones; where all are right, they are also what greedy decoding gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TurnScores {
    /// What was asked.
    pub task: RecallTask,
    /// Which of [`DEPTHS`] the answer stands at.
    pub depth: usize,
    /// Digits of the answer.
    pub digits: usize,
    /// Digits that were the best token.
    pub right: usize,
    /// Negative log-likelihood of all digits.
    pub nll: f64,
}

/// The answers to the questions of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecallScores {
    /// What was asked.
    pub task: RecallTask,
    /// Questions.
    pub questions: usize,
    /// Share of the digits that were the best token behind the right ones.
    pub digits: f64,
    /// Share of the answers that greedy decoding gets right as a whole.
    pub exact: f64,
    /// Mean negative log-likelihood of a digit, in nats.
    pub nll: f64,
    /// By where the answer stands.
    pub by_depth: Vec<DepthScores>,
}

/// The answers that stand at one depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DepthScores {
    /// As a share of the text.
    pub depth: f64,
    /// Share of the digits.
    pub digits: f64,
    /// Share of whole answers.
    pub exact: f64,
}

/// How a model answered some prompts, and what that took.
#[derive(Debug, Clone, PartialEq)]
pub struct Recall {
    /// All turns of all prompts.
    pub scores: Vec<TurnScores>,
    /// The most bytes a cache held at the end of a context.
    pub cache_bytes: usize,
    /// What the tokens of the contexts read.
    pub reads: Reads,
}

/// Reads each prompt, and answers its questions one after another. Prompts that begin like the one before share what was
/// read of it.
///
/// # Errors
///
/// What [`Decoder::hidden`] refuses.
pub fn recall(decoder: &Decoder, prompts: &[Prompt]) -> Result<Recall, ModelError> {
    let longest = prompts.iter().map(Prompt::len).max().unwrap_or_default();
    // What was read of the prompt before: its cache, and how many tokens.
    let mut shared: Option<(DecoderCache, usize)> = None;
    let mut found = Recall { scores: Vec::new(), cache_bytes: 0, reads: Reads::default() };
    for (at, prompt) in prompts.iter().enumerate() {
        let context = &prompt.context;
        let common = prompts.get(at + 1).map_or(0, |next| common_prefix(context, &next.context));
        let (mut cache, mut read) = match shared.take() {
            Some(shared) => shared,
            None => (decoder.new_cache(&[longest])?, 0),
        };
        // The last token stays: its state is what answers begin with.
        let common = common.min(context.len().saturating_sub(1));
        if common > read {
            prefill(decoder, &context[read..common], &mut cache)?;
            read = common;
        }
        if common > 0 && common == read {
            shared = Some((cache.clone(), read));
        }
        if read < context.len() {
            prefill(decoder, &context[read..], &mut cache)?;
        }
        found.cache_bytes = found.cache_bytes.max(cache.bytes());
        found.reads += cache.reads();
        for turn in &prompt.turns {
            let mut state = prefill(decoder, &turn.question, &mut cache)?;
            let mut turn_scores =
                TurnScores { task: prompt.task, depth: turn.depth, digits: turn.answer.len(), right: 0, nll: 0.0 };
            for (place, &digit) in turn.answer.iter().enumerate() {
                let logits = numbers(decoder.logits(state.clone()))?;
                let mut row = Row::new(digit, 0);
                row.push(&logits, &[]);
                turn_scores.right += usize::from(row.first() == Some(digit));
                turn_scores.nll += row.loss();
                // Nobody reads behind the last digit but the next question.
                if place + 1 < turn.answer.len() || prompt.turns.len() > 1 {
                    state = decoder.hidden(&[vec![digit]], &mut cache)?;
                }
            }
            found.scores.push(turn_scores);
        }
    }
    Ok(found)
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl RecallScores {
    /// Sums up the turns of one kind; `None` if there are none.
    pub fn of(task: RecallTask, turns: &[TurnScores]) -> Option<Self> {
        let these: Vec<&TurnScores> = turns.iter().filter(|turn| turn.task == task).collect();
        let (digits, exact) = shares(&these)?;
        let count: usize = these.iter().map(|turn| turn.digits).sum();
        let by_depth = DEPTHS.iter().enumerate().filter_map(|(at, &depth)| {
            let here: Vec<&TurnScores> = these.iter().copied().filter(|turn| turn.depth == at).collect();
            shares(&here).map(|(digits, exact)| DepthScores { depth, digits, exact })
        });
        Some(Self {
            task,
            questions: these.len(),
            digits,
            exact,
            nll: these.iter().map(|turn| turn.nll).sum::<f64>() / count as f64,
            by_depth: by_depth.collect(),
        })
    }
}

/// Shares of right digits and of right answers.
fn shares(turns: &[&TurnScores]) -> Option<(f64, f64)> {
    let digits: usize = turns.iter().map(|turn| turn.digits).sum();
    let right: usize = turns.iter().map(|turn| turn.right).sum();
    let exact = turns.iter().filter(|turn| turn.right == turn.digits).count();
    (digits > 0).then(|| (right as f64 / digits as f64, exact as f64 / turns.len() as f64))
}
