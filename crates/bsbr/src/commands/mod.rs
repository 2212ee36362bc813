//! One module for each command.

pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod inspect;
#[cfg(feature = "serve")]
pub(crate) mod serve;
pub(crate) mod split;
pub(crate) mod tune;
pub(crate) mod verify;
