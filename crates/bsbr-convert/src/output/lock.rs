//! Locks on directories, which end with the process that holds them.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;

use crate::ConvertError;

/// How a directory is held.
#[derive(Debug)]
pub(super) enum Hold {
    /// By this process alone, as long as the file is open.
    Locked(Lock),
    /// The file system has no locks.
    Unlocked,
    /// It is not there, or another one is by now.
    Gone,
}

/// A lock that ends when it is dropped. Closing the file would not do: a process that is being started by another thread has
/// it open as well until it runs its own program.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // It ends with the process at the latest.
        let _ = self.0.unlock();
    }
}

/// Holds `dir`, which is written for `output`.
///
/// # Errors
///
/// [`ConvertError::OutputBusy`] where another process holds it.
pub(super) fn hold(dir: &Path, output: &Path) -> Result<Hold, ConvertError> {
    if !cfg!(unix) {
        return Ok(if dir.is_dir() { Hold::Unlocked } else { Hold::Gone });
    }
    let file = match File::open(dir) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Hold::Gone),
        Err(error) => return Err(ConvertError::io("open", dir)(error)),
    };
    let held = match file.try_lock() {
        Ok(()) => Hold::Locked(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            return Err(ConvertError::OutputBusy { dir: output.to_owned(), partial: dir.to_owned() });
        }
        Err(TryLockError::Error(_)) => Hold::Unlocked,
    };
    // Whoever held it before may have renamed or deleted it.
    Ok(if held.is_still(dir) { held } else { Hold::Gone })
}

/// Whether an open directory is still the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().ok().map(place).is_some_and(|held| fs::symlink_metadata(path).ok().map(place) == Some(held))
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.is_dir()
}

impl Hold {
    /// Whether `dir` is still the directory that is held.
    pub(super) fn is_still(&self, dir: &Path) -> bool {
        match self {
            Self::Locked(Lock(file)) => is_at(file, dir),
            Self::Unlocked => dir.is_dir(),
            Self::Gone => false,
        }
    }
}

/// Makes the directory `dir` and holds it. What an interrupted run left there is deleted.
///
/// # Errors
///
/// [`ConvertError::OutputBusy`] where another process holds it, or may hold it: where there are no locks that cannot be told.
pub(super) fn claim(dir: &Path, output: &Path) -> Result<Hold, ConvertError> {
    loop {
        let fresh = match fs::create_dir(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(ConvertError::io("create", dir)(error)),
        };
        match hold(dir, output)? {
            Hold::Gone => {}
            Hold::Unlocked if !fresh => {
                return Err(ConvertError::OutputBusy { dir: output.to_owned(), partial: dir.to_owned() });
            }
            held if fresh => return Ok(held),
            held => {
                empty(dir)?;
                return Ok(held);
            }
        }
    }
}

/// Deletes what a directory holds.
fn empty(dir: &Path) -> Result<(), ConvertError> {
    for entry in fs::read_dir(dir).map_err(ConvertError::io("list", dir))? {
        let path = entry.map_err(ConvertError::io("list", dir))?.path();
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|kind| kind.is_dir());
        let deleted = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        deleted.map_err(ConvertError::io("delete", &path))?;
    }
    Ok(())
}
