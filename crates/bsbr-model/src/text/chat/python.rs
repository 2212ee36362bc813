//! What templates expect of Python and Jinja does not prescribe: how values are written, JSON, marks around answers.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, Output, State, Value,
    value::{Kwargs, ValueKind},
};

/// Writes a value as Python's `str`.
pub(super) fn write(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if value.is_undefined() {
        return Ok(());
    }
    let mut text = String::new();
    match value.as_str() {
        Some(content) => text.push_str(content),
        None => repr(&mut text, value)?,
    }
    out.write_str(&text).map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write"))
}

/// Python's `repr` of plain values.
fn repr(text: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => {
            let content = value.as_str().unwrap_or_default();
            let quote = if content.contains('\'') && !content.contains('"') { '"' } else { '\'' };
            text.push(quote);
            for character in content.chars() {
                match character {
                    '\n' => text.push_str("\\n"),
                    '\t' => text.push_str("\\t"),
                    '\r' => text.push_str("\\r"),
                    '\\' => text.push_str("\\\\"),
                    same if same == quote => text.extend(['\\', same]),
                    same => text.push(same),
                }
            }
            text.push(quote);
        }
        ValueKind::Seq => {
            text.push('[');
            for (at, item) in value.try_iter()?.enumerate() {
                text.push_str(if at > 0 { ", " } else { "" });
                repr(text, &item)?;
            }
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                text.push_str(if at > 0 { ", " } else { "" });
                repr(text, &key)?;
                text.push_str(": ");
                repr(text, &value.get_item(&key)?)?;
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
    Ok(())
}

/// How `json.dumps` writes.
struct Style {
    ascii: bool,
    indent: Option<usize>,
    between: String,
    colon: String,
    sorted: bool,
}

/// `tojson` of transformers: `json.dumps`, with its keywords.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (between, colon) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([between, colon]) => (between.clone(), colon.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two texts")),
    };
    let flag = |name: &str| options.get::<Option<bool>>(name).map(Option::unwrap_or_default);
    let style = Style { ascii: flag("ensure_ascii")?, indent, between, colon, sorted: flag("sort_keys")? };
    options.assert_all_used()?;
    let mut text = String::new();
    json(&mut text, value, &style, 0)?;
    Ok(text)
}

fn json(text: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&value.to_string()),
        ValueKind::String => quoted(text, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            surrounded(text, ('[', ']'), items, style, depth, |text, item| json(text, &item, style, depth + 1))?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sorted {
                keys.sort();
            }
            surrounded(text, ('{', '}'), keys, style, depth, |text, key| {
                quoted(text, &key.to_string(), style.ascii);
                text.push_str(&style.colon);
                json(text, &value.get_item(&key)?, style, depth + 1)
            })?;
        }
        kind => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("a value of type {kind} has no JSON")));
        }
    }
    Ok(())
}

/// Items between brackets, on lines of their own where there is an indent.
fn surrounded(
    text: &mut String,
    (open, close): (char, char),
    items: Vec<Value>,
    style: &Style,
    depth: usize,
    mut each: impl FnMut(&mut String, Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            text.push('\n');
            text.push_str(&" ".repeat(indent * depth));
        }
    };
    text.push(open);
    let empty = items.is_empty();
    for (at, item) in items.into_iter().enumerate() {
        text.push_str(if at > 0 { &style.between } else { "" });
        line(text, depth + 1);
        each(text, item)?;
    }
    if !empty {
        line(text, depth);
    }
    text.push(close);
    Ok(())
}

fn quoted(text: &mut String, content: &str, ascii: bool) {
    text.push('"');
    for character in content.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            same if same < ' ' || (ascii && !same.is_ascii()) => {
                for unit in same.encode_utf16(&mut [0; 2]) {
                    // Writing to a text cannot fail.
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
            same => text.push(same),
        }
    }
    text.push('"');
}

/// A template without `{% generation %}` and `{% endgeneration %}`, which mark answers for training and write nothing. They
/// become a condition that always holds, so that what they do to blanks stays.
pub(super) fn without_generation_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[2..end];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let tag_text = match word {
            "generation" => format!("{{%{}%}}", inner.replacen("generation", "if true", 1)),
            "endgeneration" => format!("{{%{}%}}", inner.replacen("endgeneration", "endif", 1)),
            _ => tag[..end + 2].to_owned(),
        };
        text.push_str(&tag_text);
        rest = &tag[end + 2..];
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_around_answers_become_a_condition_that_holds() {
        let source = "{%- generation -%}a{% endgeneration %} {% if generation %}b{% endif %}{% set x = 1";
        let expected = "{%- if true -%}a{% endif %} {% if generation %}b{% endif %}{% set x = 1";
        assert_eq!(without_generation_marks(source), expected);
    }
}
