//! Writing a directory all at once: the old content or the new one, whatever happens meanwhile.
//!
//! A directory that does not exist is written beside its place, under a name of its own, and renamed. One that holds an earlier
//! result trades places with the new one in a single step where the file system can do that. An empty directory is filled: it
//! may be a mount point, the directory a shell stands in, or what a link leads to. Its files are complete, in a directory
//! within it, before the first of them moves; the one that makes it what it is moves last.
//!
//! Whoever writes holds a lock of the operating system, which ends with the process. So what is found under the names used
//! here, and held by nobody, was left by a run that was interrupted: it is finished, put back or removed by the next one.
//!
//! - [`prepare_output`] looks whether a directory can be written, before anything that takes long;
//! - [`Staging`] writes it, and looks again before it publishes;
//! - [`ScratchDir`] is a place for files of a while, removed likewise;
//! - [`discard_unfinished`] is for the last moment of a process that is asked to end.

mod check;
mod lock;
mod place;
mod recover;
mod scratch;
mod staging;
mod unfinished;

pub use check::OutputKind;
pub use recover::prepare_output;
pub use scratch::ScratchDir;
pub use unfinished::discard_unfinished;

pub(crate) use check::Replaceable;
pub(crate) use recover::refuse_unfinished;
pub(crate) use staging::Staging;
