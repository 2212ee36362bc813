//! Tuning: a converted model is led back to its own original by gradients.
//!
//! **Layer by layer.** The original reads a window; each layer of the converted model gets the original's inputs of that
//! layer and is to give the original's attention outputs (after the output projection). No layer depends on another, no
//! gradient passes the rest of the model, and the activations of one layer are in memory at a time. Where meta projections
//! choose whole blocks, which has no gradient, they learn the shares of attention that the blocks have in truth.
//!
//! **On the logits.** The converted model as a whole, over shorter windows: divergence of its next tokens from the
//! original's.
//!
//! Trained are low-rank adapters, meta projections, gates of heads and the bases of compressed states, with AdamW; bases are made
//! orthonormal again after every step. Every weight of the original stays as it is. With several devices the windows of a step are divided among them and the gradients added up.

mod checkpoint;
mod config;
mod job;
mod layer;
mod log;
mod logits;
mod parameters;
mod run;

use std::path::Path;

use burn::tensor::{Device, Tensor};

pub use config::{LayerLoss, TuneConfig};
pub use log::{Ending, HeldOutRecord, Stage, StepRecord, TuneLog};
pub use parameters::NamedNumbers;

use crate::{Decoder, ModelError};

/// What happens while tuning.
#[derive(Debug, Clone, Copy)]
pub enum TuneEvent<'a> {
    /// A step was done; `steps` is how many the stage has at most.
    Step {
        /// The step.
        record: &'a StepRecord,
        /// Steps of the stage.
        steps: usize,
    },
    /// The held-out windows were measured.
    HeldOut(&'a HeldOutRecord),
}

/// Where a run is kept, to go on from.
#[derive(Debug, Clone, Copy)]
pub struct Checkpoint<'a> {
    /// The directory. It is replaced as a whole.
    pub dir: &'a Path,
    /// Go on from what is there.
    pub resume: bool,
}

/// A tuned model.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// The model, with its adapters apart. Where windows were held out, each part as it was best on them.
    pub decoder: Decoder,
    /// What was measured.
    pub log: TuneLog,
}

/// Tunes `decoder` on the text `tokens`. `watch` sees what happens and ends it by `false`; what is tuned by then is
/// returned.
///
/// The first of `devices` is where the decoder is. The same settings give the same result, interrupted or not, unless
/// [`TuneConfig::budget`] ends it.
///
/// # Errors
///
/// [`ModelError`] for settings, texts or devices that do not fit, before anything runs, and for a checkpoint that cannot be
/// written, read or belongs to another run.
pub fn tune(
    decoder: &Decoder,
    tokens: &[u32],
    config: &TuneConfig,
    devices: &[Device],
    checkpoint: Option<Checkpoint<'_>>,
    watch: &mut dyn FnMut(TuneEvent<'_>) -> bool,
) -> Result<Tuned, ModelError> {
    config.validate(decoder, tokens.len())?;
    if devices.is_empty() || devices[0] != decoder.device() {
        return Err(ModelError::Input("the first device to tune on must be the one the decoder is on".into()));
    }
    let vocab_size = decoder.config().decoder.vocab_size;
    if let Some(position) = tokens.iter().position(|&token| token as usize >= vocab_size) {
        let token = i64::from(tokens[position]);
        return Err(ModelError::TokenOutOfRange { token, position, vocab_size });
    }
    run::Run::new(decoder, tokens, config, devices, checkpoint)?.finish(watch)
}

/// The number in a tensor of one.
fn scalar(tensor: Tensor<1>) -> Result<f64, ModelError> {
    let numbers = tensor.try_into_vec_as::<f64>();
    let problem = |problem: String| ModelError::Input(format!("a loss cannot be read from the device: {problem}"));
    numbers.map_err(|error| problem(error.to_string()))?.first().copied().ok_or_else(|| problem("it is empty".into()))
}
