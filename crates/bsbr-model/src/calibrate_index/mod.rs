//! Calibrating what an index retrieves: the cheapest settings that keep a model near its original.
//!
//! Three settings say how much is read: `threshold` and `max_keys` which keys, `index_channels` how well these are known before
//! they are read. The search runs the whole model on windows of a text and holds its scores against the original's. A lower
//! threshold, more keys and more channels all bring it nearer, so that for each number of channels a few trials find the highest
//! threshold that serves, and then the fewest keys. Layers then get thresholds of their own around that one, see [`layers`].
//! Windows that no trial saw have to agree; where they do not, the settings get stricter until they do.

mod layers;

use bsbr_attn::BlockAttentionConfig;
use serde::{Deserialize, Serialize};

use crate::{
    Decoder, ModelConfig, ModelError, check_windows,
    evaluate::{Divergence, EvaluateConfig, Reference},
};

/// Thresholds that are tried: powers of two from the cheapest to the strictest.
const THRESHOLDS: [f64; 6] = [1.0 / 256.0, 1.0 / 512.0, 1.0 / 1024.0, 1.0 / 2048.0, 1.0 / 4096.0, 1.0 / 8192.0];

/// Most keys that are tried, from the strictest to the cheapest.
const MOST_KEYS: [usize; 4] = [2048, 1024, 512, 256];

/// One window in so many is kept to verify by.
const HELD_OUT: usize = 3;

/// Positions of a window that a trial compares; verification compares all.
const MOST_COMPARED: usize = 2048;

/// What an operation of 8-bit integers costs beside one of floating point.
const INTEGER_COST: f64 = 0.25;

/// Trials there are at most, for whoever waits.
const MOST_TRIALS: usize = 3 * (3 + 1 + MOST_KEYS.len()) + layers::TRIALS + 4;

/// What to keep, and on what.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct IndexCalibrationConfig {
    /// Mean Kullback-Leibler divergence from the original, in nats, that is not to be exceeded: as an evaluation reports it,
    /// after the first chunk of each window.
    pub target_kl: f64,
    /// Tokens of a window; windows follow each other through the text.
    pub window: usize,
    /// Most windows to read, at least two: one in three is kept to verify by.
    pub windows: usize,
}

/// The settings that are searched.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexSettings {
    /// See [`BlockAttentionConfig::threshold`].
    pub threshold: f64,
    /// See [`BlockAttentionConfig::max_keys`].
    pub max_keys: usize,
    /// See [`BlockAttentionConfig::index_channels`].
    pub index_channels: usize,
}

/// What settings cost and lose on the windows of the search.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexTrial {
    /// The settings.
    pub settings: IndexSettings,
    /// Mean Kullback-Leibler divergence from the original, in nats.
    pub kl: f64,
    /// Keys read exactly, as a share of those the original reads.
    pub keys_share: f64,
    /// Operations of attention as a share of the original's, those of the index among them.
    pub cost: f64,
}

/// What calibration found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexCalibration {
    /// The divergence that was not to be exceeded.
    pub target_kl: f64,
    /// Windows searched on.
    pub windows: usize,
    /// Windows that verified.
    pub held_out: usize,
    /// Whole-model trials, in the order they were made.
    pub trials: Vec<IndexTrial>,
    /// The cheapest that serves, or the nearest to the original where none does.
    pub found: IndexTrial,
    /// What each layer multiplies the threshold by; none where that saves nothing.
    pub threshold_factors: Vec<f64>,
    /// Divergence on the windows that no trial saw.
    pub held_out_kl: f64,
    /// Whether it is within the target there.
    pub met: bool,
}

impl IndexCalibration {
    /// The configuration `config` with what was found.
    pub fn configured(&self, config: &ModelConfig) -> ModelConfig {
        let mut config = with_settings(config, self.found.settings);
        config.threshold_factors.clone_from(&self.threshold_factors);
        config
    }
}

/// Whether these settings have an index to calibrate.
pub fn has_index(attention: &BlockAttentionConfig) -> bool {
    attention.uses_index()
}

/// `config` with other settings of the index, the same in every layer.
fn with_settings(config: &ModelConfig, settings: IndexSettings) -> ModelConfig {
    let IndexSettings { threshold, max_keys, index_channels } = settings;
    let mut config = config.clone();
    config.threshold_factors = Vec::new();
    if let Some(attention) = &mut config.attention {
        *attention =
            BlockAttentionConfig { threshold, max_keys, index_channels: Some(index_channels), ..attention.clone() };
    }
    config
}

/// Finds the cheapest settings of the index that keep `decoder` within the target of its original on `tokens`. `each` hears
/// after every trial how many of how many at most are done.
///
/// Depends on nothing but its arguments. Where no settings serve, [`IndexCalibration::met`] says so, and what is found is the
/// nearest to the original.
///
/// # Errors
///
/// [`ModelError::Config`] if no layer has an index or the target is no positive number; [`ModelError::Input`] if the text
/// is shorter than two windows, or a window so short that everything in it is read; [`ModelError::TooLong`] for a window past
/// the learned positions.
pub fn calibrate_index(
    decoder: &Decoder,
    tokens: &[u32],
    config: IndexCalibrationConfig,
    each: impl FnMut(usize, usize),
) -> Result<IndexCalibration, ModelError> {
    let attention = check(decoder, tokens.len(), config)?;
    let original = decoder.with_config(|config| config.attention = None)?.with_cache_type(burn::tensor::DType::F32);
    let count = (tokens.len() / config.window).min(config.windows);
    let held_out = (count / HELD_OUT).max(1);
    let mut windows = tokens.chunks_exact(config.window).take(count);
    // What is held out lies in the middle of what is searched on, not beyond it.
    let (seen, unseen): (Vec<_>, Vec<_>) =
        windows.by_ref().enumerate().partition(|(at, _)| *at == 0 || at % HELD_OUT != HELD_OUT - 1 && count > 2);
    let windows_of = |these: Vec<(usize, _)>| these.into_iter().map(|(_, window)| window).collect::<Vec<&[u32]>>();
    let (seen, unseen) = (windows_of(seen), windows_of(unseen));
    debug_assert_eq!(unseen.len(), held_out);
    let mut search = Search {
        decoder,
        reference: Reference::new(
            &original,
            seen.iter().copied(),
            (attention.chunk_size, config.window / MOST_COMPARED),
        )?,
        target: config.target_kl,
        trials: Vec::new(),
        done: 0,
        each: Box::new(each),
    };
    let width = decoder.config().decoder.widest_head();
    let found = search.cheapest(width)?;
    let unseen_reference = Reference::new(&original, unseen.iter().copied(), (attention.chunk_size, 1))?;
    let mut calibration = IndexCalibration {
        target_kl: config.target_kl,
        windows: seen.len(),
        held_out: unseen.len(),
        trials: Vec::new(),
        found,
        threshold_factors: Vec::new(),
        held_out_kl: f64::INFINITY,
        met: false,
    };
    if found.kl <= config.target_kl {
        calibration.threshold_factors = layers::factors(&mut search, &original, seen[0], found)?;
    }
    if !search.verify(&unseen_reference, &mut calibration)? && !calibration.threshold_factors.is_empty() {
        calibration.threshold_factors = Vec::new();
        search.verify(&unseen_reference, &mut calibration)?;
    }
    while !calibration.met
        && let Some(settings) = stricter(calibration.found.settings, width)
    {
        calibration.threshold_factors = Vec::new();
        calibration.found = search.trial(settings)?;
        search.verify(&unseen_reference, &mut calibration)?;
    }
    calibration.met &= calibration.found.kl <= config.target_kl;
    calibration.trials = search.trials;
    Ok(calibration)
}

/// The next settings that lose less, where there are any.
fn stricter(settings: IndexSettings, width: usize) -> Option<IndexSettings> {
    if let Some(&threshold) = THRESHOLDS.iter().find(|&&threshold| threshold < settings.threshold) {
        return Some(IndexSettings { threshold, ..settings });
    }
    if let Some(&max_keys) = MOST_KEYS.iter().rev().find(|&&keys| keys > settings.max_keys) {
        return Some(IndexSettings { max_keys, ..settings });
    }
    (settings.index_channels < width).then_some(IndexSettings { index_channels: width, ..settings })
}

/// Trials on the windows of the search.
struct Search<'a> {
    decoder: &'a Decoder,
    reference: Reference<'a>,
    target: f64,
    trials: Vec<IndexTrial>,
    done: usize,
    each: Box<dyn FnMut(usize, usize) + 'a>,
}

impl Search<'_> {
    /// The cheapest trial within the target, over all numbers of channels; the nearest to the original where none is.
    fn cheapest(&mut self, width: usize) -> Result<IndexTrial, ModelError> {
        let mut channels = vec![width, width / 2, width / 4];
        channels.retain(|&channels| channels > 0);
        channels.dedup();
        let mut best: Option<IndexTrial> = None;
        for index_channels in channels {
            let Some(found) = self.of_channels(index_channels)? else { continue };
            if best.is_none_or(|best| found.cost < best.cost) {
                best = Some(found);
            }
        }
        let nearest = || self.trials.iter().copied().min_by(|a, b| a.kl.total_cmp(&b.kl));
        best.or_else(nearest).ok_or_else(|| ModelError::Input("no settings could be tried".into()))
    }

    /// The highest threshold that serves, then the fewest keys with it.
    fn of_channels(&mut self, index_channels: usize) -> Result<Option<IndexTrial>, ModelError> {
        let with = |threshold, max_keys| IndexSettings { threshold, max_keys, index_channels };
        // Trial `serving` is within the target, all before `failing` are not.
        let (mut failing, mut serving) = (0, THRESHOLDS.len());
        let mut found = None;
        let mut at = THRESHOLDS.len() - 1;
        while failing < serving {
            let trial = self.trial(with(THRESHOLDS[at], MOST_KEYS[0]))?;
            if trial.kl <= self.target {
                (found, serving) = (Some(trial), at);
            } else {
                failing = at + 1;
            }
            at = failing.midpoint(serving);
        }
        let Some(mut found) = found else { return Ok(None) };
        for max_keys in &MOST_KEYS[1..] {
            let trial = self.trial(with(found.settings.threshold, *max_keys))?;
            if trial.kl > self.target {
                break;
            }
            found = trial;
        }
        Ok(Some(found))
    }

    /// Runs the model with these settings in every layer.
    fn trial(&mut self, settings: IndexSettings) -> Result<IndexTrial, ModelError> {
        let config = with_settings(self.decoder.config(), settings);
        let trial = self.run(&config, settings)?;
        self.trials.push(trial);
        Ok(trial)
    }

    /// Runs the model as `config` says.
    fn run(&mut self, config: &ModelConfig, settings: IndexSettings) -> Result<IndexTrial, ModelError> {
        let variant = self.decoder.with_config(|own| own.clone_from(config))?;
        let Divergence { kl, reads } = self.reference.divergence(&variant)?;
        self.done += 1;
        (self.each)(self.done.min(MOST_TRIALS), MOST_TRIALS);
        let width = config.decoder.widest_head() as f64;
        // Of a block: its mean, and 16 keys in some channels; of a key read exactly: its score and its value.
        let block = INTEGER_COST * (2.0 * width + 32.0 * settings.index_channels as f64) / (4.0 * width);
        let (keys_share, cost) = (reads.keys_share(), reads.keys_share() + block * reads.summaries_share());
        Ok(IndexTrial { settings, kl, keys_share, cost })
    }

    /// Whether what was found is within the target on windows that no trial saw.
    fn verify(&mut self, unseen: &Reference<'_>, calibration: &mut IndexCalibration) -> Result<bool, ModelError> {
        let config = calibration.configured(self.decoder.config());
        let variant = self.decoder.with_config(|own| *own = config)?;
        calibration.held_out_kl = unseen.divergence(&variant)?.kl;
        calibration.met = calibration.held_out_kl <= self.target;
        self.done += 1;
        (self.each)(self.done.min(MOST_TRIALS), MOST_TRIALS);
        Ok(calibration.met)
    }
}

/// Checks what can be checked before anything runs.
fn check(
    decoder: &Decoder,
    tokens: usize,
    config: IndexCalibrationConfig,
) -> Result<&BlockAttentionConfig, ModelError> {
    let IndexCalibrationConfig { target_kl, window, windows } = config;
    if !(target_kl.is_finite() && target_kl > 0.0) {
        let problem = format!("is {target_kl}, expected a positive number of nats");
        return Err(ModelError::Config { setting: "target_kl", problem });
    }
    let model = decoder.config();
    let any = (0..model.decoder.layers).any(|layer| model.layer_attention(layer).is_some_and(has_index));
    let Some(attention) = model.attention.as_ref().filter(|_| any) else {
        let problem = "is not an index in any layer: there is nothing to search".to_owned();
        return Err(ModelError::Config { setting: "selector", problem });
    };
    let least = crate::calibrate_far::least_window(attention);
    if window < least || windows < 2 || tokens / window < 2 {
        let problem = format!(
            "two windows of at least {least} tokens are needed under these settings; the text has {tokens} tokens, and \
             {windows} windows of {window} are asked for"
        );
        return Err(ModelError::Input(problem));
    }
    check_windows(decoder, tokens, EvaluateConfig { window, windows, skip: attention.chunk_size })?;
    Ok(attention)
}
