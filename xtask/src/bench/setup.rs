//! From flags to a run: what is opened, started and decided before anything is measured, and the run itself.

use std::{
    path::Path,
    time::{Instant, SystemTime},
};

use anyhow::{Result, bail};
use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::ModelSource;
use burn::tensor::Device;

use super::{
    Arm, Part, Phase,
    attention::Shape,
    budget::{Budget, Rounds},
    data::{CORRELATION, Data},
    fields::{AttentionField, Field, ModelField, Pythons},
    machine,
    pytorch::{Opponent, Python},
    report::{GemmRate, Report, SCHEMA, Settings, fits},
    session::{self, Plan},
};
use crate::{
    builtin,
    commands::bench::{Args, Opposition},
    output,
    running::{load, open, read_tokens, tokenizer},
};

/// Lengths of attention alone, of a model, and of the built-in one, when none are asked for.
const LENGTHS: [&str; 3] = ["512..131072", "512..8192", "512..2048"];

/// Longest text for which the outputs of arms are compared.
const LONGEST_COMPARED: usize = 2048;

/// Share of the time that the built-in model may take where attention alone is measured as well.
const BUILTIN_SHARE: f64 = 0.25;

/// Everything a run needs, checked.
pub(crate) struct Bench<'a> {
    args: &'a Args,
    device: Device,
    started: Instant,
    settings: Settings,
    opponent: Option<Opponent>,
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
    let model = args.hub.resolve(&args.model.clone().unwrap_or_else(builtin::dir))?;
    let dir = model.dir.clone();
    let source = (args.model.is_some() || parts.contains(&Part::Model)).then(|| open(&model)).transpose()?;
    let own = source.as_ref().and_then(|source| source.model_config().attention.clone());
    let attention = args.attention.resolve(own.as_ref())?.or(own).unwrap_or_default();
    if attention.needs_meta() && parts.contains(&Part::Attention) {
        bail!("--selector meta needs the projections of a model: add --part model");
    }
    let shape = shape(args, source.as_ref())?;

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
        phases: [Phase::Prefill, Phase::Decode, Phase::Training]
            .into_iter()
            .filter(|phase| args.phase.contains(phase))
            .collect(),
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
        arms: arms(args, &[Arm::TorchSdpa, Arm::TorchOriginal]),
        device: device.clone(),
        pythons: pythons.clone(),
        flags: flags.clone(),
        machine_memory: machine::machine().memory_bytes,
        entered: None,
    });
    let model = match source.filter(|_| parts.contains(&Part::Model)) {
        Some(source) => Some(model_field(args, (source, &dir), &attention, &device, pythons, flags)?),
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
        dtype: args.dtype.into(),
        stored: args.cache.stored(args.dtype.into()),
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
    } else if args.batch > 1 {
        if args.against.is_some() {
            output::note("transformers is measured with one text: it cannot read texts of different lengths together");
        }
        &[]
    } else {
        &[Arm::Transformers]
    };
    let mut arms = arms(args, opposing);
    arms.retain(|&arm| arm != Arm::Burn);
    let kv_bytes_per_token = source.cache_bytes_per_token() as u64;
    let decoder = load(source.with_attention(Some(attention.clone()))?, device)?;
    let decoder = decoder.with_cache_type(args.cache.cache_dtype.into());
    Ok(ModelField {
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
        flags,
        entered: 0,
    })
}

impl Bench<'_> {
    /// Measures.
    pub(crate) fn run(self) -> Result<Report> {
        let Self { args, device, started, settings, opponent, mut attention, mut model } = self;
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
            gemm: GemmRate::new(gemm),
            differences,
            fits: fits(&rows),
            rows,
        };
        Ok(report)
    }
}
