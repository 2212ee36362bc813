//! `bsbr tune`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{OutputKind, Rewrite, rewrite};
use bsbr_model::{
    AdapterConfig, AdapterTarget, Checkpoint, Ending, LayerLoss, ModelConfig, Stage, TuneConfig, TuneEvent, TuneLog,
    tune,
};

use crate::{
    args::{by_name, check_output_dir},
    bench::{machine::machine, sweep::length},
    device::DeviceArgs,
    loss_curve,
    model::HubArgs,
    output::{self, Progress, grouped},
    plot::caption,
    record,
    running::{load, open, read_tokens},
};

/// Steps where only the time ends a stage.
const MANY_STEPS: usize = 1_000_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Converted model
    #[arg(short, long, value_name = "DIR|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Where to write the tuned model
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Replace an earlier model there, and begin anew where a checkpoint is
    #[arg(long)]
    force: bool,
    /// Text to train on; its last windows are held out
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Time to end after; the steps then are as many as fit
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Steps of the first stage, layer by layer [default: 100, or what fits the time]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Steps of the second stage, on the logits of the whole model
    #[arg(long, value_name = "N", default_value_t = 0)]
    logits_steps: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", value_parser = length, default_value = "2048")]
    seq_len: usize,
    /// Tokens of a window of the second stage
    #[arg(long, value_name = "N", value_parser = length, default_value = "512")]
    logits_seq_len: usize,
    /// Windows of a step
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Highest learning rate, times the square root of the relative error of a layer at first
    #[arg(long, value_name = "R", default_value_t = TuneConfig::default().learning_rate)]
    learning_rate: f64,
    /// Highest learning rate of the second stage
    #[arg(long, value_name = "R", default_value_t = TuneConfig::default().logits_learning_rate)]
    logits_learning_rate: f64,
    /// Weight decay
    #[arg(long, value_name = "W", default_value_t = 0.0)]
    weight_decay: f64,
    /// Longest gradient of one tensor
    #[arg(long, value_name = "L", default_value_t = 1.0)]
    clip: f64,
    /// Rank of the adapters; 0 trains none
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// Factor on the adapters, times the rank
    #[arg(long, value_name = "A", default_value_t = 16.0)]
    alpha: f64,
    /// Projections with an adapter: query, key, value, output
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = by_name::<AdapterTarget>,
          default_value = "query,key,value,output")]
    targets: Vec<AdapterTarget>,
    /// Give every head a gate and train it: on what is added (additive), or on the mass of what is read by statistics (state)
    #[arg(long)]
    gates: bool,
    /// Layers to train [default: every one with BSBR attention]
    #[arg(long, value_name = "I,...", value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// What the error of a layer is relative to: all, far (what the far part is to bring)
    #[arg(long, value_name = "KIND", value_parser = by_name::<LayerLoss>, default_value = "all")]
    loss: LayerLoss,
    /// Weight of the choice of blocks in the loss, with the meta selector
    #[arg(long, value_name = "W", default_value_t = 1.0)]
    meta_weight: f64,
    /// Weight of the cross entropy of the text in the second stage
    #[arg(long, value_name = "W", default_value_t = 0.0)]
    cross_entropy: f64,
    /// Last windows of the text, never trained on
    #[arg(long, value_name = "N", default_value_t = 2)]
    held_out: usize,
    /// Steps between measurements on them, and between checkpoints
    #[arg(long, value_name = "N", default_value_t = 10)]
    evaluate_every: usize,
    /// Measurements without improvement after which a stage ends
    #[arg(long, value_name = "N", default_value_t = 5)]
    patience: usize,
    /// Of the order of the windows and the start values of adapters
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Add the adapters to the weights: faster to run, but the original is gone
    #[arg(long)]
    merge: bool,
    /// Where a run is kept to go on from [default: the output directory, with -checkpoint]
    #[arg(long, value_name = "DIR")]
    checkpoint_dir: Option<PathBuf>,
    /// Go on from the checkpoint
    #[arg(long)]
    resume: bool,
    /// Devices to divide the windows of a step among
    #[arg(long, value_name = "N", default_value_t = 1)]
    devices: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    fn settings(&self, own: Option<&AdapterConfig>) -> Result<TuneConfig> {
        let budget = match self.minutes {
            Some(minutes) if minutes.is_finite() && minutes > 0.0 => Some(Duration::from_secs_f64(60.0 * minutes)),
            Some(minutes) => bail!("--minutes {minutes}: a number above 0 is needed"),
            None => None,
        };
        let default = TuneConfig::default();
        let steps = if budget.is_some() { MANY_STEPS } else { default.steps };
        let asked = AdapterConfig { rank: self.rank, alpha: self.alpha, targets: self.targets.clone() };
        // A model that was tuned before goes on with the adapters it has.
        let adapters = own.cloned().or_else(|| (self.rank > 0).then_some(asked));
        Ok(TuneConfig {
            window: self.seq_len,
            batch: self.batch,
            steps: self.steps.unwrap_or(steps),
            logits_steps: self.logits_steps,
            logits_window: self.logits_seq_len,
            learning_rate: self.learning_rate,
            logits_learning_rate: self.logits_learning_rate,
            weight_decay: self.weight_decay,
            clip: self.clip,
            seed: self.seed,
            adapters,
            gates: self.gates,
            layers: self.layers.clone(),
            layer_loss: self.loss,
            meta_weight: self.meta_weight,
            cross_entropy: self.cross_entropy,
            held_out: self.held_out,
            evaluate_every: self.evaluate_every,
            patience: self.patience,
            budget,
            ..default
        })
    }

    fn checkpoint_dir(&self) -> PathBuf {
        let beside = || {
            // Resolved, so that `.` has a name too.
            let output = std::path::absolute(&self.output_dir).unwrap_or_else(|_| self.output_dir.clone());
            let name = output.file_name().unwrap_or_default().to_string_lossy();
            output.with_file_name(format!("{name}-checkpoint"))
        };
        self.checkpoint_dir.clone().unwrap_or_else(beside)
    }
}

pub(crate) fn run(args: Args) -> Result<()> {
    check_output_dir(&args.output_dir, OutputKind::Model, args.force)?;
    let checkpoint = args.checkpoint_dir();
    if !args.resume && !args.force && checkpoint.exists() {
        bail!("{} is there already: go on from it with --resume, or begin anew with --force", checkpoint.display());
    }
    let model = args.hub.resolve(&args.model)?;
    let source = open(&model)?;
    if !source.is_converted() {
        bail!(
            "{} is no converted model: convert it first, with the attention it is to be tuned for",
            model.dir.display()
        );
    }
    let settings = args.settings(source.model_config().adapters.as_ref())?;
    if let Some(adapters) = settings.adapters.as_ref().filter(|_| args.merge) {
        source.model_config().check_mergeable(adapters)?;
    }
    let devices = args.device.resolve_all(args.devices)?;
    let description = source.description();
    let (tokens, text_sha256) = read_tokens(&source.text_tokenizer()?, &args.text)?;
    let decoder = load(source.widened(), &devices[0])?;
    let mut progress = Progress::new("tuning");
    let mut watch = |event: TuneEvent<'_>| {
        match event {
            TuneEvent::Step { record, steps } => match settings.budget {
                Some(budget) => progress.set(record.seconds as u64, budget.as_secs()),
                None => progress.set(record.step as u64 + 1, steps as u64),
            },
            TuneEvent::HeldOut(record) => {
                output::note(&format!(
                    "{}, {} steps: held-out loss {:.5}",
                    name(record.stage),
                    record.step,
                    record.loss
                ));
            }
        }
        true
    };
    let kept = Checkpoint { dir: &checkpoint, resume: args.resume };
    let tuned = tune(&decoder, &tokens, &settings, &devices, Some(kept), &mut watch)?;
    drop(progress);

    let (decoder, changed) = if args.merge { tuned.decoder.merged()? } else { (tuned.decoder, Vec::new()) };
    let weights = decoder.extra_weights()?.into_iter().chain(changed).collect();
    let log = serde_json::json!({
        "schema": "bsbr-tune/1", "about": record::about(&description, Some(text_sha256)), "settings": settings, "log": tuned.log,
    });
    let shown = caption(&description, &machine(), rayon::current_num_threads());
    let files = vec![
        ("tune.json".to_owned(), format!("{}\n", serde_json::to_string_pretty(&log)?)),
        ("tune.svg".to_owned(), loss_curve::svg(&tuned.log, &shown)?),
    ];
    let section = ("Tuning".to_owned(), section(&settings, decoder.config(), &tuned.log, args.merge));
    let config = decoder.config().clone();
    let change = Rewrite { config, weights, section, files, force: args.force };
    let mut bar = Progress::new("writing");
    rewrite(&model.dir, &args.output_dir, &change, &mut |progress| bar.set(progress.done, progress.total))?;
    drop(bar);
    if tuned.log.ending == Some(Ending::Done) {
        remove(&checkpoint)?;
    }
    output::result(&summary(&tuned.log, &args.output_dir, &checkpoint))
}

fn remove(checkpoint: &Path) -> Result<()> {
    std::fs::remove_dir_all(checkpoint).with_context(|| format!("cannot delete {}", checkpoint.display()))
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Layers => "layers",
        Stage::Logits => "logits",
    }
}

/// Steps, losses and time as lines.
fn results(log: &TuneLog) -> Vec<String> {
    let mut lines = Vec::new();
    for stage in [Stage::Layers, Stage::Logits] {
        let steps = log.steps.iter().filter(|record| record.stage == stage).count();
        let held_out = log.held_out_change(stage);
        if let Some((first, best)) = held_out {
            lines.push(format!("{}: {steps} steps, held-out loss {first:.5} to {best:.5}", name(stage)));
        } else if steps > 0 {
            lines.push(format!("{}: {steps} steps, nothing held out", name(stage)));
        }
    }
    lines
}

/// What the model card says.
fn section(settings: &TuneConfig, config: &ModelConfig, log: &TuneLog, merged: bool) -> String {
    let mut lines = vec!["Tuned towards its own original; see `tune.json` and `tune.svg`.".to_owned(), String::new()];
    if let Some(adapters) = &settings.adapters {
        let targets: Vec<&str> = adapters.targets.iter().map(|target| target.name()).collect();
        let place = if merged { "added to the weights" } else { "beside the weights" };
        let AdapterConfig { rank, alpha, .. } = adapters;
        lines.push(format!("- adapters: rank {rank}, alpha {alpha}, on {}, {place}", targets.join(", ")));
    }
    let attention = config.attention.as_ref();
    if attention.is_some_and(BlockAttentionConfig::needs_gates) {
        lines.push("- a gate for each head".to_owned());
    }
    if attention.is_some_and(|attention| attention.needs_state_basis() && attention.compression_factor > 1) {
        lines.push("- bases of compressed states".to_owned());
    }
    if attention.is_some_and(BlockAttentionConfig::needs_meta) {
        lines.push("- meta projections".to_owned());
    }
    lines.extend(results(log).into_iter().map(|line| format!("- {line}")));
    lines.join("\n")
}

fn summary(log: &TuneLog, output_dir: &Path, checkpoint: &Path) -> String {
    let mut lines = vec![format!("tuned to {}", output_dir.display())];
    lines.push(format!("trained: {} numbers in {} layers", grouped(log.parameters as u64), log.layers.len()));
    lines.extend(results(log));
    if log.ending == Some(Ending::Time) {
        lines.push(format!("the time was over; {} goes on with --resume and more --minutes", checkpoint.display()));
    }
    lines.join("\n")
}
