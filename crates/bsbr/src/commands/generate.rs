//! `bsbr generate`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use bsbr_model::{GenerateConfig, PositionPolicy, Sampler, SamplingConfig, generate};

use crate::{
    args::CacheArgs,
    builtin,
    device::DeviceArgs,
    model::HubArgs,
    output,
    running::{load, note_beyond_training, open, read_text, tokenizer},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or GGUF file (its original attention) or converted model; the built-in checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Text to continue; `-` reads it from standard input
    #[arg(short, long, value_name = "TEXT", conflicts_with = "prompt_file", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue; `-` is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Most tokens to add
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Divides the scores; 0 takes the best token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Choose among the best K tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the best tokens whose probabilities reach P
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Run a converted model with its original attention
    #[arg(long)]
    full_attention: bool,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary)
    #[arg(long, value_name = "POLICY", value_parser = crate::args::by_name::<PositionPolicy>)]
    positions: Option<PositionPolicy>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let sampling =
        SamplingConfig { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut sampler = Sampler::new(sampling)?;
    let text = match (args.prompt, args.prompt_file) {
        (Some(text), _) if text != "-" => text,
        (Some(name), _) => read_text(Path::new(&name))?,
        (None, Some(path)) => read_text(&path)?,
        (None, None) => bail!("a prompt is needed: --prompt TEXT or --prompt-file FILE"),
    };
    if text.is_empty() {
        bail!("the prompt is empty: at least one token is needed");
    }
    let model = args.hub.resolve(&builtin::or_builtin(args.model)?)?;
    let mut source = open(&model)?;
    if args.full_attention {
        source = source.with_attention(None)?;
    }
    let tokenizer = tokenizer(&source, &model.dir)?;
    let prompt = tokenizer.encode(&text)?;
    let device = args.device.resolve()?;
    let mut decoder = load(source, &device)?.with_cache_type(args.cache.cache_dtype.into());
    if let Some(policy) = args.positions {
        decoder = decoder.with_config(|config| config.position_policy = policy)?;
    }
    let config =
        GenerateConfig { max_new_tokens: args.max_new_tokens, stop_tokens: decoder.config().stop_tokens.clone() };
    note_beyond_training(&decoder, prompt.len().saturating_add(config.max_new_tokens));
    let mut stream = tokenizer.stream();
    let mut failed = None;
    let generation = generate(&decoder, &prompt, &config, &mut sampler, |token| {
        let shown = stream.push(token).map_err(anyhow::Error::from).and_then(|text| output::fragment(&text));
        failed = shown.err();
        failed.is_none()
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    output::result(&stream.finish()?)?;
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let (prefill, decode) = (generation.prefill.as_secs_f64(), generation.decode.as_secs_f64());
    output::note(&format!(
        "prompt {} tokens in {prefill:.2} s ({:.1}/s), {} new tokens in {decode:.2} s ({:.1}/s), cache {}{}",
        prompt.len(),
        rate(prompt.len(), prefill),
        generation.tokens.len(),
        rate(generation.tokens.len().saturating_sub(1), decode),
        output::bytes(generation.cache_bytes as u64),
        if generation.stopped { ", ended by a stop token" } else { "" },
    ));
    Ok(())
}
