//! Many runs, several at once, each in a thread of its own.

use std::{
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use burn::tensor::Device;

use super::{Run, RunSpec, RunStore, TrainError, train};
use crate::tasks::Corpus;

/// What happens while runs go on.
#[derive(Debug)]
pub enum Event<'a> {
    /// These were finished before.
    Kept(usize),
    /// A run has ended; how many there are now, of all.
    Finished(&'a Run, usize, usize),
}

/// Does the runs that `store` does not hold, `jobs` at once, and gives all of them in the order of `specs`.
///
/// # Errors
///
/// The first error of a run; runs that go on then are finished and kept, others do not start.
pub fn run_all(
    specs: &[RunSpec],
    corpus: Option<&Corpus>,
    device: &Device,
    jobs: usize,
    store: &mut RunStore,
    note: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<Run>, TrainError> {
    let open: Vec<&RunSpec> = specs.iter().filter(|spec| store.find(spec).is_none()).collect();
    note(Event::Kept(specs.len() - open.len()));
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    let mut failure = None;
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, open.len().max(1)) {
            let (sender, open, next) = (sender.clone(), &open, &next);
            scope.spawn(move || {
                while let Some(spec) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send(alone(spec, corpus, device)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut done = specs.len() - open.len();
        for result in receiver {
            let kept = result.and_then(|run| {
                store.add(run.clone())?;
                Ok(run)
            });
            match kept {
                Ok(run) => {
                    done += 1;
                    note(Event::Finished(&run, done, specs.len()));
                }
                Err(error) => {
                    next.store(open.len(), Ordering::Relaxed);
                    failure.get_or_insert(error);
                }
            }
        }
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(specs.iter().filter_map(|spec| store.find(spec).cloned()).collect()),
    }
}

/// One run in a pool of one thread.
fn alone(spec: &RunSpec, corpus: Option<&Corpus>, device: &Device) -> Result<Run, TrainError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|error| TrainError::Device(error.to_string()))?;
    pool.install(|| train(spec, corpus, device))
}
