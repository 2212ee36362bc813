//! How results are given: a table for people, JSON and CSV for programs; printed, or written to a file.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::{
    commands::bench::{directory, write},
    output,
};

/// How a report is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs, with everything that is known
    Json,
    /// For spreadsheets, a line for each thing measured
    Csv,
}

/// Form and place of a report.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportArgs {
    /// How to give the report [default: table]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// The same as --format json
    #[arg(long, num_args = 0..=1, value_name = "", conflicts_with = "format")]
    json: Option<Option<PathBuf>>,
    /// Write the report to a file in this format; what is printed is the table then
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Takes the things measured out of the JSON of a report.
pub type Rows<'a> = &'a dyn Fn(&Value) -> Vec<Value>;

/// One report in its forms.
pub struct Forms<'a> {
    /// For people.
    pub table: &'a dyn Fn() -> Result<String>,
    /// Everything.
    pub json: &'a dyn Fn() -> Result<Value>,
    /// The things measured, each an object; `None` where there is no such list.
    pub rows: Option<Rows<'a>>,
}

impl ReportArgs {
    /// The format asked for.
    pub fn format(&self) -> Format {
        self.format.unwrap_or(if self.json.is_some() { Format::Json } else { Format::Table })
    }

    /// Checks what can be checked before anything runs.
    ///
    /// # Errors
    ///
    /// For a file that cannot be written, or an older way of asking for one.
    pub fn check(&self) -> Result<()> {
        if let Some(Some(path)) = &self.json {
            bail!("--json takes no file: --format json --output {}", path.display());
        }
        self.output.as_deref().map_or(Ok(()), |path| writable("output", path))
    }

    /// Whether the report goes to a file.
    pub fn writes(&self) -> bool {
        self.output.is_some()
    }

    /// Prints the report, or writes it.
    ///
    /// # Errors
    ///
    /// If it cannot be written, or has no such form.
    pub fn emit(&self, forms: &Forms<'_>) -> Result<()> {
        let text = match (self.format(), forms.rows) {
            (Format::Table, _) => (forms.table)()?,
            (Format::Json, _) => serde_json::to_string_pretty(&(forms.json)()?)?,
            (Format::Csv, Some(rows)) => csv(&rows(&(forms.json)()?)),
            (Format::Csv, None) => bail!("--format csv: this report is no list; json has all of it"),
        };
        match &self.output {
            Some(path) => {
                write(path, text.trim_end())?;
                output::result((forms.table)()?.trim_end())
            }
            None => output::result(text.trim_end()),
        }
    }
}

/// Checks that a picture can be there: pictures are SVG.
///
/// # Errors
///
/// For another kind of picture, and as [`writable`].
pub fn drawable(path: &Path) -> Result<()> {
    if !path.extension().is_some_and(|end| end.eq_ignore_ascii_case("svg")) {
        bail!(
            "--plot: {} is no name of an SVG file, and nothing else is drawn: name it like report.svg",
            path.display()
        );
    }
    writable("plot", path)
}

/// Checks that a file can be there.
///
/// # Errors
///
/// If it cannot; `flag` asked for it.
pub fn writable(flag: &str, path: &Path) -> Result<()> {
    if path.is_dir() || !directory(path).is_dir() {
        bail!("--{flag}: {} cannot be written, expected a file in a directory that exists", path.display());
    }
    Ok(())
}

/// Objects as comma-separated values: a column for each number, text and truth in any of them, named by its path; lists stay out.
pub(crate) fn csv(rows: &[Value]) -> String {
    let flat: Vec<Map<String, Value>> = rows.iter().map(flattened).collect();
    let mut columns: Vec<&String> = Vec::new();
    for row in &flat {
        for name in row.keys() {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
    }
    let line = |cells: Vec<String>| cells.join(",");
    let header = line(columns.iter().map(|name| quoted(name)).collect());
    let cell = |value: Option<&Value>| match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => quoted(text),
        Some(other) => other.to_string(),
    };
    let lines = flat.iter().map(|row| line(columns.iter().map(|name| cell(row.get(*name))).collect()));
    std::iter::once(header).chain(lines).collect::<Vec<_>>().join("\n")
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// What is in an object and in the objects in it, by path.
fn flattened(value: &Value) -> Map<String, Value> {
    fn go(prefix: &str, value: &Value, into: &mut Map<String, Value>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    go(&path, value, into);
                }
            }
            Value::Array(_) => {}
            single => drop(into.insert(prefix.to_owned(), single.clone())),
        }
    }
    let mut flat = Map::new();
    go("", value, &mut flat);
    flat
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_have_a_column_for_everything_that_any_of_them_has() {
        let rows = [
            json!({"name": "a, \"b\"", "time": {"median": 1.5, "all": [1, 2]}}),
            json!({"name": "c", "note": null, "time": {"min": 2}}),
        ];
        assert_eq!(csv(&rows), "name,time.median,note,time.min\n\"a, \"\"b\"\"\",1.5,,\nc,,,2");
        assert_eq!(csv(&[]), "");
    }
}
