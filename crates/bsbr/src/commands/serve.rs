//! `bsbr serve`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use bsbr_serve::{Chat, EngineConfig, HttpConfig, Model, serve};

use crate::{
    builtin,
    chat::{FormArgs, end_tokens},
    commands::chat::RunArgs,
    model::{HubArgs, LocalModel},
    output,
    running::{configured, open},
    signals,
};

/// Where the key can be besides a file.
const KEY_VARIABLE: &str = "BSBR_API_KEY";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Hugging Face checkpoint or GGUF file (its original attention unless settings are given) or converted model; the built-in
    /// checkpoint when absent
    #[arg(short, long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Address and port; 0 takes a free port, 0.0.0.0 listens to other machines too
    #[arg(short, long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// File with the key that clients have to send; the variable BSBR_API_KEY does the same [default: none is asked for]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Name by which clients ask for the model [default: that of its directory or file]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    bounds: BoundArgs,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// Bounds; what goes beyond them is refused or waits.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Bounds")]
struct BoundArgs {
    /// Most texts that are read and written at once
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_texts)]
    max_texts: usize,
    /// Most texts that wait for a place; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_waiting)]
    max_waiting: usize,
    /// Most tokens of a text, prompt and answer; longer ones are refused with 413 [default: the trained length]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Most megabytes of caches of all texts; one that takes more alone is refused with 413, others wait
    #[arg(long, value_name = "MB", default_value_t = EngineConfig::default().cache_bytes >> 20)]
    cache_memory: usize,
    /// Tokens of a chat's answer for which a request names no number
    #[arg(long, value_name = "N", default_value_t = HttpConfig::default().default_new_tokens)]
    new_tokens: usize,
    /// Tokens of prompts that are read between two new tokens of other texts
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().step_tokens)]
    step_tokens: usize,
    /// Most kilobytes of a request
    #[arg(long, value_name = "KB", default_value_t = HttpConfig::default().body_bytes >> 10)]
    max_body: usize,
    /// Seconds that running answers may take once the server is asked to stop
    #[arg(long, value_name = "SECONDS", default_value_t = HttpConfig::default().stop_after.as_secs())]
    stop_seconds: u64,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let api_key = key(args.api_key_file.as_deref())?;
    let variables = args.form.variables()?;
    let bounds = &args.bounds;
    let bytes = |number: usize, shift: u32, flag: &str| {
        number.checked_mul(1 << shift).with_context(|| format!("{flag} is {number}, more than any machine has"))
    };
    let engine = EngineConfig {
        max_texts: bounds.max_texts,
        max_waiting: bounds.max_waiting,
        max_tokens: bounds.max_tokens,
        cache_bytes: bytes(bounds.cache_memory, 20, "--cache-memory")?,
        step_tokens: bounds.step_tokens,
    };
    engine.validate()?;
    let http = HttpConfig {
        address: args.listen,
        api_key,
        body_bytes: bytes(bounds.max_body, 10, "--max-body")?,
        stop_after: Duration::from_secs(bounds.stop_seconds),
        default_new_tokens: bounds.new_tokens.max(1),
        ..HttpConfig::default()
    };
    let local = args.hub.resolve(&builtin::or_builtin(args.model.clone())?)?;
    let name = match &args.name {
        Some(name) if name.is_empty() => bail!("--name is empty"),
        Some(name) => name.clone(),
        None => name_of(args.model.as_deref(), &local),
    };
    let source = open(&local)?;
    let tokenizer = source.text_tokenizer()?;
    let template = args.form.find(&source)?;
    let description = source.description();
    let decoder = configured(source, &args.run)?;
    let chat = template.map(|template| {
        let stop_tokens = end_tokens(&decoder.config().stop_tokens, &template, &variables, &tokenizer);
        Chat { template, variables, stop_tokens }
    });
    if !http.address.ip().is_loopback() && http.api_key.is_none() {
        output::note("note: whoever reaches this machine can ask: --api-key-file FILE has them send a key");
    }
    if chat.is_none() {
        output::note("note: the model has no chat template: /v1/completions continues texts, chats are refused");
    }
    let model = Model { name: name.clone(), decoder, tokenizer, chat };
    let mut told = Ok(());
    serve(model, engine, http, |server| {
        let stop = server.stop_handle();
        signals::at_first(move || {
            output::note("stopping once the running answers have ended; once more ends at once");
            stop.stop();
        });
        output::note(&format!("{description} as `{name}`, up to {} tokens a text", server.most_tokens()));
        told = output::result(&format!("http://{}", server.address()));
    })?;
    told
}

/// The key that clients have to send.
fn key(file: Option<&Path>) -> Result<Option<String>> {
    let key = match file {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => match std::env::var(KEY_VARIABLE) {
            Ok(key) => key,
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(error) => bail!("{KEY_VARIABLE}: {error}"),
        },
    };
    let key = key.trim();
    if key.is_empty() {
        bail!(
            "the API key in {} is empty",
            file.map_or_else(|| KEY_VARIABLE.into(), |path| path.display().to_string())
        );
    }
    Ok(Some(key.to_owned()))
}

/// A name for a model: that of the hub, of its directory or of its file.
fn name_of(asked: Option<&Path>, local: &LocalModel) -> String {
    match asked {
        Some(name) if local.origin.is_some() => name.display().to_string(),
        _ => {
            let gguf = local.dir.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
            let path = std::fs::canonicalize(&local.dir).unwrap_or_else(|_| local.dir.clone());
            let name = if gguf { path.file_stem() } else { path.file_name() };
            name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
        }
    }
}
