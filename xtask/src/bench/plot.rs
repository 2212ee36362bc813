//! A report as a picture: time and extra memory by length, both axes logarithmic.

use std::fmt::Display;

use anyhow::Result;
use plotters::{
    coord::{Shift, combinators::IntoLogRange},
    prelude::*,
};

use super::{
    Arm, Part, Phase,
    report::{Report, Row},
    session::duration,
};
use crate::output::bytes;

/// Pixels of one panel.
const PANEL: (u32, u32) = (560, 400);

/// Panels beside each other.
const COLUMNS: usize = 2;

/// Less memory than this is drawn as this much: the system counts in batches of pages, and nothing at all has no place on
/// a logarithmic axis.
const LEAST_MEMORY: f64 = 1e5;

/// One line for each arm.
struct Panel {
    title: String,
    /// Of a value on the vertical axis.
    label: fn(f64) -> String,
    lines: Vec<(Arm, Vec<(f64, f64)>)>,
}

/// The picture as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    let panels = panels(&report.rows);
    anyhow::ensure!(!panels.is_empty(), "--plot: nothing was measured that could be drawn");
    let mut svg = String::new();
    let grid = panels.len().div_ceil(COLUMNS);
    let size = (PANEL.0 * COLUMNS.min(panels.len()) as u32, PANEL.1 * grid as u32);
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        for (area, panel) in root.split_evenly((grid, COLUMNS.min(panels.len()))).iter().zip(&panels) {
            draw(area, panel)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow::anyhow!("--plot: {error}")
}

/// Time of every part and phase, and memory of reading.
fn panels(rows: &[Row]) -> Vec<Panel> {
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
        ];
        for (phase, title, value, label) in wanted {
            let of = |arm: Arm| {
                let rows = rows.iter().filter(|row| (row.part, row.phase, row.arm) == (part, phase, arm));
                let points = rows.filter_map(|row| Some((row.tokens as f64, value(row)?.max(1e-9))));
                (arm, points.collect::<Vec<_>>())
            };
            let lines: Vec<_> = arms(rows).into_iter().map(of).filter(|(_, points)| !points.is_empty()).collect();
            if !lines.is_empty() {
                panels.push(Panel { title, label, lines });
            }
        }
    }
    panels
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

fn draw(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<()> {
    let points = || panel.lines.iter().flat_map(|(_, points)| points);
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = points().map(of).fold((f64::INFINITY, 0.0_f64), |(l, h), x| (l.min(x), h.max(x)));
        (low / 1.25)..(high * 1.25)
    };
    let (x, mut y) = (bounds(|point| point.0), bounds(|point| point.1));
    if y.end / y.start < 100.0 {
        // Room for at least two powers of ten, which is where the labels are.
        y = 10_f64.powf(y.start.log10().floor())..10_f64.powf(y.end.log10().ceil());
    }
    let style = |size: u32| ("sans-serif", size).into_font().color(&BLACK);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, style(17))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(x.log_scale().base(2.0), y.log_scale())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .x_labels(9)
        .y_labels(8)
        .label_style(style(12))
        .axis_desc_style(style(13))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(224, 224, 224))
        .x_label_formatter(&|tokens| thousands(*tokens))
        .y_label_formatter(&|value| (panel.label)(*value))
        .draw()
        .map_err(failed)?;
    for (arm, points) in &panel.lines {
        let color = color(*arm);
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(0);
        let drawn = chart.draw_series(line).map_err(failed)?;
        drawn.label(arm.name()).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, color.filled()))).map_err(failed)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .label_font(style(12))
        .draw()
        .map_err(failed)
}

/// Colours that can be told apart by the colour-blind (Okabe and Ito).
fn color(arm: Arm) -> RGBColor {
    match arm {
        Arm::Bsbr => RGBColor(0, 114, 178),
        Arm::BsbrPlain => RGBColor(86, 180, 233),
        Arm::Dense => RGBColor(213, 94, 0),
        Arm::Burn => RGBColor(230, 159, 0),
        Arm::TorchSdpa => RGBColor(0, 158, 115),
        Arm::TorchOriginal => RGBColor(204, 121, 167),
        Arm::Transformers => RGBColor(0, 0, 0),
    }
}

/// `65536` as `64k`.
fn thousands(tokens: f64) -> String {
    let tokens = tokens.round() as u64;
    if tokens >= 1024 && tokens.is_multiple_of(1024) { format!("{}k", tokens / 1024) } else { tokens.to_string() }
}

/// `1.00 ms` as `1 ms`.
fn trimmed(text: &str) -> String {
    match text.split_once(' ') {
        Some((number, unit)) if number.contains('.') => {
            format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        assert_eq!([512.0, 1024.0, 65_536.0, 1000.0].map(thousands), ["512", "1k", "64k", "1000"]);
        assert_eq!(["1.00 ms", "12.5 s", "100 us", "0.00 us"].map(trimmed), ["1 ms", "12.5 s", "100 us", "0 us"]);
    }

    #[test]
    fn there_is_a_panel_for_what_was_measured_and_for_nothing_else() {
        let mut row = Row::new(Part::Model, Phase::Decode, Arm::Dense, 512);
        assert!(panels(std::slice::from_ref(&row)).is_empty());
        row.measured(vec![0.5], 1, &[]);
        let panels = panels(&[row]);
        assert_eq!(panels.len(), 1);
        assert_eq!(panels[0].lines, [(Arm::Dense, vec![(512.0, 0.5)])]);
    }
}
