//! `cargo xtask eval`.

use std::path::PathBuf;

use anyhow::Result;
use bsbr_model::PositionPolicy;

use crate::{
    args::{AttentionArgs, DeviceArgs},
    builtin,
    model::HubArgs,
    output,
    running::{evaluation_tables, load, measure, open, read_tokens, tokenizer},
};

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint, GGUF file or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Text to measure on; the built-in held-out text when absent
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window, one or more lengths
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1024")]
    seq_len: Vec<usize>,
    /// Most windows of each length
    #[arg(long, value_name = "N", default_value_t = 12)]
    windows: usize,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary) [default: the model's own]
    #[arg(long, value_name = "POLICY", value_parser = crate::args::by_name::<PositionPolicy>)]
    positions: Option<PositionPolicy>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let model = args.hub.resolve(&args.model.unwrap_or_else(builtin::dir))?;
    let mut source = open(&model)?;
    let own = source.model_config().attention.clone();
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    let device = args.device.resolve()?;
    let tokenizer = tokenizer(&source, &model.dir)?;
    let tokens = read_tokens(&tokenizer, &args.text.unwrap_or_else(builtin::heldout))?;
    let description = source.description();
    source = source.with_attention(Some(attention.clone()))?;
    let mut decoder = load(source, &device)?;
    if let Some(policy) = args.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    let mut reports = Vec::with_capacity(args.seq_len.len());
    measure(&decoder, &attention, &tokens, (&args.seq_len, args.windows), |report| {
        if matches!(args.format, Format::Table) {
            output::result(&format!("{description}\n{}\n", evaluation_tables(&report)))?;
        }
        reports.push(report);
        Ok(())
    })?;
    if matches!(args.format, Format::Json) {
        let json = serde_json::json!({
            "schema": "bsbr-eval/1", "model": description, "attention": attention, "lengths": reports,
        });
        output::result(&serde_json::to_string_pretty(&json)?)?;
    }
    Ok(())
}
