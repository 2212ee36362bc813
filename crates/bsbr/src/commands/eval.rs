//! `bsbr eval`.

mod long;

use std::path::PathBuf;

use anyhow::{Result, bail};
use bsbr_model::{LengthReport, LongTask, PositionPolicy};
use serde_json::Value;

use crate::{
    args::{ArithmeticArgs, AttentionArgs, CacheArgs},
    bench::sweep::Lengths,
    builtin,
    device::DeviceArgs,
    model::HubArgs,
    output,
    page::{self, HtmlArgs},
    record,
    report::{Format, Forms, ReportArgs},
    running::{evaluation_tables, load, measure, open, read_tokens},
};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Perplexity and agreement, beside retrieval = none
    Standard,
    /// The same up to the longest text the model reads, its last quarter, and numbers hidden in long texts; beside
    /// retrieval = none and far = none, with the share of the keys read and the bytes of the cache
    Long,
}

/// Windows of the standard suite unless said otherwise.
const WINDOWS: usize = 12;

/// Their length.
const SEQ_LEN: usize = 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint, GGUF file or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Model whose scores count as the original ones, as that which a model in codes was made from [default: the model itself,
    /// with full attention]
    #[arg(long, value_name = "PATH|NAME")]
    original: Option<PathBuf>,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Suite::Standard)]
    suite: Suite,
    /// Text to measure on; the built-in held-out text when absent
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window, one or more lengths: 4096, 512,2k or 1k..8k (doubling) [default: 1024; long: doubled from there to
    /// what the model was trained for, 8192 or the text]
    #[arg(long, value_name = "LENGTHS")]
    seq_len: Option<Lengths>,
    /// Most windows of each length [default: 12; long: 4]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Of the long suite: perplexity, passkey, needle, queries, chain [default: all]
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', value_parser = crate::args::by_name::<LongTask>)]
    tasks: Option<Vec<LongTask>>,
    /// Prompts of each task, length and depth, of the long suite [default: 2]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary) [default: the model's own]
    #[arg(long, value_name = "POLICY", value_parser = crate::args::by_name::<PositionPolicy>)]
    positions: Option<PositionPolicy>,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    page: HtmlArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    arithmetic: ArithmeticArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if args.suite == Suite::Long && args.original.is_some() {
        bail!("--original belongs to --suite standard");
    }
    if args.suite == Suite::Standard && (args.tasks.is_some() || args.samples.is_some()) {
        bail!("--tasks and --samples belong to --suite long");
    }
    args.report.check()?;
    args.page.check()?;
    let model = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let mut source = open(&model)?;
    let own = source.model_config().attention.clone();
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    let device = args.device.resolve()?;
    let tokenizer = source.text_tokenizer()?;
    let (tokens, text_sha256) = read_tokens(&tokenizer, &builtin::or_heldout(args.text.clone())?)?;
    let (description, bits) = (source.description(), source.bits_per_weight()?);
    source = source.with_attention(Some(attention.clone()))?;
    let decoder = load(source, &device)?.with_cache_type(args.cache.cache_dtype.into());
    let mut decoder = decoder.with_arithmetic(args.arithmetic.into());
    if let Some(policy) = args.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    let about = record::about(&description, Some(text_sha256));
    if args.suite == Suite::Long {
        return long::run(&args, &about, &decoder, &attention, (&tokenizer, &tokens));
    }
    let original = match &args.original {
        Some(original) => Some(load(open(&args.hub.resolve(original)?)?, &device)?),
        None => None,
    };
    let lengths = args.seq_len.as_ref().map_or_else(|| vec![SEQ_LEN], |lengths| lengths.as_slice().to_vec());
    let mut reports = Vec::with_capacity(lengths.len());
    let at_once = args.report.format() == Format::Table && !args.report.writes();
    measure(&decoder, original.as_ref(), &attention, &tokens, (&lengths, args.windows.unwrap_or(WINDOWS)), |report| {
        if at_once {
            output::result(&format!("{description}, {bits:.2} bits per weight\n{}\n", evaluation_tables(&report)))?;
        }
        reports.push(report);
        Ok(())
    })?;
    let json = || {
        serde_json::json!({
            "schema": "bsbr-eval/2", "about": about, "model": description, "bits_per_weight": bits,
            "attention": attention, "lengths": reports,
        })
    };
    args.page.write(|| {
        let lengths: Vec<LengthReport> = reports.iter().map(LengthReport::from).collect();
        Ok(page::eval::page(&description, &lengths, &json()))
    })?;
    if at_once {
        return Ok(());
    }
    args.report.emit(&Forms {
        table: &|| {
            let head = format!("{description}, {bits:.2} bits per weight");
            let tables = reports.iter().map(|report| format!("{head}\n{}\n", evaluation_tables(report)));
            Ok(tables.collect::<Vec<_>>().join("\n"))
        },
        json: &|| Ok(json()),
        rows: Some(&rows),
    })
}

/// A row for the original and each variant at each length.
fn rows(report: &Value) -> Vec<Value> {
    let lengths = report["lengths"].as_array().into_iter().flatten();
    let of = |length: &Value| {
        let original = serde_json::json!({"name": "original", "perplexity": length["original"]});
        let variants = length["variants"].as_array().cloned().unwrap_or_default();
        let with_length = |mut row: Value| {
            let mut first =
                serde_json::json!({"model": report["model"], "tokens": length["window"], "windows": length["windows"]});
            if let (Some(first), Some(row)) = (first.as_object_mut(), row.as_object_mut()) {
                first.append(row);
            }
            first
        };
        std::iter::once(original).chain(variants).map(with_length).collect::<Vec<_>>()
    };
    lengths.flat_map(of).collect()
}
