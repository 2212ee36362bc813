//! A report as a picture: time and extra memory by length, both axes logarithmic, and where the one overtakes the other.

use anyhow::Result;

use super::{
    Arm, Part, Phase,
    report::{Report, Row},
    session::duration,
    statistics::overtakes,
};
use crate::{
    output::{bytes, grouped},
    plot::{Axis, Color, Line, Panel, caption, picture, thousands, trimmed},
};

/// Less memory than this is drawn as this much: the system counts in batches of pages, and nothing at all has no place on
/// a logarithmic axis.
const LEAST_MEMORY: f64 = 1e5;

/// The picture of a report as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    picture(&panels(&report.rows), &headline(report))
}

/// What was measured, and where.
pub(crate) fn headline(report: &Report) -> String {
    let (settings, machine) = (&report.settings, &report.machine);
    let what = settings.model.clone().unwrap_or_else(|| format!("attention {}", settings.data));
    caption(&what, machine, settings.threads)
}

/// Time of every part and phase, and memory of what takes whole texts.
pub(crate) fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels = Vec::new();
    for part in [Part::Attention, Part::Model] {
        let name = if part == Part::Attention { "attention" } else { "whole model" };
        let time: fn(&Row) -> Option<f64> = |row| Some(row.seconds?.median);
        let memory: fn(&Row) -> Option<f64> = |row| Some((row.memory?.extra_bytes as f64).max(LEAST_MEMORY));
        let seconds: fn(f64) -> String = |value| trimmed(&duration(value));
        let size: fn(f64) -> String = |value| trimmed(&bytes(value as u64));
        let wanted = [
            (Phase::Prefill, format!("{name}: time to read a text"), time, seconds),
            (Phase::Prefill, format!("{name}: memory to read a text, beyond K and V"), memory, size),
            (Phase::Decode, format!("{name}: time of one token behind a text"), time, seconds),
            (Phase::Training, format!("{name}: time to read a text and of its gradients"), time, seconds),
            (Phase::Training, format!("{name}: memory for that, beyond inputs and gradients"), memory, size),
        ];
        for (phase, title, value, label) in wanted {
            let is_time = label(1.0) == seconds(1.0);
            let of = |arm: Arm| {
                let rows = rows.iter().filter(|row| (row.part, row.phase, row.arm) == (part, phase, arm));
                let points = rows.clone().filter_map(|row| Some((row.tokens as f64, value(row)?.max(1e-9))));
                let spread = rows.filter_map(|row| {
                    let seconds = row.seconds?;
                    Some((row.tokens as f64, seconds.lower_quartile.max(1e-9), seconds.upper_quartile.max(1e-9)))
                });
                let quartiles = if is_time { spread.collect() } else { Vec::new() };
                Line { quartiles, ..Line::new(arm.name(), color(arm), points.collect()) }
            };
            let lines: Vec<_> = arms(rows).into_iter().map(of).filter(|line| !line.points.is_empty()).collect();
            if !lines.is_empty() {
                let marks = if is_time { break_even(&lines).into_iter().collect() } else { Vec::new() };
                let (across, up) = (Axis::log("tokens", thousands), Axis::log("", label));
                panels.push(Panel { title, across, up, lines, marks });
            }
        }
    }
    panels
}

/// From where on bsbr is faster than dense attention, between lengths as a straight line of the logarithms, and what is written
/// there; nothing where it is from the first length on, or never.
fn break_even(lines: &[Line]) -> Option<(f64, String)> {
    let of = |arm: Arm| lines.iter().find(|line| line.name == arm.name());
    let tokens = overtakes(&of(Arm::Bsbr)?.points, &of(Arm::Dense)?.points)?;
    Some((tokens, format!("break-even {}", grouped(tokens.round() as u64))))
}

/// Every arm once, in the order of the rows.
fn arms(rows: &[Row]) -> Vec<Arm> {
    let mut arms: Vec<Arm> = Vec::new();
    for row in rows {
        if !arms.contains(&row.arm) {
            arms.push(row.arm);
        }
    }
    arms
}

/// Colours that can be told apart by the colour-blind (Okabe and Ito).
fn color(arm: Arm) -> Color {
    match arm {
        Arm::Bsbr => Color(0, 114, 178),
        Arm::BsbrPlain => Color(86, 180, 233),
        Arm::Dense => Color(213, 94, 0),
        Arm::Burn => Color(230, 159, 0),
        Arm::TorchSdpa => Color(0, 158, 115),
        Arm::TorchOriginal => Color(204, 121, 167),
        Arm::Transformers => Color(0, 0, 0),
        Arm::LlamaCpp => Color(240, 228, 66),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_panel_for_what_was_measured_and_for_nothing_else() {
        let mut row = Row::new(Part::Model, Phase::Decode, Arm::Dense, 512);
        assert!(panels(std::slice::from_ref(&row)).is_empty());
        row.measured(vec![0.5], 1, &[]);
        let panels = panels(&[row]);
        assert_eq!(panels.len(), 1);
        let line =
            Line { quartiles: vec![(512.0, 0.5, 0.5)], ..Line::new("dense", color(Arm::Dense), vec![(512.0, 0.5)]) };
        assert_eq!(panels[0].lines, [line]);
        assert_eq!(panels[0].marks, []);
    }

    #[test]
    fn the_break_even_of_times_is_marked() {
        let mut rows = Vec::new();
        for (tokens, dense, bsbr) in [(1024, 1.0, 2.0), (4096, 16.0, 8.0)] {
            for (arm, seconds) in [(Arm::Dense, dense), (Arm::Bsbr, bsbr)] {
                let mut row = Row::new(Part::Attention, Phase::Prefill, arm, tokens);
                row.measured(vec![seconds], 1, &[]);
                rows.push(row);
            }
        }
        // Half as fast at one length, twice as fast at the other: even in the middle of the logarithms.
        let panels = panels(&rows);
        let (tokens, label) = &panels[0].marks[0];
        assert!((tokens - 2048.0).abs() < 1e-6, "{tokens}");
        assert_eq!(label, "break-even 2,048");
    }
}
