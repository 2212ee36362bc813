//! The index by which keys are chosen.

/// Tokens of a block.
pub const BLOCK: usize = 16;
/// Tokens of a section.
pub const SECTION: usize = 64;
