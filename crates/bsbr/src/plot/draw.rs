//! A panel as SVG.

use std::fmt::Write;

use super::{Line, Panel};
use crate::markup::escaped;

/// Pixels of a panel, and what of it belongs to the picture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// The title is drawn: nothing else says it.
    pub(crate) titled: bool,
    /// Points can be reached by the keyboard.
    pub(crate) focusable: bool,
}

/// Left, right and lower margin, the height of a line of the legend, and the width of the sample of a line and of a letter in it.
const LEFT: f64 = 66.0;
const RIGHT: f64 = 14.0;
const BELOW: f64 = 42.0;
const LEGEND: f64 = 18.0;
const SAMPLE: f64 = 22.0;
const LETTER: f64 = 6.7;

/// How everything is drawn, light and dark.
pub(crate) const STYLE: &str = "\
.ground{fill:#fff}.label{font:12px system-ui,sans-serif;fill:#222}.title{font:600 15px system-ui,sans-serif;fill:#222}\
.grid{fill:none;stroke:#ddd;stroke-width:1}.axis{fill:none;stroke:#777;stroke-width:1}\
.line{fill:none;stroke:var(--l);stroke-width:2}.bar{stroke:var(--l);stroke-width:1.2}.dot{fill:var(--l);stroke:#fff;stroke-width:1}\
.mark{fill:none;stroke:#555;stroke-width:1.5;stroke-dasharray:5 4}\
@media (prefers-color-scheme:dark){.ground{fill:#15181c}.label,.title{fill:#e4e6e8}.grid{stroke:#33383e}.axis{stroke:#8a9097}\
.line{stroke:var(--d)}.bar{stroke:var(--d)}.dot{fill:var(--d);stroke:#15181c}.mark{stroke:#c0c4c8}}";

/// A panel as an image of its own, as wide as there is room for.
pub(crate) fn chart(panel: &Panel, frame: &Frame) -> String {
    let Frame { width, height, .. } = frame;
    format!(
        "<svg class=\"chart\" viewBox=\"0 0 {width} {height}\" role=\"group\" aria-label=\"{}\" data-grid=\"\">\n{}</svg>\n",
        escaped(&panel.title),
        self::panel(panel, frame)
    )
}

/// A panel without what surrounds it.
pub(super) fn panel(panel: &Panel, frame: &Frame) -> String {
    let (width, height) = (f64::from(frame.width), f64::from(frame.height));
    let rows = legend_rows(&panel.lines, width);
    let above = match (frame.titled, panel.marks.is_empty()) {
        (true, true) => 38.0,
        (true, false) => 54.0,
        (false, true) => 12.0,
        (false, false) => 28.0,
    };
    let bottom = height - BELOW - LEGEND * rows.len() as f64 - 4.0;
    let inner = Inner::new(panel, (LEFT, width - RIGHT), (above, bottom));
    let mut svg = String::new();
    if frame.titled {
        let _ = writeln!(
            svg,
            "<text class=\"title\" x=\"{}\" y=\"22\" text-anchor=\"middle\">{}</text>",
            width / 2.0,
            escaped(&panel.title)
        );
    }
    inner.axes(&mut svg);
    for (value, label) in &panel.marks {
        inner.mark(&mut svg, *value, label);
    }
    for (number, line) in panel.lines.iter().enumerate() {
        inner.line(&mut svg, (number, line), frame.focusable);
    }
    legend(&mut svg, &rows, bottom + BELOW + 8.0);
    svg
}

/// A panel whose axes are fitted to its values.
struct Inner<'a> {
    panel: &'a Panel,
    across: super::axis::Fitted<'a>,
    up: super::axis::Fitted<'a>,
    x: (f64, f64),
    y: (f64, f64),
}

impl<'a> Inner<'a> {
    fn new(panel: &'a Panel, x: (f64, f64), y: (f64, f64)) -> Self {
        let points = || panel.lines.iter().flat_map(|line| &line.points);
        let ends = panel.lines.iter().flat_map(|line| &line.quartiles).flat_map(|&(_, low, high)| [low, high]);
        Self {
            panel,
            across: panel.across.fitted(points().map(|point| point.0)),
            up: panel.up.fitted(points().map(|point| point.1).chain(ends)),
            x,
            y,
        }
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.at_x(x), self.y.1 - (self.y.1 - self.y.0) * self.up.place(y))
    }

    fn at_x(&self, x: f64) -> f64 {
        self.x.0 + (self.x.1 - self.x.0) * self.across.place(x)
    }

    fn axes(&self, svg: &mut String) {
        let ((left, right), (top, bottom)) = (self.x, self.y);
        let mut places: Vec<f64> = self.panel.lines.iter().flat_map(|line| &line.points).map(|point| point.0).collect();
        places.sort_by(f64::total_cmp);
        places.dedup();
        for (value, label) in self.up.ticks(6, None) {
            let y = self.at((1.0, value)).1;
            let _ = writeln!(svg, "<path class=\"grid\" d=\"M{left:.1} {y:.1}H{right:.1}\"/>");
            let (x, y) = (left - 6.0, y + 4.0);
            let _ = writeln!(
                svg,
                "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
                escaped(&label)
            );
        }
        // Labels that would touch the one before are left out.
        let mut free = f64::NEG_INFINITY;
        for (value, label) in self.across.ticks(9, Some(&places)) {
            let (x, half) = (self.at_x(value), LETTER * label.chars().count() as f64 / 2.0);
            let _ = writeln!(svg, "<path class=\"grid\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>");
            if x - half > free {
                let y = bottom + 17.0;
                let _ = writeln!(
                    svg,
                    "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
                    escaped(&label)
                );
                free = x + half + 6.0;
            }
        }
        let _ = writeln!(svg, "<path class=\"axis\" d=\"M{left:.1} {top:.1}V{bottom:.1}H{right:.1}\"/>");
        let (x, y) = ((left + right) / 2.0, bottom + 35.0);
        let _ = writeln!(
            svg,
            "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
            escaped(self.across.name)
        );
    }

    fn mark(&self, svg: &mut String, value: f64, label: &str) {
        let (x, (top, bottom)) = (self.at_x(value), self.y);
        let _ = writeln!(svg, "<path class=\"mark\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>");
        // Within the panel, to whichever side there is room.
        let wide = LETTER * label.chars().count() as f64;
        let place = x.min(self.x.1 - wide / 2.0).max(self.x.0 + wide / 2.0);
        let y = top - 6.0;
        let _ = writeln!(
            svg,
            "<text class=\"label\" x=\"{place:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
            escaped(label)
        );
    }

    fn line(&self, svg: &mut String, (number, line): (usize, &Line), focusable: bool) {
        let _ = writeln!(svg, "<g style=\"{}\">", colors(line));
        let mut path = String::new();
        for (at, &point) in line.points.iter().enumerate() {
            let (x, y) = self.at(point);
            let _ = write!(path, "{}{x:.1} {y:.1}", if at == 0 { 'M' } else { 'L' });
        }
        let _ = writeln!(svg, "<path class=\"line\"{} d=\"{path}\"/>", dashes(number));
        for &(x, low, high) in &line.quartiles {
            let ((x, low), (_, high)) = (self.at((x, low)), self.at((x, high)));
            let _ = writeln!(svg, "<path class=\"bar\" d=\"M{x:.1} {low:.1}V{high:.1}\"/>");
        }
        if line.marked {
            for (at, &point) in line.points.iter().enumerate() {
                let told = format!(
                    "{}, {} {}: {}",
                    line.name,
                    self.across.name,
                    self.panel.across.written(point.0),
                    self.panel.up.written(point.1)
                );
                let told = escaped(&told);
                let reached = if focusable {
                    format!(
                        " tabindex=\"{}\" role=\"img\" aria-label=\"{told}\" data-r=\"{number}\" data-c=\"{at}\"",
                        if (number, at) == (0, 0) { 0 } else { -1 }
                    )
                } else {
                    String::new()
                };
                let shape = shape(number, self.at(point));
                let _ = writeln!(svg, "<path class=\"dot\" d=\"{shape}\"{reached}><title>{told}</title></path>");
            }
        }
        svg.push_str("</g>\n");
    }
}

/// Lines differ by more than their colour.
fn dashes(number: usize) -> &'static str {
    ["", " stroke-dasharray=\"7 4\"", " stroke-dasharray=\"2 4\"", " stroke-dasharray=\"10 3 2 3\""][number % 4]
}

/// A point: a disc, a square, a triangle or a diamond.
fn shape(number: usize, (x, y): (f64, f64)) -> String {
    match number % 4 {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", x - 4.0),
        1 => format!("M{:.1} {:.1}h7v7h-7Z", x - 3.5, y - 3.5),
        2 => format!("M{x:.1} {:.1}l4.5 8h-9Z", y - 5.0),
        _ => format!("M{x:.1} {:.1}l5 5l-5 5l-5 -5Z", y - 5.0),
    }
}

fn colors(line: &Line) -> String {
    format!("--l:{};--d:{}", line.color.hex(), line.color.on_dark().hex())
}

/// The lines in rows that are as wide as the panel, with where each begins.
fn legend_rows(lines: &[Line], width: f64) -> Vec<Vec<(usize, &Line, f64)>> {
    let (mut rows, mut at) = (vec![Vec::new()], LEFT);
    for (number, line) in lines.iter().enumerate() {
        let wide = SAMPLE + 8.0 + LETTER * line.name.chars().count() as f64 + 14.0;
        if at + wide > width && rows.last().is_some_and(|row| !row.is_empty()) {
            rows.push(Vec::new());
            at = LEFT;
        }
        if let Some(row) = rows.last_mut() {
            row.push((number, line, at));
        }
        at += wide;
    }
    rows
}

/// Names and colours below a panel, where they cover nothing.
fn legend(svg: &mut String, rows: &[Vec<(usize, &Line, f64)>], top: f64) {
    for (row, entries) in rows.iter().enumerate() {
        let y = top + LEGEND * row as f64;
        for &(number, line, x) in entries {
            let _ = writeln!(
                svg,
                "<g style=\"{}\"><path class=\"line\"{} d=\"M{x:.1} {y:.1}h{SAMPLE}\"/><path class=\"dot\" d=\"{}\"/></g>",
                colors(line),
                dashes(number),
                shape(number, (x + SAMPLE / 2.0, y))
            );
            let (x, y) = (x + SAMPLE + 6.0, y + 4.0);
            let _ = writeln!(svg, "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escaped(&line.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::Color;

    #[test]
    fn a_legend_lies_within_its_panel_and_no_name_covers_another() {
        let names = ["bsbr", "torch-original", "transformers", "bsbr-plain", "torch-sdpa", "dense", "burn"];
        let lines = names.map(|name| Line::new(name, Color::ALL[0], vec![(1.0, 1.0)]));
        for width in [560.0, 400.0] {
            let rows = legend_rows(&lines, width);
            assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), 7);
            let end = |entry: &(usize, &Line, f64)| entry.2 + SAMPLE + 6.0 + LETTER * entry.1.name.len() as f64;
            for row in &rows {
                assert!(row.windows(2).all(|pair| end(&pair[0]) <= pair[1].2), "{row:?}");
                assert!(row.last().is_some_and(|last| end(last) <= width), "{row:?}");
            }
        }
    }
}
