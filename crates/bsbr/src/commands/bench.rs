//! `bsbr bench`.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    args::{ArithmeticArgs, AttentionArgs, CacheArgs, Dtype},
    bench::{Arm, Part, Phase, data::Data, memory, plot, setup, sweep::Lengths, table},
    device::DeviceArgs,
    model::HubArgs,
    output,
    page::{self, HtmlArgs},
    report::{Forms, ReportArgs, drawable},
};

/// More runs than anyone waits for.
const MOST_RUNS: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Opposition {
    /// scaled_dot_product_attention, the Python original's formula and, with a model, transformers
    Pytorch,
    /// llama-bench on a GGUF file of the model
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lengths in tokens: 4096, 512,2k,64k, 512..65536 (doubling) or 512..65536*4 [default: 512..131072; a model
    /// 512..8192, the built-in one 512..2048]
    #[arg(long, value_name = "LENGTHS")]
    pub(crate) seq_len: Option<Lengths>,
    /// What to measure [default: attention; with --model, or without --seq-len, both]
    #[arg(long, value_enum, value_name = "PART,...", value_delimiter = ',')]
    pub(crate) part: Vec<Part>,
    /// When to measure
    #[arg(long, value_enum, value_name = "PHASE,...", value_delimiter = ',', default_value = "prefill,decode")]
    pub(crate) phase: Vec<Phase>,
    /// Which implementations to measure
    #[arg(
        long,
        value_enum,
        value_name = "ARM,...",
        value_delimiter = ',',
        default_value = "bsbr,bsbr-plain,dense,burn"
    )]
    pub(crate) arms: Vec<Arm>,
    /// Run the same in other programs, with as many threads
    #[arg(long, value_enum, value_name = "WHAT,...", value_delimiter = ',')]
    pub(crate) against: Vec<Opposition>,
    /// Python that has torch
    #[arg(long, value_name = "PATH", default_value = "python3", requires = "against")]
    pub(crate) python: String,
    /// The llama-bench to run --against llama.cpp
    #[arg(long, value_name = "PATH", requires = "against")]
    pub(crate) llama_bench: Option<PathBuf>,
    /// The model as a GGUF file for it [default: that of --model]
    #[arg(long, value_name = "FILE", requires = "llama_bench")]
    pub(crate) llama_model: Option<PathBuf>,
    /// Hugging Face checkpoint or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
    /// Text for the model; the built-in held-out text when absent
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Windows of each length to measure quality on [default: what 8192 tokens hold if there is time, at least 1]
    #[arg(long, value_name = "N")]
    pub(crate) windows: Option<usize>,
    /// Texts at once; those of a model are of N lengths in equal steps up to the one named
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) batch: usize,
    /// Untimed runs of each arm at each length
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) warmup: usize,
    /// Timed runs of each arm at each length
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) runs: usize,
    /// Seconds the whole may take: runs that do not fit are left out, and the rows say so
    #[arg(long, value_name = "S", default_value_t = 280.0)]
    pub(crate) seconds: f64,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
    /// Draw time and memory by length as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) page: HtmlArgs,
    /// Query heads of attention alone [default: 12, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    pub(crate) heads: Option<usize>,
    /// Key and value heads [default: as many as heads, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    pub(crate) kv_heads: Option<usize>,
    /// Width of a head [default: 64, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    pub(crate) head_dim: Option<usize>,
    /// Type of queries, keys and values
    #[arg(long, value_enum, default_value_t = Dtype::F32, help_heading = "Attention alone")]
    pub(crate) dtype: Dtype,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    #[command(flatten)]
    pub(crate) arithmetic: ArithmeticArgs,
    /// Where queries, keys and values come from [default: model with --model, else walk]
    #[arg(long, value_enum, help_heading = "Attention alone")]
    pub(crate) data: Option<Data>,
    /// Layers of the model whose heads are taken, with --data model [default: spread over all of them]
    #[arg(long, value_name = "N,...", value_delimiter = ',', help_heading = "Attention alone")]
    pub(crate) layers: Option<Vec<usize>>,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Attention alone")]
    pub(crate) seed: u64,
    /// What the process does that measures memory
    #[arg(long, hide = true)]
    pub(crate) memory_of: Option<String>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    #[command(flatten)]
    pub(crate) attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let device = args.device.resolve()?;
    if let Some(probe) = &args.memory_of {
        return output::result(&serde_json::to_string(&memory::answer(probe, &device)?)?);
    }
    check(&args)?;
    let report = setup::prepare(&args, device)?.run()?;
    let drawn = args.plot.as_ref().map(|path| write(path, &plot::svg(&report)?)).transpose();
    let shown = args.page.write(|| Ok(page::bench::page(&report, &serde_json::to_value(&report)?)));
    args.report.emit(&Forms {
        table: &|| Ok(table::text(&report)),
        json: &|| Ok(serde_json::to_value(&report)?),
        rows: Some(&|report| report["rows"].as_array().cloned().unwrap_or_default()),
    })?;
    drawn.map(drop).and(shown)
}

/// Checks what can be checked before anything runs.
fn check(args: &Args) -> Result<()> {
    let sizes = [("batch", Some(args.batch)), ("heads", args.heads), ("kv-heads", args.kv_heads)];
    let counts = [("head-dim", args.head_dim), ("runs", Some(args.runs)), ("windows", args.windows)];
    for (flag, value) in sizes.into_iter().chain(counts) {
        if value == Some(0) {
            bail!("--{flag} is 0, expected at least 1");
        }
    }
    for (flag, value) in [("runs", args.runs), ("warmup", args.warmup)] {
        if value > MOST_RUNS {
            bail!("--{flag} is {value}, expected at most {MOST_RUNS}");
        }
    }
    if args.seconds.is_nan() || args.seconds <= 0.0 {
        bail!("--seconds is {}, expected more than 0", args.seconds);
    }
    if args.arms == [Arm::Burn] && args.part == [Part::Model] {
        bail!("--arms burn is attention alone: a model runs bsbr, bsbr-plain and dense");
    }
    if args.phase == [Phase::Training] && args.part == [Part::Model] {
        bail!("--phase training is attention alone: a model is measured with prefill and decode");
    }
    match (args.against.contains(&Opposition::LlamaCpp), args.llama_bench.is_some()) {
        (true, false) => bail!("--against llama.cpp needs a llama-bench: name it with --llama-bench PATH"),
        (false, true) => bail!("--llama-bench is run with --against llama.cpp"),
        _ => {}
    }
    args.report.check()?;
    args.page.check()?;
    args.plot.as_deref().map_or(Ok(()), drawable)
}

/// The directory of a file.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes a file as a whole or not at all.
///
/// # Errors
///
/// If it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut builder = tempfile::Builder::new();
    // As any other file, not for the owner's eyes alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory(path)).with_context(cannot)?;
    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).with_context(cannot)?;
    file.persist(path).with_context(cannot).map(drop)
}
