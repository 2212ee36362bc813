//! What a run of the bench came to: the content of its JSON.

use bsbr_attn::{BlockAttentionConfig, Retrieved};
use serde::Serialize;

use super::{
    Arm, Part, Phase,
    attention::Shape,
    gemm, llama,
    machine::{Machine, Versions},
    memory::Memory,
    model::Quality,
    pytorch::Opponent,
    statistics::{LARGEST_EXPONENT_SPREAD, Summary, exponent, exponent_spread, upper_half},
};

/// Name and version of the format. Fields may be added to a version; one that changes or goes makes the next.
pub(crate) const SCHEMA: &str = "bsbr-bench/1";

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: &'static str,
    /// Seconds since 1970 at the start.
    pub(crate) unix_time: u64,
    /// Seconds the whole run took.
    pub(crate) elapsed_seconds: f64,
    pub(crate) versions: Versions,
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) opponent: Option<Opponent>,
    pub(crate) llama_cpp: Option<llama::About>,
    pub(crate) gemm: Option<GemmRate>,
    pub(crate) differences: Vec<Difference>,
    pub(crate) rows: Vec<Row>,
    pub(crate) fits: Vec<Fit>,
}

/// What was asked for.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Settings {
    pub(crate) device: String,
    pub(crate) threads: usize,
    /// Lengths of attention alone, in tokens.
    pub(crate) attention_lengths: Vec<usize>,
    /// Lengths of the model, in tokens.
    pub(crate) model_lengths: Vec<usize>,
    pub(crate) phases: Vec<Phase>,
    pub(crate) warmup: usize,
    pub(crate) runs: usize,
    /// Seconds the whole was to take at most.
    pub(crate) seconds: f64,
    pub(crate) shape: Shape,
    /// Correlation of neighbouring tokens in the random data of attention alone; 0 for data of a model.
    pub(crate) correlation: f32,
    /// What the data of attention alone is, in words.
    pub(crate) data: String,
    pub(crate) attention: BlockAttentionConfig,
    pub(crate) model: Option<String>,
    pub(crate) text: Option<String>,
    /// Of the file of the text.
    pub(crate) text_sha256: Option<String>,
}

/// The rate of matrix products in this process, measured between the arms of attention alone.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GemmRate {
    /// Rows and columns of the matrices.
    pub(crate) size: usize,
    pub(crate) seconds: Vec<f64>,
    pub(crate) gflop_per_second: f64,
}

impl GemmRate {
    pub(crate) fn new(seconds: Vec<f64>) -> Option<Self> {
        let median = Summary::of(&seconds)?.median;
        Some(Self { size: gemm::SIZE, seconds, gflop_per_second: gemm::OPERATIONS / median / 1e9 })
    }
}

/// What an index retrieved for the tokens that had a choice.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Keys {
    /// Keys for a token and KV head, the mean.
    pub(crate) mean: f64,
    /// Share of the choices that `max_keys` cut.
    pub(crate) capped: f64,
}

impl From<Retrieved> for Keys {
    fn from(found: Retrieved) -> Self {
        let choices = found.tokens.max(1) as f64;
        Self { mean: found.keys as f64 / choices, capped: found.capped as f64 / choices }
    }
}

/// How far two arms' outputs for one text are apart.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Difference {
    pub(crate) arm: Arm,
    pub(crate) from: Arm,
    pub(crate) tokens: usize,
    /// Largest difference, as a share of the largest number.
    pub(crate) largest: f64,
    /// Root mean square of the difference, as a share of that of the numbers.
    pub(crate) rms: f64,
}

/// One arm at one length in one phase.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) part: Part,
    pub(crate) phase: Phase,
    pub(crate) arm: Arm,
    /// Tokens of the text; in decoding, those already there.
    pub(crate) tokens: usize,
    /// Why it was not measured.
    pub(crate) left_out: Option<String>,
    /// Untimed runs before the samples.
    pub(crate) warmup: usize,
    /// Seconds of each run with a whole text, or for each token of decoding.
    pub(crate) samples: Vec<f64>,
    pub(crate) seconds: Option<Summary>,
    pub(crate) tokens_per_second: Option<f64>,
    /// Floating-point arithmetic of a run with a whole text.
    pub(crate) operations: Option<f64>,
    /// Integer arithmetic of an index, which is not part of that.
    pub(crate) integer_operations: Option<f64>,
    /// What the index retrieved.
    pub(crate) retrieved: Option<Keys>,
    /// Arithmetic in a second, as a share of that of matrix products between the same samples.
    pub(crate) share_of_gemm: Option<f64>,
    pub(crate) memory: Option<Memory>,
    /// Bytes kept for decoding.
    pub(crate) kept_bytes: Option<u64>,
    pub(crate) quality: Option<Quality>,
    pub(crate) notes: Vec<String>,
}

impl Row {
    pub(crate) fn new(part: Part, phase: Phase, arm: Arm, tokens: usize) -> Self {
        Self {
            part,
            phase,
            arm,
            tokens,
            left_out: None,
            warmup: 0,
            samples: Vec::new(),
            seconds: None,
            tokens_per_second: None,
            operations: None,
            integer_operations: None,
            retrieved: None,
            share_of_gemm: None,
            memory: None,
            kept_bytes: None,
            quality: None,
            notes: Vec::new(),
        }
    }

    /// Takes the samples in, of `tokens` tokens each. `gemm` are products timed between them.
    pub(crate) fn measured(&mut self, samples: Vec<f64>, tokens: usize, gemm: &[f64]) {
        self.seconds = Summary::of(&samples);
        self.samples = samples;
        let Some(seconds) = self.seconds else { return };
        self.tokens_per_second = Some(tokens as f64 / seconds.median);
        self.share_of_gemm = self
            .operations
            .zip(Summary::of(gemm))
            .map(|(operations, product)| (operations / seconds.median) / (gemm::OPERATIONS / product.median));
        if seconds.is_noisy() {
            self.notes.push(format!("spread {:.0} %", 100.0 * seconds.spread()));
        }
    }
}

/// Growth of a number with the length of the text, over the longer half of the lengths measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Fit {
    pub(crate) part: Part,
    pub(crate) phase: Phase,
    pub(crate) arm: Arm,
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
    /// Median seconds.
    Time,
    /// Extra bytes.
    Memory,
}

/// Memory below this is as much the system's doing as the arm's: nothing is fitted to it.
const CLEAR_BYTES: f64 = 1e6;

/// Fits what can be fitted, in the order of the rows; what the spread of the samples leaves open is no fit.
pub(crate) fn fits(rows: &[Row]) -> Vec<Fit> {
    let mut fits: Vec<Fit> = Vec::new();
    for row in rows {
        let key = (row.part, row.phase, row.arm);
        if fits.iter().any(|fit| (fit.part, fit.phase, fit.arm) == key) {
            continue;
        }
        let same = || rows.iter().filter(|row| (row.part, row.phase, row.arm) == key);
        let times: Vec<(usize, Summary)> = same().filter_map(|row| Some((row.tokens, row.seconds?))).collect();
        let bytes: Vec<(usize, f64)> =
            same().filter_map(|row| Some((row.tokens, row.memory?.extra_bytes as f64))).collect();
        let open = match upper_half(&times) {
            [(from, first), .., (to, last)] => exponent_spread((*from as f64, *first), (*to as f64, *last)),
            _ => 0.0,
        };
        let clear =
            [open <= LARGEST_EXPONENT_SPREAD, upper_half(&bytes).iter().all(|(_, bytes)| *bytes >= CLEAR_BYTES)];
        let times: Vec<(usize, f64)> = times.iter().map(|(tokens, seconds)| (*tokens, seconds.median)).collect();
        for ((of, points), clear) in [(Quantity::Time, times), (Quantity::Memory, bytes)].into_iter().zip(clear) {
            if !clear {
                continue;
            }
            let upper = upper_half(&points);
            let logs: Vec<(f64, f64)> = upper.iter().map(|&(tokens, value)| (tokens as f64, value)).collect();
            if let (Some(exponent), [(from, _), .., (to, _)]) = (exponent(&logs), upper) {
                let (part, phase, arm) = key;
                fits.push(Fit { part, phase, arm, of, exponent, from: *from, to: *to, points: upper.len() });
            }
        }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(arm: Arm, tokens: usize, seconds: f64) -> Row {
        let mut row = Row::new(Part::Attention, Phase::Prefill, arm, tokens);
        row.operations = Some(1e9);
        row.measured(vec![seconds; 3], tokens, &[gemm::OPERATIONS / 1e11]);
        row
    }

    #[test]
    fn the_exponent_is_that_of_the_longer_half_of_each_arm() {
        // Linear up to 1024, quadratic from there on.
        let rows: Vec<Row> = [(512, 1.0), (1024, 2.0), (2048, 8.0), (4096, 32.0)]
            .into_iter()
            .flat_map(|(tokens, seconds)| [row(Arm::Dense, tokens, seconds), row(Arm::Bsbr, tokens, tokens as f64)])
            .collect();
        let fits = fits(&rows);
        assert_eq!(fits.len(), 2);
        assert!((fits[0].exponent - 2.0).abs() < 1e-9, "{:?}", fits[0]);
        assert_eq!((fits[0].arm, fits[0].from, fits[0].to, fits[0].points), (Arm::Dense, 2048, 4096, 2));
        assert!((fits[1].exponent - 1.0).abs() < 1e-9, "{:?}", fits[1]);
    }

    #[test]
    fn nothing_is_fitted_to_one_length_or_to_rows_left_out() {
        assert_eq!(fits(&[row(Arm::Dense, 512, 1.0)]), []);
        let left_out = Row::new(Part::Attention, Phase::Prefill, Arm::Dense, 1024);
        assert_eq!(fits(&[row(Arm::Dense, 512, 1.0), left_out]), []);
    }

    #[test]
    fn rates_follow_from_the_median() {
        let row = row(Arm::Dense, 512, 0.02);
        assert_eq!(row.tokens_per_second, Some(25_600.0));
        // 1e9 operations in 0.02 s are 50 GFLOP/s, of 100.
        assert!((row.share_of_gemm.unwrap() - 0.5).abs() < 1e-12);
        assert!(row.notes.is_empty());
    }
}
