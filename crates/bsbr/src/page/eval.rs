//! `bsbr eval` as a page: perplexity by position, agreement with the original, and numbers hidden in long texts, against every
//! control.

use bsbr_model::{DEPTHS, LengthReport, LongVariant, RecallTask};
use serde_json::Value;

use super::{
    Page, cards, figure,
    heat::{self, Cell},
    percent, section, table,
};
use crate::{
    output::{bytes, grouped},
    plot::{Axis, Color, Line, Panel, thousands},
};

/// The page of a report: what was measured at each length; `data` is its JSON.
pub(crate) fn page(model: &str, lengths: &[LengthReport], data: &Value) -> String {
    let read = lengths.iter().any(|length| length.windows > 0);
    let mut body = String::new();
    if read {
        body.push_str(&perplexity(lengths));
        body.push_str(&agreement(lengths));
    }
    body.push_str(&hidden(lengths));
    body.push_str(&reading(lengths));
    let of = |name: &str| data["about"][name].as_str().map(|found| format!("{name}: {found}"));
    let mut lead = vec![model.to_owned()];
    lead.extend(of("text_sha256"));
    lead.extend(data["about"]["machine"]["cpu"].as_str().map(|cpu| format!("measured on {cpu}")));
    lead.push(format!("bsbr {}", env!("CARGO_PKG_VERSION")));
    Page { title: "What attention costs in quality", lead, body, data, style: "", script: "" }.html()
}

/// Names of variants over all lengths, in order.
fn names(lengths: &[LengthReport]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for variant in lengths.iter().flat_map(|length| &length.variants) {
        if !names.contains(&variant.name.as_str()) {
            names.push(&variant.name);
        }
    }
    names
}

/// The same colour for a variant everywhere.
fn color(names: &[&str], name: &str) -> Color {
    // The original is what everything is held against: black.
    match names.iter().position(|other| *other == name) {
        Some(0) => Color(0, 0, 0),
        Some(at) => Color::ALL[(at - 1) % (Color::ALL.len() - 1)],
        None => Color(0, 0, 0),
    }
}

/// A linear range around values.
fn around(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), value| (l.min(value), h.max(value)));
    let room = (0.06 * (high - low)).max(0.01 * high.abs());
    if low <= high { (low - room, high + room) } else { (0.0, 1.0) }
}

fn perplexity(lengths: &[LengthReport]) -> String {
    let names = names(lengths);
    let panel = |length: &LengthReport| {
        let line = |variant: &LongVariant| {
            let buckets = variant.perplexity.iter().flat_map(|found| &found.by_position);
            let points = buckets.map(|bucket| (bucket.end as f64, bucket.perplexity)).collect();
            Line::new(variant.name.as_str(), color(&names, &variant.name), points)
        };
        let lines: Vec<Line> = length.variants.iter().map(line).collect();
        let range = around(lines.iter().flat_map(|line| &line.points).map(|point| point.1));
        Panel {
            title: format!("Perplexity by position, windows of {} tokens", grouped(length.length as u64)),
            across: Axis::linear("tokens up to", |tokens| format!("{tokens:.0}"), (0.0, length.length as f64)),
            up: Axis::linear("", |perplexity| format!("{perplexity:.2}"), range),
            lines,
            marks: Vec::new(),
        }
    };
    let figures: Vec<String> =
        lengths.iter().filter(|length| length.windows > 0).map(|length| figure(&panel(length))).collect();
    let row = |(length, variant): (&LengthReport, &LongVariant)| {
        let found = variant.perplexity.as_ref()?;
        let original = length.variants.first()?.perplexity.as_ref()?;
        let change = |found: f64, original: f64| format!("{:+.2} %", 100.0 * (found / original - 1.0));
        let mut cells = vec![grouped(length.length as u64), length.windows.to_string(), variant.name.clone()];
        cells.extend([format!("{:.3}", found.all), change(found.all, original.all), format!("{:.3}", found.later)]);
        cells.extend([format!("{:.3}", found.last_quarter), change(found.last_quarter, original.last_quarter)]);
        Some(cells)
    };
    let rows: Vec<Vec<String>> = each(lengths).filter_map(row).collect();
    let header =
        ["tokens", "windows", "attention", "perplexity", "change", "after the first chunk", "last quarter", "change"];
    section(
        "Perplexity",
        "Of the tokens of windows of the text, by where they stand: each point is of the tokens since the one before it. \
         Lower is better; what lies on the original lost nothing.",
        &format!("{}{}", cards(&figures), table("Perplexity", &header, &rows)),
    )
}

/// Every variant at every length.
fn each(lengths: &[LengthReport]) -> impl Iterator<Item = (&LengthReport, &LongVariant)> {
    lengths.iter().flat_map(|length| length.variants.iter().map(move |variant| (length, variant)))
}

/// A number of a variant by length.
fn by_length(
    lengths: &[LengthReport],
    (title, label): (&str, fn(f64) -> String),
    value: impl Fn(&LongVariant) -> Option<f64>,
) -> Option<Panel> {
    let names = names(lengths);
    let line = |name: &&str| {
        let of_name = each(lengths).filter(|(_, variant)| variant.name == **name);
        let points = of_name.filter_map(|(length, variant)| Some((length.length as f64, value(variant)?)));
        Line::new(*name, color(&names, name), points.collect())
    };
    let lines: Vec<Line> = names.iter().map(line).filter(|line| !line.points.is_empty()).collect();
    let range = around(lines.iter().flat_map(|line| &line.points).map(|point| point.1));
    (!lines.is_empty()).then(|| Panel {
        title: title.to_owned(),
        across: Axis::log("tokens", thousands),
        up: Axis::linear("", label, range),
        lines,
        marks: Vec::new(),
    })
}

fn agreement(lengths: &[LengthReport]) -> String {
    let top1 = by_length(lengths, ("The same best token as the original", percent), |variant| {
        Some(variant.perplexity.as_ref()?.agreement.as_ref()?.top1)
    });
    let kl = by_length(lengths, ("Divergence from the original, nats", |nats| format!("{nats:.4}")), |variant| {
        Some(variant.perplexity.as_ref()?.agreement.as_ref()?.kl)
    });
    // One length is a table, not a line.
    let figures: Vec<String> = match lengths.len() {
        0 | 1 => Vec::new(),
        _ => top1.iter().chain(&kl).map(figure).collect(),
    };
    let row = |(length, variant): (&LengthReport, &LongVariant)| {
        let found = variant.perplexity.as_ref()?;
        let (all, last) = (found.agreement.as_ref()?, found.agreement_last_quarter.as_ref()?);
        let mut cells = vec![grouped(length.length as u64), variant.name.clone()];
        for agreement in [all, last] {
            cells.extend([agreement.top1, agreement.top5, agreement.top10].map(percent));
            cells.push(format!("{:.5}", agreement.kl));
        }
        cells.insert(6, format!("{:.5}", all.cosine));
        Some(cells)
    };
    let rows: Vec<Vec<String>> = each(lengths).filter_map(row).collect();
    let header = [
        "tokens",
        "attention",
        "top-1",
        "top-5",
        "top-10",
        "KL",
        "cosine",
        "last quarter: top-1",
        "top-5",
        "top-10",
        "KL",
    ];
    section(
        "Agreement with the original",
        "Over the tokens behind the first chunk of each window: how often the same token is best, how much of the five and ten best \
         is the same, the Kullback-Leibler divergence in nats and the cosine of the last hidden states; then over the last quarter of each window.",
        &format!("{}{}", cards(&figures), table("Agreement", &header, &rows)),
    )
}

fn task_name(task: RecallTask) -> &'static str {
    match task {
        RecallTask::Passkey => "Passkey: one number, asked for at the end",
        RecallTask::Needle => "Needle: one fact in a text, asked for at the end",
        RecallTask::Queries => "Queries: several facts, asked for one after another",
        RecallTask::Chain => "Chain: a fact that leads to another",
    }
}

fn hidden(lengths: &[LengthReport]) -> String {
    let mut tasks: Vec<RecallTask> = Vec::new();
    for scores in each(lengths).flat_map(|(_, variant)| &variant.recall) {
        if !tasks.contains(&scores.task) {
            tasks.push(scores.task);
        }
    }
    let columns: Vec<String> = lengths.iter().map(|length| thousands(length.length as f64)).collect();
    let mut content = String::new();
    for task in &tasks {
        let maps = names(lengths).into_iter().map(|name| {
            let row = |&depth: &f64| {
                let cell = |length: &LengthReport| {
                    let variant = length.variants.iter().find(|variant| variant.name == name)?;
                    let scores = variant.recall.iter().find(|scores| scores.task == *task)?;
                    let found = scores.by_depth.iter().find(|found| found.depth == depth)?;
                    let told = format!(
                        "{name}, {} tokens, {:.0} % into the text: {:.0} % of the digits, {:.0} % of whole numbers",
                        grouped(length.length as u64),
                        100.0 * depth,
                        100.0 * found.digits,
                        100.0 * found.exact
                    );
                    Some(Cell { share: found.digits, text: format!("{:.0}", 100.0 * found.digits), told })
                };
                (format!("{:.0} %", 100.0 * depth), lengths.iter().map(cell).collect())
            };
            let rows: Vec<_> = DEPTHS.iter().map(row).collect();
            heat::map(name, "depth", &columns, &rows, heat::Range::Whole)
        });
        content.push_str(&format!(
            "<h3>{}</h3>\n<div class=\"cards maps\">\n{}</div>\n",
            task_name(*task),
            maps.collect::<String>()
        ));
    }
    if tasks.is_empty() {
        return String::new();
    }
    let row = |(length, variant): (&LengthReport, &LongVariant)| {
        let cells = variant.recall.iter().map(move |scores| {
            vec![
                format!("{:?}", scores.task).to_lowercase(),
                grouped(length.length as u64),
                variant.name.clone(),
                scores.questions.to_string(),
                percent(scores.digits),
                percent(scores.exact),
                format!("{:.3}", scores.nll),
            ]
        });
        cells.collect::<Vec<_>>()
    };
    let rows: Vec<Vec<String>> = each(lengths).flat_map(row).collect();
    let header = ["task", "tokens", "attention", "questions", "digits", "whole numbers", "nats"];
    section(
        "Numbers hidden in long texts",
        "The share of digits that are the best token behind the right ones, in percent, by how long the text is and how deep in it the \
         number stands (0 % is the beginning). A conversion can find no more than its original does.",
        &format!("{}{content}{}", heat::key("no digit", "every digit"), table("Hidden numbers", &header, &rows)),
    )
}

fn reading(lengths: &[LengthReport]) -> String {
    let keys = by_length(lengths, ("Keys read exactly, of those the original reads", percent), |variant| {
        Some(variant.keys_share)
    });
    let cache = by_length(lengths, ("Cache, of the original's", percent), |variant| Some(variant.cache_share));
    let figures: Vec<String> = match lengths.len() {
        0 | 1 => Vec::new(),
        _ => keys.iter().chain(&cache).map(figure).collect(),
    };
    let row = |(length, variant): (&LengthReport, &LongVariant)| {
        let shares = [variant.keys_share, variant.summaries_share, variant.capped_share].map(percent);
        let mut cells = vec![grouped(length.length as u64), variant.name.clone()];
        cells.extend(shares);
        cells.extend([bytes(variant.cache_bytes as u64), percent(variant.cache_share)]);
        cells
    };
    let rows: Vec<Vec<String>> = each(lengths).map(row).collect();
    let header = ["tokens", "attention", "keys read", "summaries", "choices cut", "cache", "of the original's"];
    section(
        "What is read and kept",
        "Keys read exactly and statistics scored, as shares of the keys that the original reads, measured as they happened; and the bytes \
         of the cache at the end of a text.",
        &format!("{}{}", cards(&figures), table("Reading", &header, &rows)),
    )
}
