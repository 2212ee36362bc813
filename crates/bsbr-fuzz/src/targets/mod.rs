//! What takes bytes.

mod checkpoints;
mod settings;
mod views;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// What is run on an input; says what came out.
pub(crate) type Run<'a> = Box<dyn Fn(&[u8]) -> String + 'a>;

/// A function of bytes.
pub struct Target {
    /// Its name, also that of the directory of its corpus.
    pub name: &'static str,
    /// Sets up what the runs share.
    pub(crate) prepare: for<'a> fn(&'a Place) -> Run<'a>,
    /// The fixtures it begins with.
    fixtures: fn() -> Vec<Vec<u8>>,
    /// What belongs to the format.
    pub(crate) words: &'static [&'static str],
    /// Most bytes of an input.
    pub(crate) longest: usize,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    checkpoints::SAFETENSORS_HEADER,
    checkpoints::SAFETENSORS_FILE,
    checkpoints::GGUF,
    checkpoints::PICKLE,
    checkpoints::INDEX,
    checkpoints::CONFIG,
    checkpoints::CONVERTED_CONFIG,
    checkpoints::RECORD,
    checkpoints::CODED,
    settings::TOKENIZER,
    settings::TOKENIZER_COMPANIONS,
    settings::ATTENTION_TOML,
    settings::SPLIT_SETTINGS,
    views::VIEWS,
];

impl Target {
    /// The inputs to begin with.
    pub(crate) fn seeds(&self) -> Vec<Vec<u8>> {
        let mut seeds = (self.fixtures)();
        seeds.extend(self.corpus());
        seeds.push(Vec::new());
        seeds.retain(|seed| seed.len() <= self.longest);
        seeds
    }

    /// What is kept of earlier finds.
    pub(crate) fn corpus(&self) -> Vec<Vec<u8>> {
        contents(&Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name))
    }
}

/// A directory for files of a while, in memory where there is such a place.
pub(crate) struct Place(TempDir);

impl Place {
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = memory.is_dir().then(|| tempfile::tempdir_in(memory)).and_then(Result::ok);
        Self(made.unwrap_or_else(|| tempfile::tempdir().expect("a temporary directory")))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file anew.
    pub(crate) fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).expect("room");
    }
}

/// A directory of the converter's fixtures.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bsbr-convert/tests/fixtures")
}

/// Files of a directory in the order of their names; none if it is not there.
pub(crate) fn contents(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().filter(|path| path.is_file()).map(|path| fs::read(path).expect("a file")).collect()
}

/// The files called `name` of all fixtures.
pub(crate) fn all_called(name: &str) -> Vec<Vec<u8>> {
    let mut dirs: Vec<PathBuf> =
        fs::read_dir(fixtures()).expect("fixtures").flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    dirs.into_iter().filter_map(|dir| fs::read(dir.join(name)).ok()).collect()
}

/// What is said of a result.
pub(crate) fn said<T, E: std::error::Error>(result: Result<T, E>) -> String {
    match result {
        Ok(_) => "fine".to_owned(),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text.push_str(&error.to_string());
                cause = error.source();
            }
            text
        }
    }
}
