//! `bsbr chat`.

use std::{
    io::{BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use bsbr_model::{GenerateConfig, PositionPolicy, Sampler};
use serde_json::json;

use crate::{
    args::{ArithmeticArgs, NarrowCacheArgs, SettingFlags},
    builtin,
    chat::{
        TemplateArgs,
        commands::{HELP, Line, parse},
        end_tokens,
        session::{Answer, Event, Session, Setting},
    },
    commands::bench::write,
    device::DeviceArgs,
    model::HubArgs,
    output::{self, Progress},
    running::{configured, note_beyond_training, open},
    sampling::SamplingArgs,
    signals,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or GGUF file (its original attention unless settings are given) or converted model
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Most tokens of an answer
    #[arg(short = 'n', long, value_name = "N", default_value_t = 2048)]
    max_new_tokens: usize,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// How a model runs, for the commands that write texts.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Running the model")]
pub(crate) struct RunArgs {
    /// Run a converted model with its original attention
    #[arg(long)]
    pub(crate) full_attention: bool,
    /// Past the trained length: error; clamp, interpolate, slide (learned); grouped (rotary)
    #[arg(long, value_name = "POLICY", value_parser = crate::args::by_name::<PositionPolicy>)]
    pub(crate) positions: Option<PositionPolicy>,
    #[command(flatten)]
    pub(crate) cache: NarrowCacheArgs,
    #[command(flatten)]
    pub(crate) arithmetic: ArithmeticArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    #[command(flatten)]
    pub(crate) attention: SettingFlags,
}

pub(crate) fn run(args: Args) -> Result<()> {
    if args.max_new_tokens == 0 {
        bail!("--max-new-tokens is 0, expected at least 1");
    }
    let mut sampler = args.sampling.sampler()?;
    let variables = args.template.variables()?;
    let model = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let source = open(&model)?;
    let template = args.template.template(&source)?;
    let tokenizer = source.text_tokenizer()?;
    let description = source.description();
    let decoder = configured(source, &args.run)?;
    let stop_tokens = end_tokens(&decoder.config().stop_tokens, &template, &variables, &tokenizer);
    let setting = Setting {
        decoder: &decoder,
        tokenizer: &tokenizer,
        template: &template,
        variables: &variables,
        config: GenerateConfig { max_new_tokens: args.max_new_tokens, stop_tokens },
        stops: args.sampling.stops(),
    };
    let watched = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if watched {
        output::note(&format!("{description}. /help lists what else can be typed; Ctrl-D ends."));
    }
    signals::keep_interrupts();
    let begin = || Session::new(&setting, args.template.system.as_deref());
    let mut session = begin();
    while let Some(text) = read(watched)? {
        match parse(&text) {
            None => {}
            Some(Line::Exit) => break,
            Some(Line::Help) => output::say(HELP),
            Some(Line::Clear) => {
                session = begin();
                output::note("a new conversation");
            }
            Some(Line::Wrong(problem)) => output::say(&problem),
            Some(Line::Save(path)) => match save(&path, &description, &session) {
                Ok(()) => output::note(&format!("{} messages are in {}", session.messages().len(), path.display())),
                Err(error) => output::say(&format!("error: {error:#}")),
            },
            Some(Line::Message(text)) => match ask(&mut session, &text, &mut sampler) {
                Ok(answer) => {
                    told(&answer);
                    note_beyond_training(&decoder, answer.held + answer.read + answer.generation.tokens.len());
                }
                Err(error) if output::is_broken_pipe(&error) => return Err(error),
                // A message that is too long, or that the template refuses, is no reason to lose the conversation.
                Err(error) if watched => output::say(&format!("error: {error:#}")),
                Err(error) => return Err(error),
            },
        }
    }
    Ok(())
}

/// A message or command: a line, and those after it where it ends in a backslash. `None` at the end.
fn read(watched: bool) -> Result<Option<String>> {
    let mut text = String::new();
    loop {
        if watched {
            let _ = write!(std::io::stderr(), "{}", if text.is_empty() { "> " } else { "  " });
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).context("cannot read standard input")? == 0 {
            return Ok((!text.is_empty()).then_some(text));
        }
        match line.trim_end_matches(['\r', '\n']).strip_suffix('\\') {
            Some(more) => {
                text.push_str(more);
                text.push('\n');
            }
            None => return Ok(Some(text + &line)),
        }
    }
}

/// Asks, and prints the answer as it comes.
fn ask(session: &mut Session<'_>, text: &str, sampler: &mut Sampler) -> Result<Answer> {
    let mut bar = Some(Progress::new("reading"));
    // One that came before the question is of no use.
    signals::interrupted();
    let answer = session.ask(text, sampler, |event| {
        match event {
            Event::Read(done, total) => {
                if let Some(bar) = &mut bar {
                    bar.set(done as u64, total as u64);
                }
            }
            Event::Text(text) => {
                bar = None;
                output::fragment(text)?;
            }
        }
        Ok(!signals::interrupted())
    })?;
    drop(bar);
    output::result("")?;
    Ok(answer)
}

/// What an answer took, for those who want to know, and what the reader has to know.
fn told(answer: &Answer) {
    let generation = &answer.generation;
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let (prefill, decode) = (generation.prefill.as_secs_f64(), generation.decode.as_secs_f64());
    output::detail(&format!(
        "{} tokens read in {prefill:.2} s ({:.1}/s) behind {}, {} new in {decode:.2} s ({:.1}/s), cache {}{}",
        answer.read,
        rate(answer.read, prefill),
        answer.held,
        generation.tokens.len(),
        rate(generation.tokens.len().saturating_sub(1), decode),
        output::bytes(generation.cache_bytes as u64),
        if answer.again { "; the template changed what was said before, so it was read again" } else { "" },
    ));
    if answer.cut {
        output::note("the answer was cut: --max-new-tokens allows more");
    }
}

/// Writes the conversation.
fn save(path: &Path, model: &str, session: &Session<'_>) -> Result<()> {
    let json = json!({
        "schema": "bsbr-chat/1",
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "messages": session.messages(),
    });
    write(path, &serde_json::to_string_pretty(&json)?)
}
