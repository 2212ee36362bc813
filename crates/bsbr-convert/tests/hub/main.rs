//! Fetching models from a hub that the tests serve themselves.
#![cfg(feature = "hub")]

mod fetching;
mod https;
mod refusals;
mod server;
mod transfers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bsbr_convert::hub::{Fetched, HubError, HubSettings, fetch};
use server::{Files, Hub, TOKEN};

const MODEL: &str = "test/llama";

/// A directory with a cache in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    /// The cache of [`MODEL`].
    fn repository(&self) -> PathBuf {
        self.0.path().join("home/hub/models--test--llama")
    }

    fn blob(&self, etag: &str) -> PathBuf {
        self.repository().join("blobs").join(etag)
    }

    /// Settings as the environment would give them, with short pauses.
    fn settings(&self, hub: &Hub, more: &[(&str, &str)]) -> HubSettings {
        let home = self.0.path().join("home").to_str().expect("plain paths").to_owned();
        let variables: BTreeMap<&str, &str> = [("HF_HOME", home.as_str()), ("HF_ENDPOINT", &hub.endpoint)]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        let settings = HubSettings::resolve(|name| variables.get(name).map(|value| (*value).to_owned()), |_| Ok(None));
        let mut settings = settings.expect("sound settings");
        settings.first_pause = Duration::from_millis(1);
        settings
    }

    fn fetch(&self, hub: &Hub, model: &str) -> Result<Fetched, HubError> {
        self.fetch_with(&self.settings(hub, &[("HF_TOKEN", TOKEN)]), model, "main")
    }

    fn fetch_with(&self, settings: &HubSettings, model: &str, revision: &str) -> Result<Fetched, HubError> {
        fetch(&model.parse()?, revision, settings, &mut |_| {})
    }

    fn fetched(&self, hub: &Hub) -> Fetched {
        self.fetch(hub, MODEL).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Fetches what cannot be fetched. The message holds all of `words` and no secret, and no snapshot names a file.
    #[track_caller]
    fn refused(&self, hub: &Hub, model: &str, words: &[&str]) -> HubError {
        let error = self.fetch(hub, model).expect_err("nothing to fetch");
        check_message(&error, words);
        let snapshots = self.repository().join("snapshots");
        assert_eq!(paths(&snapshots).iter().filter(|path| path.is_file()).count(), 0, "{error}");
        error
    }

    #[track_caller]
    fn offline_lacks(&self, hub: &Hub, revision: &str, file: &str) {
        let settings = self.settings(hub, &[("HF_HUB_OFFLINE", "1")]);
        let error = self.fetch_with(&settings, MODEL, revision).expect_err("not in the cache");
        let expected = format!("`{file}` of `{MODEL}` at revision `{revision}` is not in the cache");
        check_message(&error, &[&expected, "home/hub", "--offline", "HF_HUB_CACHE"]);
        assert!(hub.seen().is_empty());
    }
}

#[track_caller]
fn check_message(error: &HubError, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
    let all = format!("{message} {error:?}");
    assert!(!all.contains(TOKEN) && !all.contains("secret"), "{all}");
}

/// Everything below a directory that is there.
fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(paths(&path));
        }
        found.push(path);
    }
    found
}

fn files(list: &[(&str, &[u8])]) -> Files {
    list.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect()
}

/// A model of two files with `weights` bytes, different for every `seed`.
fn model(seed: u8, weights: usize) -> Files {
    let content: Vec<u8> = (0..weights).map(|at| (at % 251) as u8 ^ seed).collect();
    files(&[("config.json", b"{}"), ("model.safetensors", &content)])
}

fn fixture(name: &str) -> Files {
    let mut files = server::files_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name));
    files.remove("expected.safetensors");
    files
}
