//! How to tune.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use bsbr_attn::BlockAttentionConfig;

use super::parameters::trains_basis;
use crate::{AdapterConfig, Decoder, ModelConfig, ModelError, PositionPolicy};

/// What an error of the attention outputs is measured against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerLoss {
    /// Every token, relative to the variance of the original's outputs.
    #[default]
    All,
    /// Tokens that have a far part, relative to what is lost there without any: 1 is no better than dropping it.
    Far,
}

/// How to tune a converted model towards its original.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TuneConfig {
    /// Tokens of a window; windows follow each other through the text.
    pub window: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Steps of the first stage, layer by layer.
    pub steps: usize,
    /// Steps of the second stage, on the logits of the whole model.
    pub logits_steps: usize,
    /// Tokens of a window of the second stage.
    pub logits_window: usize,
    /// Highest learning rate of the first stage, of a layer whose output is all wrong; that of another is less by the
    /// relative size of its error.
    pub learning_rate: f64,
    /// Highest learning rate of the second stage.
    pub logits_learning_rate: f64,
    /// Share of a stage in which the learning rate rises; then it falls along a cosine.
    pub warmup: f64,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
    /// Longest gradient of one tensor; longer ones are shortened to it.
    pub clip: f64,
    /// Of the order of the windows and the start values of the adapters.
    pub seed: u64,
    /// Adapters to train; none trains only what the model has.
    pub adapters: Option<AdapterConfig>,
    /// Give every head a gate and train it: see [`BlockAttentionConfig::head_gates`]. Those that a model has are trained anyway.
    pub gates: bool,
    /// Layers to train; every layer with BSBR attention when absent.
    pub layers: Option<Vec<usize>>,
    /// What errors of the first stage are relative to.
    pub layer_loss: LayerLoss,
    /// Weight of the divergence of meta scores from the true shares of the blocks, where there are meta projections.
    pub meta_weight: f64,
    /// Weight of the cross entropy of the text itself beside the divergence from the original, in the second stage.
    pub cross_entropy: f64,
    /// Last windows of the text, never trained on.
    pub held_out: usize,
    /// Steps between measurements on them.
    pub evaluate_every: usize,
    /// Measurements without improvement after which a stage ends.
    pub patience: usize,
    /// Time to stop after, of both stages together. The learning rate then follows the time where that is ahead.
    pub budget: Option<Duration>,
    /// Share of the time that the first stage may use when there is a second one.
    pub budget_of_layers: f64,
}

impl Default for TuneConfig {
    fn default() -> Self {
        Self {
            window: 2048,
            batch: 1,
            steps: 100,
            logits_steps: 0,
            logits_window: 512,
            learning_rate: 8e-3,
            logits_learning_rate: 2e-4,
            warmup: 0.05,
            weight_decay: 0.0,
            clip: 1.0,
            seed: 0,
            adapters: None,
            gates: false,
            layers: None,
            layer_loss: LayerLoss::All,
            meta_weight: 1.0,
            cross_entropy: 0.0,
            held_out: 2,
            evaluate_every: 10,
            patience: 5,
            budget: None,
            budget_of_layers: 0.6,
        }
    }
}

impl TuneConfig {
    /// Checks the settings against each other, the model and a text of `tokens` tokens.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] with the setting and what it must be, [`ModelError::Input`] for a text that is too short.
    pub fn validate(&self, decoder: &Decoder, tokens: usize) -> Result<(), ModelError> {
        let fail = |setting, problem: String| Err(ModelError::Config { setting, problem });
        let counts = [
            ("window", self.window, 2),
            ("logits_window", self.logits_window, 2),
            ("batch", self.batch, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("patience", self.patience, 1),
        ];
        for (setting, value, least) in counts {
            if value < least {
                return fail(setting, format!("is {value}, expected at least {least}"));
            }
        }
        if self.steps == 0 && self.logits_steps == 0 {
            return fail("steps", "and `logits_steps` are both 0: there is nothing to do".into());
        }
        for (setting, value) in [
            ("learning_rate", self.learning_rate),
            ("logits_learning_rate", self.logits_learning_rate),
            ("clip", self.clip),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return fail(setting, format!("is {value}, expected a finite number above 0"));
            }
        }
        for (setting, value) in [
            ("weight_decay", self.weight_decay),
            ("meta_weight", self.meta_weight),
            ("cross_entropy", self.cross_entropy),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(setting, format!("is {value}, expected a finite number, 0 or more"));
            }
        }
        for (setting, value) in [("warmup", self.warmup), ("budget_of_layers", self.budget_of_layers)] {
            if !(0.0..=1.0).contains(&value) {
                return fail(setting, format!("is {value}, expected a share from 0 to 1"));
            }
        }
        self.check_model(decoder.config())?;
        self.check_text(decoder, tokens)
    }

    fn check_model(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let fail = |setting, problem: String| Err(ModelError::Config { setting, problem });
        if config.attention.is_none() {
            let problem = "is the original's: there is nothing to tune; convert the model first".to_owned();
            return fail("attention", problem);
        }
        if let Some(adapters) = &self.adapters {
            adapters.validate()?;
            if config.adapters.as_ref().is_some_and(|own| own != adapters) {
                let problem = "are others than the model has already: leave them out, or merge those first".to_owned();
                return fail("adapters", problem);
            }
        }
        let gated = config.attention.as_ref().map(|own| BlockAttentionConfig { head_gates: true, ..own.clone() });
        if let Some(gated) = gated.filter(|_| self.gates) {
            gated.validate()?;
        }
        let own = config
            .attention
            .as_ref()
            .is_some_and(|attention| attention.needs_meta() || attention.needs_gates() || trains_basis(attention));
        if self.adapters.is_none() && config.adapters.is_none() && !self.gates && !own {
            let problem = "are none, and the model has no gates, no meta projections and no calibrated bases of compressed \
                           states: there is nothing to train";
            return fail("adapters", problem.to_owned());
        }
        for &layer in self.layers.iter().flatten() {
            if layer >= config.decoder.layers || config.layer_attention(layer).is_none() {
                return fail("layers", format!("names layer {layer}, which has no BSBR attention"));
            }
        }
        if self.layers.as_ref().is_some_and(Vec::is_empty) {
            return fail("layers", "names none".into());
        }
        Ok(())
    }

    fn check_text(&self, decoder: &Decoder, tokens: usize) -> Result<(), ModelError> {
        let longest = self.window.max(if self.logits_steps > 0 { self.logits_window } else { 0 });
        decoder.check_length(longest)?;
        let max_positions = decoder.config().decoder.max_positions;
        if decoder.config().position_policy == PositionPolicy::Slide && longest > max_positions {
            return Err(ModelError::TooLong { length: longest, max_positions });
        }
        let needed = self.held_out * self.window + longest;
        if tokens < needed {
            return Err(ModelError::Input(format!(
                "the text has {tokens} tokens; a window of {longest} to train on and {} of {} held out need {needed}",
                self.held_out, self.window
            )));
        }
        Ok(())
    }

    /// Tokens at the start of the text that are trained on.
    pub(super) fn trained_on(&self, tokens: usize) -> usize {
        tokens - self.held_out * self.window
    }

    /// The learning rate where `done` of a stage is over, `peak` being its highest.
    pub(super) fn rate(&self, peak: f64, done: f64) -> f64 {
        if done < self.warmup {
            return peak * done / self.warmup;
        }
        let fall = ((done - self.warmup) / (1.0 - self.warmup).max(1e-9)).min(1.0);
        peak * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * fall).cos()))
    }
}
