#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! Fuzzing of everything that takes bytes from outside: files of weights, configurations, tokenizers, settings, and the
//! shapes of views.
//!
//! A [`Target`] is a function of bytes. Whatever they are, it must return, in no more than two seconds and no more than a
//! gigabyte; a panic is a fault, wherever it comes from. The [driver](drive) changes seeds, which are the test fixtures and
//! what `corpus/` keeps of earlier finds, and keeps what brings a new answer: an error that was not seen before says that
//! another place was reached, which stands in for measuring coverage and needs no other build of anything.
//!
//! ```text
//! cargo test --release --workspace --test fuzz                              # every target for a few seconds
//! cargo test --release --workspace --test fuzz -- gguf --runs 1000000 --seed 7
//! ```
//!
//! Runs are the same for the same seed. Where a fault aborts the process, `--trace` shows on which input: it is written down
//! before it runs.

mod drive;
mod mutate;
mod random;
mod targets;

pub use drive::{Fault, Limits, Report, drive, regressions};
pub use targets::{TARGETS, Target};

/// The examples of the repository's first page, which no published package holds.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct FirstPage;
