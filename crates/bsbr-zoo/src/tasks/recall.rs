//! Associative recall with many queries (MQAR).
//!
//! `filler k1 v1 k2 v2 .. kP vP`, then filler in which every key stands once, anywhere; after each the value is asked that
//! belonged to it. The answer does not follow, so it is found in one place only. Keys and values are different tokens, and
//! within a sequence all keys and all values differ, as in Zoology. There are as many of each as the most pairs.

use super::{FILLER, LEAD, Question, Sequence, random};

/// Fewest pairs.
pub(super) const LEAST: usize = 4;

/// Most pairs, however long the sequences.
const MOST: usize = 64;

/// Tokens that `pairs` pairs and their queries take.
pub(super) fn length_for(pairs: usize) -> usize {
    LEAD + 3 * pairs
}

/// Numbers of pairs: powers of two that fit.
pub(super) fn sizes(length: usize) -> Vec<usize> {
    let all = std::iter::successors(Some(LEAST), |pairs| Some(2 * pairs));
    all.take_while(|&pairs| pairs <= MOST && length_for(pairs) <= length).collect()
}

pub(super) fn vocabulary(most: usize) -> usize {
    1 + 2 * most
}

pub(super) fn sequence(pairs: usize, most: usize, length: usize, rng: &mut random::Rng) -> Sequence {
    let keys = random::different(rng, pairs, most);
    let values = random::different(rng, pairs, most);
    let mut tokens = vec![FILLER; length];
    for (pair, (key, value)) in keys.iter().zip(&values).enumerate() {
        tokens[LEAD + 2 * pair] = 1 + *key as u32;
        tokens[LEAD + 2 * pair + 1] = (1 + most + value) as u32;
    }
    let start = LEAD + 2 * pairs;
    let places = random::different(rng, pairs, length - start);
    let mut questions: Vec<Question> = Vec::with_capacity(pairs);
    for (pair, place) in places.into_iter().enumerate() {
        let (position, found) = (start + place, LEAD + 2 * pair + 1);
        tokens[position] = tokens[found - 1];
        questions.push(Question { row: 0, position, answer: tokens[found], size: pairs, distance: position - found });
    }
    questions.sort_unstable_by_key(|question| question.position);
    Sequence { tokens, questions }
}
