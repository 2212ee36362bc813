//! One family at one length, timed and weighed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bsbr_zoo::{DecoderConfig, SmallDecoder, State};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use bsbr::harness::{DECODE_TOKENS, Peak, Phase, Subject, peak_of, sync};

/// Tokens that a state takes in at once.
const PIECE: usize = 1024;

/// Tokens of the run that starts thread pools and the like.
const FIRST_TOKENS: usize = 256;

/// Reads a text of some length, and goes on behind it.
pub(crate) struct FamilySubject {
    decoder: SmallDecoder,
    length: usize,
    state: Option<State>,
    device: Device,
}

impl FamilySubject {
    pub(crate) fn new(decoder: SmallDecoder, length: usize, device: &Device) -> Self {
        Self { decoder, length, state: None, device: device.clone() }
    }

    /// Tokens `from..to` of a text that never ends. What they are does not matter here.
    fn tokens(&self, from: usize, to: usize) -> Tensor<2, Int> {
        let vocabulary = self.decoder.config().vocabulary;
        let tokens: Vec<i64> = (from..to).map(|at| (at * at % 251 % vocabulary) as i64).collect();
        Tensor::from_data(TensorData::new(tokens, [1, to - from]), &self.device)
    }
}

impl Subject for FamilySubject {
    fn prepare(&mut self, phase: Phase) -> Result<()> {
        if phase == Phase::Decode && self.state.is_none() {
            let mut state = self.decoder.start(1)?;
            for from in (0..self.length).step_by(PIECE) {
                drop(self.decoder.step_hidden(self.tokens(from, self.length.min(from + PIECE)), &mut state)?);
            }
            sync(&self.device)?;
            self.state = Some(state);
        }
        Ok(())
    }

    fn run(&mut self, phase: Phase) -> Result<Duration> {
        match phase {
            Phase::Prefill => {
                let text = self.tokens(0, self.length);
                let last =
                    Tensor::<1, Int>::from_data(TensorData::new(vec![self.length as i64 - 1], [1]), &self.device);
                let start = Instant::now();
                let scores = self.decoder.logits_at(text, last)?;
                sync(&self.device)?;
                let elapsed = start.elapsed();
                drop(scores);
                Ok(elapsed)
            }
            Phase::Decode => {
                let mut state = self.state.take().context("decoding was not prepared")?;
                let first = state.len();
                let tokens: Vec<_> = (first..first + DECODE_TOKENS).map(|at| self.tokens(at, at + 1)).collect();
                let start = Instant::now();
                for token in tokens {
                    drop(self.decoder.step(token, &mut state)?);
                }
                sync(&self.device)?;
                let elapsed = start.elapsed();
                self.state = Some(state);
                Ok(elapsed / DECODE_TOKENS as u32)
            }
            Phase::Training => anyhow::bail!("training is not measured here"),
        }
    }

    fn kept_bytes(&self) -> Option<u64> {
        self.state.as_ref().map(|state| state.bytes() as u64)
    }
}

/// What a process of its own runs, whose memory is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Probe {
    pub(crate) decoder: DecoderConfig,
    pub(crate) tokens: usize,
}

/// The other side: runs the probe in this process.
pub(crate) fn answer(probe: &str, device: &Device) -> Result<Peak> {
    let probe: Probe = serde_json::from_str(probe).context("--memory-of: no probe")?;
    let decoder = SmallDecoder::new(&probe.decoder, 0, device)?;
    FamilySubject::new(decoder.clone(), FIRST_TOKENS.min(probe.tokens), device).run(Phase::Prefill)?;
    let mut whole = FamilySubject::new(decoder, probe.tokens, device);
    peak_of(|| whole.run(Phase::Prefill).map(drop))
}
