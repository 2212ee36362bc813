//! Lengths to measure, as one writes them: `512`, `512,2k`, `512..65536*2`.

use std::str::FromStr;

/// Longest text: positions are 32-bit numbers on some devices, and nobody waits for more.
const LONGEST: usize = 1 << 24;

/// More lengths than a sweep can mean.
const MOST_LENGTHS: usize = 64;

/// Lengths in tokens, ascending, each once, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths(Vec<usize>);

impl Lengths {
    /// All of them.
    pub fn as_slice(&self) -> &[usize] {
        &self.0
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut lengths = Vec::new();
        for part in text.split(',') {
            match part.split_once("..") {
                Some((first, rest)) => range(first, rest, &mut lengths)?,
                None => lengths.push(length(part)?),
            }
        }
        lengths.sort_unstable();
        lengths.dedup();
        if lengths.len() > MOST_LENGTHS {
            return Err(format!("{} lengths, expected at most {MOST_LENGTHS}", lengths.len()));
        }
        Ok(Self(lengths))
    }
}

/// `FIRST..LAST` doubles; `FIRST..LAST*FACTOR` multiplies by another factor. `LAST` is included if it is hit.
fn range(first: &str, rest: &str, lengths: &mut Vec<usize>) -> Result<(), String> {
    let (last, factor) = rest.split_once('*').unwrap_or((rest, "2"));
    let (first, last) = (length(first)?, length(last)?);
    let factor: f64 = factor.trim().parse().map_err(|_| format!("factor `{factor}`: expected a number like 2"))?;
    if !(factor.is_finite() && factor > 1.0) {
        return Err(format!("factor {factor}: expected more than 1"));
    }
    if first > last {
        return Err(format!("{first}..{last} is empty: expected the shorter length first"));
    }
    let mut exact = first as f64;
    while exact.round() as usize <= last {
        if lengths.len() >= 2 * MOST_LENGTHS {
            return Err(format!("factor {factor}: more than {MOST_LENGTHS} lengths"));
        }
        lengths.push(exact.round() as usize);
        exact *= factor;
    }
    Ok(())
}

/// Tokens, possibly in units of 1024 (`k`) or 1024 x 1024 (`m`).
pub(crate) fn length(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1 << 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    let expected = || format!("length `{text}`: expected 1 to {LONGEST}, like 512, 64k, 512,2k or 512..65536*2");
    let number: usize = digits.parse().map_err(|_| expected())?;
    number.checked_mul(unit).filter(|tokens| (1..=LONGEST).contains(tokens)).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Vec<usize> {
        text.parse::<Lengths>().unwrap_or_else(|error| panic!("{text}: {error}")).0
    }

    #[test]
    fn the_forms_of_the_manual() {
        assert_eq!(parsed("4096"), [4096]);
        assert_eq!(parsed("512..65536*2"), [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]);
        assert_eq!(parsed("512..2048"), [512, 1024, 2048]);
        assert_eq!(parsed("1k..64K*4"), [1024, 4096, 16384, 65536]);
        assert_eq!(parsed("1m, 2k,100..300*1.5,2048"), [100, 150, 225, 2048, 1 << 20]);
    }

    #[test]
    fn what_is_no_sweep_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "length ``"),
            ("0", "expected 1 to"),
            ("-5", "length `-5`"),
            ("1.5k", "length `1.5k`"),
            ("k", "length `k`"),
            ("512,,1024", "length ``"),
            ("512..", "length ``"),
            ("1024..512", "is empty"),
            ("512..1024*1", "more than 1"),
            ("512..1024*NaN", "more than 1"),
            ("512..1024*inf", "more than 1"),
            ("512..1024*x", "factor `x`"),
            ("512..1000000*1.0001", "more than 64"),
            ("999999999999999999999", "expected 1 to"),
            ("18446744073709551615m", "expected 1 to"),
            ("17m", "expected 1 to"),
        ] {
            let error = text.parse::<Lengths>().expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_range_starts_at_its_start_multiplies_and_ends_before_its_end(
            first in 1_usize..5000, times in 1_usize..500, factor in 2_usize..9,
        ) {
            let last = first * times;
            let lengths = parsed(&format!("{first}..{last}*{factor}"));
            prop_assert_eq!(lengths[0], first);
            prop_assert!(lengths.windows(2).all(|pair| pair[1] == pair[0] * factor));
            let end = *lengths.last().unwrap();
            prop_assert!(end <= last && end * factor > last);
        }

        #[test]
        fn a_list_is_sorted_and_holds_each_of_its_lengths_once(list in prop::collection::vec(1_usize..LONGEST, 1..40)) {
            let text: Vec<String> = list.iter().map(usize::to_string).collect();
            let mut expected = list;
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(parsed(&text.join(",")), expected);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "[0-9kKmM.,* x-]{0,20}") {
            if let Ok(Lengths(lengths)) = text.parse() {
                prop_assert!(!lengths.is_empty() && lengths.len() <= MOST_LENGTHS);
                prop_assert!(lengths.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(lengths.iter().all(|length| (1..=LONGEST).contains(length)));
            }
        }
    }
}
