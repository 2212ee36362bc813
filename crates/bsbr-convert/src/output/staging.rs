//! A directory being written.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::ConvertError;

use super::check::{Found, Replaceable, check, resolve};
use super::lock::{Hold, claim, hold};
use super::place::{WITHIN, delete, fill, partial, rename_new, swap, sync};
use super::recover::recover;
use super::scratch::missing_above;
use super::unfinished::Unfinished;

/// A directory being written. Dropped before [`Staging::publish`] it disappears with all it holds.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    output: PathBuf,
    /// Directories above the output that were made for it, innermost first.
    made: Vec<PathBuf>,
    force: bool,
    replaceable: Replaceable,
    found: Found,
    place: Place,
    /// The output, where there is one; nobody else writes it meanwhile.
    held: Option<Hold>,
    /// The directory that is written, as long as this exists.
    _lock: Hold,
    published: bool,
}

/// Where the files are until they are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Beside the output, whose place they take.
    Beside,
    /// Within the output, which stays the directory it is.
    Within,
}

impl Staging {
    /// Begins to write `output`, which must be absent, empty or, when forced, an earlier result that is `replaceable`.
    pub(crate) fn begin(output: &Path, force: bool, replaceable: Replaceable) -> Result<Self, ConvertError> {
        let output = resolve(output)?;
        recover(&output)?;
        let found = check(&output, force, &replaceable)?;
        let mut unfinished = Unfinished::lock();
        let made = missing_above(&output);
        let (place, path, held, lock) = match found {
            Found::Nothing => {
                let parent = output.parent().unwrap_or(&output);
                let made_and_held = || {
                    fs::create_dir_all(parent).map_err(ConvertError::io("create", parent))?;
                    claim(&partial(&output), &output)
                };
                let lock = made_and_held().inspect_err(|_| remove_empty(&made))?;
                (Place::Beside, partial(&output), None, lock)
            }
            Found::EmptyDirectory => within(&output, hold(&output, &output)?)?,
            Found::Replaceable => {
                let held = hold(&output, &output)?;
                match beside(&output)? {
                    Some(lock) => (Place::Beside, partial(&output), Some(held), lock),
                    None => within(&output, held)?,
                }
            }
        };
        unfinished.add(&path, &made);
        drop(unfinished);
        Ok(Self { path, output, made, force, replaceable, found, place, held, _lock: lock, published: false })
    }

    /// The directory in which the files are written.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a small file through to the disk.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), ConvertError> {
        let path = self.path.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(ConvertError::io("write", &path))
    }

    /// Copies those of `names` that `from` has.
    pub(crate) fn copy_present(&self, from: &Path, names: &[&str]) -> Result<(), ConvertError> {
        for name in names {
            let source = from.join(name);
            if source.is_file() {
                let content = fs::read(&source).map_err(ConvertError::io("read", &source))?;
                self.write(name, &content)?;
            }
        }
        Ok(())
    }

    /// Puts the files in their place, if that is still what it was at first. Whatever ends the process meanwhile, the
    /// output is what it was or what it is to be, or can be made so by the next run.
    pub(crate) fn publish(mut self) -> Result<(), ConvertError> {
        let output = self.output.clone();
        sync(&self.path)?;
        let mut moment = Unfinished::lock();
        let found = check(&output, self.force, &self.replaceable)?;
        let same = found == self.found && self.held.as_ref().is_none_or(|held| held.is_still(&output));
        let vanished = self.place == Place::Beside && found == Found::Nothing;
        let made_meanwhile = self.found == Found::Nothing && found == Found::EmptyDirectory;
        if !same && !vanished && !made_meanwhile {
            return Err(ConvertError::OutputExists { dir: output });
        }
        if made_meanwhile {
            let inner = output.join(WITHIN[0]);
            rename_new(&self.path, &inner).map_err(ConvertError::io("create", &inner))?;
            self.place = Place::Within;
        }
        match (self.place, found) {
            (Place::Beside, Found::Replaceable) => {
                let old = swap(&self.path, &output)?;
                sync_above(&output)?;
                delete(&old)?;
            }
            (Place::Beside, _) => match rename_new(&self.path, &output) {
                Ok(()) => sync_above(&output)?,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(ConvertError::OutputExists { dir: output });
                }
                Err(error) => return Err(ConvertError::io("create", &output)(error)),
            },
            (Place::Within, _) => fill(&output)?,
        }
        self.published = true;
        moment.remove(&self.path);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to tell anyone: an error that led here is already on its way.
            let _ = delete(&self.path);
            remove_empty(&self.made);
            Unfinished::lock().remove(&self.path);
        }
    }
}

fn remove_empty(made: &[PathBuf]) {
    for path in made {
        let _ = fs::remove_dir(path);
    }
}

fn sync_above(output: &Path) -> Result<(), ConvertError> {
    output.parent().map_or(Ok(()), sync)
}

/// A place within `output`, which is held.
fn within(output: &Path, held: Hold) -> Result<(Place, PathBuf, Option<Hold>, Hold), ConvertError> {
    let path = output.join(WITHIN[0]);
    let lock = claim(&path, output)?;
    Ok((Place::Within, path, Some(held), lock))
}

/// A place beside `output` from which its own can be taken; none where the output cannot be replaced as a whole: a mount
/// point, the directory this process stands in, one in a directory that is not to be written.
fn beside(output: &Path) -> Result<Option<Hold>, ConvertError> {
    if std::env::current_dir().is_ok_and(|here| here.starts_with(output)) {
        return Ok(None);
    }
    let (path, inner) = (partial(output), output.join(WITHIN[0]));
    let lock = match claim(&path, output) {
        Err(ConvertError::Io { source, .. })
            if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
        {
            return Ok(None);
        }
        claimed => claimed?,
    };
    // Into the output and out again: no step leads over the border of a file system.
    if rename_new(&path, &inner).and_then(|()| rename_new(&inner, &path)).is_ok() {
        return Ok(Some(lock));
    }
    delete(&path)?;
    delete(&inner)?;
    Ok(None)
}
