//! Both parts as pictures.

use anyhow::Result;
use bsbr_zoo::{Family, tasks::Task};

use super::{
    report::{Cost, Report, Row, Trained},
    trained_table::{over_seeds, ranges, sizes},
};
use bsbr::harness::{Axis, Color, Line, Panel, Phase, bytes, caption, duration, picture, thousands, trimmed};

/// The picture as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    let families: Vec<Family> = report.families.iter().map(|about| about.family).collect();
    let mut panels = Vec::new();
    if let Some(cost) = &report.cost {
        panels.extend(cost_panels(cost, &families));
    }
    if let Some(trained) = &report.trained {
        panels.extend(trained_panels(trained, &families));
    }
    let what = "small decoders of each family of attention";
    picture(&panels, &caption(what, &report.machine, threads(report)))
}

/// What is drawn of a row, and how it is written beside the axis.
type OfRow = fn(&Row) -> Option<f64>;
type Label = fn(f64) -> String;

/// Threads of the runs.
fn threads(report: &Report) -> usize {
    let timed = report.cost.as_ref().map(|cost| cost.threads);
    timed.or(report.trained.as_ref().map(|trained| trained.jobs)).unwrap_or(1)
}

fn cost_panels(cost: &Cost, families: &[Family]) -> Vec<Panel> {
    let seconds: Label = |value| trimmed(&duration(value));
    let size: Label = |value| trimmed(&bytes(value as u64));
    let time: OfRow = |row| Some(row.seconds?.median);
    let memory: OfRow = |row| row.memory.map(|memory| memory.peak as f64);
    let state: OfRow = |row| row.state_bytes.map(|bytes| bytes as f64);
    let wanted = [
        ("time to read a text", Phase::Prefill, time, seconds),
        ("time of one token behind a text", Phase::Decode, time, seconds),
        ("resident memory while reading a text", Phase::Prefill, memory, size),
        ("state kept for the next token", Phase::Decode, state, size),
    ];
    let panel = |(title, phase, value, label): (&str, Phase, OfRow, Label)| {
        let line = |&family: &Family| {
            let rows = cost.rows.iter().filter(|row| (row.family, row.phase) == (family, phase));
            let points = rows.clone().filter_map(|row| Some((row.tokens as f64, value(row)?.max(1e-9)))).collect();
            let spread = rows.filter_map(|row| {
                let seconds = row.seconds?;
                Some((row.tokens as f64, seconds.lower_quartile.max(1e-9), seconds.upper_quartile.max(1e-9)))
            });
            let quartiles = if title.starts_with("time") { spread.collect() } else { Vec::new() };
            Line { quartiles, ..Line::new(family.name(), color(family), points) }
        };
        let lines: Vec<Line> = families.iter().map(line).filter(|line| !line.points.is_empty()).collect();
        (!lines.is_empty()).then(|| Panel {
            title: title.into(),
            across: Axis::log("tokens", thousands),
            up: Axis::log("", label),
            lines,
            marks: Vec::new(),
        })
    };
    wanted.into_iter().filter_map(panel).collect()
}

fn trained_panels(trained: &Trained, families: &[Family]) -> Vec<Panel> {
    let mut panels = Vec::new();
    for set in &trained.tasks {
        let task = set.task;
        let chunk = set.train.chunk_size;
        if let Some(across) = task.size_name() {
            let sizes = sizes(trained, task);
            let lines = families.iter().map(|&family| {
                let point = |&size: &usize| {
                    let over = over_seeds(trained, task, family, |score| score.size == size)?;
                    Some((size as f64, over.mean))
                };
                Line::new(family.name(), color(family), sizes.iter().filter_map(point).collect())
            });
            panels.push(panel(format!("{task}: by {across}"), across, task, lines.collect()));
        }
        if task != Task::Copy {
            let ranges = ranges(trained, task);
            let across = if task == Task::Text { "tokens before, up to" } else { "tokens back, up to" };
            let lines = families.iter().map(|&family| {
                let point = |&(from, to): &(usize, usize)| {
                    let over = over_seeds(trained, task, family, |score| score.from_chunk == from)?;
                    Some((((to + 1) * chunk) as f64, over.mean))
                };
                Line::new(family.name(), color(family), ranges.iter().filter_map(point).collect())
            });
            panels.push(panel(format!("{task}: by distance"), across, task, lines.collect()));
        }
    }
    panels.retain(|panel| panel.lines.iter().any(|line| !line.points.is_empty()));
    panels
}

fn panel(title: String, across: &'static str, task: Task, lines: Vec<Line>) -> Panel {
    let lines: Vec<Line> = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
    let values = || lines.iter().flat_map(|line| &line.points).map(|point| point.1);
    let share: fn(f64) -> String = |value| format!("{:.0} %", 100.0 * value);
    let bits: fn(f64) -> String = |value| format!("{value:.2}");
    let (range, label) = match task {
        Task::Text => {
            let (low, high) = values().fold((f64::INFINITY, 0.0_f64), |(l, h), value| (l.min(value), h.max(value)));
            ((low - 0.05, high + 0.05), bits)
        }
        _ => ((0.0, 1.03), share),
    };
    let (across, up) = (Axis::log(across, thousands), Axis::linear("", label, range));
    Panel { title, across, up, lines, marks: Vec::new() }
}

/// Colours that can be told apart by the colour-blind (Okabe and Ito).
fn color(family: Family) -> Color {
    match family {
        Family::Standard => Color(213, 94, 0),
        Family::Bsbr => Color(0, 114, 178),
        Family::Linear => Color(230, 159, 0),
        Family::Delta => Color(0, 158, 115),
        Family::Window => Color(204, 121, 167),
        Family::Hopfield => Color(86, 180, 233),
        Family::Gau => Color(0, 0, 0),
    }
}
