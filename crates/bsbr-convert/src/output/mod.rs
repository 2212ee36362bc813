//! Writing a directory all at once: into a sibling first, then renamed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::ConvertError;

/// A directory being written. Dropped before [`Staging::publish`] it disappears with all it holds.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    output: PathBuf,
    /// Directories above the output that were made for it, innermost first.
    made: Vec<PathBuf>,
    published: bool,
}

impl Staging {
    /// Creates a temporary directory beside `output`, so that the final rename stays on one file system.
    pub(crate) fn new(output: &Path) -> Result<Self, ConvertError> {
        let output = std::path::absolute(output).map_err(ConvertError::io("resolve", output))?;
        let parent = output.parent().unwrap_or(&output);
        let made = parent.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        let path = sibling(&output, "partial");
        let staging = Self { path, output: output.clone(), made, published: false };
        fs::create_dir_all(parent).map_err(ConvertError::io("create", parent))?;
        fs::create_dir(&staging.path).map_err(ConvertError::io("create", &staging.path))?;
        Ok(staging)
    }

    /// The temporary directory.
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

    /// Puts the directory in its place. What was there is moved aside first and deleted last, so that a crash leaves
    /// the old state or the new one.
    pub(crate) fn publish(mut self) -> Result<(), ConvertError> {
        let output = self.output.clone();
        let old = output.exists().then(|| sibling(&output, "old"));
        if let Some(old) = &old {
            fs::rename(&output, old).map_err(ConvertError::io("move aside", &output))?;
        }
        if let Err(error) = fs::rename(&self.path, &output) {
            if let Some(old) = &old {
                // The first error is the one to report; the old state is still there under its other name.
                let _ = fs::rename(old, &output);
            }
            return Err(ConvertError::io("create", &output)(error));
        }
        self.published = true;
        old.map_or(Ok(()), |old| fs::remove_dir_all(&old).map_err(ConvertError::io("delete", &old)))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Nothing to tell anyone: an error that led here is already on its way.
            let _ = fs::remove_dir_all(&self.path);
            for path in &self.made {
                let _ = fs::remove_dir(path);
            }
        }
    }
}

/// A free hidden name beside `output`.
fn sibling(output: &Path, what: &str) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let process = std::process::id();
    let candidates = (0_u32..).map(|n| output.with_file_name(format!(".{name}.{what}-{process}-{n}")));
    candidates.into_iter().find(|path| !path.exists()).unwrap_or_else(|| output.with_extension(what))
}

/// Checks that `output` may be written: absent, empty, or, when forced, a directory that `replaceable` knows as one
/// of ours.
pub(crate) fn check_output(
    output: &Path,
    force: bool,
    replaceable: impl FnOnce(&[String]) -> bool,
) -> Result<(), ConvertError> {
    let Ok(kind) = fs::metadata(output) else { return Ok(()) };
    let foreign = |why| Err(ConvertError::OutputForeign { dir: output.to_owned(), why });
    if !kind.is_dir() {
        return foreign("it is not a directory");
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(output).map_err(ConvertError::io("list", output))? {
        let entry = entry.map_err(ConvertError::io("list", output))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    match (names.is_empty(), force) {
        (true, _) => Ok(()),
        (false, false) => Err(ConvertError::OutputExists { dir: output.to_owned() }),
        (false, true) if replaceable(&names) => Ok(()),
        (false, true) => foreign("it holds files that were not written here; delete it yourself if it may go"),
    }
}
