//! Losses by step as a picture.

use std::fmt::Display;

use anyhow::Result;
use bsbr_model::{Stage, TuneLog};
use plotters::{
    coord::{Shift, combinators::IntoLogRange},
    prelude::*,
};

use crate::bench::plot::{CAPTION, captioned, legend};

/// Pixels of the panel of a stage.
const PANEL: (u32, u32) = (560, 400);

/// The losses of a stage.
struct Panel {
    title: &'static str,
    /// Of every step.
    trained: Vec<(f64, f64)>,
    held_out: Vec<(f64, f64)>,
}

/// The picture as SVG: a panel for each stage that ran.
pub(crate) fn svg(log: &TuneLog, caption: &str) -> Result<String> {
    let panels = panels(log);
    let mut svg = String::new();
    {
        let size = (PANEL.0 * panels.len().max(1) as u32, PANEL.1 + CAPTION);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let below = captioned(&root, caption)?;
        for (area, panel) in below.split_evenly((1, panels.len().max(1))).iter().zip(&panels) {
            draw(area, panel)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow::anyhow!("the loss curve cannot be drawn: {error}")
}

fn panels(log: &TuneLog) -> Vec<Panel> {
    let of = |(stage, title)| {
        // A loss of 0 has no place on a logarithmic axis.
        let point = |step: usize, loss: f64| (step as f64, loss.max(1e-12));
        let trained = log.steps.iter().filter(|record| record.stage == stage);
        let held_out = log.held_out.iter().filter(|record| record.stage == stage);
        Panel {
            title,
            trained: trained.map(|record| point(record.step, record.loss)).collect(),
            held_out: held_out.map(|record| point(record.step, record.loss)).collect(),
        }
    };
    let stages = [(Stage::Layers, "layer by layer: relative error"), (Stage::Logits, "logits: divergence")];
    let panels = stages.into_iter().map(of);
    panels.filter(|panel| !(panel.trained.is_empty() && panel.held_out.is_empty())).collect()
}

/// The two lines, and where their names stand below a panel.
const TRAINED: (&str, RGBColor, i32) = ("trained on", RGBColor(86, 180, 233), 70);
const HELD_OUT: (&str, RGBColor, i32) = ("held out", RGBColor(213, 94, 0), 200);

fn draw(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<()> {
    let (area, below) = area.split_vertically(PANEL.1 - 24);
    legend(&below, &[vec![TRAINED, HELD_OUT]])?;
    let points = || panel.trained.iter().chain(&panel.held_out);
    let (low, high) =
        points().fold((f64::INFINITY, 0.0_f64), |(low, high), &(_, loss)| (low.min(loss), high.max(loss)));
    let last = points().fold(1.0_f64, |last, &(step, _)| last.max(step));
    let style = |size: u32| ("sans-serif", size).into_font().color(&BLACK);
    let mut chart = ChartBuilder::on(&area)
        .caption(panel.title, style(17))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, ((low / 1.25)..(high * 1.25)).log_scale())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc("steps")
        .label_style(style(12))
        .axis_desc_style(style(13))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(224, 224, 224))
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.1e}"))
        .draw()
        .map_err(failed)?;
    for ((_, color, _), points, width) in [(TRAINED, &panel.trained, 1), (HELD_OUT, &panel.held_out, 2)] {
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(width)).point_size(0);
        chart.draw_series(line).map_err(failed)?;
    }
    Ok(())
}
