//! Training: repeatable, resumable, and it learns.
#![cfg(feature = "flex")]

use std::{fs, path::Path};

use bsbr_zoo::{
    DecoderConfig, Family,
    tasks::{Corpus, Generator, Task},
    train::{Event, Run, RunSpec, RunStore, TrainConfig, TrainError, run_all, train},
};
use burn::tensor::Device;

/// A run of a moment.
fn spec(family: Family, task: Task, seed: u64) -> RunSpec {
    let train = TrainConfig {
        length: 32,
        batch: 4,
        steps: 6,
        warmup: 2,
        evaluation_rows: 3,
        chunk_size: 8,
        ..TrainConfig::default()
    };
    let corpus = corpus();
    let vocabulary = Generator::new(task, train.length, Some(&corpus)).expect("a task").vocabulary();
    let decoder = DecoderConfig { family, vocabulary, width: 16, layers: 1, heads: 2, ..DecoderConfig::default() };
    RunSpec { task, seed, decoder, train, text: (task == Task::Text).then(|| "made up".into()) }
}

fn corpus() -> Corpus {
    Corpus::new(&"the quick brown fox jumps over the lazy dog, and so on. ".repeat(200))
}

fn specs() -> Vec<RunSpec> {
    let mut specs = Vec::new();
    for task in Task::ALL {
        specs.extend([Family::Standard, Family::Bsbr].map(|family| spec(family, task, 1)));
    }
    specs
}

/// Everything but the time it took.
fn timeless(runs: Vec<Run>) -> Vec<Run> {
    runs.into_iter().map(|run| Run { seconds: 0.0, ..run }).collect()
}

fn all(specs: &[RunSpec], jobs: usize, file: &Path, started: &mut Vec<usize>) -> Result<Vec<Run>, TrainError> {
    let mut store = RunStore::open(file)?;
    let runs = run_all(specs, Some(&corpus()), &Device::flex(), jobs, &mut store, &mut |event| match event {
        Event::Kept(count) => started.push(specs.len() - count),
        Event::Finished(..) => {}
    });
    runs.map(timeless)
}

#[test]
fn a_run_is_the_same_each_time_alone_and_beside_others_and_another_with_another_seed() {
    let dir = tempfile::tempdir().expect("a directory");
    let specs = specs();
    let serial = all(&specs, 1, &dir.path().join("one"), &mut Vec::new()).expect("runs");
    let parallel = all(&specs, 3, &dir.path().join("three"), &mut Vec::new()).expect("runs");
    assert_eq!(serial, parallel);
    for (run, spec) in serial.iter().zip(&specs) {
        assert_eq!(run.spec, *spec);
        assert!(run.diverged.is_none() && run.losses.len() == 6, "{run:?}");
        assert!(run.losses.iter().all(|point| point.loss.is_finite() && point.loss > 0.0));
        let asked: usize = run.scores.iter().map(|score| score.questions).sum();
        let generator = Generator::new(spec.task, 32, Some(&corpus())).expect("a task");
        let expected: usize = generator.sizes().iter().map(|&size| generator.evaluation(size, 3).questions.len()).sum();
        assert_eq!(asked, expected);
    }
    let other = spec(Family::Standard, Task::Recall, 2);
    let other = timeless(vec![train(&other, None, &Device::flex()).expect("a run")]);
    assert_ne!(other[0].losses, serial[0].losses);
}

#[test]
fn a_comparison_that_was_interrupted_ends_as_one_that_was_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let (specs, whole, cut) = (specs(), dir.path().join("whole"), dir.path().join("cut"));
    let expected = all(&specs, 2, &whole, &mut Vec::new()).expect("runs");
    // Three runs were finished, and the fourth was being written.
    let text = fs::read_to_string(&whole).expect("a file");
    let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
    assert_eq!(ends.len(), specs.len());
    fs::write(&cut, &text[..ends[2] + 40]).expect("room");
    let mut started = Vec::new();
    assert_eq!(all(&specs, 2, &cut, &mut started).expect("runs"), expected);
    assert_eq!(started, [specs.len() - 3]);
    // Then nothing is left to do, and a change of settings is another run.
    assert_eq!(all(&specs, 2, &cut, &mut started).expect("runs"), expected);
    let mut changed = specs[..1].to_vec();
    changed[0].train.learning_rate *= 2.0;
    all(&changed, 1, &cut, &mut started).expect("runs");
    assert_eq!(started[1..], [0, 1]);
}

#[test]
fn a_file_that_holds_something_else_is_refused_by_its_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("runs.jsonl");
    fs::write(&file, "{\"spec\": 1}\n").expect("room");
    let error = RunStore::open(&file).expect_err("no run").to_string();
    assert!(error.contains("runs.jsonl line 1 is no finished run"), "{error}");
    assert!(RunStore::open(dir.path()).expect_err("a directory").to_string().contains("finished runs"));
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    let refused = |change: fn(&mut RunSpec), word: &str| {
        let mut spec = spec(Family::Standard, Task::Recall, 0);
        change(&mut spec);
        let error = train(&spec, None, &Device::flex()).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(|spec| spec.train.steps = 0, "steps is 0, expected at least 1");
    refused(|spec| spec.train.batch = 0, "batch is 0");
    refused(|spec| spec.train.learning_rate = f64::NAN, "learning_rate is NaN");
    refused(|spec| spec.train.clip = 0.0, "clip is 0");
    refused(|spec| spec.train.final_share = 1.5, "final_share is 1.5");
    refused(|spec| spec.train.length = 10, "at least 20 tokens");
    refused(|spec| spec.decoder.vocabulary = 3, "vocabulary is 3");
    refused(|spec| spec.decoder.heads = 3, "heads");
    refused(|spec| spec.task = Task::Text, "0 characters");
}

/// Four values, all of which stand in every sequence: whoever does not look up which belongs to a key loses at least ln 4
/// nats in the mean, by symmetry.
#[test]
fn recall_is_learned_by_looking_up() {
    let mut spec = spec(Family::Standard, Task::Recall, 0);
    spec.train = TrainConfig { length: 20, batch: 16, steps: 250, warmup: 10, ..spec.train };
    spec.train.learning_rate = 1e-2;
    let run = train(&spec, None, &Device::flex()).expect("a run");
    let (first, last) = (run.losses[0].loss, run.losses[run.losses.len() - 1].loss);
    let guessing = 4_f64.ln();
    assert!(first > guessing, "{first} before it learned anything");
    assert!(last < 0.5 * guessing, "{last}, and {guessing} by guessing");
    let right: usize = run.scores.iter().map(|score| score.right).sum();
    let asked: usize = run.scores.iter().map(|score| score.questions).sum();
    assert!(2 * right > asked, "{right} of {asked}");
}
