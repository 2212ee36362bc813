//! Goes through lengths and phases, as far as the time goes.

use std::time::Instant;

use anyhow::Result;
use bsbr_zoo::{Family, SmallDecoder};
use burn::tensor::Device;

use super::{
    report::Row,
    subject::{FamilySubject, Probe},
};
use bsbr::harness::{
    Budget, Contender, Cost, DECODE_TOKENS, History, Phase, Rounds, Subject, divide, duration, interleaved,
    measure_memory,
};

/// Least time for a phase of a length: a point of short runs is not lost because earlier ones took longer.
const LEAST_SECONDS: f64 = 0.5;

/// What a run may take longer than the one before it says.
const MARGIN: f64 = 1.2;

/// What to do.
pub(crate) struct Plan<'a> {
    pub(crate) lengths: &'a [usize],
    pub(crate) rounds: Rounds,
    pub(crate) device: &'a Device,
    /// For the processes that measure memory.
    pub(crate) flags: &'a [String],
}

/// A family, and what it did so far.
pub(crate) struct Entrant {
    pub(crate) decoder: SmallDecoder,
    prefill: History,
    decode: History,
    /// Of what decoding needs before it can begin.
    prepare: History,
}

impl Entrant {
    pub(crate) fn new(decoder: SmallDecoder) -> Self {
        Self { decoder, prefill: History::default(), decode: History::default(), prepare: History::default() }
    }

    fn family(&self) -> Family {
        self.decoder.config().family
    }

    /// What it is expected to cost. Nothing here grows faster than with the square of the text, and most of a short one does not.
    fn cost(&self, phase: Phase, tokens: usize) -> Cost {
        let seconds = |history: &History, power| MARGIN * history.expected(tokens, power).unwrap_or(0.0);
        match phase {
            Phase::Prefill | Phase::Training => Cost { fixed: 0.0, run: seconds(&self.prefill, 1.0) },
            Phase::Decode => {
                let token = seconds(&self.decode, 0.5);
                Cost { fixed: seconds(&self.prepare, 1.0), run: token * DECODE_TOKENS as f64 }
            }
        }
    }
}

/// Measures every family at every length. `note` hears what happens.
pub(crate) fn run(
    entrants: &mut [Entrant],
    plan: &Plan<'_>,
    budget: Budget,
    note: &mut dyn FnMut(&str),
) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    if let Some(&shortest) = plan.lengths.first() {
        for entrant in entrants.iter_mut() {
            first_run(entrant, shortest, plan.device)?;
        }
    }
    for (at, &tokens) in plan.lengths.iter().enumerate() {
        // What short lengths leave of their share goes to the longer ones.
        let point = budget.share(1.0, (plan.lengths.len() - at) as f64);
        let mut subjects: Vec<FamilySubject> =
            entrants.iter().map(|entrant| FamilySubject::new(entrant.decoder.clone(), tokens, plan.device)).collect();
        for phase in [Phase::Prefill, Phase::Decode] {
            let share = if phase == Phase::Prefill { 0.7 * point.left() } else { point.left() };
            let mut rows: Vec<Row> = entrants.iter().map(|entrant| Row::new(phase, entrant.family(), tokens)).collect();
            measure(entrants, &mut subjects, plan, share.max(LEAST_SECONDS), &mut rows)?;
            note(&line(&rows));
            all.extend(rows);
        }
    }
    Ok(all)
}

/// Starts thread pools, fills caches and tells what to expect.
fn first_run(entrant: &mut Entrant, tokens: usize, device: &Device) -> Result<()> {
    let mut subject = FamilySubject::new(entrant.decoder.clone(), tokens, device);
    let start = Instant::now();
    subject.prepare(Phase::Decode)?;
    entrant.prepare.push(tokens, start.elapsed().as_secs_f64());
    for phase in [Phase::Prefill, Phase::Decode] {
        subject.run(phase)?;
        let seconds = subject.run(phase)?.as_secs_f64();
        let history = if phase == Phase::Prefill { &mut entrant.prefill } else { &mut entrant.decode };
        history.push(tokens, seconds);
    }
    Ok(())
}

/// One phase of one length: fills in the rows, which are those of the entrants.
fn measure(
    entrants: &mut [Entrant],
    subjects: &mut [FamilySubject],
    plan: &Plan<'_>,
    seconds: f64,
    rows: &mut [Row],
) -> Result<()> {
    let Some((phase, tokens)) = rows.first().map(|row| (row.phase, row.tokens)) else { return Ok(()) };
    let costs: Vec<Cost> = entrants.iter().map(|entrant| entrant.cost(phase, tokens)).collect();
    let asked = Rounds { memory: plan.rounds.memory && phase == Phase::Prefill, ..plan.rounds };
    let given = divide(&costs, asked, seconds);
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for (((subject, entrant), row), (rounds, cost)) in
        subjects.iter_mut().zip(entrants.iter_mut()).zip(rows.iter_mut()).zip(given.iter().zip(&costs))
    {
        let Some(rounds) = *rounds else {
            let needed = duration(cost.fixed + cost.run);
            row.left_out = Some(format!("no time: would take about {needed}"));
            continue;
        };
        let start = Instant::now();
        if let Err(error) = subject.prepare(phase) {
            row.left_out = Some(format!("{error:#}"));
            continue;
        }
        if phase == Phase::Decode {
            entrant.prepare.push(tokens, start.elapsed().as_secs_f64());
        }
        contenders.push(Contender { name: row.family.name(), subject, rounds });
    }
    let samples = interleaved(&mut contenders, phase, None)?;
    for (contender, result) in contenders.iter().zip(samples.arms) {
        let found = rows.iter_mut().zip(entrants.iter_mut()).find(|(row, _)| row.family.name() == contender.name);
        let Some((row, entrant)) = found else { continue };
        match result {
            Ok(samples) => {
                row.warmup = contender.rounds.warmup;
                row.measured(samples);
                if phase == Phase::Decode {
                    row.state_bytes = contender.subject.kept_bytes();
                }
                let history = if phase == Phase::Prefill { &mut entrant.prefill } else { &mut entrant.decode };
                history.push(tokens, row.seconds.map_or(0.0, |seconds| seconds.median));
            }
            Err(error) => row.left_out = Some(format!("{error:#}")),
        }
    }
    drop(contenders);
    if phase == Phase::Prefill {
        for ((row, entrant), rounds) in rows.iter_mut().zip(entrants.iter()).zip(given) {
            if row.left_out.is_none() && plan.rounds.memory {
                weigh(row, entrant, rounds.is_some_and(|rounds| rounds.memory), plan.flags);
            }
        }
    }
    Ok(())
}

/// Memory of a prefill, where there is time for it.
fn weigh(row: &mut Row, entrant: &Entrant, time: bool, flags: &[String]) {
    if !time {
        row.notes.push("no memory: no time".into());
        return;
    }
    let probe = Probe { decoder: entrant.decoder.config().clone(), tokens: row.tokens };
    match measure_memory("compare", &probe, flags) {
        Ok(peak) => row.memory = Some(peak),
        Err(error) => row.notes.push(format!("no memory: {error:#}")),
    }
}

/// One line about a point, for the person who watches.
fn line(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let families = rows.iter().map(|row| {
        let time = row.seconds.map_or_else(|| "left out".into(), |seconds| duration(seconds.median));
        format!("{} {time}", row.family)
    });
    format!("{} {}: {}", first.phase.name(), first.tokens, families.collect::<Vec<_>>().join(", "))
}
