//! The one place that maps files into memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

use memmap2::{Mmap, MmapOptions};

/// Bytes of a file, mapped read-only until dropped.
#[derive(Debug)]
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps `range` of `file`. Only the pages of the range count towards resident memory, and only until the
    /// mapping is dropped: that is why each tensor is mapped for itself where it is read and not kept.
    pub(crate) fn new(file: &File, range: Range<u64>) -> std::io::Result<Self> {
        if range.is_empty() {
            return Ok(Self(None));
        }
        let len = usize::try_from(range.end - range.start).map_err(std::io::Error::other)?;
        // SAFETY: the mapping is read-only and private to this process. The range was checked against the length
        // of the file when it was opened. As with every mapped file, another process that truncates it meanwhile
        // ends this one with SIGBUS; nothing here writes to a file it maps.
        let map = unsafe { MmapOptions::new().offset(range.start).len(len).map(file)? };
        Ok(Self(Some(map)))
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// A mapped file, and some of its bytes.
pub(crate) type SharedPart = (Arc<Mapping>, Range<u64>);

/// A whole file, mapped once for all that read of it as it is.
#[derive(Debug, Default)]
pub(crate) struct WholeFile(OnceLock<Arc<Mapping>>);

impl WholeFile {
    /// The mapping of `file`, which has `len` bytes.
    pub(crate) fn get(&self, file: &File, len: u64) -> std::io::Result<Arc<Mapping>> {
        if let Some(mapping) = self.0.get() {
            return Ok(Arc::clone(mapping));
        }
        let mapping = Arc::new(Mapping::new(file, 0..len)?);
        Ok(Arc::clone(self.0.get_or_init(|| mapping)))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
