//! What this process is writing, to be deleted if it is asked to end.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Directories that are written, and those that were made on the way to them.
static UNFINISHED: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// How often a directory is deleted into which another thread may still write.
const TRIES: usize = 200;

struct Entry {
    path: PathBuf,
    /// Directories above it, innermost first.
    made: Vec<PathBuf>,
}

/// The list, which also stands for the moment in which something is published: who holds it is not interrupted.
pub(super) struct Unfinished(MutexGuard<'static, Vec<Entry>>);

impl Unfinished {
    pub(super) fn lock() -> Self {
        Self(UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn add(&mut self, path: &Path, made: &[PathBuf]) {
        self.0.push(Entry { path: path.to_owned(), made: made.to_vec() });
    }

    pub(super) fn remove(&mut self, path: &Path) {
        self.0.retain(|entry| entry.path != path);
    }
}

/// Deletes everything this process is writing and has not published; returns where it was. What is being published
/// at this moment is waited for.
///
/// For a process that is about to end: whatever tries to write, publish or begin another directory afterwards waits for
/// ever.
pub fn discard_unfinished() -> Vec<PathBuf> {
    let Unfinished(mut entries) = Unfinished::lock();
    let found = std::mem::take(&mut *entries);
    std::mem::forget(entries);
    for Entry { path, made } in &found {
        for _ in 0..TRIES {
            // Another thread may make a file between listing and deleting.
            if fs::remove_dir_all(path).is_ok() || !path.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for path in made {
            let _ = fs::remove_dir(path);
        }
    }
    found.into_iter().map(|entry| entry.path).collect()
}
