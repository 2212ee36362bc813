//! Working memory that is used again: fresh memory of this size costs a page fault for every 4 KiB.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
};

/// Buffers kept for the next use. A block of a decoder, its linear layers split or not, holds no more at once.
const KEPT: usize = 12;

/// Numbers to a cache line.
const LINE: usize = 16;

static FREE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Numbers that begin at a cache line. What they are at first is whatever was there before.
#[derive(Debug)]
pub(super) struct Scratch {
    buffer: Vec<f32>,
    start: usize,
    length: usize,
}

impl Scratch {
    pub(super) fn new(length: usize) -> Self {
        let room = length + LINE;
        let mut buffer = {
            let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
            // The smallest that is large enough.
            let fits = free.iter().enumerate().filter(|(_, buffer)| buffer.len() >= room);
            let at = fits.min_by_key(|(_, buffer)| buffer.len()).map(|(at, _)| at);
            at.map(|at| free.swap_remove(at)).unwrap_or_default()
        };
        if buffer.len() < room {
            buffer = vec![0.0; room];
        }
        let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { buffer, start, length }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(buffer);
        if free.len() > KEPT {
            let smallest = (0..free.len()).min_by_key(|&at| free[at].len());
            smallest.map(|at| free.swap_remove(at));
        }
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[self.start..self.start + self.length]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..self.start + self.length]
    }
}
