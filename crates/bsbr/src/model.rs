//! `--model`: a directory, a GGUF file, or the name of a model on a hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bsbr_convert::{
    HubOrigin, check_file,
    hub::{self, HubEvent, HubSettings, ModelName},
    is_gguf,
};

use crate::output::{self, Progress};

/// The flags beside `--model`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct HubArgs {
    /// Branch, tag or commit of a model on a hub [default: main]
    #[arg(long, value_name = "REV", requires = "model")]
    revision: Option<String>,
    /// Take a model of a hub from the cache, ask nobody
    #[arg(long)]
    offline: bool,
}

/// A model on this machine.
#[derive(Debug)]
pub(crate) struct LocalModel {
    /// Its directory, or the GGUF file.
    pub(crate) dir: PathBuf,
    /// Where it was fetched, if it was.
    pub(crate) origin: Option<HubOrigin>,
}

impl LocalModel {
    /// A model that is in a directory or a GGUF file.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), origin: None }
    }
}

/// Whether this can be nothing but a path: no hub has such a name. A name has one slash, or more before a GGUF file.
fn is_path(model: &Path) -> bool {
    let text = model.to_string_lossy();
    let gguf = model.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    let deep = model.components().count() > 2 && !gguf;
    model.is_absolute() || deep || text.starts_with(['.', '~']) || text.ends_with(['/', '\\']) || text.contains('\\')
}

impl HubArgs {
    /// What `--model` names: the directory or GGUF file of that name or, when there is none, the model on a hub, fetched.
    pub(crate) fn resolve(&self, model: &Path) -> Result<LocalModel> {
        check_file(model)?;
        // By its first bytes too: a store of models names its files as it likes.
        let called_gguf = model.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
        let gguf = model.is_file() && (called_gguf || is_gguf(model));
        if model.is_dir() || gguf {
            if let Some(revision) = &self.revision {
                let what = if gguf { "file" } else { "directory" };
                bail!("{} is a {what} and has no revision `{revision}`: leave --revision out", model.display());
            }
            return Ok(LocalModel::at(model));
        }
        let shown = model.display();
        let takes = "--model takes a local Hugging Face directory, a converted model, a GGUF file, or the name of a model on a hub";
        if model.is_file() && ["config.json", "conversion.json"].iter().any(|name| model.with_file_name(name).is_file())
        {
            let dir = model.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            bail!("{shown} is a file of a model: name its directory, {}", dir.display());
        }
        if model.exists() {
            bail!("{shown} is neither a directory nor a GGUF file. {takes}");
        }
        if is_path(model) {
            bail!("there is no directory or file {shown}");
        }
        let name: ModelName =
            model.to_string_lossy().parse().with_context(|| format!("{shown} is not a directory. {takes}"))?;
        let mut settings = HubSettings::from_env()?;
        settings.offline |= self.offline;
        let mut bar = Progress::new("fetching");
        let revision = self.revision.as_deref().unwrap_or("main");
        let fetched = hub::fetch(&name, revision, &settings, &mut |event| match event {
            HubEvent::Transfer { done, total, .. } => bar.set(done, total),
            HubEvent::Waiting { pause, why } => output::note(&format!("next try in {} s: {why}", pause.as_secs())),
            HubEvent::Locked { file } => output::note(&format!("waiting for another process, which fetches `{file}`")),
            _ => {}
        });
        let fetched = fetched.with_context(|| format!("{shown} is not a directory, so it was looked for on a hub"))?;
        Ok(LocalModel { dir: fetched.path, origin: Some(fetched.origin) })
    }
}
