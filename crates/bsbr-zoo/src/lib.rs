//! Attention families as layers of one small decoder, each in a parallel form and a recurrent form that compute the same.

mod config;
mod decoder;
mod error;
mod family;
mod heads;
mod init;
mod layer;
mod mixers;
mod reads;
mod rows;
mod state;
pub mod tasks;
pub mod train;

pub use config::{DecoderConfig, Positions};
pub use decoder::SmallDecoder;
pub use error::ZooError;
pub use family::Family;
pub use reads::keys_read;
pub use state::State;
