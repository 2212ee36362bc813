//! The comparison by cost.

use std::time::{Instant, SystemTime};

use anyhow::Result;
use bsbr_zoo::{DecoderConfig, Family, SmallDecoder, keys_read, original};
use burn::tensor::{Device, Int, Tensor};

use super::{
    report::{About, Cost, Report, SCHEMA, fits},
    session::{self, Entrant, Plan},
};
use bsbr::harness::{self, Budget, Rounds};

use crate::compare_command::Args;

/// Length of the text whose state is weighed.
const STATE_TOKENS: usize = 256;

/// Times the families.
pub(crate) fn run(args: &Args, base: &DecoderConfig, device: &Device) -> Result<Report> {
    let started = Instant::now();
    let budget = Budget::new(args.seconds);
    let families = args.families();
    let decoder = |family: Family| SmallDecoder::new(&DecoderConfig { family, ..base.clone() }, 0, device);
    let mut entrants: Vec<Entrant> =
        families.iter().map(|&family| Ok(Entrant::new(decoder(family)?))).collect::<Result<_>>()?;
    let threads = rayon::current_num_threads();
    let flags: Vec<String> = args.device.flags();
    let rounds = Rounds { warmup: args.warmup, runs: args.runs, memory: true };
    let plan = Plan { lengths: args.seq_len.as_slice(), rounds, device, flags: &flags };
    let rows = session::run(&mut entrants, &plan, budget, &mut |line| harness::note(line))?;
    let mut report = report(args, base, device, started)?;
    report.cost = Some(Cost {
        threads,
        lengths: args.seq_len.as_slice().to_vec(),
        warmup: args.warmup,
        runs: args.runs,
        seconds: args.seconds,
        fits: fits(&families, &rows),
        rows,
    });
    Ok(report)
}

/// A report without results.
pub(crate) fn report(args: &Args, base: &DecoderConfig, device: &Device, started: Instant) -> Result<Report> {
    let elapsed_seconds = started.elapsed().as_secs_f64();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let families = args.families();
    let about = families.iter().map(|&family| about(&DecoderConfig { family, ..base.clone() }, device));
    Ok(Report {
        schema: SCHEMA,
        unix_time: now.saturating_sub(elapsed_seconds as u64),
        elapsed_seconds,
        versions: harness::versions(),
        machine: harness::machine(),
        device: args.device.name(),
        families: about.collect::<Result<_>>()?,
        cost: None,
        trained: None,
    })
}

fn about(config: &DecoderConfig, device: &Device) -> Result<About> {
    let decoder = SmallDecoder::new(config, 0, device)?;
    let standard = SmallDecoder::new(&DecoderConfig { family: Family::Standard, ..config.clone() }, 0, device)?;
    let mut state = decoder.start(1)?;
    decoder.step(Tensor::<2, Int>::zeros([1, STATE_TOKENS], device), &mut state)?;
    Ok(About {
        family: config.family,
        source: config.family.source(),
        original: original(config.family),
        parameters: decoder.parameters(),
        parameters_of_standard: decoder.parameters() as f64 / standard.parameters() as f64,
        state_bytes: state.bytes() as u64,
        state_tokens: STATE_TOKENS,
        keys_read: keys_read(config, STATE_TOKENS),
        decoder: config.clone(),
    })
}
