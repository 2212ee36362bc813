//! `bsbr verify`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use bsbr_convert::ExpectedLogits;
use bsbr_model::{Decoder, LogitDifference};

use crate::{
    CheckFailed,
    device::DeviceArgs,
    model::HubArgs,
    record,
    report::{Format, Forms, ReportArgs},
    running::{load, open},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint, GGUF file or converted model
    #[arg(short, long, value_name = "PATH|NAME")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// safetensors file with `input_ids` [batch, tokens] and `logits` [batch, tokens, vocab]
    #[arg(short, long, value_name = "FILE")]
    expected: PathBuf,
    /// Largest absolute difference allowed
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    atol: f64,
    #[command(flatten)]
    report: ReportArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if args.atol.is_nan() || args.atol < 0.0 {
        bail!("--atol is {}, expected 0 or more", args.atol);
    }
    args.report.check()?;
    let expected = ExpectedLogits::open(&args.expected)?;
    let source = open(&args.hub.resolve(&args.model)?)?;
    let description = source.description();
    let decoder = load(source, &args.device.resolve()?)?;
    let found = bsbr_model::compare_logits(&decoder, &expected.tokens, &expected.logits)?;
    let verdict = judged(&found, args.atol);
    // Tables of what failed are the error; a program gets its report all the same.
    if verdict.is_ok() || args.report.format() != Format::Table {
        args.report.emit(&Forms {
            table: &|| Ok(format!("{description}: {}", line(&found))),
            json: &|| {
                Ok(serde_json::json!({
                    "schema": "bsbr-verify/1", "about": record::about(&description, None), "max": found.max,
                    "mean": found.mean, "top1": found.top1, "tokens": found.tokens, "atol": args.atol,
                    "passed": verdict.is_ok(),
                }))
            },
            rows: Some(&|report| vec![report.clone()]),
        })?;
    }
    verdict.map(drop)
}

/// Compares and says how far off; [`CheckFailed`] past the tolerance.
pub(crate) fn check(decoder: &Decoder, expected: &ExpectedLogits, atol: f64) -> Result<String> {
    judged(&bsbr_model::compare_logits(decoder, &expected.tokens, &expected.logits)?, atol)
}

fn judged(found: &LogitDifference, atol: f64) -> Result<String> {
    if found.max <= atol {
        return Ok(line(found));
    }
    Err(CheckFailed(format!("logits differ by more than {atol:e}: {}", line(found))).into())
}

fn line(found: &LogitDifference) -> String {
    format!(
        "max |difference| {:.2e}, mean {:.2e}, top-1 {:.2} % over {} tokens",
        found.max,
        found.mean,
        100.0 * found.top1,
        found.tokens
    )
}
