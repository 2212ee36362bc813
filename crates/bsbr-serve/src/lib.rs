#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! [`Engine`] runs a decoder on a thread of its own and continues many texts at once; [`Server`] puts OpenAI's API before it.
//! Either can be used without a command line; the engine also without HTTP.

mod config;
mod engine;
mod error;
mod http;

pub use config::{EngineConfig, HttpConfig};
pub use engine::{Counts, Ended, Ending, Engine, Event, Request, ScoreBias, TokenScore};
pub use error::{Refusal, ServeError};
pub use http::{Chat, Model, Server, StopHandle, serve};
