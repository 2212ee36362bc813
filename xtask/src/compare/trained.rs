//! The comparison by what the families learn.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use bsbr_zoo::{
    DecoderConfig,
    tasks::{Corpus, Generator, Task},
    train::{Event, RunSpec, RunStore, TrainConfig, run_all},
};
use burn::tensor::Device;

use super::{
    cost::report,
    report::{Report, Trained, TrainedTask},
};
use bsbr::harness;

use crate::compare_command::Args;

/// File of finished runs in the directory of a comparison.
pub(crate) const RUNS: &str = "runs.jsonl";

/// Trains and asks every family on every task with every seed. Runs that `dir` holds are not done again.
pub(crate) fn run(args: &Args, base: &DecoderConfig, device: &Device, dir: &Path) -> Result<Report> {
    let started = Instant::now();
    let tasks = args.tasks();
    let (corpus, text) = if tasks.contains(&Task::Text) { corpus(args)? } else { (None, None) };
    let mut set = Vec::new();
    for &task in &tasks {
        let train = args.train(TrainConfig { chunk_size: base.bsbr.chunk_size, ..TrainConfig::of(task) });
        train.validate()?;
        let generator = Generator::new(task, train.length, corpus.as_ref())?;
        let text = text.clone().filter(|_| task == Task::Text);
        set.push(TrainedTask { task, train, vocabulary: generator.vocabulary(), chance: generator.chance(), text });
    }
    let mut specs = Vec::new();
    for task in &set {
        // Seeds outside, so that a comparison that is interrupted has whole seeds.
        for seed in 0..args.seeds {
            for family in args.families() {
                let decoder = DecoderConfig { family, vocabulary: task.vocabulary, ..base.clone() };
                let (train, text) = (task.train.clone(), task.text.clone());
                specs.push(RunSpec { task: task.task, seed, decoder, train, text });
            }
        }
    }
    let mut store = RunStore::open(&dir.join(RUNS))?;
    let jobs = args.jobs.unwrap_or_else(rayon::current_num_threads);
    let runs = run_all(&specs, corpus.as_ref(), device, jobs, &mut store, &mut |event| match event {
        Event::Kept(0) => {}
        Event::Kept(count) => harness::note(&format!("{count} of {} runs were done before", specs.len())),
        Event::Finished(run, done, all) => harness::note(&super::trained_table::line(run, done, all)),
    })?;
    let mut report = report(args, base, device, started)?;
    report.trained = Some(Trained { jobs, seeds: args.seeds, tasks: set, runs });
    Ok(report)
}

/// The text of the text task, and what it is called in results.
fn corpus(args: &Args) -> Result<(Option<Corpus>, Option<String>)> {
    let path = harness::or_heldout(args.text.clone())?;
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read the text {}", path.display()))?;
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let hash = harness::sha256(&path)?;
    Ok((Some(Corpus::new(&text)), Some(format!("{name}, SHA-256 {}", &hash[..16]))))
}
