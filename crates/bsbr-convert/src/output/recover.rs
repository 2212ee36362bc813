//! What an interrupted run left behind, and the look at an output before anything takes long.

use std::fs;
use std::path::Path;

use crate::ConvertError;

use super::check::{OutputKind, Replaceable, check, resolve};
use super::lock::{Hold, hold};
use super::place::{WITHIN, aside, delete, finish, partial, rename_new, scratch};

/// Checks that `output` may be written as what `kind` says: absent, empty, or, with `force`, an earlier result and nothing
/// else. `tell` hears what an interrupted run left there and what became of it, in lines to show.
///
/// Everything that writes a directory looks again, at the moment in which it is published.
///
/// # Errors
///
/// [`ConvertError::OutputExists`], [`ConvertError::OutputForeign`], [`ConvertError::OutputBusy`], and [`ConvertError::Io`].
pub fn prepare_output(
    output: &Path,
    kind: OutputKind,
    force: bool,
    tell: &mut dyn FnMut(&str),
) -> Result<(), ConvertError> {
    let output = resolve(output)?;
    recover(&output)?.iter().for_each(|line| tell(line));
    check(&output, force, &Replaceable::of(kind)).map(drop)
}

/// Finishes, puts back or deletes what interrupted runs left of `output`, resolved.
pub(super) fn recover(output: &Path) -> Result<Vec<String>, ConvertError> {
    let mut found = Vec::new();
    let busy = |partial: &Path| ConvertError::OutputBusy { dir: output.to_owned(), partial: partial.to_owned() };
    let [writing, complete, moving] = WITHIN.map(|name| output.join(name));
    if let Some(within) = [&writing, &complete, &moving].into_iter().find(|path| path.is_dir()) {
        match hold(output, output)? {
            Hold::Gone => {}
            Hold::Unlocked => return Err(busy(within)),
            Hold::Locked(_lock) => {
                if complete.is_dir() || moving.is_dir() {
                    finish(output)?;
                    found.push(format!(
                        "an interrupted run had not put all its files into {}: done now",
                        output.display()
                    ));
                }
                if writing.is_dir() {
                    delete(&writing)?;
                    found.push(format!("an interrupted run left {}: deleted", writing.display()));
                }
            }
        }
    }
    for path in [partial(output), scratch(output)] {
        if path.is_dir() {
            match hold(&path, output)? {
                Hold::Gone => {}
                Hold::Unlocked => return Err(busy(&path)),
                Hold::Locked(_lock) => {
                    delete(&path)?;
                    found.push(format!("an interrupted run left {}: deleted", path.display()));
                }
            }
        }
    }
    let old = aside(output);
    if old.is_dir() {
        if fs::symlink_metadata(output).is_err() {
            rename_new(&old, output).map_err(ConvertError::io("put back", output))?;
            found.push(format!("an interrupted run had moved {} to {}: put back", output.display(), old.display()));
        } else {
            delete(&old)?;
            found.push(format!("an interrupted run left {}: deleted", old.display()));
        }
    }
    Ok(found)
}

/// Refuses to read a directory whose files an interrupted run had not all put in their places.
pub(crate) fn refuse_unfinished(dir: &Path) -> Result<(), ConvertError> {
    match WITHIN[1..].iter().any(|name| dir.join(name).is_dir()) {
        true => Err(ConvertError::OutputUnfinished { dir: dir.to_owned() }),
        false => Ok(()),
    }
}
