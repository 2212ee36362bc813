//! The loops of a decoder on the CPU.
mod gather;
mod heads;
mod panel;
mod product;
mod select;
mod vector;

pub mod attention;

pub use heads::Heads;
