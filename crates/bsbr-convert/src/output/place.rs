//! The names used while a directory is written, and the steps that put it in its place.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::ConvertError;

use super::check::{is_known, seal};

/// Within the output, in this order: files that are being written; all of them, complete, while the earlier ones go; all
/// of them while they move to their places.
pub(super) const WITHIN: [&str; 3] = [".bsbr-partial", ".bsbr-complete", ".bsbr-moving"];

/// Whether an entry of an output is there only while it is written.
pub(super) fn is_ours(name: &str) -> bool {
    WITHIN.contains(&name)
}

/// A directory beside `output`, hidden and named after it.
fn beside(output: &Path, what: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(output.file_name().unwrap_or_default());
    name.push(what);
    output.with_file_name(name)
}

/// Where the new content is written.
pub(super) fn partial(output: &Path) -> PathBuf {
    beside(output, ".bsbr-partial")
}

/// Where the earlier content is for a moment, on file systems where two directories cannot trade places.
pub(super) fn aside(output: &Path) -> PathBuf {
    beside(output, ".bsbr-old")
}

/// Where files of a while are.
pub(super) fn scratch(output: &Path) -> PathBuf {
    beside(output, ".bsbr-scratch")
}

/// Renames `from` to `to`, which must not exist; nothing that appears there at the last moment is lost.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, rustix::fs::RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(error) if is_unsupported(error) => {}
        Err(error) => return Err(error.into()),
    }
    if fs::symlink_metadata(to).is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

/// Puts the directory `new` in the place of `output`; what was there is at `new` or [`aside`] then, to be deleted.
pub(super) fn swap(new: &Path, output: &Path) -> Result<PathBuf, ConvertError> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    match rustix::fs::renameat_with(rustix::fs::CWD, new, rustix::fs::CWD, output, rustix::fs::RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(new.to_owned()),
        Err(error) if is_unsupported(error) => {}
        Err(error) => return Err(ConvertError::io("replace", output)(error.into())),
    }
    let old = aside(output);
    rename_new(output, &old).map_err(ConvertError::io("move aside", output))?;
    if let Err(error) = rename_new(new, output) {
        // The first error is the one to report; the old state is still there, under a name the next run knows.
        let _ = rename_new(&old, output);
        return Err(ConvertError::io("create", output)(error));
    }
    Ok(old)
}

/// Whether a file system, or the system itself, lacks the operation.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn is_unsupported(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOTSUP].contains(&error)
}

/// Moves the complete files in `.bsbr-partial` of `output` to their places, in place of those of an earlier result. From the
/// first step on it can be gone on with: see [`finish`].
pub(super) fn fill(output: &Path) -> Result<(), ConvertError> {
    let [partial, complete, _] = WITHIN.map(|name| output.join(name));
    fs::rename(&partial, &complete).map_err(ConvertError::io("rename", &partial))?;
    finish(output)
}

/// Goes on with [`fill`] where it was interrupted.
pub(super) fn finish(output: &Path) -> Result<(), ConvertError> {
    let [_, complete, moving] = WITHIN.map(|name| output.join(name));
    if complete.is_dir() {
        // What makes the directory what it was goes first.
        let seal = seal(output);
        let mut old: Vec<String> = entries(output)?.into_iter().filter(|name| is_known(name)).collect();
        old.sort_by_key(|name| name != seal);
        for name in old {
            let path = output.join(name);
            fs::remove_file(&path).map_err(ConvertError::io("delete", &path))?;
        }
        fs::rename(&complete, &moving).map_err(ConvertError::io("rename", &complete))?;
    }
    if moving.is_dir() {
        let seal = seal(&moving);
        let mut new = entries(&moving)?;
        new.sort_by_key(|name| name == seal);
        for name in new {
            if name == seal {
                sync(output)?;
            }
            let path = output.join(&name);
            rename_new(&moving.join(&name), &path).map_err(ConvertError::io("create", &path))?;
        }
        fs::remove_dir(&moving).map_err(ConvertError::io("delete", &moving))?;
    }
    sync(output)
}

fn entries(dir: &Path) -> Result<Vec<String>, ConvertError> {
    let names = || -> io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    names().map_err(ConvertError::io("list", dir))
}

/// Writes through to the disk what a directory holds, where that can be asked for.
pub(super) fn sync(dir: &Path) -> Result<(), ConvertError> {
    if cfg!(unix) {
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        // A file system without the operation says so.
        if let Err(error) = synced
            && !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported)
        {
            return Err(ConvertError::io("write", dir)(error));
        }
    }
    Ok(())
}

/// Deletes a directory and what it holds. That it is gone already is fine.
pub(super) fn delete(dir: &Path) -> Result<(), ConvertError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(ConvertError::io("delete", dir)(error)),
        _ => Ok(()),
    }
}
