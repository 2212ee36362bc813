//! `cargo xtask bench`.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::ModelSource;
use burn::tensor::{DType, Device};

use crate::{
    args::{AttentionArgs, DeviceArgs},
    bench::{
        Arm, Part, Phase,
        attention::Shape,
        budget::{Budget, Rounds},
        data::{CORRELATION, Data},
        fields::{AttentionField, Field, ModelField, Pythons},
        machine, memory, plot,
        pytorch::{Opponent, Python},
        report::{GemmRate, Report, SCHEMA, Settings, fits},
        session::{self, Plan},
        sweep::Lengths,
        table,
    },
    builtin, output,
    running::{load, open, read_tokens, tokenizer},
};

/// Lengths of attention alone, of a model, and of the built-in one, when none are asked for.
const LENGTHS: [&str; 3] = ["512..131072", "512..8192", "512..2048"];

/// More runs than anyone waits for.
const MOST_RUNS: usize = 10_000;

/// Longest text for which the outputs of arms are compared.
const LONGEST_COMPARED: usize = 2048;

/// Share of the time that the built-in model may take where attention alone is measured as well.
const BUILTIN_SHARE: f64 = 0.25;

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Opposition {
    /// scaled_dot_product_attention, the Python original's formula and, with a model, transformers
    Pytorch,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Lengths in tokens: 4096, 512,2k,64k, 512..65536 (doubling) or 512..65536*4 [default: 512..131072; a model
    /// 512..8192, the built-in one 512..2048]
    #[arg(long, value_name = "LENGTHS")]
    seq_len: Option<Lengths>,
    /// What to measure [default: attention; with --model, or without --seq-len, both]
    #[arg(long, value_enum, value_name = "PART,...", value_delimiter = ',')]
    part: Vec<Part>,
    /// When to measure
    #[arg(long, value_enum, value_name = "PHASE,...", value_delimiter = ',', default_value = "prefill,decode")]
    phase: Vec<Phase>,
    /// Which implementations to measure
    #[arg(
        long,
        value_enum,
        value_name = "ARM,...",
        value_delimiter = ',',
        default_value = "bsbr,bsbr-plain,dense,burn"
    )]
    arms: Vec<Arm>,
    /// Run the same in a Python process, with as many threads
    #[arg(long, value_enum, value_name = "WHAT")]
    against: Option<Opposition>,
    /// Python that has torch
    #[arg(long, value_name = "PATH", default_value = "python3", requires = "against")]
    python: String,
    /// Hugging Face checkpoint or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text for the model; the built-in held-out text when absent
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Windows of each length to measure quality on [default: what 8192 tokens hold if there is time, at least 1]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Untimed runs of each arm at each length
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: usize,
    /// Timed runs of each arm at each length
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Seconds the whole may take: runs that do not fit are left out, and the rows say so
    #[arg(long, value_name = "S", default_value_t = 280.0)]
    seconds: f64,
    /// Threads to compute with [default: RAYON_NUM_THREADS, or one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Write the report with every sample as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw time and memory by length as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Query heads of attention alone [default: 12, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    heads: Option<usize>,
    /// Key and value heads [default: as many as heads, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    kv_heads: Option<usize>,
    /// Width of a head [default: 64, or the model's]
    #[arg(long, value_name = "N", help_heading = "Attention alone")]
    head_dim: Option<usize>,
    /// Texts at once
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Attention alone")]
    batch: usize,
    /// Type of queries, keys and values
    #[arg(long, value_enum, default_value_t = Dtype::F32, help_heading = "Attention alone")]
    dtype: Dtype,
    /// Random rows: independent, or a walk along the text, so that neighbours choose alike as they do in a model
    #[arg(long, value_enum, default_value_t = Data::Walk, help_heading = "Attention alone")]
    data: Data,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Attention alone")]
    seed: u64,
    /// What the process does that measures memory
    #[arg(long, hide = true)]
    memory_of: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.context("--threads: the threads run already")?;
    }
    let device = args.device.resolve()?;
    if let Some(probe) = &args.memory_of {
        return output::result(&serde_json::to_string(&memory::answer(probe, &device)?)?);
    }
    check(&args)?;
    let bench = prepare(args, device)?;
    let (report, args) = bench.run()?;
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &args.json {
        write(path, &json)?;
    }
    let drawn = args.plot.as_ref().map(|path| write(path, &plot::svg(&report)?)).transpose();
    match args.format {
        Format::Table => output::result(&table::text(&report))?,
        Format::Json => output::result(&json)?,
    }
    drawn.map(drop)
}

/// Checks what can be checked before anything runs.
fn check(args: &Args) -> Result<()> {
    let sizes = [("batch", Some(args.batch)), ("heads", args.heads), ("kv-heads", args.kv_heads)];
    let counts = [("head-dim", args.head_dim), ("runs", Some(args.runs)), ("windows", args.windows)];
    for (flag, value) in sizes.into_iter().chain(counts).chain([("threads", args.threads)]) {
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
    for (flag, path) in [("json", &args.json), ("plot", &args.plot)] {
        let Some(path) = path else { continue };
        if path.is_dir() || !directory(path).is_dir() {
            bail!("--{flag}: {} cannot be written, expected a file in a directory that exists", path.display());
        }
    }
    Ok(())
}

/// The directory of a file.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes a file as a whole or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut builder = tempfile::Builder::new();
    // As any other file, not for the owner's eyes alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory(path)).with_context(cannot)?;
    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).with_context(cannot)?;
    file.persist(path).with_context(cannot).map(drop)
}

/// Everything a run needs, checked.
struct Bench {
    args: Args,
    device: Device,
    started: Instant,
    settings: Settings,
    opponent: Option<Opponent>,
    attention: Option<AttentionField>,
    model: Option<ModelField>,
}

fn prepare(args: Args, device: Device) -> Result<Bench> {
    let started = Instant::now();
    let with_model = args.model.is_some() || (args.seq_len.is_none() && args.part.is_empty());
    let mut parts = if with_model { vec![Part::Attention, Part::Model] } else { vec![Part::Attention] };
    if !args.part.is_empty() {
        parts.retain(|_| false);
        parts.extend([Part::Attention, Part::Model].into_iter().filter(|part| args.part.contains(part)));
    }
    let dir = args.model.clone().unwrap_or_else(builtin::dir);
    let source = (args.model.is_some() || parts.contains(&Part::Model)).then(|| open(&dir)).transpose()?;
    let own = source.as_ref().and_then(|source| source.model_config().attention.clone());
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    if attention.needs_meta() && parts.contains(&Part::Attention) {
        bail!("--selector meta needs the projections of a model: add --part model");
    }
    let shape = shape(&args, source.as_ref())?;

    let threads = rayon::current_num_threads();
    let (pythons, opponent) = match args.against {
        Some(Opposition::Pytorch) => {
            let (timing, opponent) = Python::start(&args.python, threads, false)?;
            let (memory, _) = Python::start(&args.python, threads, true)?;
            (Some(Pythons { timing, memory }), Some(opponent))
        }
        None => (None, None),
    };
    let lengths = |kind: usize| -> Result<Vec<usize>> {
        let chosen = args.seq_len.clone().map_or_else(|| LENGTHS[kind].parse().map_err(anyhow::Error::msg), Ok);
        Ok(chosen?.as_slice().to_vec())
    };
    let flags: Vec<String> =
        [args.device.flags(), vec!["--threads".into(), threads.to_string()]].into_iter().flatten().collect();
    let settings = Settings {
        device: args.device.name(),
        threads,
        attention_lengths: if parts.contains(&Part::Attention) { lengths(0)? } else { Vec::new() },
        model_lengths: if parts.contains(&Part::Model) {
            lengths(if args.model.is_some() { 1 } else { 2 })?
        } else {
            Vec::new()
        },
        phases: [Phase::Prefill, Phase::Decode].into_iter().filter(|phase| args.phase.contains(phase)).collect(),
        warmup: args.warmup,
        runs: args.runs,
        seconds: args.seconds,
        shape,
        correlation: if args.data == Data::Walk { CORRELATION } else { 0.0 },
        attention: attention.clone(),
        model: source.as_ref().filter(|_| parts.contains(&Part::Model)).map(ModelSource::description),
        text: parts.contains(&Part::Model).then(|| match &args.text {
            Some(path) => path.display().to_string(),
            None => "built-in".into(),
        }),
    };
    let field = parts.contains(&Part::Attention).then(|| AttentionField {
        shape,
        attention: attention.clone(),
        arms: arms(&args, &[Arm::TorchSdpa, Arm::TorchOriginal]),
        device: device.clone(),
        pythons: pythons.clone(),
        flags: flags.clone(),
        machine_memory: machine::machine().memory_bytes,
        entered: None,
    });
    let model = match source.filter(|_| parts.contains(&Part::Model)) {
        Some(source) => Some(model_field(&args, (source, &dir), &attention, &device, pythons, flags)?),
        None => None,
    };
    Ok(Bench { args, device, started, settings, opponent, attention: field, model })
}

/// The arms asked for, in one order, and those of the opponent.
fn arms(args: &Args, opposing: &[Arm]) -> Vec<Arm> {
    let own = [Arm::Bsbr, Arm::BsbrPlain, Arm::Dense, Arm::Burn].into_iter().filter(|arm| args.arms.contains(arm));
    own.chain(opposing.iter().copied().filter(|_| args.against.is_some())).collect()
}

fn shape(args: &Args, source: Option<&ModelSource>) -> Result<Shape> {
    let model = source.filter(|_| args.model.is_some()).map(|source| source.model_config().decoder.clone());
    let heads = args.heads.or(model.as_ref().map(|model| model.heads)).unwrap_or(12);
    let models = model.as_ref().filter(|_| args.heads.is_none()).map(|model| model.kv_heads);
    let kv_heads = args.kv_heads.or(models).unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        bail!("--kv-heads is {kv_heads}, expected a divisor of the {heads} heads");
    }
    Ok(Shape {
        batch: args.batch,
        heads,
        kv_heads,
        head_dim: args.head_dim.or(model.map(|model| model.head_dim)).unwrap_or(64),
        dtype: match args.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::BF16,
        },
        data: args.data,
        seed: args.seed,
    })
}

fn model_field(
    args: &Args,
    (source, dir): (ModelSource, &Path),
    attention: &BlockAttentionConfig,
    device: &Device,
    pythons: Option<Pythons>,
    flags: Vec<String>,
) -> Result<ModelField> {
    let tokenizer = tokenizer(&source, dir)?;
    let text = read_tokens(&tokenizer, args.text.as_deref().unwrap_or(&builtin::heldout()))?;
    let opposing: &[Arm] = if source.is_converted() {
        if args.against.is_some() {
            output::note(&format!("{} is a converted model: transformers cannot run it", dir.display()));
        }
        &[]
    } else {
        &[Arm::Transformers]
    };
    let mut arms = arms(args, opposing);
    arms.retain(|&arm| arm != Arm::Burn);
    let kv_bytes_per_token = source.cache_bytes_per_token() as u64;
    let decoder = load(source.with_attention(Some(attention.clone()))?, device)?;
    Ok(ModelField {
        decoder,
        dir: dir.to_owned(),
        attention: attention.clone(),
        arms,
        text: text.into(),
        windows: args.windows,
        kv_bytes_per_token,
        pythons,
        flags,
        entered: 0,
    })
}

impl Bench {
    fn run(self) -> Result<(Report, Args)> {
        let Self { args, device, started, settings, opponent, mut attention, mut model } = self;
        let budget = Budget::new(args.seconds - started.elapsed().as_secs_f64());
        let rounds = Rounds { warmup: args.warmup, runs: args.runs, memory: cfg!(target_os = "linux") };
        let mut note = |line: &str| output::note(line);
        let (mut rows, mut gemm, mut differences) = (Vec::new(), Vec::new(), Vec::new());
        // The model first: what it does not need is for the long texts of attention alone.
        if let Some(field) = &mut model {
            let share = if args.model.is_some() { 0.5 } else { BUILTIN_SHARE };
            let share = budget.share(share, if attention.is_some() { 1.0 } else { share });
            let plan = Plan { lengths: &settings.model_lengths, phases: &settings.phases, rounds, device: &device };
            rows.extend(session::run(field, &plan, share, &mut note)?.rows);
        }
        drop(model);
        if let Some(field) = &mut attention {
            let lengths = &settings.attention_lengths;
            let compared = lengths.iter().copied().rfind(|&tokens| tokens <= LONGEST_COMPARED);
            let compared = compared.unwrap_or(LONGEST_COMPARED);
            if field.obstacle(Arm::Dense, Phase::Prefill, compared, 0).is_none() {
                field.enter(compared)?;
                differences = field.differences()?;
            }
            let plan = Plan { lengths, phases: &settings.phases, rounds, device: &device };
            let outcome = session::run(field, &plan, budget, &mut note)?;
            rows.splice(0..0, outcome.rows);
            gemm = outcome.gemm;
        }
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let elapsed = started.elapsed();
        let report = Report {
            schema: SCHEMA,
            unix_time: since_1970.saturating_sub(elapsed).as_secs(),
            elapsed_seconds: elapsed.as_secs_f64(),
            versions: machine::versions(),
            machine: machine::machine(),
            settings,
            opponent,
            gemm: GemmRate::new(gemm),
            differences,
            fits: fits(&rows),
            rows,
        };
        Ok((report, args))
    }
}
