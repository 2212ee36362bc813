//! Losses and gradients of some windows on one device.

use burn::{
    optim::{GradientsAccumulator, GradientsParams},
    tensor::Device,
};

use super::{
    config::TuneConfig,
    layer::{LayerObjective, Student},
    log::Stage,
    logits::LogitsObjective,
    parameters::Parameters,
    scalar,
};
use crate::{Decoder, LayerTrace, ModelError};

/// A relative error up to this is rounding: AdamW would make steps of full length of its gradients too.
const ROUNDING: f64 = 1e-9;

/// The two models on one device.
pub(super) struct Job {
    original: Decoder,
    converted: Decoder,
    device: Device,
    layers: LayerObjective,
    logits: LogitsObjective,
}

/// Losses summed over windows, one for each trained layer or one for the model, and gradients.
pub(super) type Outcome = (Vec<f64>, GradientsParams);

impl Job {
    pub(super) fn new(converted: Decoder, config: &TuneConfig, device: Device) -> Result<Self, ModelError> {
        let original = converted.with_config(|config| config.attention = None)?;
        let layers = LayerObjective { loss: config.layer_loss, meta_weight: config.meta_weight };
        Ok(Self {
            original,
            converted,
            device,
            layers,
            logits: LogitsObjective { cross_entropy: config.cross_entropy },
        })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// The sums over `windows`; gradients of `share` times the losses, if parameters are tracked.
    pub(super) fn run(
        &self,
        stage: Stage,
        windows: &[&[u32]],
        parameters: &Parameters,
        share: f64,
    ) -> Result<Outcome, ModelError> {
        let mut gradients = GradientsAccumulator::new();
        let mut losses: Vec<f64> = Vec::new();
        for window in windows {
            let own = match stage {
                Stage::Layers => self.layers(window, parameters, share, &mut gradients)?,
                Stage::Logits => vec![self.logits(window, parameters, share, &mut gradients)?],
            };
            if losses.is_empty() {
                losses = own;
            } else {
                losses.iter_mut().zip(own).for_each(|(sum, loss)| *sum += loss);
            }
        }
        Ok((losses, gradients.grads()))
    }

    /// One pass of the original over the window; every trained layer is done with when the pass has left it.
    fn layers(
        &self,
        window: &[u32],
        parameters: &Parameters,
        share: f64,
        gradients: &mut GradientsAccumulator<Parameters>,
    ) -> Result<Vec<f64>, ModelError> {
        let (student, _) = Student::new(&self.converted, window)?;
        let mut losses = Vec::with_capacity(parameters.layers.len());
        let mut failed = None;
        let mut visit = |trace: LayerTrace| {
            let Some(own) = parameters.layers.get(losses.len()) else { return };
            if own.layer != trace.layer || failed.is_some() {
                return;
            }
            let mut one = || {
                let loss = self.layers.of(&student, &trace, own)?;
                let number = scalar(loss.clone().inner())?;
                if loss.is_tracked() && number > ROUNDING {
                    let found = GradientsParams::from_grads((loss * share).backward(), own);
                    gradients.accumulate(parameters, found);
                }
                Ok(number)
            };
            match one() {
                Ok(loss) => losses.push(loss),
                Err(error) => failed = Some(error),
            }
        };
        let mut cache = self.original.new_cache(&[window.len()])?;
        self.original.trace(window, &mut cache, &mut visit)?;
        failed.map_or(Ok(losses), Err)
    }

    fn logits(
        &self,
        window: &[u32],
        parameters: &Parameters,
        share: f64,
        gradients: &mut GradientsAccumulator<Parameters>,
    ) -> Result<f64, ModelError> {
        let (loss, backward) = self.logits.of(&self.original, &self.converted, parameters, window, share)?;
        if let Some(backward) = backward {
            let found = GradientsParams::from_grads(backward.backward(), parameters);
            gradients.accumulate(parameters, found);
        }
        Ok(loss)
    }
}
