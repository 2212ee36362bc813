//! What happens when the process is asked to end: unfinished output is deleted first.

#[cfg(unix)]
mod unix {
    use std::sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    };

    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
        low_level::emulate_default_handler,
    };

    use crate::output;

    static ENDING: AtomicBool = AtomicBool::new(false);
    static KEPT: AtomicBool = AtomicBool::new(false);
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    static AT_FIRST: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(None);

    /// The next interrupt or request to end does this, and ends nothing: that is left to the one after it.
    #[cfg(feature = "serve")]
    pub(crate) fn at_first(ask: impl FnOnce() + Send + 'static) {
        *AT_FIRST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(ask));
    }

    /// From now on an interrupt ends nothing: [`interrupted`] tells of it.
    pub(crate) fn keep_interrupts() {
        KEPT.store(true, Ordering::SeqCst);
    }

    /// Whether there was an interrupt since this was asked last.
    pub(crate) fn interrupted() -> bool {
        INTERRUPTED.swap(false, Ordering::SeqCst)
    }

    /// From now on an interrupt or a request to end deletes what is unfinished, and ends the process as it would have ended
    /// without. What is being published at that moment is published first.
    pub(crate) fn clean_up_when_asked_to_end() {
        // Where no handler can be set, what stays behind is found by the next run.
        let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else { return };
        std::thread::spawn(move || {
            for signal in signals.forever() {
                if signal == SIGINT && KEPT.load(Ordering::SeqCst) {
                    INTERRUPTED.store(true, Ordering::SeqCst);
                    continue;
                }
                if let Some(ask) = AT_FIRST.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    ask();
                    continue;
                }
                ENDING.store(true, Ordering::SeqCst);
                for path in bsbr_convert::discard_unfinished() {
                    output::say(&format!("interrupted: {} is deleted", path.display()));
                }
                if emulate_default_handler(signal).is_err() {
                    std::process::exit(128 + signal);
                }
            }
        });
    }

    /// Waits for the end if it is near: an error then is one of files that were deleted on purpose.
    pub(crate) fn wait_if_ending() {
        while ENDING.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
}

#[cfg(not(unix))]
mod unix {
    pub(crate) fn clean_up_when_asked_to_end() {}

    pub(crate) fn wait_if_ending() {}

    pub(crate) fn keep_interrupts() {}

    #[cfg(feature = "serve")]
    pub(crate) fn at_first(_: impl FnOnce() + Send + 'static) {}

    pub(crate) fn interrupted() -> bool {
        false
    }
}

#[cfg(feature = "serve")]
pub(crate) use unix::at_first;
pub(crate) use unix::{clean_up_when_asked_to_end, interrupted, keep_interrupts, wait_if_ending};
