//! Which code computes attention.

/// The code that computes attention; all of it computes the same function.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Kernel {
    /// A fused kernel where there is one for the device and the settings, plain tensor operations elsewhere.
    #[default]
    Fastest,
    /// Always plain tensor operations.
    Plain,
}
