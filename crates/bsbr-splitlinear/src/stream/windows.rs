//! Which windows of a text are calibrated on.

use std::ops::Range;

use crate::{CalibrationSettings, SplitError};

/// A window of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Where it is, in tokens.
    pub tokens: Range<usize>,
    /// Whether it judges what was fitted on the others.
    pub held_out: bool,
}

/// Windows of a text of `length` tokens, which do not overlap, in its order. Of more windows than are asked for the seed
/// chooses; held-out ones are spread evenly, at least one of
/// them where any are asked for and there are two windows. A window is always full: there is no padding.
///
/// # Errors
///
/// [`SplitError`] if the text is shorter than one window, or none is left to calibrate on.
pub fn choose_windows(length: usize, settings: &CalibrationSettings) -> Result<Vec<Window>, SplitError> {
    let CalibrationSettings { samples, length: window, seed, holdout, .. } = *settings;
    let there = length / window.max(1);
    if there == 0 {
        let expected = format!("text of at least one window of {window} tokens");
        return Err(SplitError::shape("calibration", expected, format!("{length} tokens")));
    }
    let mut numbers: Vec<usize> = (0..there).collect();
    if samples < there {
        let mut state = seed;
        for at in 0..samples {
            let other = at + (next(&mut state) % (there - at) as u64) as usize;
            numbers.swap(at, other);
        }
        numbers.truncate(samples);
        numbers.sort_unstable();
    }
    let border = |count: usize| (count as f64 * holdout + 1e-9).floor() as usize;
    // Of few windows the last: something must judge.
    let last = (holdout > 0.0 && numbers.len() > 1 && border(numbers.len()) == 0).then(|| numbers.len() - 1);
    let windows = numbers.iter().enumerate().map(|(at, number)| Window {
        tokens: number * window..(number + 1) * window,
        held_out: border(at + 1) > border(at) || last == Some(at),
    });
    Ok(windows.collect())
}

/// Splitmix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(samples: usize) -> CalibrationSettings {
        CalibrationSettings { samples, length: 10, ..Default::default() }
    }

    #[test]
    fn windows_are_full_apart_and_a_tenth_of_them_is_held_out() {
        let windows = choose_windows(1234, &settings(40)).unwrap();
        assert_eq!(windows.len(), 40);
        assert_eq!(windows.iter().filter(|window| window.held_out).count(), 4);
        assert!(windows.iter().all(|window| window.tokens.len() == 10 && window.tokens.end <= 1234));
        assert!(windows.windows(2).all(|pair| pair[0].tokens.end <= pair[1].tokens.start));
        assert_eq!(windows, choose_windows(1234, &settings(40)).unwrap());
        let other = CalibrationSettings { seed: 1, ..settings(40) };
        assert_ne!(windows, choose_windows(1234, &other).unwrap());
    }

    #[test]
    fn a_short_text_gives_all_its_windows_and_none_is_an_error() {
        let windows = choose_windows(39, &settings(64)).unwrap();
        let held: Vec<bool> = windows.iter().map(|window| window.held_out).collect();
        assert_eq!(held, [false, false, true]);
        assert!(!choose_windows(19, &settings(64)).unwrap()[0].held_out);
        let none = CalibrationSettings { holdout: 0.0, ..settings(64) };
        assert!(choose_windows(39, &none).unwrap().iter().all(|window| !window.held_out));
        assert!(choose_windows(9, &settings(64)).unwrap_err().to_string().contains("10 tokens"));
    }
}
