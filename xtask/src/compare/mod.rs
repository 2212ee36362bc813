//! What `cargo xtask compare` does: attention families side by side, by cost and by what they learn.
//!
//! [`cost`] times them over a sweep of lengths, with the tools of [`bsbr::harness`]; [`trained`] has them trained alike. Each
//! gives a [`part`](page::Part) of one summary page.

pub(crate) mod cost;
pub(crate) mod cost_table;
pub(crate) mod page;
pub(crate) mod plot;
pub(crate) mod report;
pub(crate) mod session;
pub(crate) mod subject;
pub(crate) mod trained;
pub(crate) mod trained_table;
