//! Finished runs on disk, one JSON object a line: what a comparison that was interrupted continues from.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use super::{Run, RunSpec, TrainError};

/// A file of finished runs.
#[derive(Debug)]
pub struct RunStore {
    path: PathBuf,
    runs: Vec<Run>,
}

impl RunStore {
    /// Reads what is there; a file that is not there holds nothing yet. A last line without an end was being written when the
    /// program was stopped, and is cut off.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`] if the file cannot be read or cut, [`TrainError::Line`] if a line of it is no run.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let failed = |source| TrainError::File { path: path.to_owned(), source };
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut runs = Vec::new();
        for (line, number) in bytes[..whole].split_inclusive(|&byte| byte == b'\n').zip(1..) {
            let run = serde_json::from_slice(line);
            runs.push(run.map_err(|source| TrainError::Line { path: path.to_owned(), number, source })?);
        }
        if whole < bytes.len() {
            let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
            file.set_len(whole as u64).map_err(failed)?;
        }
        Ok(Self { path: path.to_owned(), runs })
    }

    /// The finished run of these settings; the last one, where there are several.
    pub fn find(&self, spec: &RunSpec) -> Option<&Run> {
        self.runs.iter().rev().find(|run| run.spec == *spec)
    }

    /// Adds a run, on disk first.
    ///
    /// # Errors
    ///
    /// [`TrainError::File`] if it cannot be written.
    pub fn add(&mut self, run: Run) -> Result<(), TrainError> {
        let failed = |source| TrainError::File { path: self.path.clone(), source };
        let mut line = serde_json::to_string(&run).map_err(|error| failed(error.into()))?;
        line.push('\n');
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path).map_err(failed)?;
        file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).map_err(failed)?;
        self.runs.push(run);
        Ok(())
    }
}
