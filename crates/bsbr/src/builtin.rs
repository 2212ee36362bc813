//! The checkpoint inside the program: see `builtin/PROVENANCE.md`.
//!
//! Models are read from directories, so it is written out once for each user and version, into the cache directory of the system.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The checkpoint, in the Hugging Face layout, and what it is measured with.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../builtin/config.json")),
    ("expected.safetensors", include_bytes!("../builtin/expected.safetensors")),
    ("heldout.txt", include_bytes!("../builtin/heldout.txt")),
    ("model.safetensors", include_bytes!("../builtin/model.safetensors")),
    ("tokenizer.json", include_bytes!("../builtin/tokenizer.json")),
];

static DIR: OnceLock<PathBuf> = OnceLock::new();

/// The model asked for, or this one.
pub(crate) fn or_builtin(model: Option<PathBuf>) -> Result<PathBuf> {
    model.map_or_else(dir, Ok)
}

/// The text asked for, or one that the built-in checkpoint never saw.
///
/// # Errors
///
/// If that cannot be written out.
pub fn or_heldout(text: Option<PathBuf>) -> Result<PathBuf> {
    text.map_or_else(heldout, Ok)
}

/// The checkpoint.
pub(crate) fn dir() -> Result<PathBuf> {
    if let Some(dir) = DIR.get() {
        return Ok(dir.clone());
    }
    let name = name();
    let places = places();
    let mut failed = None;
    for place in &places {
        let dir = place.join(&name).join("builtin");
        match write_out(&dir) {
            Ok(()) => return Ok(DIR.get_or_init(|| dir).clone()),
            Err(error) => failed = Some((dir, error)),
        }
    }
    let (dir, error) = failed.context("there is no directory for temporary files")?;
    Err(error).with_context(|| format!("the built-in model cannot be written to {}", dir.display()))
}

/// Text it never saw.
pub(crate) fn heldout() -> Result<PathBuf> {
    Ok(dir()?.join("heldout.txt"))
}

/// Token ids and the logits another implementation computes for them.
pub(crate) fn expected() -> Result<PathBuf> {
    Ok(dir()?.join("expected.safetensors"))
}

/// Where its conversion goes when nothing else is said.
pub(crate) fn output() -> PathBuf {
    crate::repository().map_or_else(|| "builtin-bsbr".into(), |repository| repository.join("target/bsbr/builtin"))
}

/// A name of its own for these bytes, so that versions of the program do not meet.
fn name() -> String {
    let mut hash = Sha256::new();
    for (name, content) in FILES {
        hash.update(name.as_bytes());
        hash.update(content);
    }
    let hash = hash.finalize();
    hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Where it may lie: the user's cache, or else the directory for temporary files.
fn places() -> Vec<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").filter(|dir| dir.is_absolute()).or_else(|| {
        if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            variable("HOME").map(|home| home.join("Library/Caches"))
        } else {
            variable("HOME").map(|home| home.join(".cache"))
        }
    });
    cache.into_iter().map(|dir| dir.join("bsbr")).chain([env::temp_dir().join("bsbr")]).collect()
}

/// Makes `dir` hold the files, and nothing that someone changed in them.
fn write_out(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for (name, content) in FILES {
        let path = dir.join(name);
        if fs::read(&path).is_ok_and(|found| found == content) {
            continue;
        }
        // Another process may do the same at this moment: each file appears as a whole.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(content)?;
        file.persist(&path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_changed_is_written_again() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("model");
        write_out(&dir).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        fs::remove_file(dir.join("tokenizer.json")).unwrap();
        write_out(&dir).unwrap();
        for (name, content) in FILES {
            assert!(fs::read(dir.join(name)).unwrap() == content, "{name}");
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), FILES.len());
    }
}
