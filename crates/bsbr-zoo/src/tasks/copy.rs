//! Copying: `filler s1 .. sL | s1 .. sL filler`. Each symbol of the second string is asked for, by the separator and by the symbols
//! copied so far; what has to be found lies `L` tokens back.

use super::{FILLER, LEAD, Question, Sequence, random};

/// Shortest string.
pub(super) const LEAST: usize = 8;

/// Symbols of a string.
pub(super) const SYMBOLS: usize = 32;

/// Filler, separator, symbols.
pub(super) const VOCABULARY: usize = 2 + SYMBOLS;

const SEPARATOR: u32 = 1;

/// Tokens that a string and its copy take.
pub(super) fn length_for(symbols: usize) -> usize {
    LEAD + 2 * symbols + 1
}

/// Lengths of strings: 8, doubled while they fit, and the longest that fits and is a multiple of 8.
pub(super) fn sizes(length: usize) -> Vec<usize> {
    let longest = length.saturating_sub(LEAD + 1) / 2 / LEAST * LEAST;
    let doubled = std::iter::successors(Some(LEAST), |symbols| Some(2 * symbols));
    let mut sizes: Vec<usize> = doubled.take_while(|&symbols| symbols < longest).collect();
    sizes.extend((longest >= LEAST).then_some(longest));
    sizes
}

pub(super) fn sequence(symbols: usize, length: usize, rng: &mut random::Rng) -> Sequence {
    let mut tokens = vec![FILLER; length];
    let separator = LEAD + symbols;
    tokens[separator] = SEPARATOR;
    for at in LEAD..separator {
        tokens[at] = 2 + random::below(rng, SYMBOLS) as u32;
        tokens[at + symbols + 1] = tokens[at];
    }
    // Asked at a position is the token behind it, which stood `symbols` tokens before that position.
    let asked = separator..separator + symbols;
    let question = |position: usize| {
        let answer = tokens[position + 1];
        Question { row: 0, position, answer, size: symbols, distance: symbols }
    };
    let questions = asked.map(question).collect();
    Sequence { tokens, questions }
}
