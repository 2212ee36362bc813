//! Running a target on changed inputs, with a watch on time and memory.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::mutate::mutate;
use crate::random::Random;
use crate::targets::{Place, Target};

/// Time of the processor after which a run counts as hanging, so that a busy machine is no fault.
const HANG: Duration = Duration::from_secs(2);
/// The same of the clock on the wall, for a run that waits.
const STANDSTILL: Duration = Duration::from_secs(60);
/// Memory that a run may take beyond what the process had before, in bytes.
const MEMORY: u64 = 1 << 30;
/// Inputs kept besides the seeds.
const KEPT: usize = 4096;

/// How much to run.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most runs.
    pub runs: u64,
    /// Most time.
    pub time: Duration,
    /// What decides all changes.
    pub seed: u64,
    /// Whether each input is written down before it runs, for faults that abort the process.
    pub trace: bool,
}

/// What running did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Runs.
    pub runs: u64,
    /// Different answers.
    pub answers: usize,
    /// The longest run.
    pub longest: Duration,
    /// Most memory the process had, in bytes; 0 where the system does not tell.
    pub peak: u64,
}

/// An input on which a target failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Number of the run; none for an input of the corpus.
    pub run: Option<u64>,
    /// What happened and where.
    pub what: String,
    /// The input.
    pub input: Vec<u8>,
}

/// What runs at this moment.
struct Now {
    /// Its number; `None` between two runs.
    run: Option<u64>,
    input: Vec<u8>,
}

/// Runs `target` on its seeds and on changes of them.
///
/// A run that hangs or takes too much memory ends the process, after its input was written to `faults`.
///
/// # Errors
///
/// The first [`Fault`].
///
/// # Panics
///
/// If there is no place for files of a while.
pub fn drive(target: &Target, limits: Limits, faults: &Path) -> Result<Report, Box<Fault>> {
    let place = Place::new();
    let run = (target.prepare)(&place);
    let mut inputs = target.seeds();
    let now = Arc::new(Mutex::new(Now { run: None, input: Vec::new() }));
    watch(target.name, &now, faults);
    let mut random = Random::new(limits.seed);
    let (mut seen, mut longest) = (HashSet::new(), Duration::ZERO);
    let started = Instant::now();
    let (mut done, seeds) = (0, inputs.len());
    while done < limits.runs && started.elapsed() < limits.time {
        let mut input = random.pick(&inputs).clone();
        // The seeds themselves come first.
        match inputs.get(done as usize) {
            Some(seed) if (done as usize) < seeds => input.clone_from(seed),
            _ => mutate(&mut random, &mut input, &inputs, target.words, target.longest),
        }
        done += 1;
        if limits.trace {
            let _ = std::fs::create_dir_all(faults).and_then(|()| std::fs::write(faults.join("running"), &input));
        }
        let began = Instant::now();
        *lock(&now) = Now { run: Some(done), input: input.clone() };
        let answer = quietly(|| run(&input));
        lock(&now).run = None;
        longest = longest.max(began.elapsed());
        match answer {
            Ok(answer) => {
                if seen.insert(kind_of(&answer)) && inputs.len() < seeds + KEPT {
                    inputs.push(input);
                }
            }
            Err(what) => return Err(Box::new(Fault { run: Some(done), what, input })),
        }
    }
    Ok(Report { runs: done, answers: seen.len(), longest, peak: memory("VmHWM:").unwrap_or(0) })
}

/// Runs `target` on everything its corpus keeps.
///
/// # Errors
///
/// The first [`Fault`].
pub fn regressions(target: &Target) -> Result<usize, Box<Fault>> {
    let place = Place::new();
    let run = (target.prepare)(&place);
    let inputs = target.corpus();
    for input in &inputs {
        if let Err(what) = quietly(|| run(input)) {
            return Err(Box::new(Fault { run: None, what, input: input.clone() }));
        }
    }
    Ok(inputs.len())
}

/// The answer, or what the panic said.
fn quietly(run: impl FnOnce() -> String) -> Result<String, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}

/// What an answer says, without the names and numbers in it.
fn kind_of(answer: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    // Lines that show a piece of the input say nothing of their own.
    let own: String = answer.lines().filter(|line| !line.contains('|')).collect();
    let parts = own.split(['`', '"']).step_by(2).flat_map(str::split_whitespace);
    // Words as we write them; what an input brings in is mostly something else.
    let words = parts.filter(|word| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_lowercase()));
    words.take(24).for_each(|word| word.hash(&mut hasher));
    hasher.finish()
}

fn lock(now: &Mutex<Now>) -> std::sync::MutexGuard<'_, Now> {
    now.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process when a run hangs or takes too much memory.
fn watch(name: &'static str, now: &Arc<Mutex<Now>>, faults: &Path) {
    let (now, faults) = (Arc::downgrade(now), faults.to_owned());
    let before = memory("VmRSS:").unwrap_or(0);
    std::thread::spawn(move || {
        let mut seen = (None, Instant::now(), processor_time());
        while let Some(now) = now.upgrade() {
            {
                let now = lock(&now);
                if now.run != seen.0 {
                    seen = (now.run, Instant::now(), processor_time());
                }
                let used = processor_time().zip(seen.2).map(|(now, before)| now.saturating_sub(before));
                let waits = seen.1.elapsed();
                let hangs = now.run.is_some() && (used.unwrap_or(waits) > HANG || waits > STANDSTILL);
                let grown = memory("VmRSS:").unwrap_or(0).saturating_sub(before);
                if hangs || grown > MEMORY {
                    let why = if hangs { "hangs".to_owned() } else { format!("takes {grown} bytes of memory") };
                    let path = keep(&faults, name, &now.input);
                    // Nothing else is left to be done in a process one of whose threads does not come back.
                    let text = format!("{name} {why}: the input is in {}\n", path.display());
                    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                    std::process::abort();
                }
            }
            drop(now);
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Time of the processor that this process took, where the system tells.
fn processor_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name, which may hold anything: the twelfth and thirteenth field, in hundredths of a second.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks =
        fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(Duration::from_millis(10 * ticks))
}

/// Writes an input on which a target failed.
pub(crate) fn keep(faults: &Path, name: &str, input: &[u8]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let path = faults.join(format!("{name}-{:016x}", hasher.finish()));
    let _ = std::fs::create_dir_all(faults).and_then(|()| std::fs::write(&path, input));
    path
}

impl Fault {
    /// Writes the input to `faults`; says what happened and where it is.
    pub fn keep(&self, name: &str, faults: &Path) -> String {
        let path = keep(faults, name, &self.input);
        let run = self.run.map_or_else(|| "an input of the corpus".to_owned(), |run| format!("run {run}"));
        format!("{name}: {run}: {}\nthe input is in {}", self.what, path.display())
    }
}

/// A line of the system's account of this process, in bytes.
fn memory(line: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|found| found.strip_prefix(line))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}
