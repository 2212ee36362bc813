//! `bsbr generate`.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use bsbr_model::{GenerateConfig, Generation, Message, Sampler, Step, StopTexts, TextTokenizer, generate_behind};
use serde_json::json;

use crate::{
    builtin,
    chat::{self, TemplateArgs, end_tokens},
    commands::chat::RunArgs,
    model::HubArgs,
    output::{self, Progress},
    record,
    running::{configured, note_beyond_training, open, read_text},
    sampling::SamplingArgs,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or GGUF file (its original attention unless settings are given) or converted model; the built-in
    /// checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Text to continue; `-` reads it from standard input, as does a pipe without this flag
    #[arg(short, long, value_name = "TEXT", conflicts_with = "prompt_file", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue; `-` is standard input
    #[arg(short = 'f', long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Take the prompt as what a user says, and write the answer
    #[arg(long)]
    chat: bool,
    /// Most tokens to add
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Print the text and what it took as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    run: RunArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let mut sampler = args.sampling.sampler()?;
    if let Some(flag) = args.template.asked().filter(|_| !args.chat) {
        bail!("{flag} belongs to a chat: add --chat");
    }
    let text = prompt(&args)?;
    if text.is_empty() {
        bail!("the prompt is empty: at least one token is needed");
    }
    let variables = args.template.variables()?;
    let model = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let source = open(&model)?;
    let tokenizer = source.text_tokenizer()?;
    let template = if args.chat { Some(args.template.template(&source)?) } else { None };
    if template.is_none() && chat::find(&source, None).is_ok_and(|found| found.is_some()) {
        output::note(
            "note: the model has a chat template; --chat puts the prompt into it, `bsbr chat` begins a conversation",
        );
    }
    let prompt = match &template {
        Some(template) => {
            let system = args.template.system.as_deref().map(|system| Message::new("system", system));
            let messages: Vec<Message> = system.into_iter().chain([Message::new("user", text.trim_end())]).collect();
            tokenizer.encode_plain(&template.render(&messages, true, &variables)?)?
        }
        None => tokenizer.encode(&text)?,
    };
    let description = source.description();
    let decoder = configured(source, &args.run)?;
    let mut stop_tokens = decoder.config().stop_tokens.clone();
    if let Some(template) = &template {
        stop_tokens = end_tokens(&stop_tokens, template, &variables, &tokenizer);
    }
    let config = GenerateConfig { max_new_tokens: args.max_new_tokens, stop_tokens };
    note_beyond_training(&decoder, prompt.len().saturating_add(config.max_new_tokens));
    let mut cache = decoder.new_cache(&[prompt.len().saturating_add(config.max_new_tokens)])?;
    let written = write(&args, &tokenizer, &mut sampler, |sampler, each| {
        Ok(generate_behind(&decoder, &mut cache, &prompt, &config, sampler, each)?)
    })?;
    let Written { text: continuation, generation, ended } = written;
    if args.json {
        let json = json!({
            "schema": "bsbr-generate/1",
            "about": record::about(&description, Some(record::sha256_of(text.as_bytes()))),
            "attention": decoder.config().attention,
            "sampling": args.sampling.config(),
            "prompt_tokens": prompt.len(),
            "text": continuation,
            "tokens": generation.tokens,
            "ended": ended,
            "prefill_seconds": generation.prefill.as_secs_f64(),
            "decode_seconds": generation.decode.as_secs_f64(),
            "cache_bytes": generation.cache_bytes,
        });
        output::result(&serde_json::to_string_pretty(&json)?)?;
    }
    output::note(&summary(prompt.len(), &generation, ended));
    Ok(())
}

/// The text to continue: of the flags, or of a pipe.
fn prompt(args: &Args) -> Result<String> {
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) if text != "-" => Ok(text.clone()),
        (Some(name), _) => read_text(Path::new(name)),
        (None, Some(path)) => read_text(path),
        (None, None) if std::io::stdin().is_terminal() => {
            bail!("a prompt is needed: --prompt TEXT or --prompt-file FILE, or one through a pipe")
        }
        (None, None) => match read_text(Path::new("-"))? {
            text if text.is_empty() => {
                bail!("a prompt is needed: --prompt TEXT or --prompt-file FILE, or one through a pipe")
            }
            text => Ok(text),
        },
    }
}

/// A continuation as text.
struct Written {
    text: String,
    generation: Generation,
    /// By what: `stop-token`, `stop-text` or `length`.
    ended: &'static str,
}

/// Prints a text as it is generated, unless it is to be part of JSON.
fn write(
    args: &Args,
    tokenizer: &TextTokenizer,
    sampler: &mut Sampler,
    generate: impl FnOnce(&mut Sampler, &mut dyn FnMut(Step) -> bool) -> Result<Generation>,
) -> Result<Written> {
    let (mut stream, mut watch, mut text) = (tokenizer.stream(), StopTexts::new(args.sampling.stops()), String::new());
    let mut shown = |new: &str| -> Result<()> {
        text.push_str(new);
        if args.json || new.is_empty() { Ok(()) } else { output::fragment(new) }
    };
    let mut bar = Some(Progress::new("reading"));
    let mut failed = None;
    let generation = generate(sampler, &mut |step| {
        let next = match step {
            Step::Read(done, all) => {
                if let Some(bar) = &mut bar {
                    bar.set(done as u64, all as u64);
                }
                return true;
            }
            Step::Token(token) => {
                bar = None;
                stream.push(token).map_err(anyhow::Error::from).and_then(|new| shown(&watch.push(&new)))
            }
        };
        failed = next.err();
        failed.is_none() && !watch.found()
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    shown(&watch.push(&stream.finish()?))?;
    let ended = if watch.found() {
        "stop-text"
    } else if generation.stopped {
        "stop-token"
    } else {
        "length"
    };
    shown(&watch.finish())?;
    if !args.json {
        output::result("")?;
    }
    Ok(Written { text, generation, ended })
}

/// What it took, in one line.
fn summary(prompt: usize, generation: &Generation, ended: &str) -> String {
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let (prefill, decode) = (generation.prefill.as_secs_f64(), generation.decode.as_secs_f64());
    format!(
        "prompt {prompt} tokens in {prefill:.2} s ({:.1}/s), {} new tokens in {decode:.2} s ({:.1}/s), cache {}{}",
        rate(prompt, prefill),
        generation.tokens.len(),
        rate(generation.tokens.len().saturating_sub(1), decode),
        output::bytes(generation.cache_bytes as u64),
        match ended {
            "stop-token" => ", ended by a stop token",
            "stop-text" => ", ended by --stop",
            _ => "",
        },
    )
}
