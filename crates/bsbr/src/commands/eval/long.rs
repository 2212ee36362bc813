//! `bsbr eval --suite long`.

use anyhow::Result;
use bsbr_attn::BlockAttentionConfig;
use bsbr_model::{
    Decoder, LengthReport, LongConfig, LongReport, LongTask, LongVariant, RecallTask, TextTokenizer, default_lengths,
    evaluate_long,
};

use serde_json::Value;

use super::Args;
use crate::{
    output::{Progress, bytes, grouped, table},
    page,
    report::Forms,
};

/// Most windows of each length unless said otherwise.
const WINDOWS: usize = 4;

/// Prompts of each kind, length and depth unless said otherwise.
const SAMPLES: usize = 2;

pub(super) fn run(
    args: &Args,
    about: &Value,
    decoder: &Decoder,
    attention: &BlockAttentionConfig,
    (tokenizer, tokens): (&TextTokenizer, &[u32]),
) -> Result<()> {
    let config = LongConfig {
        lengths: match &args.seq_len {
            Some(lengths) => lengths.as_slice().to_vec(),
            None => default_lengths(decoder, tokens.len()),
        },
        windows: args.windows.unwrap_or(WINDOWS),
        samples: args.samples.unwrap_or(SAMPLES),
        tasks: args.tasks.clone().unwrap_or_else(|| LongTask::ALL.to_vec()),
    };
    let mut progress = Progress::new("evaluating");
    let report = evaluate_long(decoder, attention, tokenizer, tokens, config, |done, total| {
        progress.set(done as u64, total as u64);
    })?;
    drop(progress);
    let model = about["model"].as_str().unwrap_or_default();
    let json = || {
        serde_json::json!({
            "schema": "bsbr-eval-long/2", "about": about, "model": model, "attention": attention,
            "config": report.config, "lengths": report.lengths,
        })
    };
    args.page.write(|| Ok(page::eval::page(model, &report.lengths, &json())))?;
    args.report.emit(&Forms {
        table: &|| Ok(format!("{model}\n\n{}", tables(&report))),
        json: &|| Ok(json()),
        rows: Some(&rows),
    })
}

/// A row for each variant at each length.
fn rows(report: &Value) -> Vec<Value> {
    let lengths = report["lengths"].as_array().into_iter().flatten();
    let of = |length: &Value| {
        let variants = length["variants"].as_array().cloned().unwrap_or_default();
        let with_length = |mut row: Value| {
            row["tokens"] = length["length"].clone();
            row["windows"] = length["windows"].clone();
            row
        };
        variants.into_iter().map(with_length).collect::<Vec<_>>()
    };
    lengths.flat_map(of).collect()
}

fn tables(report: &LongReport) -> String {
    let sections = report.lengths.iter().map(|length| section(length, report.config.samples));
    sections.collect::<Vec<_>>().join("\n\n")
}

/// What was measured at one length.
fn section(report: &LengthReport, samples: usize) -> String {
    let mut parts = vec![format!("{} tokens", grouped(report.length as u64)), reading(report)];
    if report.windows > 0 {
        let windows = format!(
            "{} windows; agreement after the first {} tokens, and over the last quarter",
            report.windows, report.skip
        );
        parts.extend([windows, perplexities(report), positions(report)]);
    }
    let mut tasks: Vec<RecallTask> = Vec::new();
    if let Some(original) = report.variants.first() {
        tasks.extend(original.recall.iter().map(|scores| scores.task));
    }
    if !tasks.is_empty() {
        parts.push(format!(
            "{samples} samples; share of digits right behind the right ones / of whole numbers by greedy decoding"
        ));
        parts.push(answers(report));
        parts.push("digits by where the number stands".to_owned());
        parts.push(depths(report, &tasks));
    }
    parts.join("\n\n")
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A line to a variant.
fn lines(report: &LengthReport, cells: impl Fn(&LongVariant) -> Vec<String>) -> Vec<Vec<String>> {
    report.variants.iter().map(|variant| [vec![variant.name.clone()], cells(variant)].concat()).collect()
}

fn reading(report: &LengthReport) -> String {
    let cells = |variant: &LongVariant| {
        let shares = [variant.keys_share, variant.summaries_share, variant.capped_share].map(percent);
        let cache = [bytes(variant.cache_bytes as u64), percent(variant.cache_share)];
        shares.into_iter().chain(cache).collect()
    };
    table(&["attention", "keys read", "summaries", "choices cut", "cache", "of the original's"], &lines(report, cells))
}

fn perplexities(report: &LengthReport) -> String {
    let original = report.variants.first().and_then(|variant| variant.perplexity.clone());
    let cells = |variant: &LongVariant| {
        let (Some(found), Some(original)) = (&variant.perplexity, &original) else { return Vec::new() };
        let change = |found: f64, original: f64| format!("{:+.2} %", 100.0 * (found / original - 1.0));
        let mut cells = vec![format!("{:.3}", found.all), format!("{:.3}", found.last_quarter)];
        match (&found.agreement, &found.agreement_last_quarter) {
            (Some(agreement), Some(last)) => {
                cells.insert(1, change(found.all, original.all));
                cells.push(change(found.last_quarter, original.last_quarter));
                for agreement in [agreement, last] {
                    cells.extend([agreement.top1, agreement.top5, agreement.top10].map(percent));
                    cells.push(format!("{:.5}", agreement.kl));
                }
            }
            _ => {
                cells.insert(1, "-".into());
                cells.extend(std::iter::repeat_n("-".to_owned(), 9));
            }
        }
        cells
    };
    let agreement = ["top-1", "top-5", "top-10", "KL"];
    let header = [["attention", "perplexity", "change", "last quarter", "change"].as_slice(), &agreement, &agreement];
    table(&header.concat(), &lines(report, cells))
}

fn positions(report: &LengthReport) -> String {
    let buckets = report.variants.first().and_then(|variant| variant.perplexity.as_ref());
    let ranges = buckets.iter().flat_map(|found| &found.by_position);
    let header: Vec<String> = ranges.map(|bucket| format!("{}-{}", bucket.start, bucket.end)).collect();
    let header: Vec<&str> = std::iter::once("perplexity at").chain(header.iter().map(String::as_str)).collect();
    let cells = |variant: &LongVariant| {
        let buckets = variant.perplexity.iter().flat_map(|found| &found.by_position);
        buckets.map(|bucket| format!("{:.2}", bucket.perplexity)).collect()
    };
    table(&header, &lines(report, cells))
}

fn name(task: RecallTask) -> &'static str {
    match task {
        RecallTask::Passkey => "passkey",
        RecallTask::Needle => "needle",
        RecallTask::Queries => "queries",
        RecallTask::Chain => "chain",
    }
}

fn answers(report: &LengthReport) -> String {
    let mut header = vec!["attention".to_owned()];
    for scores in report.variants.iter().take(1).flat_map(|variant| &variant.recall) {
        header.extend([format!("{} ({})", name(scores.task), scores.questions), "nats".to_owned()]);
    }
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let cells = |variant: &LongVariant| {
        let cells = variant.recall.iter().flat_map(|scores| {
            let right = format!("{:.0} / {:.0} %", 100.0 * scores.digits, 100.0 * scores.exact);
            [right, format!("{:.2}", scores.nll)]
        });
        cells.collect()
    };
    table(&header, &lines(report, cells))
}

fn depths(report: &LengthReport, tasks: &[RecallTask]) -> String {
    let mut rows = Vec::new();
    for task in tasks {
        for variant in &report.variants {
            let Some(scores) = variant.recall.iter().find(|scores| scores.task == *task) else { continue };
            let digits = scores.by_depth.iter().map(|depth| format!("{:.0} %", 100.0 * depth.digits));
            rows.push([vec![format!("{}, {}", name(*task), variant.name)], digits.collect()].concat());
        }
    }
    let depths = bsbr_model::DEPTHS.map(|depth| format!("{:.0} %", 100.0 * depth));
    let header: Vec<&str> = std::iter::once("at").chain(depths.iter().map(String::as_str)).collect();
    table(&header, &rows)
}
