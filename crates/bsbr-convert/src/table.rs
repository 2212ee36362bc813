//! Plans and rules as text: the mapping table that a dry run prints, and the rule table of an architecture.

use std::collections::BTreeSet;
use std::fmt;

use crate::plan::{Plan, SourceTensor, Step};
use crate::rules::{Architecture, Prefix, Rule, TieFlag, Wrapper, expand, is_of_part};

impl fmt::Display for Plan {
    /// One line per rule, with `{i}` for the layer: source, shape, dtype, what happens, targets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["source", "shape", "dtype", "how", "target"].map(str::to_owned)];
        for (number, rule) in self.rules().enumerate() {
            rows.extend(self.row(number, rule));
        }
        let read = self.steps.iter().map(|step| step.sources.len()).sum::<usize>();
        let weights = self.steps.iter().map(|step| step.targets.len()).sum::<usize>();
        let (copies, ignored) = (usize::from(self.tied_copy.is_some()), self.ignored.len());
        writeln!(
            f,
            "rules `{}` version {}, prefix `{}`",
            self.architecture.id, self.architecture.version, self.prefix.body
        )?;
        writeln!(
            f,
            "{} tensors: {read} become {weights} weights of {} layers, {copies} equal to another, {ignored} kept aside\n",
            read + copies + ignored,
            self.model.decoder.layers
        )?;
        write_rows(f, &rows)
    }
}

impl Plan {
    /// `None` for a rule that did not apply.
    fn row(&self, number: usize, rule: &Rule) -> Option<[String; 5]> {
        let name = |template: &str| template.replace("{p}", self.prefix.body).replace("{h}", self.prefix.head);
        match *rule {
            Rule::Map { source, targets, .. } => self.step_row(number, name(source), targets),
            Rule::Tie { head, target, embed } => match &self.tied_copy {
                Some((copy, _)) => {
                    let [shape, dtype] = describe([copy].into_iter());
                    Some([name(head), shape, dtype, "equal".to_owned(), format!("(is {})", name(embed))])
                }
                None => self.step_row(number, name(head), &[target]),
            },
            Rule::Ignore { name: template, why } | Rule::IgnoreIn { name: template, why, .. } => {
                let layers = 0..self.model.decoder.layers;
                let names: BTreeSet<String> =
                    layers.map(|layer| expand(template, self.prefix, (layer, 0), 0)).collect();
                let found = self.ignored.iter().map(|ignored| &ignored.tensor).filter(|t| names.contains(&t.name));
                let [shape, dtype] = describe(found);
                (!shape.is_empty()).then(|| [name(template), shape, dtype, "keep aside".to_owned(), format!("({why})")])
            }
            Rule::IgnorePart { start, why } => {
                let of_part = |name: &str| is_of_part(name, start, self.prefix, self.model.layers_beyond());
                let found = self.ignored.iter().filter(|ignored| of_part(&ignored.tensor.name)).count();
                let row = || [part(&name(start)), format!("{found} tensors"), String::new()];
                (found > 0)
                    .then(row)
                    .map(|[source, shape, dtype]| [source, shape, dtype, "keep aside".to_owned(), format!("({why})")])
            }
        }
    }

    fn step_row(&self, number: usize, source: String, targets: &[&str]) -> Option<[String; 5]> {
        let steps: Vec<&Step> = self.steps.iter().filter(|step| step.rule == number).collect();
        let [shape, dtype] = describe(steps.iter().flat_map(|step| &step.sources));
        let ops: Vec<String> = steps.first()?.ops.iter().map(ToString::to_string).collect();
        let how = if ops.is_empty() { "as it is".to_owned() } else { ops.join(", ") };
        Some([source, shape, dtype, how, targets.join(", ")])
    }
}

impl fmt::Display for Architecture {
    /// One line per rule: source, when it applies, what happens, targets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        writeln!(f, "rules `{}` version {}, for model type {}", self.id, self.version, quoted(self.model_types))?;
        writeln!(f, "prefix {{p}}: the first of {} that gives `{}`", quoted(self.prefixes), self.anchor)?;
        for reject in self.rejects {
            writeln!(f, "refused: `{}` = true: {}", reject.key, reject.why)?;
        }
        writeln!(f)?;
        let mut rows = vec![["source", "when", "how", "target"].map(str::to_owned)];
        rows.extend(self.rules.iter().map(|rule| match *rule {
            Rule::Map { source, targets, ops, when } => {
                let ops: Vec<String> = ops.iter().map(ToString::to_string).collect();
                let how = if ops.is_empty() { "as it is".to_owned() } else { ops.join(", ") };
                [source.to_owned(), when.to_string(), how, targets.join(", ")]
            }
            Rule::Tie { head, embed, target } => {
                let how = format!("dropped if equal to `{embed}`");
                [head.to_owned(), "if there".to_owned(), how, target.to_owned()]
            }
            Rule::Ignore { name, why } => {
                [name.to_owned(), "if there".to_owned(), "keep aside".to_owned(), format!("({why})")]
            }
            Rule::IgnoreIn { name, when, why } => {
                [name.to_owned(), format!("{when}, if there"), "keep aside".to_owned(), format!("({why})")]
            }
            Rule::IgnorePart { start, why } => {
                [part(start), "if there".to_owned(), "keep aside".to_owned(), format!("({why})")]
            }
        }));
        write_rows(f, &rows)
    }
}

impl fmt::Display for Wrapper {
    /// Which object the decoder is, its prefixes, what ties its head, and one line per part that is kept aside.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = self.model_types.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        writeln!(f, "model type {types}: a decoder described by `text_config`, and other parts")?;
        writeln!(f, "rules of the decoder: those of its `model_type`, `{}` where it says none", self.text_type)?;
        if self.flat {
            writeln!(f, "older files have its settings beside those of the other parts")?;
        }
        let tie = match self.tie {
            TieFlag::Outer { default } => format!("outside `text_config`, {default} where absent"),
            TieFlag::Either => "outside or inside `text_config`".to_owned(),
        };
        writeln!(f, "head tied by `tie_word_embeddings` {tie}")?;
        for Prefix { body, head } in self.prefixes {
            writeln!(f, "prefix {{p}}: `{body}`, of the head {{h}}: `{head}`")?;
        }
        for key in self.unread {
            writeln!(f, "not read inside `text_config`: `{key}`")?;
        }
        writeln!(f)?;
        let mut rows = vec![["source", "how", "what"].map(str::to_owned)];
        rows.extend(self.aside.iter().filter_map(|rule| match *rule {
            Rule::IgnorePart { start, why } => Some([part(start), "keep aside".to_owned(), why.to_owned()]),
            _ => None,
        }));
        write_rows(f, &rows)
    }
}

/// The tensors that begin with `start`.
fn part(start: &str) -> String {
    if start.contains("{i}") { format!("{start}*, beyond the last layer") } else { format!("{start}*") }
}

/// Writes cells in columns, each as wide as its widest cell.
fn write_rows<const COLUMNS: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; COLUMNS]]) -> fmt::Result {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line += &format!("{cell:width$}  ");
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

/// The shapes and dtypes that occur, normally one of each.
fn describe<'a>(tensors: impl Iterator<Item = &'a SourceTensor>) -> [String; 2] {
    let (mut shapes, mut dtypes) = (BTreeSet::new(), BTreeSet::new());
    for tensor in tensors {
        shapes.insert(format!("{:?}", tensor.shape));
        dtypes.insert(tensor.dtype.to_string());
    }
    [shapes, dtypes].map(|set| set.into_iter().collect::<Vec<_>>().join(" | "))
}
