//! The loops of a decoder on the CPU.

pub mod layer;
