//! What a conversion records of the files of a checkpoint. Hashing takes about as long as copying, so it runs beside the
//! writing.

use std::fs::File;
use std::io::Read;
use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{iter, thread};

use sha2::{Digest, Sha256};

use crate::ConvertError;
use crate::convert::Progress;
use crate::record::{RecordedExport, RecordedFile};
use crate::tensors::{Header, Recipe, TensorFile, TensorRef, hex};

/// Most files hashed at the same time: enough to keep up with a fast disk.
const MOST_AT_ONCE: usize = 4;

/// Hashes `files` on threads of their own while `work` runs; returns what both give. When `work` fails the hashing stops.
pub(crate) fn record_files_beside<T>(
    files: &[TensorFile],
    progress: &mut dyn FnMut(Progress<'_>),
    work: impl FnOnce(&mut dyn FnMut(Progress<'_>)) -> Result<T, ConvertError>,
) -> Result<(T, Vec<RecordedFile>), ConvertError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let hash_next = || {
        let number = next.fetch_add(1, Ordering::Relaxed);
        files.get(number).map(|file| sha256(file.path(), &stop).map(|hash| (number, hash)))
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(files.len()).min(MOST_AT_ONCE);
    let (done, mut hashes) = thread::scope(|scope| {
        let hash_some = || iter::from_fn(hash_next).collect::<Result<Vec<_>, _>>();
        let hashing: Vec<_> = (0..threads).map(|_| scope.spawn(hash_some)).collect();
        let done = work(progress).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        let mut hashes = Vec::new();
        for thread in hashing {
            hashes.extend(thread.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        Ok::<_, ConvertError>((done, hashes))
    })?;
    hashes.sort_unstable();
    Ok((done, record_files(files, hashes.into_iter().map(|(_, hash)| hash), progress)?))
}

fn record_files(
    files: &[TensorFile],
    hashes: impl Iterator<Item = String>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<RecordedFile>, ConvertError> {
    let total = files.iter().map(TensorFile::len).sum();
    let mut done = 0;
    let mut recorded = Vec::new();
    for (file, sha256) in files.iter().zip(hashes) {
        let (name, export) = (file.name(), recorded_export(file)?);
        done += file.len();
        progress(Progress { stage: "hashing", item: &name, done, total });
        recorded.push(RecordedFile {
            name,
            format: file.format(),
            bytes: file.len(),
            sha256,
            header: file.header().text.clone(),
            export,
        });
    }
    Ok(recorded)
}

/// What an export writes in place of `file`, unless it writes the file itself.
fn recorded_export(file: &TensorFile) -> Result<Option<RecordedExport>, ConvertError> {
    let Some(name) = file.format().exported_name(&file.name()) else { return Ok(None) };
    let file = file.as_it_is();
    let Header { tensors, text, .. } = file.header();
    let mut hash = Sha256::new();
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
    for entry in tensors {
        Recipe::whole(TensorRef { file, entry }).for_each_band(|bytes| {
            hash.update(bytes);
            Ok(())
        })?;
    }
    Ok(Some(RecordedExport { name, sha256: hex(&hash.finalize()) }))
}

/// The SHA-256 of a file, of less than all of it once `stop` is set.
fn sha256(path: &Path, stop: &AtomicBool) -> Result<String, ConvertError> {
    let mut file = File::open(path).map_err(ConvertError::io("open", path))?;
    let mut hash = Sha256::new();
    // Small enough to stay in the cache of a core between reading and hashing.
    let mut buffer = vec![0; 1 << 17];
    loop {
        match file.read(&mut buffer).map_err(ConvertError::io("read", path))? {
            count if count > 0 && !stop.load(Ordering::Relaxed) => hash.update(&buffer[..count]),
            _ => return Ok(hex(&hash.finalize())),
        }
    }
}

/// The SHA-256 over the SHA-256 of each of several files.
pub(crate) fn sha256_of<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<String, ConvertError> {
    let mut hash = Sha256::new();
    for path in paths {
        hash.update(sha256(path, &AtomicBool::new(false))?);
    }
    Ok(hex(&hash.finalize()))
}

/// The SHA-256 of some bytes in hexadecimal.
pub fn sha256_text(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
