//! The cache of Python's `huggingface_hub`: `blobs` holds contents by ETag, `snapshots` a directory of links for every
//! commit, `refs` the commit of every branch and tag, `.locks` one lock for every content.
//!
//! A link in a snapshot is made once its content is whole and proven, and a ref once its snapshot is whole.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hf_hub::{Cache, CacheRepo, Repo};

use super::name::is_commit;
use super::{HubError, HubEvent, Watch};

/// The cache of one repository.
pub(super) struct RepositoryCache {
    root: PathBuf,
    folder: String,
    repository: CacheRepo,
}

impl RepositoryCache {
    pub(super) fn new(root: &Path, repository: &str) -> Self {
        let repo = Repo::model(repository.to_owned());
        let folder = repo.folder_name();
        Self { root: root.to_owned(), folder, repository: Cache::new(root.to_owned()).repo(repo) }
    }

    /// The directory of all repositories.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repository.pointer_path(commit)
    }

    /// The content that `etag` names.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repository.blob_path(etag)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.root.join(&self.folder).join("refs").join(revision)
    }

    /// The commit that `revision` was the last time it was fetched.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.reference(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Remembers what `revision` is.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.reference(revision);
        replace(&path, |temporary| fs::write(temporary, commit)).map_err(HubError::io("write", &path))
    }

    /// The files of a snapshot, plain names only. A link whose content is gone counts as absent.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let entries = fs::read_dir(self.snapshot(commit)).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.path().is_file())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Waits until no other process, Python's included, fetches the content `etag` names, and keeps them from it until
    /// the result is dropped.
    pub(super) fn lock(&self, etag: &str, file: &str, watch: Watch<'_>) -> Result<File, HubError> {
        let dir = self.root.join(".locks").join(&self.folder);
        fs::create_dir_all(&dir).map_err(HubError::io("create", &dir))?;
        let path = dir.join(format!("{etag}.lock"));
        let lock = File::options().create(true).append(true).open(&path).map_err(HubError::io("open", &path))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => watch(HubEvent::Locked { file }),
            Err(TryLockError::Error(error)) => return Err(HubError::io("lock", &path)(error)),
        }
        lock.lock().map_err(HubError::io("lock", &path))?;
        Ok(lock)
    }

    /// Gives the content `etag` names the name `file` in the snapshot of `commit`.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        replace(&path, |temporary| link(temporary, &self.blob(etag), file, etag)).map_err(HubError::io("link", &path))
    }
}

/// A link relative to the snapshot, so that the cache can be moved.
#[cfg(unix)]
fn link(temporary: &Path, _blob: &Path, file: &str, etag: &str) -> io::Result<()> {
    let up = "../".repeat(file.split('/').count() + 1);
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), temporary)
}

/// Symbolic links need a privilege on other systems: the content gets a second name.
#[cfg(not(unix))]
fn link(temporary: &Path, blob: &Path, _file: &str, _etag: &str) -> io::Result<()> {
    fs::hard_link(blob, temporary).or_else(|_| fs::copy(blob, temporary).map(drop))
}

/// Puts what `make` creates in the place of `path`, at once.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}-{count}.tmp", std::process::id()));
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    // Left by a process of the same number that was killed.
    let _ = fs::remove_file(&temporary);
    let done = make(&temporary).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    done
}
