//! Memory of one arm at one length: the high-water mark of a process of its own, which does nothing else.
//!
//! A process that measured something before holds freed memory that the next measurement would use unseen.

use std::{path::PathBuf, process::Command, rc::Rc};

use anyhow::{Context, Result, bail};
use bsbr_attn::BlockAttentionConfig;
use burn::tensor::{DType, Device};
use serde::{Deserialize, Serialize};

use super::{
    Arm, Phase, Subject,
    attention::{AttentionSubject, Inputs, Shape},
    model::{self, ModelSubject},
};

/// Tokens of the run that starts thread pools and the like.
const FIRST_TOKENS: usize = 256;

/// What to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) arm: Arm,
    pub(crate) attention: BlockAttentionConfig,
    pub(crate) phase: Phase,
    pub(crate) tokens: usize,
    pub(crate) of: Of,
}

/// Of what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Of {
    /// Attention of one layer.
    Shape(Shape),
    /// The model in a directory, how many texts it reads together, and what its caches keep keys and values in.
    Model(PathBuf, usize, DType),
}

/// Resident bytes before and at the worst moment of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Before.
    pub before: u64,
    /// At the worst moment.
    pub peak: u64,
}

/// What one run with a whole text needs in memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Memory {
    /// Resident before, inputs and weights included.
    pub(crate) before_bytes: u64,
    /// Resident at the worst moment.
    pub(crate) peak_bytes: u64,
    /// Of keys and values: of the inputs of attention alone, of all layers of a model.
    pub(crate) kv_bytes: u64,
    /// `peak - before`, less what every arm must hand out: the output of attention, or the gradients of its inputs; keys and
    /// values of a model.
    pub(crate) extra_bytes: u64,
}

impl Memory {
    pub(crate) fn new(peak: Peak, kv_bytes: u64, handed_out: u64) -> Self {
        let extra_bytes = peak.peak.saturating_sub(peak.before).saturating_sub(handed_out);
        Self { before_bytes: peak.before, peak_bytes: peak.peak, kv_bytes, extra_bytes }
    }

    /// Extra memory as a share of that of keys and values.
    pub(crate) fn share_of_kv(&self) -> f64 {
        self.extra_bytes as f64 / self.kv_bytes.max(1) as f64
    }
}

/// Starts this program again to run a command's probe. `flags` choose the device and the threads.
///
/// # Errors
///
/// If it cannot be started, or fails.
pub fn measure(name: &str, probe: &impl Serialize, flags: &[String]) -> Result<Peak> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg(name).args(flags).arg("--memory-of").arg(serde_json::to_string(probe)?);
    let output = command.output().context("cannot start this program again")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("error: "));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The other side: runs the probe in this process.
pub(crate) fn answer(probe: &str, device: &Device) -> Result<Peak> {
    let probe: Probe = serde_json::from_str(probe).context("--memory-of: no probe")?;
    match &probe.of {
        Of::Shape(shape) => {
            let subject = |tokens: usize| {
                let inputs = Rc::new(Inputs::new(shape, None, tokens, device));
                AttentionSubject::new(probe.arm, *shape, &probe.attention, inputs, device)
            };
            subject(FIRST_TOKENS.min(probe.tokens)).run(probe.phase)?;
            let mut whole = subject(probe.tokens);
            peak_of(|| whole.run(probe.phase).map(drop))
        }
        Of::Model(dir, batch, stored) => {
            let decoder = model::decoder(dir, &probe.attention, probe.arm, device)?.with_cache_type(*stored);
            // What the tokens are does not matter here.
            let tokens: Rc<[u32]> = (0..probe.tokens as u32).map(|at| at % 97 % model::vocabulary(&decoder)).collect();
            let subject = |count: usize| ModelSubject::new(decoder.clone(), Rc::clone(&tokens), count, *batch);
            subject(FIRST_TOKENS.min(probe.tokens)).run(probe.phase)?;
            let mut whole = subject(probe.tokens);
            peak_of(|| whole.run(probe.phase).map(drop))
        }
    }
}

/// Resident memory before `run` and its highest value during it.
///
/// # Errors
///
/// What `run` returns, and where the system tells nothing: other than Linux, or the mark cannot be reset.
pub fn peak_of(run: impl FnOnce() -> Result<()>) -> Result<Peak> {
    // Sets the high-water mark to what is resident now. Where that is not allowed, the mark tells something only if the
    // run raises it.
    let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let (before, mark) = (status("VmRSS")?, status("VmHWM")?);
    run()?;
    let peak = status("VmHWM")?;
    if !reset && peak <= mark {
        bail!("the high-water mark of memory cannot be reset here");
    }
    Ok(Peak { before, peak })
}

/// A field of the process's status, in bytes.
fn status(name: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("resident memory is known on Linux only")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kilobytes = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("/proc/self/status has no {name}"))? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_was_touched_at_once() {
        let touch = |megabytes: usize| {
            let block = vec![1_u8; megabytes << 20];
            std::hint::black_box(&block);
        };
        touch(1);
        let found = peak_of(|| {
            touch(64);
            touch(256);
            touch(64);
            Ok(())
        })
        .unwrap();
        // Other tests run in this process at the same time.
        let grown = (found.peak - found.before) >> 20;
        assert!((250..1500).contains(&grown), "{grown} MB");
    }

    #[test]
    fn what_every_arm_hands_out_is_not_extra() {
        let memory = Memory::new(Peak { before: 1000, peak: 1600 }, 400, 200);
        assert_eq!((memory.extra_bytes, memory.share_of_kv()), (400, 1.0));
        assert_eq!(Memory::new(Peak { before: 1000, peak: 1100 }, 400, 200).extra_bytes, 0);
    }
}
