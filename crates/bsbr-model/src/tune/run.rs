//! The loop: windows in their order, steps, measurements, checkpoints.

use std::time::Instant;

use burn::{
    grad_clipping::GradientClippingConfig,
    lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler},
    module::{Module, ParamGroup},
    optim::{AdamWConfig, ModuleOptimizer, MultiGradientsParams},
    tensor::Device,
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::{
    Checkpoint, TuneEvent, Tuned,
    checkpoint::{self, Identity, Position, Saved},
    config::TuneConfig,
    job::Job,
    log::{Ending, HeldOutRecord, Stage, StepRecord, TuneLog},
    parameters::{Parameters, with_adapters, with_gates},
};
use crate::{Decoder, ModelError};

/// A run.
pub(super) struct Run<'a> {
    decoder: Decoder,
    tokens: &'a [u32],
    config: &'a TuneConfig,
    jobs: Vec<Job>,
    checkpoint: Option<Checkpoint<'a>>,
    identity: Identity,
    state: Saved,
    started: Instant,
    /// Seconds before this start.
    before: f64,
    /// Seconds of the last step and of the last measurement.
    costs: [f64; 2],
}

fn optimizer(config: &TuneConfig) -> ModuleOptimizer {
    AdamWConfig::new()
        .with_beta_2(0.99)
        .with_epsilon(1e-8)
        .with_weight_decay(config.weight_decay as f32)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(config.clip as f32)))
        .init()
}

impl<'a> Run<'a> {
    pub(super) fn new(
        decoder: &Decoder,
        tokens: &'a [u32],
        config: &'a TuneConfig,
        devices: &[Device],
        checkpoint: Option<Checkpoint<'a>>,
    ) -> Result<Self, ModelError> {
        let identity = Identity::new(config, decoder, tokens)?;
        let decoder = with_adapters(decoder, config.adapters.as_ref(), config.seed);
        let decoder = if config.gates { with_gates(&decoder) } else { decoder };
        let parameters = Parameters::of(&decoder, config.layers.as_deref(), &devices[0]);
        let job = |device: &Device| {
            let there = if *device == devices[0] { decoder.clone() } else { decoder.clone().to_device(device) };
            Job::new(there, config, device.clone())
        };
        let jobs = devices.iter().map(job).collect::<Result<_, _>>()?;
        let stage = if config.steps > 0 { Stage::Layers } else { Stage::Logits };
        let resumed = checkpoint.filter(|checkpoint| checkpoint.resume);
        let state = match resumed {
            Some(checkpoint) => checkpoint::load(checkpoint.dir, &identity, &parameters, optimizer(config))?,
            None => {
                let layers = parameters.layers.iter().map(|layer| layer.layer).collect();
                let log = TuneLog { layers, parameters: parameters.num_params(), ..Default::default() };
                let best = parameters.clone();
                Saved { position: Position::start(stage, 0.0), log, parameters, best, optimizer: optimizer(config) }
            }
        };
        let before = state.position.seconds;
        let run = Self {
            decoder,
            tokens,
            config,
            jobs,
            checkpoint,
            identity,
            state,
            started: Instant::now(),
            before,
            costs: [0.0; 2],
        };
        Ok(run)
    }

    /// Both stages, as far as they are not done.
    pub(super) fn finish(mut self, watch: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Tuned, ModelError> {
        let mut ending = Ending::Done;
        self.state.log.ending = None;
        if self.state.position.stage == Stage::Layers {
            ending = self.stage(watch)?;
            if ending != Ending::Asked && self.config.logits_steps > 0 {
                self.state.parameters = self.best();
                self.state.position = Position::start(Stage::Logits, self.seconds());
                self.state.best = self.state.parameters.clone();
                self.state.optimizer = optimizer(self.config);
            }
        }
        if self.state.position.stage == Stage::Logits {
            ending = self.stage(watch)?;
        }
        self.state.log.ending = Some(ending);
        self.save()?;
        let decoder = self.best().plain().placed(&self.decoder);
        Ok(Tuned { decoder, log: self.state.log })
    }

    /// The parameters to keep: the best measured, or the last where nothing is measured.
    fn best(&self) -> Parameters {
        if self.config.held_out > 0 { self.state.best.clone() } else { self.state.parameters.clone() }
    }

    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    fn steps(&self) -> usize {
        match self.state.position.stage {
            Stage::Layers => self.config.steps,
            Stage::Logits => self.config.logits_steps,
        }
    }

    /// Seconds since the start of the run at which the stage begins and ends, where there is a budget.
    fn times(&self) -> Option<(f64, f64)> {
        let all = self.config.budget?.as_secs_f64();
        let both = self.config.steps > 0 && self.config.logits_steps > 0;
        let border = if both { all * self.config.budget_of_layers } else { all };
        Some(match self.state.position.stage {
            Stage::Layers => (0.0, border),
            Stage::Logits => (if both { border } else { 0.0 }, all),
        })
    }

    fn stage(&mut self, watch: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Ending, ModelError> {
        loop {
            let over = self.times().is_some_and(|(_, end)| self.seconds() + self.costs[0] + self.costs[1] > end);
            let step = self.state.position.step;
            let done = step == self.steps();
            if over || done || step.is_multiple_of(self.config.evaluate_every) {
                if let Some(record) = self.measure()?
                    && !watch(TuneEvent::HeldOut(&record))
                {
                    self.save()?;
                    return Ok(Ending::Asked);
                }
                self.save()?;
                if done || self.state.position.stale >= self.config.patience {
                    return Ok(Ending::Done);
                }
                if over {
                    return Ok(Ending::Time);
                }
            }
            let record = self.step()?;
            let goes_on = watch(TuneEvent::Step { record: &record, steps: self.steps() });
            self.state.log.steps.push(record);
            if !goes_on {
                self.save()?;
                return Ok(Ending::Asked);
            }
        }
    }

    /// One step of the optimiser.
    fn step(&mut self) -> Result<StepRecord, ModelError> {
        let start = Instant::now();
        let Position { stage, step, .. } = self.state.position;
        let windows = self.windows(step);
        let steps = self.steps();
        let (losses, gradients) = self.gradients(&windows)?;
        let loss = losses.iter().sum::<f64>() / (losses.len().max(1) * windows.len()) as f64;
        if !loss.is_finite() {
            let problem = format!("the loss of step {step} is {loss}: choose a lower learning rate");
            return Err(ModelError::Input(problem));
        }
        let by_steps = (step as f64 + 0.5) / steps as f64;
        let by_time = self.times().map_or(0.0, |(from, end)| (self.seconds() - from) / (end - from).max(1e-9));
        let peak = match stage {
            Stage::Layers => self.config.learning_rate,
            Stage::Logits => self.config.logits_learning_rate,
        };
        let learning_rate = self.config.rate(peak, by_steps.max(by_time).min(1.0));
        if stage == Stage::Layers && self.state.position.first.is_empty() {
            self.state.position.first = losses.iter().map(|sum| sum / windows.len() as f64).collect();
        }
        let rates = self.rates(learning_rate);
        let parameters = self.state.parameters.clone();
        self.state.parameters = if self.jobs.len() == 1 {
            let Some((gradients, _)) = gradients.grads.into_iter().next() else {
                return Err(ModelError::Input("no device gave gradients".into()));
            };
            self.state.optimizer.step(rates, parameters, gradients)
        } else {
            self.state.optimizer.step_multi(rates, parameters, gradients)
        };
        self.state.parameters = self.state.parameters.clone().orthonormal()?;
        self.state.position.step += 1;
        self.state.position.seconds = self.seconds();
        self.costs[0] = start.elapsed().as_secs_f64();
        Ok(StepRecord { stage, step, loss, learning_rate, seconds: self.state.position.seconds })
    }

    /// The learning rate of each layer: `rate` times the relative size of its error at first. Steps of AdamW are as long as
    /// the rate, whatever the gradient: of a layer that hardly errs they would only make errors.
    fn rates(&self, rate: f64) -> ModuleLearningRate {
        let layers = self.state.parameters.layers.iter().zip(&self.state.position.first);
        let mut scheduler = layers.fold(ModuleLrScheduler::new(rate), |scheduler, (layer, first)| {
            let group = ParamGroup::ids_from_module(layer.clone());
            scheduler.with_group(group, rate * first.sqrt().min(1.0))
        });
        scheduler.step()
    }

    /// Losses summed over `windows` and the gradients of their mean, the windows divided among the devices.
    fn gradients(&self, windows: &[&[u32]]) -> Result<(Vec<f64>, MultiGradientsParams), ModelError> {
        let stage = self.state.position.stage;
        let share = 1.0 / windows.len() as f64;
        let parameters = &self.state.parameters;
        if let [job] = self.jobs.as_slice() {
            let (losses, gradients) = job.run(stage, windows, parameters, share)?;
            return Ok((losses, MultiGradientsParams { grads: vec![(gradients, job.device().clone())] }));
        }
        let count = self.jobs.len();
        let outcomes = std::thread::scope(|scope| {
            let threads = self.jobs.iter().enumerate().map(|(at, job)| {
                let own: Vec<&[u32]> = windows.iter().copied().skip(at).step_by(count).collect();
                let parameters = parameters.clone();
                scope.spawn(move || {
                    let parameters = parameters.fork(&job.device().clone().autodiff());
                    job.run(stage, &own, &parameters, share)
                })
            });
            let threads: Vec<_> = threads.collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect::<Result<Vec<_>, _>>()
        })?;
        let mut sums: Vec<f64> = Vec::new();
        let mut grads = Vec::with_capacity(count);
        for ((losses, gradients), job) in outcomes.into_iter().zip(&self.jobs) {
            sums.resize(sums.len().max(losses.len()), 0.0);
            sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
            grads.push((gradients, job.device().clone()));
        }
        Ok((sums, MultiGradientsParams { grads }))
    }

    /// Measures the held-out windows, keeps what is best on them; `None` if there are none or it was done already.
    fn measure(&mut self) -> Result<Option<HeldOutRecord>, ModelError> {
        let Position { stage, step, .. } = self.state.position;
        let last = self.state.log.held_out.last();
        if self.config.held_out == 0 || last.is_some_and(|last| (last.stage, last.step) == (stage, step)) {
            return Ok(None);
        }
        let start = Instant::now();
        let tail = &self.tokens[self.config.trained_on(self.tokens.len())..];
        let windows: Vec<&[u32]> =
            tail.chunks_exact(self.window().min(tail.len())).take(self.config.held_out).collect();
        let plain = self.state.parameters.plain();
        let (mut losses, _) = self.jobs[0].run(stage, &windows, &plain, 1.0)?;
        losses.iter_mut().for_each(|loss| *loss /= windows.len() as f64);
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let position = &mut self.state.position;
        match stage {
            Stage::Layers => {
                position.best.resize(losses.len(), f64::MAX);
                for (at, (best, &loss)) in position.best.iter_mut().zip(&losses).enumerate() {
                    if loss < *best {
                        *best = loss;
                        self.state.best.layers[at] = self.state.parameters.layers[at].clone();
                    }
                }
            }
            Stage::Logits => {
                if loss < position.best_mean {
                    self.state.best = self.state.parameters.clone();
                }
            }
        }
        position.stale = if loss < position.best_mean { 0 } else { position.stale + 1 };
        position.best_mean = position.best_mean.min(loss);
        position.seconds = self.before + self.started.elapsed().as_secs_f64();
        self.costs[1] = start.elapsed().as_secs_f64();
        let layers = if stage == Stage::Layers { losses } else { Vec::new() };
        let record = HeldOutRecord { stage, step, loss, layers };
        self.state.log.held_out.push(record.clone());
        Ok(Some(record))
    }

    fn window(&self) -> usize {
        match self.state.position.stage {
            Stage::Layers => self.config.window,
            Stage::Logits => self.config.logits_window,
        }
    }

    /// The windows of a step: all of the text in a random order, then all of it in another.
    fn windows(&self, step: usize) -> Vec<&'a [u32]> {
        let text = &self.tokens[..self.config.trained_on(self.tokens.len())];
        let all: Vec<&[u32]> = text.chunks_exact(self.window()).collect();
        let of = |at: usize| {
            let mut order: Vec<usize> = (0..all.len()).collect();
            let round = (at / all.len()) as u64;
            order.shuffle(&mut StdRng::seed_from_u64(self.config.seed.wrapping_add(round.wrapping_mul(0x9e37_79b9))));
            all[order[at % all.len()]]
        };
        (step * self.config.batch..(step + 1) * self.config.batch).map(of).collect()
    }

    fn save(&mut self) -> Result<(), ModelError> {
        self.state.position.seconds = self.seconds();
        match self.checkpoint {
            Some(checkpoint) => checkpoint::save(checkpoint.dir, &self.identity, &self.state),
            None => Ok(()),
        }
    }
}

impl Position {
    fn start(stage: Stage, seconds: f64) -> Self {
        let (first, best) = (Vec::new(), Vec::new());
        Self { stage, step: 0, seconds, first, best, best_mean: f64::MAX, stale: 0 }
    }
}
