//! A GGUF file in two parts: rows that a converted model holds as they are, and everything else.
//!
//! Everything else, the header first, is kept beside the weights; the two together are the file again, byte for byte.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use bsbr_weights::Format;

use super::file::{architecture, present};
use super::header::GgufHeader;
use super::metadata::Metadata;
use super::problem::GgufProblem;
use super::stored::Stored;
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::plan::Plan;
use crate::tensors::{Mapping, row_runs};

/// The name of everything else in a converted model.
pub(crate) const SOURCE_GGUF: &str = "source_gguf.bin";

/// A tensor of the file whose rows are all in weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    /// Where in the file it is.
    pub(crate) bytes: Range<usize>,
    /// Bytes of a row.
    pub(crate) row: usize,
    /// Its rows in the order of the file: a weight, the first row of it, and how many.
    pub(crate) rows: Vec<(String, usize, usize)>,
}

/// The tensors that weights hold row by row, in the order of the file. `weights` says the format of a weight in the converted model,
/// `tensors` how the file holds what a checkpoint of that name would.
///
/// # Errors
///
/// [`ConvertError::Rules`] as [`Plan::blocks`].
pub(crate) fn held(
    plan: &Plan,
    tensors: &HashMap<String, Stored>,
    weights: &dyn Fn(&str) -> Option<Format>,
) -> Result<Vec<Held>, ConvertError> {
    let mut found = Vec::new();
    for step in &plan.steps {
        let sources: Vec<Option<&Stored>> = step.sources.iter().map(|source| tensors.get(&source.name)).collect();
        let blocks = plan.blocks(step)?;
        for (number, source) in sources.iter().enumerate() {
            let Some(stored) = source else { continue };
            let format = stored.kind.format();
            let fits = step.targets.iter().all(|target| target.shape.len() == 2 && weights(&target.name) == format);
            let (Some(format), true) = (format, fits) else { continue };
            // Rows of the file, and where in which weight they are.
            let mut rows: Vec<(usize, &str, usize, usize)> = Vec::new();
            let (mut row, mut whole) = (0, true);
            for (target, blocks) in step.targets.iter().zip(&blocks) {
                let runs = row_runs(blocks, target.shape[1], &sources);
                let bytes = format.row_bytes(target.shape[1]).filter(|bytes| row == 0 || row == *bytes);
                let (Some(runs), Some(bytes)) = (runs, bytes) else {
                    whole = false;
                    break;
                };
                row = bytes;
                let mut at = 0;
                for run in runs {
                    if run.source == number {
                        rows.push((run.row, &target.name, at, run.count));
                    }
                    at += run.count;
                }
            }
            rows.sort_unstable();
            let mut next = 0;
            whole &= rows.iter().all(|&(first, _, _, count)| {
                let follows = first == next;
                next += count;
                follows
            });
            let (Ok(start), Ok(end)) = (usize::try_from(stored.bytes.start), usize::try_from(stored.bytes.end)) else {
                continue;
            };
            if whole && row > 0 && next * row == end - start {
                let rows = rows.into_iter().map(|(_, name, at, count)| (name.to_owned(), at, count)).collect();
                found.push(Held { bytes: start..end, row, rows });
            }
        }
    }
    found.sort_by_key(|held| held.bytes.start);
    Ok(found)
}

/// Writes what is left of `file` without the tensors `held` to `path`.
pub(crate) fn write_rest(file: &Mapping, held: &[Held], path: &Path) -> Result<(), ConvertError> {
    let write = || {
        let mut out = BufWriter::new(File::create_new(path)?);
        let mut at = 0;
        for Held { bytes, .. } in held {
            out.write_all(&file[at..bytes.start])?;
            at = bytes.end;
        }
        out.write_all(&file[at..])?;
        out.flush()?;
        out.get_ref().sync_all()
    };
    write().map_err(ConvertError::io("write", path))
}

/// What is left of a file of `len` bytes, mapped, and the tensors that are missing in it.
///
/// # Errors
///
/// [`ConvertError::Gguf`] for one that is damaged, or does not belong to the weights.
pub(crate) fn open_rest(
    path: &Path,
    len: u64,
    config: &ConfigFile,
    plan: &Plan,
    weights: &dyn Fn(&str) -> Option<Format>,
) -> Result<(Mapping, Vec<Held>), ConvertError> {
    let fault = |problem| ConvertError::Gguf { path: path.to_owned(), problem: Box::new(problem) };
    let file = File::open(path).map_err(ConvertError::io("open", path))?;
    let rest_len = file.metadata().map_err(ConvertError::io("read", path))?.len();
    let rest = Mapping::new(&file, 0..rest_len).map_err(ConvertError::io("map", path))?;
    let header = GgufHeader::parse_start(&rest, usize::try_from(len).unwrap_or(usize::MAX)).map_err(fault)?;
    let metadata = Metadata::new(path, header.metadata);
    let object = serde_json::from_str(&config.text()).map_err(ConvertError::json(config.path()))?;
    let (_, stored) = present(path, architecture(&metadata)?, &object, &header.tensors)?;
    let held = held(plan, &stored, weights)?;
    let missing: u64 = held.iter().map(|held| held.bytes.len() as u64).sum();
    if rest_len.checked_add(missing) != Some(len) {
        return Err(fault(GgufProblem::Rest { rest: rest_len, weights: missing, file: len }));
    }
    Ok((rest, held))
}
