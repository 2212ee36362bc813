//! Characters of a text. Every tenth piece of it is held out.

use std::{collections::BTreeMap, sync::Arc};

use super::{Question, Sequence, random, random::Stream};

/// Characters with a token of their own; the rarest share one.
const COMMON: usize = 63;

/// Pieces of which one is held out.
const PIECES: usize = 10;

/// Characters of a piece, as a multiple of a sequence.
const SEQUENCES: usize = 16;

/// A text as tokens.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub(super) tokens: Arc<[u32]>,
    vocabulary: usize,
}

impl Corpus {
    /// The most frequent 63 characters become tokens, all others one more.
    pub fn new(text: &str) -> Self {
        let mut counts: BTreeMap<char, usize> = BTreeMap::new();
        for character in text.chars() {
            *counts.entry(character).or_default() += 1;
        }
        let mut order: Vec<(char, usize)> = counts.into_iter().collect();
        // Equal ones stay in the order of their numbers.
        order.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let common: BTreeMap<char, u32> =
            order.iter().take(COMMON).zip(0..).map(|(&(c, _), token)| (c, token)).collect();
        let other = common.len() as u32;
        let tokens = text.chars().map(|character| common.get(&character).copied().unwrap_or(other)).collect();
        Self { tokens, vocabulary: common.len() + usize::from(order.len() > COMMON) }
    }

    /// Characters.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens there are.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }
}

/// Characters of a piece for sequences of `length` tokens.
fn piece(length: usize) -> usize {
    SEQUENCES * length
}

/// Characters that a text must have: one piece held out, and those before it.
pub(super) fn least(length: usize) -> usize {
    PIECES * piece(length)
}

pub(super) fn sequence(corpus: &Corpus, length: usize, rng: &mut random::Rng, stream: Stream) -> Sequence {
    // A sequence and the character behind it lie inside one piece.
    let pieces = corpus.len() / piece(length);
    let held_out = pieces / PIECES;
    let chosen = match stream {
        Stream::Evaluation => random::below(rng, held_out) * PIECES + PIECES - 1,
        Stream::Training => {
            let kept = random::below(rng, pieces - held_out);
            // Skips the held-out piece at the end of every ten.
            kept + kept / (PIECES - 1)
        }
    };
    let start = chosen * piece(length) + random::below(rng, piece(length) - length);
    let tokens = corpus.tokens[start..start + length].to_vec();
    let question = |position: usize| {
        let answer = corpus.tokens[start + position + 1];
        Question { row: 0, position, answer, size: 0, distance: position }
    };
    Sequence { questions: (0..length).map(question).collect(), tokens }
}
