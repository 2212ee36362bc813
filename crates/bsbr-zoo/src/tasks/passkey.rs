//! Passkey: `filler .. MARK d1 .. d10 .. filler ASK d1 .. d10`. The filler is random words; the key of ten random digits stands at a
//! random depth. Each digit is asked for at the end, by the mark and by the digits given so far.

use super::{FILLER, LEAD, Question, Sequence, random};

/// Digits there are.
pub(super) const DIGITS: usize = 10;

/// Digits of a key.
const KEY: usize = 10;

/// Words of the filler.
const WORDS: usize = 16;

const MARK: u32 = 1;
const ASK: u32 = 2;

/// Lead, marks, digits, words.
pub(super) const VOCABULARY: usize = 3 + DIGITS + WORDS;

/// Lead, mark and key, and the same at the end but for the last digit, which no token comes after.
pub(super) const LEAST_LENGTH: usize = LEAD + 2 * (KEY + 1) - 1;

pub(super) fn sequence(length: usize, rng: &mut random::Rng) -> Sequence {
    let word = |rng: &mut random::Rng| (3 + DIGITS + random::below(rng, WORDS)) as u32;
    let mut tokens: Vec<u32> = (0..length).map(|at| if at < LEAD { FILLER } else { word(rng) }).collect();
    let ask = length - KEY;
    let mark = LEAD + random::below(rng, ask - (KEY + 1) - LEAD + 1);
    (tokens[mark], tokens[ask]) = (MARK, ASK);
    let mut questions = Vec::with_capacity(KEY);
    for digit in 0..KEY {
        let answer = 3 + random::below(rng, DIGITS) as u32;
        let found = mark + 1 + digit;
        tokens[found] = answer;
        if let Some(given) = tokens.get_mut(ask + 1 + digit) {
            *given = answer;
        }
        let position = ask + digit;
        questions.push(Question { row: 0, position, answer, size: 0, distance: position - found });
    }
    Sequence { tokens, questions }
}
