//! `bsbr eval`.

mod long;

use std::path::PathBuf;

use anyhow::{Result, bail};
use bsbr_model::{LongTask, PositionPolicy};

use crate::{
    args::{AttentionArgs, CacheArgs},
    builtin,
    device::DeviceArgs,
    model::HubArgs,
    output,
    running::{evaluation_tables, load, measure, open, read_tokens, tokenizer},
};

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

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
    /// What to measure
    #[arg(long, value_enum, default_value_t = Suite::Standard)]
    suite: Suite,
    /// Text to measure on; the built-in held-out text when absent
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window, one or more lengths [default: 1024; long: doubled from there to what the model was trained for,
    /// 8192 or the text]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    seq_len: Option<Vec<usize>>,
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
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if args.suite == Suite::Standard && (args.tasks.is_some() || args.samples.is_some()) {
        bail!("--tasks and --samples belong to --suite long");
    }
    let model = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let mut source = open(&model)?;
    let own = source.model_config().attention.clone();
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    let device = args.device.resolve()?;
    let tokenizer = tokenizer(&source, &model.dir)?;
    let tokens = read_tokens(&tokenizer, &builtin::or_heldout(args.text.clone())?)?;
    let description = source.description();
    source = source.with_attention(Some(attention.clone()))?;
    let mut decoder = load(source, &device)?.with_cache_type(args.cache.cache_dtype.into());
    if let Some(policy) = args.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    if args.suite == Suite::Long {
        return long::run(&args, &description, &decoder, &attention, (&tokenizer, &tokens));
    }
    let lengths = args.seq_len.unwrap_or_else(|| vec![SEQ_LEN]);
    let mut reports = Vec::with_capacity(lengths.len());
    measure(&decoder, &attention, &tokens, (&lengths, args.windows.unwrap_or(WINDOWS)), |report| {
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
