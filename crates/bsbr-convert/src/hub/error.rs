//! What asking a hub for a model can end with.

use std::path::{Path, PathBuf};

/// A model that a hub, the cache or the request itself does not give.
///
/// Every message names the repository or the file, what was expected, what was found and what to do. None holds a
/// token or the query of a signed address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The program was built without the feature `hub`.
    #[error("`{repository}` cannot be fetched: this program was built without the feature `hub`")]
    NotCompiledIn {
        /// The repository asked for.
        repository: String,
    },
    /// Not the name of a model on a hub.
    #[error(
        "`{name}` is not the name of a model on a hub: {why}. Such a name is `organisation/model`, or \
         `organisation/model/file.gguf` for one file"
    )]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not a branch, a tag or a commit.
    #[error("`{revision}` is not a revision: {why}. A revision is a branch, a tag or a commit")]
    Revision {
        /// What was given.
        revision: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An environment variable that cannot be used. Its value is not repeated: it may hold a password.
    #[error("the environment variable {variable} cannot be used: {why}")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// What is wrong and what to do.
        why: String,
    },
    /// Offline, and the cache lacks something.
    #[error(
        "`{file}` of `{repository}` at revision `{revision}` is not in the cache {}: fetch the model once with a network \
         (without --offline and HF_HUB_OFFLINE), or set HF_HUB_CACHE to the cache that has it", cache.display()
    )]
    NotInCache {
        /// The repository.
        repository: String,
        /// The revision asked for.
        revision: String,
        /// The file, or what is missing instead.
        file: String,
        /// The cache.
        cache: PathBuf,
    },
    /// 401.
    #[error(
        "the hub does not show `{repository}` ({said}): {token}. The repository is private or gated, or there is none of \
         this name: check the name, accept the licence at {page} if it asks for that, and set HF_TOKEN to a token that \
         may read it"
    )]
    Unauthorised {
        /// The repository.
        repository: String,
        /// Status and reason.
        said: String,
        /// What token was sent, in words.
        token: String,
        /// The page of the repository.
        page: String,
    },
    /// 403.
    #[error(
        "the hub refuses `{repository}` ({said}): {token}. Accept the licence at {page} with the account of the token, or \
         use a token that may read this repository"
    )]
    Forbidden {
        /// The repository.
        repository: String,
        /// Status and reason.
        said: String,
        /// What token was sent, in words.
        token: String,
        /// The page of the repository.
        page: String,
    },
    /// 404 for the repository.
    #[error("there is no repository `{repository}` at {endpoint}: check the name")]
    RepositoryNotFound {
        /// The repository.
        repository: String,
        /// The hub.
        endpoint: String,
    },
    /// 404 for the revision.
    #[error("`{repository}` has no revision `{revision}`: its branches, tags and commits are listed at {page}")]
    RevisionNotFound {
        /// The repository.
        repository: String,
        /// The revision.
        revision: String,
        /// Where revisions are listed.
        page: String,
    },
    /// A file that the repository does not have.
    #[error("`{repository}` has no file `{file}` at commit {commit}{others}")]
    FileNotFound {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// The commit.
        commit: String,
        /// Similar files it has instead, as the end of the message.
        others: String,
    },
    /// A repository without weights of a known kind.
    #[error(
        "`{repository}` has no weights that can be read: expected `model.safetensors` or `pytorch_model.bin` or their \
         indices, found {found}. A GGUF file is asked for by its name: `{repository}/file.gguf`"
    )]
    NoWeights {
        /// The repository.
        repository: String,
        /// Files that look like weights.
        found: String,
    },
    /// 429.
    #[error("the hub asks for fewer requests{}: wait, or set HF_TOKEN, which raises the limit", after(*.seconds))]
    RateLimited {
        /// Seconds after which to come back.
        seconds: Option<u64>,
    },
    /// Any other refusal.
    #[error("{url} answers {said}")]
    Status {
        /// The address, without its query.
        url: String,
        /// Status and reason.
        said: String,
    },
    /// No answer.
    #[error(
        "no answer from {host}: {why}. Check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT; --offline uses what \
         the cache has"
    )]
    Connection {
        /// The host.
        host: String,
        /// What happened.
        why: String,
    },
    /// Tried more than once, in vain.
    #[error("{last} (tried {tries} times)")]
    GaveUp {
        /// How often.
        tries: u32,
        /// The last failure.
        last: Box<HubError>,
    },
    /// An answer that is not what a hub says.
    #[error("{url}: {problem}: is this address a hub?")]
    Answer {
        /// The address, without its query.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An index of shards that cannot be followed.
    #[error("`{index}` of `{repository}`: {problem}")]
    Index {
        /// The repository.
        repository: String,
        /// The index.
        index: String,
        /// What is wrong with it.
        problem: String,
    },
    /// More or fewer bytes than announced.
    #[error("`{file}` of `{repository}` should have {expected} bytes, {found} arrived: try again")]
    Size {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes that arrived.
        found: u64,
    },
    /// Other bytes than announced.
    #[error(
        "`{file}` of `{repository}` arrived damaged: its SHA-256 should be {expected} and is {found}. Nothing was kept; \
         try again, and suspect the network or a proxy if it stays"
    )]
    Hash {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// SHA-256 announced.
        expected: String,
        /// SHA-256 of what arrived.
        found: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl HubError {
    /// For `map_err`: an I/O failure of `action` on `path`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

fn after(seconds: Option<u64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(", the next in {seconds} s"))
}
