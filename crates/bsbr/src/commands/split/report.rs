//! `bsbr split report`, and the report that compressing leaves in the directory of the model.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bsbr_model::{EvaluateConfig, evaluate};
use bsbr_splitlinear::{CompressedGroup, Plan, SavedSplit};
use serde_json::{Value, json};

use super::setup::{Setup, read_json};
use crate::{
    bench::sweep::length,
    builtin,
    device::DeviceArgs,
    model::HubArgs,
    output::{self, Progress, grouped},
    record,
    report::{Forms, ReportArgs},
    running::{load, open, read_tokens},
};

/// Name of the file.
pub(super) const FILE: &str = "split_report.json";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Compressed model
    #[arg(short, long, value_name = "DIR|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// The model it was made of, to measure against; the built-in checkpoint for one made of that
    #[arg(long, value_name = "DIR")]
    original: Option<PathBuf>,
    /// Text to measure on; the built-in held-out text when absent
    #[arg(long, value_name = "FILE", requires = "original")]
    text: Option<PathBuf>,
    /// Tokens of a window
    #[arg(long, value_name = "N", value_parser = length, default_value = "1024")]
    seq_len: usize,
    /// Most windows; those at the end of the text are taken
    #[arg(long, value_name = "N", default_value_t = 12)]
    windows: usize,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    let model = args.hub.resolve(&args.model)?;
    let source = open(&model)?;
    if source.model_config().split.is_none() {
        bail!("{} is no compressed model: make one with `split compress`", model.dir.display());
    }
    let description = source.description();
    let mut report = read_json(&model.dir.join(FILE))?;
    if let Some(original) = &args.original {
        let original = if original.as_os_str() == "builtin" { builtin::dir()? } else { original.clone() };
        let dense = open(&crate::model::LocalModel::at(&original))?;
        let text = builtin::or_heldout(args.text.clone())?;
        let (tokens, text_sha256) = read_tokens(&source.text_tokenizer()?, &text)?;
        // The end of the text: a calibration takes the beginning, if it takes any of it.
        let wanted = args.seq_len.saturating_mul(args.windows).min(tokens.len() / args.seq_len.max(1) * args.seq_len);
        let tokens = &tokens[tokens.len() - wanted..];
        let device = args.device.resolve()?;
        let (dense, compressed) = (load(dense, &device)?, load(source, &device)?);
        let config = EvaluateConfig { window: args.seq_len, windows: args.windows, skip: 0 };
        let mut bar = Progress::new("evaluating");
        let measured = evaluate(&dense, &[("compressed", &compressed)], tokens, config, |done, total| {
            bar.set(done as u64, total as u64);
        })?;
        drop(bar);
        report["measured"] = serde_json::to_value(measured)?;
        report["measured"]["text_sha256"] = text_sha256.into();
    }
    args.report.emit(&Forms {
        table: &|| table(&report),
        json: &|| Ok(described(&report, &description)),
        rows: Some(&|report| report["groups"].as_array().cloned().unwrap_or_default()),
    })
}

/// The report as it is printed: with the program and the machine, which the file in the directory of the model leaves out.
pub(super) fn described(report: &Value, model: &str) -> Value {
    let mut report = report.clone();
    let sha256 = report["measured"]["text_sha256"].as_str().map(str::to_owned);
    report["about"] = record::about(model, sha256);
    report
}

/// The report on a compression.
pub(super) fn of(
    setup: &Setup,
    plan: &Plan,
    saved: &SavedSplit,
    groups: &[CompressedGroup],
    all: usize,
    seconds: f64,
) -> Value {
    let (before, after) = (plan.parameters_before(), plan.parameters_after());
    let groups: Vec<Value> = groups
        .iter()
        .map(|group| {
            let refits = group.refits.iter().map(|(part, refit)| json!({ "part": part, "refit": refit }));
            let mut value = serde_json::to_value(&group.report).unwrap_or_default();
            value["refits"] = refits.collect();
            value
        })
        .collect();
    json!({
        "schema": "bsbr-split/1",
        "model": setup.source.description(),
        "base": saved.base,
        "calibration": saved.calibration,
        "config": setup.config,
        "parameters": { "model_before": all, "model_after": all - before + after, "before": before, "after": after },
        "flop_ratio": plan.flop_ratio(),
        "seconds": seconds,
        "groups": groups,
    })
}

/// A report as tables.
pub(super) fn table(report: &Value) -> Result<String> {
    let groups = report["groups"].as_array().context("the report has no groups")?;
    let number = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), grouped);
    let percent =
        |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{:.3} %", 100.0 * value));
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let mut rows = Vec::new();
    for group in groups {
        for member in group["members"].as_array().into_iter().flatten() {
            let refit = group["refits"].as_array().into_iter().flatten().find(|refit| refit["part"] == member["name"]);
            let refit = refit.map_or(&group["refit"], |refit| &refit["refit"]);
            rows.push(vec![
                text(&member["name"]),
                text(&group["name"]),
                number(&group["rank"]),
                number(&group["parameters_before"]),
                number(&group["parameters_after"]),
                percent(&member["error"]),
                percent(&member["held_out_error"]),
                member["condition"].as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.1e}")),
                text(&refit["outcome"]),
                text(&group["decomposition"]),
                group["seconds"].as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.2}")),
            ]);
        }
    }
    let header = [
        "part",
        "group",
        "rank",
        "parameters",
        "compressed",
        "error",
        "held-out error",
        "condition",
        "refit",
        "path",
        "seconds",
    ];
    let sizes = &report["parameters"];
    let mut lines = vec![text(&report["model"]), String::new(), output::table(&header, &rows), String::new()];
    for (what, before, after) in [("linear layers", "before", "after"), ("whole model", "model_before", "model_after")]
    {
        let (before, after) = (sizes[before].as_u64().unwrap_or(0), sizes[after].as_u64().unwrap_or(0));
        let share = 100.0 * after as f64 / before.max(1) as f64;
        lines.push(format!(
            "{what}: {} parameters, {} compressed ({share:.2} % kept)",
            grouped(before),
            grouped(after)
        ));
    }
    if let Some(measured) = report.get("measured") {
        let (original, variant) = (&measured["original"], &measured["variants"][0]);
        let compressed = &variant["perplexity"];
        let of = |value: &Value| format!("{:.3}", value.as_f64().unwrap_or(f64::NAN));
        lines.push(format!(
            "{} windows of {} tokens: perplexity {} original, {} compressed; top-1 agreement {}, KL {}; {} and {} seconds",
            number(&measured["windows"]),
            number(&measured["window"]),
            of(&original["all"]),
            of(&compressed["all"]),
            percent(&variant["agreement"]["top1"]),
            of(&variant["agreement"]["kl"]),
            of(&original["seconds"]),
            of(&compressed["seconds"]),
        ));
    }
    Ok(lines.join("\n"))
}
