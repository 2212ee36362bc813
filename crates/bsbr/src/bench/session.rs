//! One run of the bench: parts, lengths and phases, as far as the time goes.

use std::time::Instant;

use anyhow::Result;
use burn::tensor::Device;

use super::{
    Arm, DECODE_TOKENS, Part, Phase, Subject,
    budget::{Budget, Cost, History, Rounds, divide},
    fields::Field,
    gemm::Gemm,
    measure::{Contender, interleaved},
    report::Row,
};

/// Length of the runs that come before all others: they start thread pools, fill caches and tell what to expect.
const FIRST_TOKENS: usize = 512;

/// What a run may take longer than its arithmetic says.
const MARGIN: f64 = 1.3;

/// Seconds of a run from which on the cost of starting up makes no difference.
const LONG_RUN: f64 = 0.5;

/// Time that every phase of every length gets at least.
const LEAST_SECONDS: f64 = 0.5;

/// What a window costs whose quality is measured, in prefills: one, the head for every token, and the comparison.
const QUALITY_COST: f64 = 1.6;

/// What to do.
pub(crate) struct Plan<'a> {
    pub(crate) lengths: &'a [usize],
    pub(crate) phases: &'a [Phase],
    pub(crate) rounds: Rounds,
    pub(crate) device: &'a Device,
}

/// What one arm did so far.
#[derive(Default)]
struct Past {
    prefill: History,
    decode: History,
    training: History,
    /// Of what decoding needs before it can begin.
    prepare: History,
}

impl Past {
    fn of(&self, phase: Phase) -> &History {
        match phase {
            Phase::Prefill => &self.prefill,
            Phase::Decode => &self.decode,
            Phase::Training => &self.training,
        }
    }

    fn push(&mut self, phase: Phase, tokens: usize, seconds: f64) {
        let history = match phase {
            Phase::Prefill => &mut self.prefill,
            Phase::Decode => &mut self.decode,
            Phase::Training => &mut self.training,
        };
        history.push(tokens, seconds);
    }
}

/// Products timed between samples, and what was measured.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) rows: Vec<Row>,
    pub(crate) gemm: Vec<f64>,
}

/// Goes through the lengths of one part. `note` hears what happens.
pub(crate) fn run(
    field: &mut dyn Field,
    plan: &Plan<'_>,
    budget: Budget,
    note: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut pasts: Vec<(Arm, Past)> = field.arms().iter().map(|&arm| (arm, Past::default())).collect();
    // Attention alone is held against the rate of matrix products.
    let gemm = (field.part() == Part::Attention).then(|| Gemm::new(plan.device));
    if let Some(gemm) = &gemm {
        (0..3).try_for_each(|_| gemm.run().map(drop))?;
    }
    if let Some(&shortest) = plan.lengths.first() {
        first_runs(field, plan, shortest.min(FIRST_TOKENS), &mut pasts)?;
    }
    for (at, &tokens) in plan.lengths.iter().enumerate() {
        // Short lengths leave most of their share to the longer ones.
        let point = budget.share(1.0, (plan.lengths.len() - at) as f64);
        let mut length = Length { field, plan, tokens, gemm: gemm.as_ref(), pasts: &mut pasts, subjects: Vec::new() };
        let first_row = outcome.rows.len();
        length.run(point, &mut outcome, note)?;
        length.add_quality(point, &mut outcome.rows[first_row..]);
    }
    Ok(outcome)
}

/// Runs every arm at a short length, twice if that is quick; one that fails has no past, and fails again where its rows say so.
fn first_runs(field: &mut dyn Field, plan: &Plan<'_>, tokens: usize, pasts: &mut [(Arm, Past)]) -> Result<()> {
    let mut entered = false;
    for (arm, past) in pasts {
        let can = |phase: &Phase| field.obstacle(*arm, *phase, tokens, 2 * DECODE_TOKENS).is_none();
        let phases: Vec<Phase> = plan.phases.iter().copied().filter(can).collect();
        if phases.is_empty() {
            continue;
        }
        if !std::mem::replace(&mut entered, true) {
            field.enter(tokens)?;
        }
        let Ok(mut subject) = field.subject(*arm) else { continue };
        for phase in phases {
            let mut runs = || -> Result<(f64, f64)> {
                let start = Instant::now();
                subject.prepare(phase)?;
                let prepared = start.elapsed().as_secs_f64();
                let first = subject.run(phase)?.as_secs_f64();
                let seconds = if first < LONG_RUN { subject.run(phase)?.as_secs_f64() } else { first };
                Ok((prepared, seconds))
            };
            let Ok((prepared, seconds)) = runs() else { continue };
            past.push(phase, tokens, seconds);
            if phase == Phase::Decode {
                past.prepare.push(tokens, prepared);
            }
        }
    }
    Ok(())
}

/// Seconds that an arm should take for a run with a whole text.
fn expected_run(field: &dyn Field, arm: Arm, phase: Phase, past: &History, tokens: usize) -> f64 {
    if let (Arm::Bsbr, Some((last, seconds))) = (arm, past.last())
        && let (Some(then), Some(now)) =
            (field.operations(arm, phase, last, None), field.operations(arm, phase, tokens, None))
    {
        // Fused, it takes what its arithmetic takes, and one disturbed sample says nothing about growth.
        return MARGIN * seconds * now.time() / then.time();
    }
    // Attention to everything grows with the square of the text; the rest of a model, and retrieval, do not.
    let whole = field.part() == Part::Attention && !arm.is_bsbr();
    past.expected(tokens, if whole { 2.0 } else { 1.0 }).unwrap_or(0.0)
}

/// One length of a part.
struct Length<'a> {
    field: &'a mut dyn Field,
    plan: &'a Plan<'a>,
    tokens: usize,
    gemm: Option<&'a Gemm>,
    pasts: &'a mut [(Arm, Past)],
    /// Made when first needed, kept for the next phase.
    subjects: Vec<(Arm, Box<dyn Subject>)>,
}

impl Length<'_> {
    fn run(&mut self, point: Budget, outcome: &mut Outcome, note: &mut dyn FnMut(&str)) -> Result<()> {
        let arms = self.field.arms().to_vec();
        let mut entered = false;
        let whole = point.left();
        for &phase in self.plan.phases {
            // Most of the time goes to reading texts.
            let both = self.plan.phases.len() > 1 && phase == Phase::Prefill;
            let share = match (both, self.field.windows(self.tokens)) {
                (true, _) => 0.75 * point.left(),
                // Something is left for quality.
                (false, Some(_)) => 0.25 * whole,
                (false, None) => point.left().max(0.25 * whole),
            };
            // What came before may have taken longer than expected; a point of short runs is not lost for that.
            let seconds = share.max(LEAST_SECONDS);
            let mut rows: Vec<Row> =
                arms.iter().map(|&arm| Row::new(self.field.part(), phase, arm, self.tokens)).collect();
            let given = self.give_time(phase, seconds, &mut rows);
            let mut runs = Vec::new();
            for (index, rounds) in given {
                if !std::mem::replace(&mut entered, true) {
                    self.field.enter(self.tokens)?;
                }
                match self.prepare(arms[index], phase) {
                    Ok(()) => runs.push((index, rounds)),
                    Err(error) => rows[index].left_out = Some(format!("{error:#}")),
                }
            }
            self.measure(phase, &runs, &mut rows, outcome)?;
            note(&line(&rows));
            outcome.rows.extend(rows);
        }
        Ok(())
    }

    /// Which arms run how often in `seconds`; the rows of the others say why they do not.
    fn give_time(&self, phase: Phase, seconds: f64, rows: &mut [Row]) -> Vec<(usize, Rounds)> {
        let asked = Rounds { memory: self.plan.rounds.memory && phase.takes_text(), ..self.plan.rounds };
        let more = (asked.warmup + asked.runs) * DECODE_TOKENS;
        let mut candidates = Vec::new();
        for (index, row) in rows.iter_mut().enumerate() {
            row.left_out = self.field.obstacle(row.arm, phase, self.tokens, more);
            if row.left_out.is_none() {
                candidates.push((index, self.cost(row.arm, phase)));
            }
        }
        let costs: Vec<Cost> = candidates.iter().map(|(_, cost)| *cost).collect();
        let mut given = Vec::new();
        for (&(index, cost), rounds) in candidates.iter().zip(divide(&costs, asked, seconds)) {
            match rounds {
                Some(rounds) => given.push((index, rounds)),
                None => {
                    let needed = cost.fixed + cost.run;
                    rows[index].left_out = Some(format!("no time: would take about {}", duration(needed)));
                }
            }
        }
        given
    }

    /// What an arm is expected to cost here.
    fn cost(&self, arm: Arm, phase: Phase) -> Cost {
        let Some((_, past)) = self.pasts.iter().find(|(other, _)| *other == arm) else {
            return Cost { fixed: 0.0, run: 0.0 };
        };
        let seconds = |history: &History, power| history.expected(self.tokens, power).unwrap_or(0.0);
        match phase {
            Phase::Prefill | Phase::Training => {
                let run = expected_run(self.field, arm, phase, past.of(phase), self.tokens);
                let windows = self.field.windows(self.tokens).filter(|_| !arm.is_foreign());
                Cost { fixed: windows.map_or(0.0, |(least, _)| QUALITY_COST * least as f64 * run), run }
            }
            Phase::Decode => {
                let made = self.subjects.iter().any(|(other, _)| *other == arm);
                // A model that was just measured holds its text already.
                let held = made && self.field.part() == Part::Model;
                let fixed = if held { 0.0 } else { seconds(&past.prepare, 1.0) };
                let token = seconds(&past.decode, if arm.is_bsbr() { 0.3 } else { 1.0 });
                // llama.cpp reads the text again for every run.
                let again = if arm == Arm::LlamaCpp { seconds(&past.prefill, 1.0) } else { 0.0 };
                Cost { fixed, run: again + token * DECODE_TOKENS as f64 }
            }
        }
    }

    /// Measures the quality of what ran, on as many windows as there is time for; it counts for all rows of an arm.
    fn add_quality(&self, point: Budget, rows: &mut [Row]) {
        let Some((least, most)) = self.field.windows(self.tokens) else { return };
        let ran = |phase: Option<Phase>, arm: Arm| {
            let is_it = |row: &Row| row.arm == arm && phase.is_none_or(|phase| row.phase == phase);
            rows.iter().any(|row| is_it(row) && row.left_out.is_none())
        };
        let own = || self.field.arms().iter().copied().filter(|arm| !arm.is_foreign());
        let arms: Vec<Arm> = own().filter(|&arm| ran(None, arm)).collect();
        if arms.is_empty() {
            return;
        }
        // The original is read in any case.
        let read = arms.iter().copied().filter(|&arm| arm != Arm::Dense).chain([Arm::Dense]);
        let window: f64 = read.map(|arm| QUALITY_COST * self.cost(arm, Phase::Prefill).run).sum();
        let affordable = (point.left() / window.max(1e-9)) as usize;
        let measured = if affordable == 0 && !own().any(|arm| ran(Some(Phase::Prefill), arm)) {
            Err(anyhow::anyhow!("no time: would take about {}", duration(window)))
        } else {
            self.field.quality(&arms, self.tokens, affordable.clamp(least, most))
        };
        for row in rows.iter_mut().filter(|row| row.left_out.is_none() && !row.arm.is_foreign()) {
            match &measured {
                Ok(measured) => {
                    let own = measured.iter().find(|(arm, _)| *arm == row.arm);
                    row.quality = own.map(|(_, quality)| quality.clone());
                }
                Err(error) => row.notes.push(format!("no quality: {error:#}")),
            }
        }
    }

    fn prepare(&mut self, arm: Arm, phase: Phase) -> Result<()> {
        if !self.subjects.iter().any(|(other, _)| *other == arm) {
            self.subjects.push((arm, self.field.subject(arm)?));
        }
        let start = Instant::now();
        for (_, subject) in self.subjects.iter_mut().filter(|(other, _)| *other == arm) {
            subject.prepare(phase)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        if phase == Phase::Decode
            && let Some((_, past)) = self.pasts.iter_mut().find(|(other, _)| *other == arm)
        {
            past.prepare.push(self.tokens, seconds);
        }
        Ok(())
    }

    /// Runs what was given time, and fills in the rows.
    fn measure(
        &mut self,
        phase: Phase,
        runs: &[(usize, Rounds)],
        rows: &mut [Row],
        outcome: &mut Outcome,
    ) -> Result<()> {
        let rounds_of = |arm: Arm| runs.iter().find(|(index, _)| rows[*index].arm == arm).map(|(_, rounds)| *rounds);
        let mut contenders: Vec<Contender<'_>> = Vec::with_capacity(runs.len());
        for (arm, subject) in &mut self.subjects {
            if let Some(rounds) = rounds_of(*arm) {
                contenders.push(Contender { name: arm.name(), subject: subject.as_mut(), rounds });
            }
        }
        let gemm = self.gemm.filter(|_| phase.takes_text());
        let samples = interleaved(&mut contenders, phase, gemm)?;
        for (contender, result) in contenders.iter_mut().zip(samples.arms) {
            let Some(row) = rows.iter_mut().find(|row| row.arm.name() == contender.name) else { continue };
            match result {
                Ok(seconds) => {
                    if phase.takes_text() {
                        let found = contender.subject.retrieved()?;
                        row.retrieved = found.map(Into::into);
                        let operations = self.field.operations(row.arm, phase, self.tokens, found);
                        row.operations = operations.map(|operations| operations.float);
                        row.integer_operations = operations.map(|operations| operations.integer);
                    } else {
                        row.kept_bytes = contender.subject.kept_bytes();
                    }
                    row.warmup = contender.rounds.warmup;
                    row.measured(seconds, self.field.tokens_read(phase, self.tokens), &samples.gemm);
                }
                Err(error) => row.left_out = Some(format!("{error:#}")),
            }
        }
        outcome.gemm.extend(samples.gemm);
        for row in rows.iter_mut().filter(|row| row.left_out.is_none()) {
            if let (Some(seconds), Some((_, past))) =
                (row.seconds, self.pasts.iter_mut().find(|(other, _)| *other == row.arm))
            {
                past.push(phase, self.tokens, seconds.median);
            }
        }
        for (index, rounds) in runs {
            let row = &mut rows[*index];
            if phase.takes_text() && row.left_out.is_none() {
                match rounds.memory.then(|| self.field.memory(row.arm, phase, self.tokens)) {
                    Some(Ok(memory)) => row.memory = Some(memory),
                    Some(Err(error)) => row.notes.push(format!("no memory: {error:#}")),
                    None if self.plan.rounds.memory => row.notes.push("no memory: no time".into()),
                    None => {}
                }
            }
        }
        Ok(())
    }
}

/// One line about a point, for the person who watches.
fn line(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let arms = rows.iter().map(|row| {
        let time = row.seconds.map_or_else(|| "left out".into(), |seconds| duration(seconds.median));
        format!("{} {time}", row.arm.name())
    });
    let arms: Vec<String> = arms.collect();
    format!("{} {} {}: {}", first.part.name(), first.phase.name(), first.tokens, arms.join(", "))
}

/// Seconds in the unit that suits them, with three digits.
pub fn duration(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "us"),
    };
    let decimals = (2 - value.max(1.0).log10().floor() as i32).max(0) as usize;
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_digits_and_a_unit() {
        let shown = [0.0, 1.234e-6, 0.000_999, 0.012_34, 0.1234, 1.0, 12.345, 123.45, 4321.0].map(duration);
        let expected = ["0.00 us", "1.23 us", "999 us", "12.3 ms", "123 ms", "1.00 s", "12.3 s", "123 s", "4321 s"];
        assert_eq!(shown, expected);
    }
}
