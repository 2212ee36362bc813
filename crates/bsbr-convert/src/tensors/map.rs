//! The one place that maps files into memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::{Deref, Range};

use memmap2::{Mmap, MmapOptions};

/// Bytes of a file, mapped read-only until dropped.
#[derive(Debug)]
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps `range` of `file`. Only the pages of the range count towards resident memory, and only until the
    /// mapping is dropped: that is why each tensor is mapped for itself.
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

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
