//! Heat maps: tables whose cells have the colour of their number, and say it.

use super::percent;
use crate::markup::escaped;

/// Stops of a scale that gets evenly lighter and is the same to the colour-blind (cividis, Nunez and others 2018).
const STOPS: [(u8, u8, u8); 6] =
    [(0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56)];

/// One cell.
#[derive(Debug, Clone)]
pub(super) struct Cell {
    /// From 0 to 1.
    pub(super) share: f64,
    /// Written in it.
    pub(super) text: String,
    /// All that it says.
    pub(super) told: String,
}

/// The colour of a share, and the one of text on it.
pub(super) fn colors(share: f64) -> (String, &'static str) {
    let place = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let at = (place.floor() as usize).min(STOPS.len() - 2);
    let (from, to) = (STOPS[at], STOPS[at + 1]);
    let mixed = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * (place - at as f64)).round() as u8;
    let (r, g, b) = (mixed(from.0, to.0), mixed(from.1, to.1), mixed(from.2, to.2));
    let text = if contrast((r, g, b), (255, 255, 255)) >= contrast((r, g, b), (0, 0, 0)) { "#fff" } else { "#000" };
    (format!("#{r:02x}{g:02x}{b:02x}"), text)
}

/// Contrast of two colours as the guidelines for accessible pages define it, from 1 to 21.
fn contrast(a: (u8, u8, u8), b: (u8, u8, u8)) -> f64 {
    let light = |(r, g, b): (u8, u8, u8)| {
        let linear = |x: u8| {
            let x = f64::from(x) / 255.0;
            if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
    };
    let (a, b) = (light(a), light(b));
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

/// From where to where the colours of a map reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Range {
    /// From 0 to 1, for maps to be compared; [`key`] says so once.
    Whole,
    /// From the least to the most of its shares; the map says which.
    Own,
}

/// A map of rows and columns; what was not measured is empty.
pub(super) fn map(
    title: &str,
    corner: &str,
    columns: &[String],
    rows: &[(String, Vec<Option<Cell>>)],
    range: Range,
) -> String {
    let shares = || rows.iter().flat_map(|row| &row.1).flatten().map(|cell| cell.share);
    let (low, high) = match range {
        Range::Whole => (0.0, 1.0),
        Range::Own => (shares().fold(f64::INFINITY, f64::min), shares().fold(0.0, f64::max)),
    };
    let key = match range {
        Range::Whole => String::new(),
        Range::Own => key(&percent(low.min(high)), &percent(high)),
    };
    let head: String = columns.iter().map(|name| format!("<th scope=\"col\">{}</th>", escaped(name))).collect();
    let mut first = true;
    let mut body = String::new();
    for (r, (name, cells)) in rows.iter().enumerate() {
        body.push_str(&format!("<tr><th scope=\"row\">{}</th>", escaped(name)));
        for (c, cell) in cells.iter().enumerate() {
            let Some(cell) = cell else {
                body.push_str("<td class=\"none\">-</td>");
                continue;
            };
            let (ground, ink) = colors(if high > low { (cell.share - low) / (high - low) } else { 1.0 });
            let told = escaped(&cell.told);
            let reached = if std::mem::take(&mut first) { 0 } else { -1 };
            body.push_str(&format!(
                "<td style=\"background:{ground};color:{ink}\" tabindex=\"{reached}\" data-r=\"{r}\" data-c=\"{c}\" title=\"{told}\" aria-label=\"{told}\">{}</td>",
                escaped(&cell.text)
            ));
        }
        body.push_str("</tr>\n");
    }
    format!(
        "<figure>\n<figcaption>{}</figcaption>\n<div class=\"scroll\">\n<table class=\"heat\" role=\"grid\" data-grid=\"\">\n<thead><tr><th scope=\"col\">{}</th>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n{key}</figure>\n",
        escaped(title),
        escaped(corner)
    )
}

/// What the colours of a map mean.
pub(super) fn key(low: &str, high: &str) -> String {
    let stops: Vec<String> = (0..=5).map(|at| colors(f64::from(at) / 5.0).0).collect();
    format!(
        "<p class=\"key\">{}<i style=\"background:linear-gradient(90deg,{})\"></i>{}</p>\n",
        escaped(low),
        stops.join(","),
        escaped(high)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_can_be_read_on_every_colour() {
        for at in 0..=100 {
            let (ground, ink) = colors(f64::from(at) / 100.0);
            let part = |from: usize| u8::from_str_radix(&ground[from..from + 2], 16).unwrap();
            let ink = if ink == "#fff" { (255, 255, 255) } else { (0, 0, 0) };
            let found = contrast((part(1), part(3), part(5)), ink);
            assert!(found >= 4.5, "{found} at {at}");
        }
        assert_eq!(colors(0.0).0, "#00224e");
        assert_eq!(colors(2.0).0, "#fee838");
        // The first example of the guidelines.
        assert!((contrast((0, 0, 0), (255, 255, 255)) - 21.0).abs() < 1e-9);
    }
}
