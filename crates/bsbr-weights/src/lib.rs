#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! - [`Format`] names a number format, its blocks and their bytes.
//! - [`Matrix`] views weights `[outputs, inputs]` in one of them, [`StoredMatrix`] owns them or keeps what owns them.
//! - [`decode`] says what numbers a block means: the definition that every faster loop is tested against.
//! - [`encode`] gives the blocks of numbers, [`first_not_finite`] finds what no weight may be.
//!
//! It computes nothing with weights, opens no file and knows no tensor framework.

mod decode;
mod encode;
mod finite;
mod format;
mod matrix;

pub use decode::{Group, TWICE_E2M1, decode, e4m3, half_e8m0};
pub use encode::{EncodeError, encode};
pub use finite::first_not_finite;
pub use format::{Arithmetic, Format};
pub use matrix::{LayoutError, Matrix, StoredMatrix};
