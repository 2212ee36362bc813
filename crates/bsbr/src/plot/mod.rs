//! Lines over one horizontal axis, as SVG: pictures of their own, and charts of a page.

mod axis;
mod draw;

use anyhow::Result;

use crate::{bench::machine::Machine, markup::escaped};
pub use axis::Axis;
pub(crate) use draw::{Frame, STYLE, chart};

/// Pixels of one panel of a picture.
const PANEL: (u32, u32) = (560, 400);

/// Panels beside each other.
const COLUMNS: usize = 2;

/// Pixels of the line above all panels.
const CAPTION: u32 = 34;

/// A colour in which something is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Color(pub u8, pub u8, pub u8);

impl Color {
    /// Colours that can be told apart by the colour-blind (Okabe and Ito), the best known first.
    pub const ALL: [Self; 7] = [
        Self(0, 114, 178),
        Self(213, 94, 0),
        Self(0, 158, 115),
        Self(204, 121, 167),
        Self(230, 159, 0),
        Self(86, 180, 233),
        Self(0, 0, 0),
    ];

    /// On a light ground.
    pub(crate) fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }

    /// On a dark ground: the darker a colour is, the more white is mixed in.
    pub(crate) fn on_dark(self) -> Self {
        let [r, g, b] = [self.0, self.1, self.2].map(f64::from);
        let dark = 1.0 - (0.299 * r + 0.587 * g + 0.114 * b) / 255.0;
        let share = 0.85 * dark * dark;
        let [r, g, b] = [r, g, b].map(|x| (x + (255.0 - x) * share).round() as u8);
        Self(r, g, b)
    }
}

/// Several lines over one horizontal axis.
#[derive(Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// The horizontal axis.
    pub across: Axis,
    /// The vertical axis.
    pub up: Axis,
    /// In the order of the legend.
    pub lines: Vec<Line>,
    /// Places on the horizontal axis that mean something, with what they mean.
    pub marks: Vec<(f64, String)>,
}

/// One line of a panel.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// Of line and points.
    pub color: Color,
    /// In the order in which they are joined.
    pub points: Vec<(f64, f64)>,
    /// Lower and upper quartile at a place, where there are several samples.
    pub quartiles: Vec<(f64, f64, f64)>,
    /// Whether every point is marked: there are few.
    pub marked: bool,
}

impl Line {
    /// Marked points without quartiles.
    pub fn new(name: impl Into<String>, color: Color, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), color, points, quartiles: Vec::new(), marked: true }
    }
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
    let (rows, columns) = (panels.len().div_ceil(COLUMNS), COLUMNS.min(panels.len()));
    let (width, height) = (PANEL.0 * columns as u32, PANEL.1 * rows as u32 + CAPTION);
    // As much as fits: names of machines are long.
    let most = (width as usize / 7).max(10);
    let shown: String = match caption.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &caption[..end]),
        None => caption.to_owned(),
    };
    let mut svg = format!(
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" xmlns=\"http://www.w3.org/2000/svg\">\n\
         <title>{}</title>\n<style>{STYLE}</style>\n<rect class=\"ground\" width=\"{width}\" height=\"{height}\"/>\n\
         <text class=\"label\" x=\"14\" y=\"22\">{}</text>\n",
        escaped(caption),
        escaped(&shown),
    );
    for (at, panel) in panels.iter().enumerate() {
        let (x, y) = ((at % COLUMNS) as u32 * PANEL.0, (at / COLUMNS) as u32 * PANEL.1 + CAPTION);
        let frame = Frame { width: PANEL.0, height: PANEL.1, titled: true, focusable: false };
        svg.push_str(&format!("<g transform=\"translate({x} {y})\">\n{}</g>\n", draw::panel(panel, &frame)));
    }
    svg.push_str("</svg>\n");
    Ok(svg)
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
    fn on_a_dark_ground_no_colour_is_dark() {
        for color in Color::ALL {
            let Color(r, g, b) = color.on_dark();
            let light = 0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b);
            assert!(light > 110.0, "{color:?} as {:?}", color.on_dark());
        }
        assert_eq!(Color(0, 114, 178).hex(), "#0072b2");
    }

    #[test]
    fn a_picture_escapes_what_it_is_told() {
        let line = Line::new("a<b", Color::ALL[0], vec![(1.0, 1.0), (4.0, 2.0)]);
        let panel = Panel {
            title: "x & y".into(),
            across: Axis::log("tokens", thousands),
            up: Axis::log("", thousands),
            lines: vec![line],
            marks: vec![(2.0, "half </svg>".into())],
        };
        let svg = picture(&[panel], "<where>").unwrap();
        for part in ["a&lt;b", "x &amp; y", "half &lt;/svg&gt;", "&lt;where&gt;"] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
        assert_eq!(svg.matches("</svg>").count(), 1);
    }
}
