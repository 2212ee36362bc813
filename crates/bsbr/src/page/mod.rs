//! Pages: one HTML file each, with its style, its script and its data inside, that asks for nothing else.
//!
//! They are written as XHTML as well, so that any parser of XML says whether they are well-formed.

pub(crate) mod attention;
pub(crate) mod bench;
pub(crate) mod eval;
mod heat;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::{
    commands::bench::write,
    markup::{escaped, json},
    plot::{self, Frame, Panel},
    report::writable,
};

/// Where a page goes.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct HtmlArgs {
    /// Write a page with figures and their numbers, for a browser: one file that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl HtmlArgs {
    /// Checks what can be checked before anything runs.
    ///
    /// # Errors
    ///
    /// For a file that is no page by its name or cannot be written.
    pub(crate) fn check(&self) -> Result<()> {
        let Some(path) = &self.html else { return Ok(()) };
        let is_page = |end: &std::ffi::OsStr| end.eq_ignore_ascii_case("html") || end.eq_ignore_ascii_case("htm");
        if !path.extension().is_some_and(is_page) {
            bail!("--html: {} is no name of a page: name it like report.html", path.display());
        }
        writable("html", path)
    }

    /// The file asked for.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.html.as_deref()
    }

    /// Writes the page, if one was asked for.
    ///
    /// # Errors
    ///
    /// If it cannot be made or written.
    pub(crate) fn write(&self, page: impl FnOnce() -> Result<String>) -> Result<()> {
        self.html.as_deref().map_or(Ok(()), |path| write(path, page()?.trim_end()))
    }
}

/// What a page holds.
pub(crate) struct Page<'a> {
    pub(crate) title: &'a str,
    /// Lines below the title.
    pub(crate) lead: Vec<String>,
    /// Markup.
    pub(crate) body: String,
    /// Everything the page shows, for programs.
    pub(crate) data: &'a Value,
    /// Rules and a script of its own.
    pub(crate) style: &'a str,
    pub(crate) script: &'a str,
}

impl Page<'_> {
    /// The file.
    pub(crate) fn html(&self) -> String {
        let lead = self.lead.iter().map(|line| format!("<p class=\"faint\">{}</p>\n", escaped(line)));
        let script = |text: &str| format!("<script>//<![CDATA[\n{text}//]]></script>\n");
        let own = if self.script.is_empty() { String::new() } else { script(self.script) };
        format!(
            "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
             script-src 'unsafe-inline'\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n\
             <style>{}{}{}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{}{}</main>\n\
             <script type=\"application/json\" id=\"report\">{}</script>\n{own}{}</body>\n</html>\n",
            include_str!("style.css"),
            plot::STYLE,
            self.style,
            lead.collect::<String>(),
            self.body,
            json(self.data),
            script(include_str!("keys.js")),
            title = escaped(self.title),
        )
    }
}

/// A heading and what belongs to it.
fn section(title: &str, about: &str, content: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n<p>{}</p>\n{content}</section>\n", escaped(title), escaped(about))
}

/// Figures side by side.
fn cards(figures: &[String]) -> String {
    format!("<div class=\"cards\">\n{}</div>\n", figures.concat())
}

/// A panel with its numbers below it.
fn figure(panel: &Panel) -> String {
    let frame = Frame { width: 400, height: 300, titled: false, focusable: true };
    format!(
        "<figure>\n<figcaption>{}</figcaption>\n{}{}</figure>\n",
        escaped(&panel.title),
        plot::chart(panel, &frame),
        details(&numbers(panel))
    )
}

/// Something to open.
fn details(content: &str) -> String {
    format!("<details>\n<summary>The numbers</summary>\n{content}</details>\n")
}

/// The points of a panel: a row to a place, a column to a line.
fn numbers(panel: &Panel) -> String {
    let mut places: Vec<f64> = panel.lines.iter().flat_map(|line| &line.points).map(|point| point.0).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let header = std::iter::once(panel.across.name()).chain(panel.lines.iter().map(|line| line.name.as_str()));
    let row = |&place: &f64| {
        let of = |line: &plot::Line| {
            let point = line.points.iter().find(|point| point.0 == place);
            point.map_or_else(|| "-".to_owned(), |point| panel.up.written(point.1))
        };
        std::iter::once(panel.across.written(place)).chain(panel.lines.iter().map(of)).collect()
    };
    let rows: Vec<Vec<String>> = places.iter().map(row).collect();
    table(&panel.title, &header.collect::<Vec<_>>(), &rows)
}

/// Rows of text; it scrolls where there is no room for it.
fn table(title: &str, header: &[&str], rows: &[Vec<String>]) -> String {
    let head: String = header.iter().map(|name| format!("<th scope=\"col\">{}</th>", escaped(name))).collect();
    let row = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(at, cell)| match at {
            0 => format!("<th scope=\"row\">{}</th>", escaped(cell)),
            // What is a sentence may break.
            _ if cell.len() > 40 => format!("<td class=\"words\">{}</td>", escaped(cell)),
            _ => format!("<td>{}</td>", escaped(cell)),
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{}</tbody>\n</table>\n</div>\n",
        escaped(title),
        rows.iter().map(row).collect::<String>()
    )
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
