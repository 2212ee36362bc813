//! `cargo xtask compare`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bsbr_zoo::{DecoderConfig, Family, ZooError, tasks::Task, tasks::TaskError, train::TrainConfig, train::compared};
use serde_json::Value;
use tempfile::TempDir;

use bsbr::harness::{self, DeviceArgs, Forms, Lengths, ReportArgs, drawable, write};

use crate::compare::{cost, cost_table, page, plot, report::Report, subject, trained, trained_table};

/// More runs or seeds than anyone waits for.
const MOST_RUNS: usize = 10_000;

/// Some of a known list, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice<T> {
    All,
    One(T),
}

fn family(name: &str) -> Result<Choice<Family>, ZooError> {
    if name == "all" { Ok(Choice::All) } else { name.parse().map(Choice::One) }
}

fn task(name: &str) -> Result<Choice<Task>, TaskError> {
    if name == "all" { Ok(Choice::All) } else { name.parse().map(Choice::One) }
}

/// What was chosen, each once, in the order of `all`.
fn chosen<T: Copy + PartialEq>(choices: &[Choice<T>], all: &[T]) -> Vec<T> {
    let wanted = |one: &T| choices.iter().any(|choice| *choice == Choice::All || *choice == Choice::One(*one));
    all.iter().copied().filter(wanted).collect()
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Families: all, or some of standard, bsbr, linear, delta, window, hopfield, gau
    #[arg(long, value_name = "FAMILY,...", value_delimiter = ',', default_value = "all", value_parser = family)]
    models: Vec<Choice<Family>>,
    /// TOML file with settings of the decoder that all families share, and of each family
    #[arg(long, value_name = "FILE")]
    decoder: Option<PathBuf>,
    /// Write results and one page of tables and plots here; finished runs that lie there are not done again
    #[arg(short, long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
    /// Draw the report as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Lengths in tokens: 4096, 512,2k, 64..8192 (doubling) or 64..8192*4
    #[arg(long, value_name = "LENGTHS", default_value = "64..8192*2", help_heading = "Cost")]
    pub(crate) seq_len: Lengths,
    /// Untimed runs of each family at each length
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Cost")]
    pub(crate) warmup: usize,
    /// Timed runs of each family at each length
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Cost")]
    pub(crate) runs: usize,
    /// Seconds the whole may take: runs that do not fit are left out, and the rows say so
    #[arg(long, value_name = "S", default_value_t = 280.0, help_heading = "Cost")]
    pub(crate) seconds: f64,
    /// Train each family instead and ask it: all, or some of recall, copy, passkey, text
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', value_parser = task, help_heading = "Training")]
    task: Vec<Choice<Task>>,
    /// Runs of each family on each task, with seeds from 0
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Training")]
    pub(crate) seeds: u64,
    /// Steps of a run [default: by task]
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<usize>,
    /// Sequences of a step [default: by task]
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch: Option<usize>,
    /// Tokens of a sequence [default: 256]
    #[arg(long, value_name = "N", help_heading = "Training")]
    train_len: Option<usize>,
    /// Peak of the learning rate [default: by task]
    #[arg(long, value_name = "R", help_heading = "Training")]
    learning_rate: Option<f64>,
    /// Sequences of each size that are asked in the end [default: by task]
    #[arg(long, value_name = "N", help_heading = "Training")]
    evaluation: Option<usize>,
    /// Text of the text task; the built-in held-out text when absent
    #[arg(long, value_name = "FILE", help_heading = "Training")]
    pub(crate) text: Option<PathBuf>,
    /// Runs at once, each in one thread, which changes no result [default: one for each core]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub(crate) jobs: Option<usize>,
    /// What the process does that measures memory
    #[arg(long, hide = true)]
    memory_of: Option<String>,
}

impl Args {
    pub(crate) fn families(&self) -> Vec<Family> {
        chosen(&self.models, &Family::ALL)
    }

    pub(crate) fn tasks(&self) -> Vec<Task> {
        chosen(&self.task, &Task::ALL)
    }

    /// The settings of a task with what was asked for.
    pub(crate) fn train(&self, base: TrainConfig) -> TrainConfig {
        TrainConfig {
            steps: self.steps.unwrap_or(base.steps),
            batch: self.batch.unwrap_or(base.batch),
            length: self.train_len.unwrap_or(base.length),
            learning_rate: self.learning_rate.unwrap_or(base.learning_rate),
            evaluation_rows: self.evaluation.unwrap_or(base.evaluation_rows),
            ..base
        }
    }
}

pub(crate) fn run(args: Args) -> Result<()> {
    let device = args.device.resolve()?;
    if let Some(probe) = &args.memory_of {
        return harness::result(&serde_json::to_string(&subject::answer(probe, &device)?)?);
    }
    check(&args)?;
    let base = decoder(args.decoder.as_deref())?;
    if let Some(dir) = &args.output_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("--output-dir: cannot make {}", dir.display()))?;
    }
    let (report, part) = if args.task.is_empty() {
        (cost::run(&args, &base, &device)?, page::Part::Cost)
    } else {
        // Without a directory, finished runs are kept for as long as this one lasts.
        let forgotten = TempDir::new().context("cannot make a temporary directory")?;
        let dir = args.output_dir.as_deref().unwrap_or(forgotten.path());
        (trained::run(&args, &base, &device, dir)?, page::Part::Trained)
    };
    show(&args, &report, part)
}

/// Writes and prints a report.
fn show(args: &Args, report: &Report, part: page::Part) -> Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    let text = text(report);
    let drawn = plot::svg(report);
    if let Some(dir) = &args.output_dir {
        let name = part.name();
        write(&dir.join(format!("{name}.json")), &json)?;
        let mut section = format!("## {}\n\n{text}", title(part));
        if let Ok(svg) = &drawn {
            write(&dir.join(format!("{name}.svg")), svg)?;
            section.push_str(&format!("\n\n![{name}]({name}.svg)"));
        }
        write(&dir.join(page::PAGE), page::updated(dir, part, &section)?.trim_end())?;
    }
    let plotted = args.plot.as_ref().map(|path| write(path, &drawn?)).transpose();
    args.report.emit(&Forms {
        table: &|| Ok(text.clone()),
        json: &|| Ok(serde_json::to_value(report)?),
        rows: Some(&rows),
    })?;
    plotted.map(drop)
}

/// What was timed, or the runs of training.
fn rows(report: &Value) -> Vec<Value> {
    let timed = report["cost"]["rows"].as_array().into_iter().flatten();
    timed.chain(report["trained"]["runs"].as_array().into_iter().flatten()).cloned().collect()
}

fn title(part: page::Part) -> &'static str {
    match part {
        page::Part::Cost => "Cost",
        page::Part::Trained => "What small models learn",
    }
}

fn text(report: &Report) -> String {
    let families: Vec<Family> = report.families.iter().map(|about| about.family).collect();
    let mut blocks = vec![cost_table::head(report)];
    if let Some(trained) = &report.trained {
        blocks.push(trained_table::settings(trained));
    }
    blocks.push(cost_table::families(report));
    blocks.extend(report.cost.as_ref().map(|cost| cost_table::text(cost, &families)));
    blocks.extend(report.trained.as_ref().map(|trained| trained_table::text(trained, &families)));
    blocks.join("\n\n")
}

/// The decoder that all families share, with what the file says otherwise.
fn decoder(path: Option<&Path>) -> Result<DecoderConfig> {
    let mut config = compared();
    if let Some(path) = path {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let wrong = || format!("{} is not a settings file of a decoder", path.display());
        let said: toml::Table = toml::from_str(&text).with_context(wrong)?;
        let mut all = toml::Table::try_from(&config)?;
        overlay(&mut all, said);
        config = all.try_into().with_context(wrong)?;
    }
    config.validate()?;
    Ok(config)
}

/// Puts what `over` says into `table`, within its tables as well.
fn overlay(table: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(over)) => overlay(inner, over),
            (_, value) => drop(table.insert(key, value)),
        }
    }
}

/// Checks what can be checked before anything runs.
fn check(args: &Args) -> Result<()> {
    let counts = [("runs", Some(args.runs)), ("jobs", args.jobs), ("batch", args.batch)];
    let more = [("steps", args.steps), ("evaluation", args.evaluation), ("seeds", usize::try_from(args.seeds).ok())];
    for (flag, value) in counts.into_iter().chain(more) {
        if value == Some(0) {
            bail!("--{flag} is 0, expected at least 1");
        }
    }
    let runs = [("runs", args.runs), ("warmup", args.warmup), ("seeds", args.seeds.try_into().unwrap_or(usize::MAX))];
    for (flag, value) in runs {
        if value > MOST_RUNS {
            bail!("--{flag} is {value}, expected at most {MOST_RUNS}");
        }
    }
    if args.seconds.is_nan() || args.seconds <= 0.0 {
        bail!("--seconds is {}, expected more than 0", args.seconds);
    }
    args.report.check()?;
    args.plot.as_deref().map_or(Ok(()), drawable)
}
