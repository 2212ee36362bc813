//! A report as a picture: time and extra memory by length, both axes logarithmic. Panels of other reports are drawn alike.

use std::fmt::Display;

use anyhow::Result;
use plotters::{
    chart::ChartContext,
    coord::{
        Shift,
        combinators::{IntoLogRange, LogCoord},
        ranged1d::ValueFormatter,
    },
    prelude::*,
};

use super::{
    Arm, Part, Phase,
    machine::Machine,
    report::{Report, Row},
    session::duration,
};
use crate::output::bytes;

type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<LogCoord<f64>, Y>>;

/// Pixels of one panel.
const PANEL: (u32, u32) = (560, 400);

/// Panels beside each other.
const COLUMNS: usize = 2;

/// Pixels of the line above all panels.
pub(crate) const CAPTION: u32 = 34;

/// Pixels of a line of the legend below a panel, of the sample of a line in it, and of a letter.
const LEGEND: (u32, i32, i32) = (18, 18, 7);

/// Less memory than this is drawn as this much: the system counts in batches of pages, and nothing at all has no place on
/// a logarithmic axis.
const LEAST_MEMORY: f64 = 1e5;

/// Several lines over one horizontal axis, which is logarithmic.
#[derive(Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// What the horizontal axis counts.
    pub across: &'static str,
    /// Of a value on the horizontal axis.
    pub label_across: fn(f64) -> String,
    /// Of a value on the vertical axis.
    pub label: fn(f64) -> String,
    /// The range of the vertical axis, which is linear then; a logarithmic one fits its values.
    pub linear: Option<(f64, f64)>,
    /// In the order of the legend.
    pub lines: Vec<Line>,
}

/// One line of a panel.
#[derive(Debug, PartialEq)]
pub struct Line {
    /// In the legend.
    pub name: &'static str,
    /// Of line and points.
    pub color: RGBColor,
    /// In the order in which they are joined.
    pub points: Vec<(f64, f64)>,
    /// Lower and upper quartile at a place, where there are several samples.
    pub quartiles: Vec<(f64, f64, f64)>,
}

/// The picture of a report as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    let (settings, machine) = (&report.settings, &report.machine);
    let what = settings.model.clone().unwrap_or_else(|| format!("attention {}", settings.data));
    let caption = caption(&what, machine, settings.threads);
    picture(&panels(&report.rows), &caption)
}

/// What a picture shows, and where it was measured.
pub fn caption(what: &str, machine: &Machine, threads: usize) -> String {
    format!("{what}; {}, {threads} threads; bsbr {}", machine.cpu, env!("CARGO_PKG_VERSION"))
}

/// Panels side by side as SVG, under a line that says what and where.
///
/// # Errors
///
/// If there is nothing to draw.
pub fn picture(panels: &[Panel], caption: &str) -> Result<String> {
    anyhow::ensure!(!panels.is_empty(), "--plot: nothing was measured that could be drawn");
    let mut svg = String::new();
    let (rows, columns) = (panels.len().div_ceil(COLUMNS), COLUMNS.min(panels.len()));
    let (width, height) = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + CAPTION);
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let below = captioned(&root, caption)?;
        for (area, panel) in below.split_evenly((rows, columns)).iter().zip(panels) {
            draw(area, panel)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// Writes the caption; the area below it.
pub(crate) fn captioned<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    caption: &str,
) -> Result<DrawingArea<SVGBackend<'a>, Shift>> {
    let (above, below) = root.split_vertically(CAPTION);
    // As much as fits: names of machines are long.
    let most = (root.dim_in_pixel().0 as usize / 6).max(10);
    let shown: String = match caption.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &caption[..end]),
        None => caption.to_owned(),
    };
    above.draw(&Text::new(shown, (14, 12), style(12))).map_err(failed)?;
    Ok(below)
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow::anyhow!("--plot: {error}")
}

/// Time of every part and phase, and memory of what takes whole texts.
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
                Line { name: arm.name(), color: color(arm), points: points.collect(), quartiles }
            };
            let lines: Vec<_> = arms(rows).into_iter().map(of).filter(|line| !line.points.is_empty()).collect();
            if !lines.is_empty() {
                panels.push(Panel { title, across: "tokens", label_across: thousands, label, linear: None, lines });
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
    let rows = legend_rows(panel);
    let (area, below) = area.split_vertically(PANEL.1 - LEGEND.0 * rows.len() as u32 - 6);
    legend(&below, &rows)?;
    let points = || panel.lines.iter().flat_map(|line| &line.points).copied();
    let ends = || panel.lines.iter().flat_map(|line| &line.quartiles).flat_map(|&(x, low, high)| [(x, low), (x, high)]);
    let bounds = |of: fn((f64, f64)) -> f64| {
        let all = points().chain(ends()).map(of);
        let (low, high) = all.fold((f64::INFINITY, 0.0_f64), |(l, h), x| (l.min(x), h.max(x)));
        (low / 1.25)..(high * 1.25)
    };
    let x = bounds(|point| point.0).log_scale().base(2.0);
    let mut builder = ChartBuilder::on(&area);
    builder.caption(&panel.title, style(17)).margin(14).x_label_area_size(42).y_label_area_size(64);
    if let Some((low, high)) = panel.linear {
        return lines(builder.build_cartesian_2d(x, low..high).map_err(failed)?, panel);
    }
    let mut y = bounds(|point| point.1);
    if y.end / y.start < 100.0 {
        // Room for at least two powers of ten, which is where the labels are.
        y = 10_f64.powf(y.start.log10().floor())..10_f64.powf(y.end.log10().ceil());
    }
    lines(builder.build_cartesian_2d(x, y.log_scale()).map_err(failed)?, panel)
}

/// The lines of a panel in rows that are as wide as it.
fn legend_rows(panel: &Panel) -> Vec<Vec<(&'static str, RGBColor, i32)>> {
    let (_, sample, letter) = LEGEND;
    let (mut rows, mut at) = (vec![Vec::new()], 70);
    for line in &panel.lines {
        let width = sample + 8 + letter * line.name.len() as i32 + 16;
        if at + width > PANEL.0 as i32 && rows.last().is_some_and(|row| !row.is_empty()) {
            rows.push(Vec::new());
            at = 70;
        }
        if let Some(row) = rows.last_mut() {
            row.push((line.name, line.color, at));
        }
        at += width;
    }
    rows
}

/// Names and colours below a panel, where they cover nothing.
pub(crate) fn legend(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    rows: &[Vec<(&'static str, RGBColor, i32)>],
) -> Result<()> {
    let (height, sample, _) = LEGEND;
    for (row, entries) in rows.iter().enumerate() {
        let y = (height as usize * row + 8) as i32;
        for &(name, color, x) in entries {
            area.draw(&PathElement::new([(x, y), (x + sample, y)], color.stroke_width(2))).map_err(failed)?;
            area.draw(&Circle::new((x + sample / 2, y), 3, color.filled())).map_err(failed)?;
            area.draw(&Text::new(name, (x + sample + 6, y - 6), style(12))).map_err(failed)?;
        }
    }
    Ok(())
}

fn style(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK)
}

fn lines<'a, 'b: 'a, Y>(mut chart: Chart<'a, 'b, Y>, panel: &Panel) -> Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64> + 'a,
{
    chart
        .configure_mesh()
        .x_desc(panel.across)
        .x_labels(9)
        .y_labels(8)
        .label_style(style(12))
        .axis_desc_style(style(13))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(224, 224, 224))
        .set_all_tick_mark_size(4)
        .x_label_formatter(&|value| (panel.label_across)(*value))
        .y_label_formatter(&|value| (panel.label)(*value))
        .draw()
        .map_err(failed)?;
    for line in &panel.lines {
        let color = line.color;
        let series = LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(0);
        chart.draw_series(series).map_err(failed)?;
        chart.draw_series(line.points.iter().map(|&point| Circle::new(point, 3, color.filled()))).map_err(failed)?;
        let bars =
            line.quartiles.iter().map(|&(x, low, high)| PathElement::new([(x, low), (x, high)], color.stroke_width(1)));
        chart.draw_series(bars).map_err(failed)?;
    }
    Ok(())
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
pub fn thousands(tokens: f64) -> String {
    let tokens = tokens.round() as u64;
    if tokens >= 1024 && tokens.is_multiple_of(1024) { format!("{}k", tokens / 1024) } else { tokens.to_string() }
}

/// `1.00 ms` as `1 ms`.
pub fn trimmed(text: &str) -> String {
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
    fn a_legend_lies_below_and_within_its_panel() {
        let line = |name| Line { name, color: BLACK, points: vec![(1.0, 1.0)], quartiles: Vec::new() };
        let panel = Panel {
            title: "t".into(),
            across: "tokens",
            label_across: thousands,
            label: thousands,
            linear: None,
            lines: ["bsbr", "torch-original", "transformers", "bsbr-plain", "torch-sdpa", "dense", "burn"]
                .map(line)
                .into(),
        };
        let rows = legend_rows(&panel);
        assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), 7);
        for row in &rows {
            for pair in row.windows(2) {
                assert!(pair[0].2 + LEGEND.1 + LEGEND.2 * pair[0].0.len() as i32 <= pair[1].2, "{row:?}");
            }
            let last = row.last().unwrap();
            assert!(last.2 + LEGEND.1 + LEGEND.2 * last.0.len() as i32 <= PANEL.0 as i32, "{row:?}");
        }
    }

    #[test]
    fn there_is_a_panel_for_what_was_measured_and_for_nothing_else() {
        let mut row = Row::new(Part::Model, Phase::Decode, Arm::Dense, 512);
        assert!(panels(std::slice::from_ref(&row)).is_empty());
        row.measured(vec![0.5], 1, &[]);
        let panels = panels(&[row]);
        assert_eq!(panels.len(), 1);
        let line = Line {
            name: "dense",
            color: color(Arm::Dense),
            points: vec![(512.0, 0.5)],
            quartiles: vec![(512.0, 0.5, 0.5)],
        };
        assert_eq!(panels[0].lines, [line]);
    }
}
