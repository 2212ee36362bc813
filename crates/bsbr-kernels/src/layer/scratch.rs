//! Working memory that is used again: fresh memory of this size costs a page fault for every 4 KiB.
//!
//! What is kept follows what is asked for. A buffer serves requests down to a quarter of its size only, so that those of a
//! long prompt are not held by the short requests of decoding, and one that served none for a while is given back.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
};

/// Most buffers kept for the next use. A block of a decoder, its linear layers split or not, holds no more at once.
const KEPT: usize = 12;

/// Requests after which a buffer that served none of them is given back: those of a few steps of a deep decoder.
const PATIENCE: u64 = 4096;

/// A buffer serves no request smaller than this part of it.
const SMALLEST_PART: usize = 4;

/// Numbers to a cache line.
const LINE: usize = 16;

static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), requests: 0 });

/// Buffers that nobody uses.
struct Pool {
    /// Each with the request that it served last.
    free: Vec<(Vec<f32>, u64)>,
    requests: u64,
}

impl Pool {
    /// The smallest buffer of at least `room` numbers that is not much too large, and the number of the request.
    fn take(&mut self, room: usize) -> (Vec<f32>, u64) {
        self.requests += 1;
        let requests = self.requests;
        self.free.retain(|(_, last)| requests - last <= PATIENCE);
        let suits = |length: usize| length >= room && length / SMALLEST_PART <= room;
        let fits = self.free.iter().enumerate().filter(|(_, (buffer, _))| suits(buffer.len()));
        let at = fits.min_by_key(|(_, (buffer, _))| buffer.len()).map(|(at, _)| at);
        (at.map(|at| self.free.swap_remove(at).0).unwrap_or_default(), requests)
    }

    /// Keeps a buffer, and of too many those used last.
    fn put(&mut self, buffer: Vec<f32>, request: u64) {
        self.free.push((buffer, request));
        if self.free.len() > KEPT {
            let oldest = (0..self.free.len()).min_by_key(|&at| self.free[at].1);
            oldest.map(|at| self.free.swap_remove(at));
        }
    }
}

/// Numbers that begin at a cache line. What they are at first is whatever was there before.
#[derive(Debug)]
pub(super) struct Scratch {
    buffer: Vec<f32>,
    start: usize,
    length: usize,
    request: u64,
}

impl Scratch {
    pub(super) fn new(length: usize) -> Self {
        let room = length + LINE;
        let (mut buffer, request) = POOL.lock().unwrap_or_else(PoisonError::into_inner).take(room);
        if buffer.len() < room {
            buffer = vec![0.0; room];
        }
        let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { buffer, start, length, request }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        POOL.lock().unwrap_or_else(PoisonError::into_inner).put(buffer, self.request);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(pool: &Pool) -> usize {
        pool.free.iter().map(|(buffer, _)| buffer.len()).sum()
    }

    /// A pool after one use of a buffer of each of these sizes, all at once.
    fn after(sizes: &[usize]) -> Pool {
        let mut pool = Pool { free: Vec::new(), requests: 0 };
        let taken: Vec<_> = sizes.iter().map(|&size| (vec![0.0; size], pool.take(size).1)).collect();
        taken.into_iter().for_each(|(buffer, request)| pool.put(buffer, request));
        pool
    }

    /// One use of a buffer.
    fn serve(pool: &mut Pool, room: usize) {
        let (mut buffer, request) = pool.take(room);
        if buffer.len() < room {
            buffer = vec![0.0; room];
        }
        pool.put(buffer, request);
    }

    #[test]
    fn the_same_requests_are_served_by_the_same_buffers() {
        let mut pool = after(&[100, 70, 300]);
        let places: Vec<_> = pool.free.iter().map(|(buffer, _)| buffer.as_ptr()).collect();
        let taken: Vec<_> = [300, 70, 100].map(|room| pool.take(room)).into();
        for (buffer, _) in &taken {
            assert!(places.contains(&buffer.as_ptr()));
        }
        assert!(pool.free.is_empty());
    }

    #[test]
    fn buffers_of_a_long_prompt_are_given_back_while_tokens_are_decoded() {
        let mut pool = after(&[1 << 20; KEPT]);
        for _ in 0..PATIENCE + 1 {
            serve(&mut pool, 1 << 10);
        }
        assert!(kept(&pool) <= KEPT << 10, "{} numbers are kept", kept(&pool));
    }

    #[test]
    fn a_buffer_used_now_and_then_is_kept() {
        let mut pool = after(&[1 << 20]);
        let place = pool.free[0].0.as_ptr();
        for _ in 0..5 {
            (0..PATIENCE / 2).for_each(|_| serve(&mut pool, 1 << 10));
            let (buffer, request) = pool.take(1 << 19);
            assert_eq!(buffer.as_ptr(), place);
            pool.put(buffer, request);
        }
    }

    #[test]
    fn no_more_are_kept_than_a_block_holds() {
        assert_eq!(after(&[100; 3 * KEPT]).free.len(), KEPT);
    }
}
