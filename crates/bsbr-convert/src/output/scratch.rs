//! A directory for files of a while.

use std::fs;
use std::path::{Path, PathBuf};

use crate::ConvertError;

use super::check::resolve;
use super::lock::{Hold, claim};
use super::place::{delete, rename_new, scratch};
use super::unfinished::Unfinished;

/// A directory beside an output, for files on the way to it. It disappears when dropped, when the process is asked to end,
/// or, where that was too sudden, when the same output is written next.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
    output: PathBuf,
    made: Vec<PathBuf>,
    /// Held as long as this exists.
    _lock: Hold,
}

impl ScratchDir {
    /// Makes the directory, beside the file or directory `output`.
    ///
    /// # Errors
    ///
    /// [`ConvertError::OutputBusy`] where another process has it; [`ConvertError::Io`].
    pub fn beside(output: &Path) -> Result<Self, ConvertError> {
        let output = resolve(output)?;
        let path = scratch(&output);
        let made = missing_above(&path);
        let parent = path.parent().unwrap_or(&path);
        let mut unfinished = Unfinished::lock();
        fs::create_dir_all(parent).map_err(ConvertError::io("create", parent))?;
        let lock = claim(&path, &output)?;
        unfinished.add(&path, &made);
        Ok(Self { path, output, made, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the file `name` of this directory to the output. One that is there is replaced only if `force` says so, also one
    /// that appears at the last moment.
    ///
    /// # Errors
    ///
    /// [`ConvertError::OutputExists`]; [`ConvertError::Io`].
    pub fn publish_file(mut self, name: &str, force: bool) -> Result<(), ConvertError> {
        let _moment = Unfinished::lock();
        let from = self.path.join(name);
        let moved = if force { fs::rename(&from, &self.output) } else { rename_new(&from, &self.output) };
        match moved {
            Ok(()) => {
                // Somebody wants the directories now.
                self.made.clear();
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(ConvertError::OutputExists { dir: self.output.clone() })
            }
            Err(error) => Err(ConvertError::io("write", &self.output)(error)),
        }
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let _ = delete(&self.path);
        for path in &self.made {
            let _ = fs::remove_dir(path);
        }
        Unfinished::lock().remove(&self.path);
    }
}

/// Directories above `path` that do not exist, innermost first.
pub(super) fn missing_above(path: &Path) -> Vec<PathBuf> {
    path.ancestors().skip(1).take_while(|path| !path.exists()).map(Path::to_owned).collect()
}
