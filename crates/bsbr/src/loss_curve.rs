//! Losses by step as a picture.

use anyhow::{Context, Result};
use bsbr_model::{Stage, TuneLog};

use crate::plot::{Axis, Color, Line, Panel, picture};

/// The picture as SVG: a panel for each stage that ran.
pub(crate) fn svg(log: &TuneLog, caption: &str) -> Result<String> {
    picture(&panels(log), caption).context("the loss curve cannot be drawn")
}

fn panels(log: &TuneLog) -> Vec<Panel> {
    let of = |(stage, title): (Stage, &str)| {
        // A loss of 0 has no place on a logarithmic axis.
        let point = |step: usize, loss: f64| (step as f64, loss.max(1e-12));
        let trained = log.steps.iter().filter(|record| record.stage == stage);
        let trained: Vec<_> = trained.map(|record| point(record.step, record.loss)).collect();
        let held_out = log.held_out.iter().filter(|record| record.stage == stage);
        let held_out: Vec<_> = held_out.map(|record| point(record.step, record.loss)).collect();
        let last = trained.iter().chain(&held_out).fold(1.0_f64, |last, point| last.max(point.0));
        let line = |name: &str, color, points| Line { marked: false, ..Line::new(name, color, points) };
        Panel {
            title: title.to_owned(),
            across: Axis::linear("steps", |step| format!("{step:.0}"), (0.0, last)),
            up: Axis::log("", |loss| format!("{loss:.1e}")),
            lines: vec![
                line("held out", Color(213, 94, 0), held_out),
                line("trained on", Color(86, 180, 233), trained),
            ],
            marks: Vec::new(),
        }
    };
    let stages = [(Stage::Layers, "layer by layer: relative error"), (Stage::Logits, "logits: divergence")];
    let panels = stages.into_iter().map(of);
    panels.filter(|panel| panel.lines.iter().any(|line| !line.points.is_empty())).collect()
}
