//! Where work runs: the threads of rayon's pool, kept awake through a sequence of operations.
//!
//! Handing a task to another thread and hearing of its end takes rayon some microseconds, as long as a small product of one token.
//! Threads that are kept awake take tasks from one place instead, which they look at all the time.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rayon::prelude::*;

/// How long a thread that finds nothing to do looks for more before it sleeps.
const PATIENCE: Duration = Duration::from_micros(200);

/// Looks at the tasks of the team between two at those of rayon.
const LOOKS: usize = 64;

/// Whether somebody keeps the threads awake.
static AWAKE: AtomicBool = AtomicBool::new(false);

/// The tasks that those threads share, while there are any.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

/// Threads that are kept awake.
static HELPERS: AtomicUsize = AtomicUsize::new(0);

/// Threads that may be looking at the tasks.
static INSIDE: AtomicUsize = AtomicUsize::new(0);

/// What a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Nothing in particular.
    Any,
    /// It does the work, and keeps the others awake.
    Leader,
    /// It is kept awake, or runs a task of the team.
    Helper,
}

thread_local! {
    static ROLE: Cell<Role> = const { Cell::new(Role::Any) };
}

/// Tasks on the stack of the thread that waits for their end.
struct Shared {
    /// Runs tasks until none is left; whether there was one.
    take_turns: *const (dyn Fn() -> bool + Sync),
    panicked: AtomicBool,
}

/// Runs `work` on a thread of rayon's pool. Every parallel operation started from outside the pool waits for its
/// threads to wake up; inside they are awake already, and stay so between operations that follow each other closely: waking a
/// thread takes longer than the product of one token with a small weight.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|scope| {
        // Once at a time: threads that wait for each other's end would wait for ever.
        if ROLE.get() != Role::Any || AWAKE.swap(true, Ordering::AcqRel) {
            return work();
        }
        let done = Ended(Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&done.0);
        scope.spawn_broadcast(move |_, _| stay_awake(&until));
        ROLE.set(Role::Leader);
        let result = work();
        drop(done);
        result
    })
}

/// Says that the work has ended, if it panicked too.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        ROLE.set(Role::Any);
        self.0.store(true, Ordering::Release);
        AWAKE.store(false, Ordering::Release);
    }
}

/// Does what there is to do until the work has ended, or there was nothing for a while.
fn stay_awake(done: &AtomicBool) {
    if ROLE.get() != Role::Any {
        return;
    }
    struct Counted;
    impl Drop for Counted {
        fn drop(&mut self) {
            HELPERS.fetch_sub(1, Ordering::Relaxed);
        }
    }
    HELPERS.fetch_add(1, Ordering::Relaxed);
    let (_role, _counted) = (As::new(Role::Helper), Counted);
    let mut idle_since = Instant::now();
    while !done.load(Ordering::Acquire) && idle_since.elapsed() < PATIENCE {
        if (0..LOOKS).any(|_| helped()) || rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle_since = Instant::now();
        }
    }
}

/// Runs `work` on every item, among the threads: one by one, so that none waits long for the last. Each thread that takes part
/// begins with `scratch`, at least once.
pub(crate) fn share_with<T: Send, S>(
    items: Vec<T>,
    scratch: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, T) + Sync + Send,
) {
    // One that has gone to sleep hears of rayon's tasks alone.
    let all_awake = || HELPERS.load(Ordering::Relaxed) + 1 == rayon::current_num_threads();
    if items.len() <= 1 || ROLE.get() != Role::Leader || !all_awake() {
        return items.into_par_iter().with_max_len(1).for_each_init(scratch, work);
    }
    let (count, next) = (items.len(), AtomicUsize::new(0));
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let take = || {
        let at = next.fetch_add(1, Ordering::Relaxed);
        if at < count { items[at].lock().unwrap_or_else(PoisonError::into_inner).take() } else { None }
    };
    let take_turns = || {
        let Some(mut item) = take() else { return false };
        let mut scratch = scratch();
        loop {
            work(&mut scratch, item);
            match take() {
                Some(next) => item = next,
                None => return true,
            }
        }
    };
    // What a task shares in turn is rayon's: the place is taken.
    let _role = As::new(Role::Helper);
    let taken: &(dyn Fn() -> bool + Sync) = &take_turns;
    // SAFETY: only the lifetime changes. `Open` is dropped before what the closure borrows, and then no thread is inside any more.
    let taken = unsafe { std::mem::transmute::<&(dyn Fn() -> bool + Sync), &'static (dyn Fn() -> bool + Sync)>(taken) };
    let shared = Shared { take_turns: taken, panicked: AtomicBool::new(false) };
    let open = Open::new(&shared);
    take_turns();
    drop(open);
    assert!(!shared.panicked.load(Ordering::Acquire), "a task panicked");
}

/// The same where a thread needs nothing.
pub(crate) fn share<T: Send>(items: Vec<T>, work: impl Fn(T) + Sync + Send) {
    share_with(items, || (), |(), item| work(item));
}

/// Tasks that the others can see.
struct Open<'a>(PhantomData<&'a Shared>);

impl<'a> Open<'a> {
    fn new(shared: &'a Shared) -> Self {
        SHARED.store(std::ptr::from_ref(shared).cast_mut(), Ordering::SeqCst);
        Self(PhantomData)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        SHARED.store(std::ptr::null_mut(), Ordering::SeqCst);
        // Who has seen them has entered before, so that it counts here; who enters from now on sees nothing.
        while INSIDE.load(Ordering::SeqCst) > 0 {
            std::hint::spin_loop();
        }
    }
}

/// Whether there were tasks.
fn helped() -> bool {
    if SHARED.load(Ordering::Relaxed).is_null() {
        std::hint::spin_loop();
        return false;
    }
    struct Inside;
    impl Drop for Inside {
        fn drop(&mut self) {
            INSIDE.fetch_sub(1, Ordering::SeqCst);
        }
    }
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let _inside = Inside;
    // SAFETY: null, or tasks that are kept until no thread is inside.
    let Some(shared) = (unsafe { SHARED.load(Ordering::SeqCst).as_ref() }) else { return false };
    struct Panicked<'a>(&'a AtomicBool);
    impl Drop for Panicked<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.store(true, Ordering::Release);
            }
        }
    }
    let _panicked = Panicked(&shared.panicked);
    // SAFETY: it lives as long as the tasks.
    unsafe { (*shared.take_turns)() }
}

/// A role for a while.
struct As(Role);

impl As {
    fn new(role: Role) -> Self {
        Self(ROLE.replace(role))
    }
}

impl Drop for As {
    fn drop(&mut self) {
        ROLE.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_inside_the_pool_and_outside() {
        let count = |items: usize| {
            let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            share((0..items).collect(), |at: usize| {
                // Within a task another may be shared.
                share(vec![at, at], |at| {
                    counts[at].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2), "{counts:?}");
        };
        for items in [0, 1, 2, 7, 300] {
            count(items);
            in_pool(|| (0..200).for_each(|_| count(items)));
        }
        // Several threads at once: one leads, the others have rayon.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| in_pool(|| (0..200).for_each(|_| count(50))));
            }
        });
    }

    #[test]
    fn a_task_that_panics_is_heard_of_and_the_next_ones_run() {
        let result = std::panic::catch_unwind(|| {
            in_pool(|| share((0..64).collect(), |at: usize| assert_ne!(at, 40, "wanted")));
        });
        assert!(result.is_err());
        in_pool(|| share((0..64).collect(), |_: usize| {}));
    }
}
