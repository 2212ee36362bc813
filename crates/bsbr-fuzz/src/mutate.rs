//! Changing an input a little.

use crate::random::Random;

/// Numbers on the borders of types, sizes and limits.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 33,
    1 << 62,
    u64::MAX / 2,
    u64::MAX,
];

/// The same, and others that are none, as text has them.
const WRITTEN: [&str; 22] = [
    "0",
    "1",
    "-1",
    "2",
    "64",
    "65536",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "1e999",
    "-0.0",
    "0.1",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[1]",
    "\"\\ud800\"",
    "NaN",
];

/// Changes `input` in one to eight places. `others` are inputs to take parts from, `words` what belongs to the format.
pub(crate) fn mutate(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&str], longest: usize) {
    for _ in 0..1 << random.below(4) {
        once(random, input, others, words);
    }
    input.truncate(longest);
}

fn once(random: &mut Random, input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&str]) {
    let length = input.len();
    let at = random.below(length + 1);
    let some = |random: &mut Random| random.short(7).min(length - at);
    match random.below(14) {
        0 if at < length => input[at] ^= 1 << random.below(8),
        1 if at < length => input[at] = random.next() as u8,
        2 => {
            let end = at + some(random);
            input.drain(at..end);
        }
        3 => {
            let end = at + some(random);
            let again = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, again);
        }
        4 => input.truncate(at),
        5 => {
            // A number of four or eight bytes, as binary formats have counts, lengths and offsets.
            let number = match random.below(3) {
                0 => *random.pick(&NUMBERS),
                1 => random.pick(&NUMBERS).wrapping_sub(1 + random.below(16) as u64),
                _ => length as u64,
            };
            let bytes = number.to_le_bytes();
            let size = if random.below(2) == 0 { 4 } else { 8 };
            let end = (at + size).min(length);
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        6 => {
            // A number of text.
            if let Some(number) = digits(input, at) {
                input.splice(number, random.pick(&WRITTEN).bytes());
            }
        }
        7 if !words.is_empty() => {
            let word = *random.pick(words);
            input.splice(at..at, word.bytes());
        }
        8 if !words.is_empty() => {
            // In place of a quoted word.
            if let Some(quoted) = quoted(input, at) {
                input.splice(quoted, random.pick(words).bytes());
            }
        }
        9 if !others.is_empty() => {
            let other = random.pick(others);
            let from = random.below(other.len() + 1);
            let end = from + random.short(9).min(other.len() - from);
            let until = if random.below(2) == 0 { at } else { at + (end - from).min(length - at) };
            input.splice(at..until, other[from..end].iter().copied());
        }
        10 => {
            // Deep nesting.
            let (open, count) = (*random.pick(b"[{(<"), random.short(12));
            input.splice(at..at, std::iter::repeat_n(open, count));
        }
        11 => {
            // A line, or what stands between two commas, goes or comes again.
            let is_border = |byte: &u8| matches!(byte, b'\n' | b',');
            let start = input[..at].iter().rposition(is_border).map_or(0, |found| found + 1);
            let end = input[at..].iter().position(is_border).map_or(length, |found| at + found + 1);
            let part = input[start..end].to_vec();
            if random.below(2) == 0 {
                input.drain(start..end);
            } else {
                input.splice(end..end, part);
            }
        }
        12 => {
            if let Some(number) = digits(input, at) {
                let written = random.pick(&NUMBERS).wrapping_add(random.below(3) as u64).to_string();
                input.splice(number, written.bytes());
            }
        }
        _ if at < length => input[at] = input[at].wrapping_add(1 + random.below(4) as u8),
        _ => {}
    }
}

/// The number nearest behind `at`.
fn digits(input: &[u8], at: usize) -> Option<std::ops::Range<usize>> {
    let start = at + input[at..].iter().position(u8::is_ascii_digit)?;
    let length = input[start..].iter().position(|byte| !byte.is_ascii_digit() && *byte != b'.');
    Some(start..length.map_or(input.len(), |length| start + length))
}

/// What stands within the quotation marks nearest behind `at`.
fn quoted(input: &[u8], at: usize) -> Option<std::ops::Range<usize>> {
    let start = at + input[at..].iter().position(|&byte| byte == b'"')? + 1;
    let length = input[start..].iter().position(|&byte| byte == b'"')?;
    Some(start..start + length)
}
