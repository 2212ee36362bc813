//! What a comparison came to: the content of its JSON.

use bsbr_zoo::{
    DecoderConfig, Family, Original,
    train::{Run, TrainConfig},
};
use serde::Serialize;

use bsbr::harness::{
    LARGEST_EXPONENT_SPREAD, Machine, Peak, Phase, Summary, Versions, exponent, exponent_spread, upper_half,
};

/// Name and version of the format. Fields may be added to a version; one that changes or goes makes the next.
pub(crate) const SCHEMA: &str = "bsbr-compare/1";

/// One part: cost, or what was learned.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: &'static str,
    /// Seconds since 1970 at the start.
    pub(crate) unix_time: u64,
    /// Seconds this run of the program took.
    pub(crate) elapsed_seconds: f64,
    pub(crate) versions: Versions,
    pub(crate) machine: Machine,
    pub(crate) device: String,
    pub(crate) families: Vec<About>,
    pub(crate) cost: Option<Cost>,
    pub(crate) trained: Option<Trained>,
}

/// How a family was configured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct About {
    pub(crate) family: Family,
    pub(crate) source: &'static str,
    pub(crate) original: Option<Original>,
    pub(crate) parameters: usize,
    /// Parameters as a multiple of those of standard attention in the same decoder.
    pub(crate) parameters_of_standard: f64,
    /// Bytes kept of a text of `state_tokens` tokens.
    pub(crate) state_bytes: u64,
    pub(crate) state_tokens: usize,
    /// Share of the keys before a token that it reads as themselves, over a text of `state_tokens` tokens; `None` where nothing
    /// is kept as itself.
    pub(crate) keys_read: Option<f64>,
    pub(crate) decoder: DecoderConfig,
}

/// Time and memory by length.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cost {
    pub(crate) threads: usize,
    pub(crate) lengths: Vec<usize>,
    pub(crate) warmup: usize,
    pub(crate) runs: usize,
    /// Seconds the whole was to take at most.
    pub(crate) seconds: f64,
    pub(crate) rows: Vec<Row>,
    pub(crate) fits: Vec<Fit>,
}

/// One family at one length in one phase.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) phase: Phase,
    pub(crate) family: Family,
    /// Tokens of the text; in decoding, those already there.
    pub(crate) tokens: usize,
    /// Why it was not measured.
    pub(crate) left_out: Option<String>,
    /// Untimed runs before the samples.
    pub(crate) warmup: usize,
    /// Seconds of each prefill, or for each token of decoding.
    pub(crate) samples: Vec<f64>,
    pub(crate) seconds: Option<Summary>,
    /// Resident memory of a process of its own before and at the worst moment of a prefill.
    pub(crate) memory: Option<Peak>,
    /// Bytes kept for decoding.
    pub(crate) state_bytes: Option<u64>,
    pub(crate) notes: Vec<String>,
}

impl Row {
    pub(crate) fn new(phase: Phase, family: Family, tokens: usize) -> Self {
        Self {
            phase,
            family,
            tokens,
            left_out: None,
            warmup: 0,
            samples: Vec::new(),
            seconds: None,
            memory: None,
            state_bytes: None,
            notes: Vec::new(),
        }
    }

    pub(crate) fn measured(&mut self, samples: Vec<f64>) {
        self.seconds = Summary::of(&samples);
        self.samples = samples;
        if let Some(seconds) = self.seconds.filter(Summary::is_noisy) {
            self.notes.push(format!("spread {:.0} %", 100.0 * seconds.spread()));
        }
    }

    /// What the prefill needed beyond what was there.
    pub(crate) fn extra_bytes(&self) -> Option<u64> {
        self.memory.map(|memory| memory.peak.saturating_sub(memory.before))
    }
}

/// Growth with the length of the text, over the longer half of the lengths measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Fit {
    pub(crate) family: Family,
    pub(crate) of: Quantity,
    pub(crate) exponent: f64,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) points: usize,
}

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Quantity {
    /// Median seconds of reading a text.
    Prefill,
    /// Median seconds of one token.
    Decode,
    /// Extra bytes of reading a text.
    Memory,
    /// Bytes kept for decoding.
    State,
}

impl Quantity {
    pub(crate) const ALL: [Self; 4] = [Self::Prefill, Self::Decode, Self::Memory, Self::State];

    fn of(self, row: &Row) -> Option<f64> {
        let phase = if matches!(self, Self::Decode | Self::State) { Phase::Decode } else { Phase::Prefill };
        match self {
            _ if row.phase != phase => None,
            Self::Prefill | Self::Decode => Some(row.seconds?.median),
            Self::Memory => row.extra_bytes().map(|bytes| bytes as f64),
            Self::State => row.state_bytes.map(|bytes| bytes as f64),
        }
    }
}

/// Fits what can be fitted.
pub(crate) fn fits(families: &[Family], rows: &[Row]) -> Vec<Fit> {
    let mut fits = Vec::new();
    for &family in families {
        for of in Quantity::ALL {
            let rows = rows.iter().filter(|row| row.family == family);
            let times = rows.clone().filter(|row| of.of(row).is_some());
            let times: Vec<(f64, Summary)> = times.filter_map(|row| Some((row.tokens as f64, row.seconds?))).collect();
            let open = match upper_half(&times) {
                [first, .., last] => exponent_spread(*first, *last),
                _ => 0.0,
            };
            let is_time = matches!(of, Quantity::Prefill | Quantity::Decode);
            if is_time && open > LARGEST_EXPONENT_SPREAD {
                continue;
            }
            let points: Vec<(f64, f64)> = rows.filter_map(|row| Some((row.tokens as f64, of.of(row)?))).collect();
            let upper = upper_half(&points);
            if let (Some(exponent), [(from, _), .., (to, _)]) = (exponent(upper), upper) {
                fits.push(Fit { family, of, exponent, from: *from as usize, to: *to as usize, points: upper.len() });
            }
        }
    }
    fits
}

/// What the families learned.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Trained {
    pub(crate) jobs: usize,
    pub(crate) seeds: u64,
    pub(crate) tasks: Vec<TrainedTask>,
    pub(crate) runs: Vec<Run>,
}

/// How one task was set.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TrainedTask {
    pub(crate) task: bsbr_zoo::tasks::Task,
    pub(crate) train: TrainConfig,
    pub(crate) vocabulary: usize,
    /// Share of right answers by guessing.
    pub(crate) chance: Option<f64>,
    pub(crate) text: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_fitted_to_the_longer_half_of_each_family_and_quantity() {
        let row = |phase, tokens: usize, seconds: f64, peak: u64| {
            let mut row = Row::new(phase, Family::Delta, tokens);
            row.measured(vec![seconds]);
            match phase {
                Phase::Prefill => row.memory = Some(Peak { before: 1000, peak: 1000 + peak }),
                Phase::Decode => row.state_bytes = Some(4096),
                Phase::Training => unreachable!("no row of it is made"),
            }
            row
        };
        let mut rows = Vec::new();
        for (tokens, seconds) in [(64, 9.0), (128, 1.0), (256, 2.0), (512, 4.0), (1024, 8.0)] {
            rows.push(row(Phase::Prefill, tokens, seconds, (tokens * tokens) as u64));
            rows.push(row(Phase::Decode, tokens, 0.5, 0));
        }
        let fits = fits(&[Family::Gau, Family::Delta], &rows);
        let found: Vec<_> = fits.iter().map(|fit| (fit.family, fit.of, (fit.exponent * 1e6).round() / 1e6)).collect();
        let expected = [
            (Family::Delta, Quantity::Prefill, 1.0),
            (Family::Delta, Quantity::Decode, 0.0),
            (Family::Delta, Quantity::Memory, 2.0),
            (Family::Delta, Quantity::State, 0.0),
        ];
        assert_eq!(found, expected);
        assert_eq!((fits[0].from, fits[0].to, fits[0].points), (256, 1024, 3));
    }
}
