//! What the processor can do, and where work runs.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use pulp::{Arch, Simd, WithSimd};

/// Numbers handled by one task where an operation goes over them one by one: enough that handing it over costs little.
pub(super) const TASK: usize = 1 << 14;

/// How long a thread that finds nothing to do looks for more before it sleeps.
const PATIENCE: Duration = Duration::from_micros(200);

/// Whether somebody keeps the threads awake.
static AWAKE: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread does the work, or is kept awake for it.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread of rayon's pool. Every parallel operation started from outside the pool waits for its
/// threads to wake up; inside they are awake already, and stay so between operations that follow each other closely: waking a
/// thread takes longer than the product of one token with a small weight.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|scope| {
        // Once at a time: threads that wait for each other's end would wait for ever.
        if BUSY.get() || AWAKE.swap(true, Ordering::AcqRel) {
            return work();
        }
        let done = Ended(Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&done.0);
        scope.spawn_broadcast(move |_, _| stay_awake(&until));
        BUSY.set(true);
        let result = work();
        drop(done);
        result
    })
}

/// Says that the work has ended, if it panicked too.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        BUSY.set(false);
        self.0.store(true, Ordering::Release);
        AWAKE.store(false, Ordering::Release);
    }
}

/// Does what there is to do until the work has ended, or there was nothing for a while.
fn stay_awake(done: &AtomicBool) {
    if BUSY.replace(true) {
        return;
    }
    let mut idle_since = Instant::now();
    while !done.load(Ordering::Acquire) && idle_since.elapsed() < PATIENCE {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle_since = Instant::now(),
            Some(rayon::Yield::Idle) | None => std::hint::spin_loop(),
        }
    }
    BUSY.set(false);
}

/// Width and number of the registers of a level.
pub(super) fn registers(arch: Arch) -> (usize, usize) {
    struct Ask;
    impl WithSimd for Ask {
        type Output = (usize, usize);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            (S::F32_LANES, S::REGISTER_COUNT)
        }
    }
    arch.dispatch(Ask)
}

/// Every level this processor has, the best last.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Arch> {
    let mut levels = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(pulp::x86::V3::try_new().map(Arch::V3));
        levels.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    levels
}
