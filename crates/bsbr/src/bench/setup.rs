//! From flags to a run: what is opened, started and decided before anything is measured, and the run itself.

use std::{
    path::Path,
    rc::Rc,
    time::{Instant, SystemTime},
};

use anyhow::{Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{ModelSource, is_gguf};
use bsbr_model::Decoder;
use burn::tensor::{DType, Device};

use super::{
    Arm, Part, Phase,
    attention::Shape,
    budget::{Budget, Rounds},
    data::{CORRELATION, Data},
    fields::{AttentionField, Field, ModelField, Pythons},
    glued::ModelRows,
    llama::{About, LlamaBench},
    machine,
    pytorch::{Opponent, Python},
    report::{GemmRate, Report, SCHEMA, Settings, fits},
    session::{self, Plan},
};
use crate::{
    builtin,
    commands::bench::{Args, Opposition},
    output,
    running::{load, open, read_tokens},
};

/// Lengths of attention alone, of a model, and of the built-in one, when none are asked for.
const LENGTHS: [&str; 3] = ["512..131072", "512..8192", "512..2048"];

/// Longest text for which the outputs of arms are compared.
const LONGEST_COMPARED: usize = 2048;

/// Longest text that a model reads for the data of attention alone: it does so with full attention, and nothing of it is timed.
const LONGEST_READ: usize = 8192;

/// Share of the time that the built-in model may take where attention alone is measured as well.
const BUILTIN_SHARE: f64 = 0.25;

/// Everything a run needs, checked.
pub(crate) struct Bench<'a> {
    args: &'a Args,
    device: Device,
    started: Instant,
    settings: Settings,
    opponent: Option<Opponent>,
    llama_cpp: Option<About>,
    attention: Option<AttentionField>,
    model: Option<ModelField>,
}

/// Opens and starts what a run needs, and checks what only that can tell.
pub(crate) fn prepare(args: &Args, device: Device) -> Result<Bench<'_>> {
    let started = Instant::now();
    let with_model = (args.model.is_some() || args.seq_len.is_none()) && args.phase != [Phase::Training];
    let mut parts = if with_model { vec![Part::Attention, Part::Model] } else { vec![Part::Attention] };
    if !args.part.is_empty() {
        parts.retain(|_| false);
        parts.extend([Part::Attention, Part::Model].into_iter().filter(|part| args.part.contains(part)));
    }
    let model = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let dir = model.dir.clone();
    let reads = args.model.is_some() || parts.contains(&Part::Model) || args.data == Some(Data::Model);
    let source = reads.then(|| open(&model)).transpose()?;
    let own = source.as_ref().and_then(|source| source.model_config().attention.clone());
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    if attention.needs_meta() && parts.contains(&Part::Attention) {
        bail!("--selector meta needs the projections of a model: add --part model");
    }
    let data = args.data.unwrap_or(if args.model.is_some() { Data::Model } else { Data::Walk });
    if args.layers.is_some() && data != Data::Model {
        bail!("--layers chooses layers of a model: add --data model or --model");
    }
    let shape = shape(args, data, source.as_ref())?;

    let threads = rayon::current_num_threads();
    let (pythons, opponent) = if args.against.contains(&Opposition::Pytorch) {
        let (timing, opponent) = Python::start(&args.python, threads, false)?;
        let (memory, _) = Python::start(&args.python, threads, true)?;
        (Some(Pythons { timing, memory }), Some(opponent))
    } else {
        (None, None)
    };
    let (llama, llama_cpp) = match &args.llama_bench {
        Some(program) if args.against.contains(&Opposition::LlamaCpp) && parts.contains(&Part::Model) => {
            let own = Some(&dir).filter(|dir| is_gguf(dir));
            let Some(file) = args.llama_model.as_ref().or(own) else {
                bail!("--against llama.cpp runs a GGUF file of the same model: name it with --llama-model");
            };
            let (llama, about) = LlamaBench::start(program, file, threads)?;
            (Some(llama), Some(about))
        }
        _ => (None, None),
    };
    let lengths = |kind: usize| -> Result<Vec<usize>> {
        let chosen = args.seq_len.clone().map_or_else(|| LENGTHS[kind].parse().map_err(anyhow::Error::msg), Ok);
        Ok(chosen?.as_slice().to_vec())
    };
    let flags = args.device.flags();
    let description = source.as_ref().map(ModelSource::description).unwrap_or_default();
    let of_model = data == Data::Model && parts.contains(&Part::Attention);
    let loaded = match source.filter(|_| of_model || parts.contains(&Part::Model)) {
        Some(source) => Some(Loaded::new(args, source, &attention, &device)?),
        None => None,
    };
    let attention_lengths = if parts.contains(&Part::Attention) { lengths(0)? } else { Vec::new() };
    let rows = match &loaded {
        Some(loaded) if of_model => {
            let longest = attention_lengths.iter().copied().max().unwrap_or_default();
            Some(Rc::new(loaded.rows(args, shape, longest)?))
        }
        _ => None,
    };
    let described = match (&rows, data) {
        (Some(rows), _) => described(rows, &description, args),
        (None, Data::Iid) => "on independent random rows".to_owned(),
        (None, _) => format!("on random rows, neighbours correlated by {CORRELATION}"),
    };
    let settings = Settings {
        device: args.device.name(),
        threads,
        attention_lengths,
        model_lengths: if parts.contains(&Part::Model) {
            lengths(if args.model.is_some() { 1 } else { 2 })?
        } else {
            Vec::new()
        },
        phases: [Phase::Prefill, Phase::Decode, Phase::Training]
            .into_iter()
            .filter(|phase| args.phase.contains(phase))
            .collect(),
        warmup: args.warmup,
        runs: args.runs,
        seconds: args.seconds,
        shape,
        correlation: if data == Data::Walk { CORRELATION } else { 0.0 },
        data: described,
        attention: attention.clone(),
        model: parts.contains(&Part::Model).then_some(description),
        text: parts.contains(&Part::Model).then(|| match &args.text {
            Some(path) => path.display().to_string(),
            None => "built-in".into(),
        }),
        text_sha256: loaded.as_ref().map(|loaded| loaded.text_sha256.clone()),
    };
    let field = parts.contains(&Part::Attention).then(|| AttentionField {
        shape,
        attention: attention.clone(),
        arms: arms(args, if pythons.is_some() { &[Arm::TorchSdpa, Arm::TorchOriginal] } else { &[] }),
        device: device.clone(),
        pythons: pythons.clone(),
        flags: flags.clone(),
        machine_memory: machine::machine().memory_bytes,
        rows,
        entered: None,
    });
    let model = loaded
        .filter(|_| parts.contains(&Part::Model))
        .map(|loaded| model_field(args, (loaded, &dir), &attention, (pythons, llama), flags));
    Ok(Bench { args, device, started, settings, opponent, llama_cpp, attention: field, model })
}

/// The arms asked for, in one order, and those of the opponent.
fn arms(args: &Args, opposing: &[Arm]) -> Vec<Arm> {
    let own = [Arm::Bsbr, Arm::BsbrPlain, Arm::Dense, Arm::Burn].into_iter().filter(|arm| args.arms.contains(arm));
    own.chain(opposing.iter().copied()).collect()
}

/// What the data of attention alone is.
fn described(rows: &ModelRows, model: &str, args: &Args) -> String {
    let layers: Vec<String> = rows.layers().iter().map(usize::to_string).collect();
    let text = args.text.as_ref().map_or_else(|| "the built-in text".to_owned(), |path| path.display().to_string());
    let tokens = output::grouped(rows.tokens() as u64);
    format!("on queries, keys and values of {model}, layers {}, reading {tokens} tokens of {text}", layers.join(", "))
}

fn shape(args: &Args, data: Data, source: Option<&ModelSource>) -> Result<Shape> {
    let of_model = args.model.is_some() || data == Data::Model;
    let model = source.filter(|_| of_model).map(|source| source.model_config().decoder.clone());
    let heads = args.heads.or(model.as_ref().map(|model| model.heads)).unwrap_or(12);
    let models = model.as_ref().filter(|_| args.heads.is_none()).map(|model| model.kv_heads);
    let kv_heads = args.kv_heads.or(models).unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        bail!("--kv-heads is {kv_heads}, expected a divisor of the {heads} heads");
    }
    if let (Data::Model, Some(asked), Some(model)) = (data, args.head_dim, &model)
        && asked != model.head_dim
    {
        bail!(
            "--head-dim is {asked}, but the heads of the model are {} wide: leave it out, or take --data walk",
            model.head_dim
        );
    }
    Ok(Shape {
        batch: args.batch,
        heads,
        kv_heads,
        head_dim: args.head_dim.or(model.map(|model| model.head_dim)).unwrap_or(64),
        dtype: args.dtype.into(),
        stored: args.cache.stored(args.dtype.into()),
        data,
        seed: args.seed,
    })
}

/// A model with its text.
struct Loaded {
    decoder: Decoder,
    text: Vec<u32>,
    text_sha256: String,
    converted: bool,
    kv_bytes_per_token: u64,
}

impl Loaded {
    fn new(args: &Args, source: ModelSource, attention: &BlockAttentionConfig, device: &Device) -> Result<Self> {
        let tokenizer = source.text_tokenizer()?;
        let (text, text_sha256) = read_tokens(&tokenizer, &builtin::or_heldout(args.text.clone())?)?;
        let (converted, kv_bytes_per_token) = (source.is_converted(), source.cache_bytes_per_token() as u64);
        let decoder = load(source.with_attention(Some(attention.clone()))?, device)?;
        let decoder = decoder.with_cache_type(args.cache.cache_dtype.into()).with_arithmetic(args.arithmetic.into());
        Ok(Self { decoder, text, text_sha256, converted, kv_bytes_per_token })
    }

    /// What some layers read of as many windows of the text as `longest` asks for and the text has, each as long as they
    /// were trained for.
    fn rows(&self, args: &Args, shape: Shape, longest: usize) -> Result<ModelRows> {
        let model = &self.decoder.config().decoder;
        let tokens = self.text.len().min(model.max_positions).min(longest.clamp(1, LONGEST_READ));
        let layers = args.layers.clone().unwrap_or_else(|| {
            // Where layers differ, those with heads of the usual width.
            let alike: Vec<usize> = (0..model.layers)
                .filter(|&layer| {
                    model.shape(layer).head_dim == model.head_dim && model.layer_recurrent(layer).is_none()
                })
                .collect();
            let count = (shape.batch * shape.kv_heads).div_ceil(model.kv_heads).min(alike.len());
            // The middle layer of each of so many parts of the model.
            (0..count).map(|nth| alike[(2 * nth + 1) * alike.len() / (2 * count)]).collect()
        });
        let windows: Vec<&[u32]> = self.text.chunks_exact(tokens).take(longest.div_ceil(tokens)).collect();
        ModelRows::of(&self.decoder.clone().with_cache_type(DType::F32), &windows, &layers)
    }
}

fn model_field(
    args: &Args,
    (loaded, dir): (Loaded, &Path),
    attention: &BlockAttentionConfig,
    (pythons, llama): (Option<Pythons>, Option<Rc<LlamaBench>>),
    flags: Vec<String>,
) -> ModelField {
    let Loaded { decoder, text, converted, kv_bytes_per_token, .. } = loaded;
    let mut opposing = Vec::new();
    if pythons.is_some() {
        if converted {
            output::note(&format!("{} is a converted model: transformers cannot run it", dir.display()));
        } else if args.batch > 1 {
            output::note("transformers is measured with one text: it cannot read texts of different lengths together");
        } else {
            opposing.push(Arm::Transformers);
        }
    }
    if llama.is_some() {
        if args.batch > 1 {
            output::note("llama.cpp is measured with one text");
        } else {
            opposing.push(Arm::LlamaCpp);
        }
    }
    let mut arms = arms(args, &opposing);
    arms.retain(|&arm| arm != Arm::Burn);
    ModelField {
        decoder,
        dir: dir.to_owned(),
        attention: attention.clone(),
        arms,
        text: text.into(),
        batch: args.batch,
        stored: args.cache.cache_dtype.into(),
        windows: args.windows,
        kv_bytes_per_token,
        pythons,
        llama,
        flags,
        entered: 0,
    }
}

impl Bench<'_> {
    /// Measures.
    pub(crate) fn run(self) -> Result<Report> {
        let Self { args, device, started, settings, opponent, llama_cpp, mut attention, mut model } = self;
        let budget = Budget::new(args.seconds - started.elapsed().as_secs_f64());
        let rounds = Rounds { warmup: args.warmup, runs: args.runs, memory: cfg!(target_os = "linux") };
        let mut note = |line: &str| output::note(line);
        let (mut rows, mut gemm, mut differences) = (Vec::new(), Vec::new(), Vec::new());
        // The model first: what it does not need is for the long texts of attention alone.
        if let Some(field) = &mut model {
            let share = if args.model.is_some() { 0.5 } else { BUILTIN_SHARE };
            let share = budget.share(share, if attention.is_some() { 1.0 } else { share });
            let phases: Vec<_> = settings.phases.iter().copied().filter(|&phase| phase != Phase::Training).collect();
            let plan = Plan { lengths: &settings.model_lengths, phases: &phases, rounds, device: &device };
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
            llama_cpp,
            gemm: GemmRate::new(gemm),
            differences,
            fits: fits(&rows),
            rows,
        };
        Ok(report)
    }
}
