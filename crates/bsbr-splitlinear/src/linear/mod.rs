//! Linear layers made of parts, as burn modules.

mod pivots;
mod share;
mod split;
mod tap;

pub use pivots::Pivots;
pub use share::{Factors, ShareLinear, ShareState};
pub use split::{Run, SplitLinear};
pub use tap::Tap;
