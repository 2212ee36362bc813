//! What the families learned, as text.

use bsbr_zoo::{
    Family,
    tasks::Task,
    train::{OverSeeds, Run, Score, merged},
};

use super::report::{Trained, TrainedTask};
use bsbr::harness::{bytes, grouped, table};

/// One line about a finished run, for the person who watches.
pub(crate) fn line(run: &Run, done: usize, all: usize) -> String {
    let spec = &run.spec;
    let result = match (run.diverged, merged(&run.scores, |_| true)) {
        (Some(step), _) => format!("diverged at step {step}"),
        (None, Some(score)) if spec.task == Task::Text => format!("{:.3} bits a character", bits(&score)),
        (None, Some(score)) => format!("{:.1} % right", 100.0 * score.accuracy()),
        (None, None) => String::new(),
    };
    let family = spec.decoder.family;
    format!("{done} of {all}: {} {family} seed {}: {result}, {:.0} s", spec.task, spec.seed, run.seconds)
}

fn bits(score: &Score) -> f64 {
    score.nats / std::f64::consts::LN_2
}

/// The runs of one family on one task.
fn of(trained: &Trained, task: Task, family: Family) -> impl Iterator<Item = &Run> {
    trained.runs.iter().filter(move |run| (run.spec.task, run.spec.decoder.family) == (task, family))
}

/// A number of the kept scores of every seed: share of right answers, or bits for each character.
pub(crate) fn over_seeds(
    trained: &Trained,
    task: Task,
    family: Family,
    keep: impl Fn(&Score) -> bool + Copy,
) -> Option<OverSeeds> {
    let value = |score: Score| if task == Task::Text { bits(&score) } else { score.accuracy() };
    let values: Vec<f64> = of(trained, task, family).filter_map(|run| merged(&run.scores, keep).map(value)).collect();
    OverSeeds::of(&values)
}

fn cell(task: Task, over: Option<OverSeeds>) -> String {
    let Some(over) = over else { return "-".into() };
    let (shown, spread) = match task {
        Task::Text => (format!("{:.3}", over.mean), format!("{:.3}-{:.3}", over.least, over.greatest)),
        _ => {
            let percent = |share: f64| format!("{:.0}", 100.0 * share);
            (format!("{} %", percent(over.mean)), format!("{}-{}", percent(over.least), percent(over.greatest)))
        }
    };
    if over.seeds > 1 { format!("{shown} ({spread})") } else { shown }
}

/// Sizes that were asked for, ascending.
pub(crate) fn sizes(trained: &Trained, task: Task) -> Vec<usize> {
    let mut sizes: Vec<usize> =
        trained.runs.iter().filter(|run| run.spec.task == task).flat_map(|run| &run.scores).map(|s| s.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Distances that were asked over, ascending.
pub(crate) fn ranges(trained: &Trained, task: Task) -> Vec<(usize, usize)> {
    let runs = trained.runs.iter().filter(|run| run.spec.task == task);
    let mut ranges: Vec<(usize, usize)> =
        runs.flat_map(|run| &run.scores).map(|score| (score.from_chunk, score.to_chunk)).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// The tables of all tasks.
pub(crate) fn text(trained: &Trained, families: &[Family]) -> String {
    trained.tasks.iter().map(|task| task_text(trained, task, families)).collect::<Vec<_>>().join("\n\n")
}

fn task_text(trained: &Trained, set: &TrainedTask, families: &[Family]) -> String {
    let task = set.task;
    let mut blocks = vec![title(trained, set)];
    let ranges = ranges(trained, task);
    let by_distance = |family: Family| {
        ranges.iter().map(move |&(from, _)| over_seeds(trained, task, family, move |score| score.from_chunk == from))
    };
    let chunk = set.train.chunk_size;
    let distance = |&(from, to): &(usize, usize)| format!("{}-{}", from * chunk, (to + 1) * chunk - 1);
    let head = if task == Task::Text { "tokens before" } else { "tokens back" };
    let chunks = ranges.iter().map(|(from, to)| format!("{from}-{to}")).collect::<Vec<_>>().join(", ");
    if let Some(name) = task.size_name() {
        let sizes = sizes(trained, task);
        let columns: Vec<String> = sizes.iter().map(usize::to_string).collect();
        let by_size = |family: Family| {
            let of = move |&size: &usize| over_seeds(trained, task, family, move |score| score.size == size);
            sizes.iter().map(of).collect()
        };
        blocks.push(section(name, &columns, families, task, by_size));
    }
    // The distance of a copy is its size.
    if task != Task::Copy {
        let columns: Vec<String> = ranges.iter().map(distance).collect();
        blocks.push(section(head, &columns, families, task, |family| by_distance(family).collect()));
        blocks.push(format!("In chunks of {chunk}: {chunks}."));
    }
    blocks.push(notes(trained, set, families));
    blocks.join("\n\n")
}

fn section(
    head: &str,
    columns: &[String],
    families: &[Family],
    task: Task,
    of: impl Fn(Family) -> Vec<Option<OverSeeds>>,
) -> String {
    let header: Vec<&str> = std::iter::once(head).chain(columns.iter().map(String::as_str)).collect();
    let row = |&family: &Family| {
        let cells = of(family).into_iter().map(|over| cell(task, over));
        std::iter::once(family.to_string()).chain(cells).collect()
    };
    table(&header, &families.iter().map(row).collect::<Vec<Vec<String>>>())
}

fn title(trained: &Trained, set: &TrainedTask) -> String {
    let asked = match set.task {
        Task::Recall => "associative recall: share of right values",
        Task::Copy => "copying: share of right symbols",
        Task::Passkey => "passkey: share of right digits",
        Task::Text => "character text: bits for each character (fewer are better)",
    };
    let chance = set.chance.map_or_else(String::new, |chance| format!(", {:.1} % by guessing", 100.0 * chance));
    let (train, seeds) = (&set.train, trained.seeds);
    format!(
        "**{}**, {asked}{chance}. {} sequences of up to {} tokens, vocabulary {}; mean of {seeds} seeds, least and greatest in \
         brackets",
        set.task,
        grouped((train.steps * train.batch) as u64),
        train.length,
        set.vocabulary
    )
}

/// Last losses, times, sizes and failures.
fn notes(trained: &Trained, set: &TrainedTask, families: &[Family]) -> String {
    let rows: Vec<Vec<String>> = families
        .iter()
        .map(|&family| {
            let runs: Vec<&Run> = of(trained, set.task, family).collect();
            let losses: Vec<f64> = runs.iter().filter_map(|run| run.losses.last()).map(|point| point.loss).collect();
            let seconds: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
            let first = runs.first();
            vec![
                family.to_string(),
                OverSeeds::of(&losses).map_or_else(|| "-".into(), |over| format!("{:.3}", over.mean)),
                OverSeeds::of(&seconds).map_or_else(|| "-".into(), |over| format!("{:.0}", over.mean)),
                first.map_or_else(String::new, |run| grouped(run.parameters as u64)),
                first.map_or_else(String::new, |run| bytes(run.state_bytes)),
            ]
        })
        .collect();
    let mut text = table(&["family", "last loss, nats", "seconds a run", "parameters", "state"], &rows);
    for run in trained.runs.iter().filter(|run| run.spec.task == set.task) {
        if let Some(step) = run.diverged {
            text.push_str(&format!("\n\n{} seed {} diverged at step {step}.", run.spec.decoder.family, run.spec.seed));
        }
    }
    text
}

/// How all of them are trained.
pub(crate) fn settings(trained: &Trained) -> String {
    let Some(first) = trained.tasks.first().map(|set| &set.train) else { return String::new() };
    let each = trained.tasks.iter().map(|set| {
        let t = &set.train;
        format!(
            "{}: {} steps of {} sequences at {}, the first {:.0} % of them with sequences of {} tokens, the next {:.0} % of {}",
            set.task,
            t.steps,
            t.batch,
            t.learning_rate,
            100.0 * t.quarter_share,
            t.length / 4,
            100.0 * t.half_share,
            t.length / 2
        )
    });
    format!(
        "AdamW, warm-up of {} steps, cosine to {:.0} % of the learning rate, weight decay {}, gradients clipped to norm {}. The same \
         sequences in the same order for every family, start values by seed; no setting was chosen for one family alone. {}.",
        first.warmup,
        100.0 * first.final_share,
        first.weight_decay,
        first.clip,
        each.collect::<Vec<_>>().join("; ")
    )
}
