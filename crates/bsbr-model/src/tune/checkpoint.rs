//! Where an interrupted run goes on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::ModuleOptimizer,
    store::ModuleRecord,
    tensor::Tensor,
};
use serde::{Deserialize, Serialize};

use super::{
    config::TuneConfig,
    log::{Stage, TuneLog},
    parameters::{Parameters, numbers},
};
use crate::{Decoder, ModelConfig, ModelError};

const STATE: &str = "state.json";
const PARAMETERS: &str = "parameters.bpk";
const BEST: &str = "best.bpk";
const OPTIMIZER: &str = "optimizer.bpk";

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    pub(super) stage: Stage,
    /// Steps of the stage that are done.
    pub(super) step: usize,
    /// Seconds that took.
    pub(super) seconds: f64,
    /// Loss of each trained layer at the first step.
    pub(super) first: Vec<f64>,
    /// Best held-out loss of each trained layer, or of the model.
    pub(super) best: Vec<f64>,
    /// Best mean held-out loss.
    pub(super) best_mean: f64,
    /// Measurements since.
    pub(super) stale: usize,
}

/// What the files are of: a run can go on only with the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    pub(super) settings: TuneConfig,
    pub(super) model: ModelConfig,
    /// FNV-1a of the first numbers of every weight.
    pub(super) weights: u64,
    pub(super) tokens: usize,
    /// FNV-1a of the tokens.
    pub(super) text: u64,
}

/// FNV-1a, of which `hash` is the state.
fn fnv(hash: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// Numbers of a weight that tell it from another.
const FIRST_NUMBERS: usize = 64;

/// Hashes the first numbers of every weight.
struct Fingerprint(Result<u64, ModelError>);

impl ModuleVisitor for Fingerprint {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Ok(hash) = &self.0 else { return };
        let weight = param.val();
        let count = weight.shape().num_elements();
        let first = weight.reshape([count]).narrow(0, 0, count.min(FIRST_NUMBERS));
        self.0 = numbers(first).map(|numbers| fnv(*hash, numbers.iter().flat_map(|number| number.to_le_bytes())));
    }
}

impl Identity {
    pub(super) fn new(settings: &TuneConfig, decoder: &Decoder, tokens: &[u32]) -> Result<Self, ModelError> {
        let text = fnv(FNV_START, tokens.iter().flat_map(|token| token.to_le_bytes()));
        // A run may go on with more time.
        let settings = TuneConfig { budget: None, ..settings.clone() };
        let mut weights = Fingerprint(Ok(FNV_START));
        decoder.visit(&mut weights);
        Ok(Self { settings, model: decoder.config().clone(), weights: weights.0?, tokens: tokens.len(), text })
    }

    /// The first thing that differs.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        let pairs = [
            (self.settings == other.settings, "its settings"),
            ((&self.model, self.weights) == (&other.model, other.weights), "its model"),
            ((self.tokens, self.text) == (other.tokens, other.text), "its text"),
        ];
        pairs.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    identity: Identity,
    position: Position,
    log: TuneLog,
}

/// What a run needs to go on.
pub(super) struct Saved {
    pub(super) position: Position,
    pub(super) log: TuneLog,
    pub(super) parameters: Parameters,
    pub(super) best: Parameters,
    pub(super) optimizer: ModuleOptimizer,
}

fn failed(path: &Path, problem: impl std::fmt::Display) -> ModelError {
    ModelError::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
}

fn beside(dir: &Path, what: &str) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.{what}"))
}

/// Writes a checkpoint in place of the one before: a crash leaves one of the two.
pub(super) fn save(dir: &Path, identity: &Identity, saved: &Saved) -> Result<(), ModelError> {
    let (partial, old) = (beside(dir, "partial"), beside(dir, "old"));
    let clear = |path: &Path| if path.exists() { fs::remove_dir_all(path) } else { Ok(()) };
    clear(&partial).and_then(|()| fs::create_dir_all(&partial)).map_err(|error| failed(&partial, error))?;
    let state = State { identity: identity.clone(), position: saved.position.clone(), log: saved.log.clone() };
    let json = serde_json::to_vec_pretty(&state).map_err(|error| failed(&partial, error))?;
    for (name, parameters) in [(PARAMETERS, &saved.parameters), (BEST, &saved.best)] {
        let path = partial.join(name);
        parameters.plain().into_record().save(&path).map_err(|error| failed(&path, error))?;
    }
    let path = partial.join(OPTIMIZER);
    saved.optimizer.save(&path).map_err(|error| failed(&path, error))?;
    let path = partial.join(STATE);
    fs::write(&path, json).map_err(|error| failed(&path, error))?;
    clear(&old).map_err(|error| failed(&old, error))?;
    if dir.exists() {
        fs::rename(dir, &old).map_err(|error| failed(dir, error))?;
    }
    fs::rename(&partial, dir).and_then(|()| clear(&old)).map_err(|error| failed(dir, error))
}

/// Reads a checkpoint of the same run; `start` are parameters of the right shapes, `optimizer` one without state.
pub(super) fn load(
    dir: &Path,
    identity: &Identity,
    start: &Parameters,
    optimizer: ModuleOptimizer,
) -> Result<Saved, ModelError> {
    // A crash between two renames leaves the last one under another name.
    let old = beside(dir, "old");
    let dir = if !dir.exists() && old.exists() { &old } else { dir };
    let path = dir.join(STATE);
    let text = fs::read(&path).map_err(|error| failed(&path, error))?;
    let state: State = serde_json::from_slice(&text).map_err(|error| failed(&path, error))?;
    if let Some(what) = identity.difference(&state.identity) {
        let problem = format!("{what} differs from what is asked for: give the same, or begin anew without resuming");
        return Err(failed(dir, problem));
    }
    let read = |name: &str| {
        let path = dir.join(name);
        let record = ModuleRecord::load(&path).map_err(|error| failed(&path, error))?;
        let loaded = start.plain().try_load_record(record).map_err(|error| failed(&path, error))?;
        Ok::<_, ModelError>(loaded.tracked())
    };
    let (parameters, best) = (read(PARAMETERS)?, read(BEST)?);
    let path = dir.join(OPTIMIZER);
    let optimizer = optimizer.load(&path).map_err(|error| failed(&path, error))?;
    Ok(Saved { position: state.position, log: state.log, parameters, best, optimizer })
}
