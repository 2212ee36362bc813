//! From a name to files: what a revision is, what is needed of it, what of that is missing.

use std::collections::BTreeSet;

use super::cache::RepositoryCache;
use super::client::Client;
use super::download::{RemoteFile, Transfer};
use super::name::{check_revision, is_commit};
use super::select::{CONFIG, Lacking, select, shards};
use super::{Fetched, HubError, HubSettings, ModelName, Watch};
use crate::files::WEIGHTS;
use crate::record::HubOrigin;

/// Brings `model` at `revision` (a branch, a tag or a commit) into the cache and says where it is.
///
/// Fetched are the configuration, the tokenizer, and one form of weights: `model.safetensors`, the shards of its index,
/// `pytorch_model.bin` or the shards of its index, the first there is; or the one GGUF file that was named. What the
/// cache has is not fetched again, an interrupted transfer is continued. A request that fails for reasons that pass is
/// tried again, after the time the hub asks for if it asks. With [`HubSettings::offline`] the cache alone is used.
///
/// # Errors
///
/// A variant of [`HubError`] for every reason. Nothing incomplete or unproven ever is in a snapshot.
pub fn fetch(model: &ModelName, revision: &str, settings: &HubSettings, watch: Watch<'_>) -> Result<Fetched, HubError> {
    check_revision(revision)?;
    let cache = RepositoryCache::new(&settings.cache, model.repository());
    let fetching = Fetching { model, revision, cache: &cache };
    if settings.offline { fetching.find() } else { fetching.download(settings, watch) }
}

struct Fetching<'a> {
    model: &'a ModelName,
    revision: &'a str,
    cache: &'a RepositoryCache,
}

impl Fetching<'_> {
    fn repository(&self) -> String {
        self.model.repository().to_owned()
    }

    fn fetched(&self, commit: &str) -> Fetched {
        let snapshot = self.cache.snapshot(commit);
        let path = self.model.file().map_or_else(|| snapshot.clone(), |file| snapshot.join(file));
        let origin =
            HubOrigin { repository: self.repository(), revision: self.revision.to_owned(), commit: commit.to_owned() };
        Fetched { path, origin }
    }

    /// From the cache alone.
    fn find(&self) -> Result<Fetched, HubError> {
        let lacks = |file: &str| HubError::NotInCache {
            repository: self.repository(),
            revision: self.revision.to_owned(),
            file: file.to_owned(),
            cache: self.cache.root().to_owned(),
        };
        let commit = self.cache.commit(self.revision).ok_or_else(|| lacks(self.model.file().unwrap_or(CONFIG)))?;
        let found = self.fetched(&commit);
        if let Some(file) = self.model.file() {
            return if found.path.is_file() { Ok(found) } else { Err(lacks(file)) };
        }
        let files = self.cache.files(&commit);
        let names: Vec<&str> = files.iter().map(String::as_str).collect();
        let selection = select(&names).map_err(|lacking| match lacking {
            Lacking::Config => lacks(CONFIG),
            Lacking::Weights(_) => lacks(WEIGHTS),
        })?;
        if let Some(index) = selection.index {
            let missing = self.shards(&commit, index)?.into_iter().find(|shard| !names.contains(&shard.as_str()));
            if let Some(shard) = missing {
                return Err(lacks(&shard));
            }
        }
        Ok(found)
    }

    /// From the hub, as far as the cache lacks it.
    fn download(&self, settings: &HubSettings, watch: Watch<'_>) -> Result<Fetched, HubError> {
        let client = Client::new(settings, self.model.repository())?;
        let listing = client.listing(self.revision, watch)?;
        let commit = listing.sha;
        // It becomes the name of a directory.
        if !is_commit(&commit) {
            let problem = format!("the commit of `{}` must be 40 hexadecimal digits", self.repository());
            return Err(HubError::Answer { url: settings.endpoint.clone(), problem });
        }
        let names: Vec<&str> = listing.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let mut fetched_any = false;
        if let Some(file) = self.model.file() {
            if !names.contains(&file) {
                return Err(self.no_file(file, &commit, &names));
            }
            fetched_any |= self.get(&client, &commit, &[file.to_owned()], watch)?;
        } else {
            let selection = select(&names).map_err(|lacking| self.lacking(lacking, &commit))?;
            fetched_any |= self.get(&client, &commit, &selection.files, watch)?;
            if let Some(index) = selection.index {
                let shards = self.shards(&commit, index)?;
                if let Some(shard) = shards.iter().find(|shard| !names.contains(&shard.as_str())) {
                    let problem = format!("it names `{shard}`, which the repository does not have");
                    return Err(self.bad_index(index, problem));
                }
                fetched_any |= self.get(&client, &commit, &Vec::from_iter(shards), watch)?;
            }
        }
        let remembered = if self.revision == commit { Ok(()) } else { self.cache.set_commit(self.revision, &commit) };
        // A cache that cannot be written still serves what it has.
        if fetched_any {
            remembered?;
        }
        Ok(self.fetched(&commit))
    }

    /// Fetches those of `files` that the snapshot lacks; whether there were any.
    fn get(&self, client: &Client<'_>, commit: &str, files: &[String], watch: Watch<'_>) -> Result<bool, HubError> {
        let snapshot = self.cache.snapshot(commit);
        let mut remote = Vec::new();
        for name in files.iter().filter(|name| !snapshot.join(name).is_file()) {
            let (etag, size) = client.headers(commit, name, watch)?;
            remote.push(RemoteFile { name: name.clone(), etag, size });
        }
        let total = remote.iter().map(|file| file.size).sum();
        let mut before = 0;
        for file in &remote {
            let repository = self.model.repository();
            Transfer { client, cache: self.cache, repository, commit, before, total }.run(file, watch)?;
            before += file.size;
        }
        Ok(!remote.is_empty())
    }

    fn shards(&self, commit: &str, index: &str) -> Result<BTreeSet<String>, HubError> {
        let path = self.cache.snapshot(commit).join(index);
        let content = std::fs::read(&path).map_err(HubError::io("read", &path))?;
        shards(&content).map_err(|problem| self.bad_index(index, problem))
    }

    fn bad_index(&self, index: &str, problem: String) -> HubError {
        HubError::Index { repository: self.repository(), index: index.to_owned(), problem }
    }

    fn no_file(&self, file: &str, commit: &str, names: &[&str]) -> HubError {
        let alike: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".gguf")).collect();
        let others = if alike.is_empty() { String::new() } else { format!("; it has {}", alike.join(", ")) };
        HubError::FileNotFound {
            repository: self.repository(),
            file: file.to_owned(),
            commit: commit.to_owned(),
            others,
        }
    }

    fn lacking(&self, lacking: Lacking, commit: &str) -> HubError {
        match lacking {
            Lacking::Config => self.no_file(CONFIG, commit, &[]),
            Lacking::Weights(found) => {
                let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
                HubError::NoWeights { repository: self.repository(), found }
            }
        }
    }
}
