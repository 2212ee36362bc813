//! The PyTorch opponent: a Python process that runs the same shapes on as many threads and times itself, asked for one
//! run at a time so that it takes its turn among the other arms.

use std::{
    cell::RefCell,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    rc::Rc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Arm, DECODE_TOKENS, Phase, Subject, memory::Peak};

/// What it runs.
const SCRIPT: &str = include_str!("opponent.py");

/// What an opponent says of itself.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Opponent {
    pub(crate) python: String,
    pub(crate) torch: String,
    pub(crate) transformers: Option<String>,
    pub(crate) threads: u64,
}

/// A running process.
pub(crate) struct Python {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// One process shared by the arms that run in it.
pub(crate) type Shared = Rc<RefCell<Python>>;

impl Python {
    /// Starts an interpreter. One that is to measure memory gives freed memory back at once, which costs time.
    pub(crate) fn start(python: &str, threads: usize, measures_memory: bool) -> Result<(Shared, Opponent)> {
        let mut command = Command::new(python);
        command.args(["-c", SCRIPT, &threads.to_string()]);
        command.env("OMP_NUM_THREADS", threads.to_string()).env("MKL_NUM_THREADS", threads.to_string());
        command
            .env("TRANSFORMERS_VERBOSITY", "error")
            .env("HF_HUB_OFFLINE", "1")
            .env("TOKENIZERS_PARALLELISM", "false");
        if measures_memory {
            command.env("MALLOC_MMAP_THRESHOLD_", "65536").env("MALLOC_TRIM_THRESHOLD_", "65536");
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child =
            child.with_context(|| format!("--against pytorch: cannot start `{python}`, name another with --python"))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the Python process has no output")?);
        let mut process = Self { child, requests, answers };
        let hello = process.answer().map_err(|error| {
            anyhow::anyhow!("--against pytorch: {error:#}. Install torch there, or name another Python with --python")
        })?;
        let text = |key: &str| hello[key].as_str().map(str::to_owned);
        let opponent = Opponent {
            python: python.to_owned(),
            torch: text("torch").context("--against pytorch: the Python process names no version of torch")?,
            transformers: text("transformers"),
            threads: hello["threads"].as_u64().unwrap_or_default(),
        };
        Ok((Rc::new(RefCell::new(process)), opponent))
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let requests = self.requests.as_mut().context("the Python process takes no requests")?;
        writeln!(requests, "{request}").and_then(|()| requests.flush()).context("the Python process ended")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line).context("no answer from the Python process")? == 0 {
            bail!("the Python process ended: {}", self.child.wait()?);
        }
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the Python process answered {:?}, expected JSON", line.trim_end()))?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        // The end of its input ends it; one that hangs is not waited for.
        drop(self.requests.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An arm in a Python process.
pub(crate) struct PythonSubject {
    process: Shared,
    id: Value,
}

impl PythonSubject {
    /// `of` are the arguments of the arm's class in the script.
    pub(crate) fn new(process: &Shared, arm: Arm, of: &Value) -> Result<Self> {
        let made = process.borrow_mut().ask(&json!({"do": "make", "arm": arm.name(), "of": of}))?;
        Ok(Self { process: Rc::clone(process), id: made["id"].clone() })
    }

    fn ask(&self, what: &str) -> Result<Value> {
        self.process.borrow_mut().ask(&json!({"do": what, "id": self.id, "steps": DECODE_TOKENS}))
    }

    /// Memory of a run with a whole text.
    pub(crate) fn peak(&mut self, phase: Phase) -> Result<Peak> {
        self.prepare(phase)?;
        let ask = json!({"do": "peak", "id": self.id, "phase": phase.name()});
        Ok(serde_json::from_value(self.process.borrow_mut().ask(&ask)?)?)
    }
}

impl Subject for PythonSubject {
    fn prepare(&mut self, phase: Phase) -> Result<()> {
        match phase {
            Phase::Prefill => {}
            Phase::Decode => drop(self.ask("prepare")?),
            Phase::Training => drop(self.ask("prepare-training")?),
        }
        Ok(())
    }

    fn run(&mut self, phase: Phase) -> Result<Duration> {
        let seconds = self.ask(phase.name())?["seconds"].as_f64().context("the Python process gave no time")?;
        // Its threads go on looking for work for a while, which whoever is next must not pay for.
        thread::sleep(Duration::from_millis(20));
        Ok(Duration::try_from_secs_f64(seconds)?)
    }
}

impl Drop for PythonSubject {
    fn drop(&mut self) {
        let _ = self.ask("drop");
    }
}
