//! Which vector instructions the attention loops use.

use std::sync::atomic::{AtomicU8, Ordering};

use pulp::Arch;

/// Vector instructions, the fewest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// None: one number at a time.
    Scalar,
    /// AVX2 with fused multiplication and addition, where the processor has it.
    Avx2,
    /// The best the processor has.
    Best,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Best as u8);

/// Keeps the attention loops of this process from using more than `level`, so that a machine can test what others run.
pub fn limit_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// The level that loops may use at most.
pub(crate) fn limit() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        level if level == Level::Scalar as u8 => Level::Scalar,
        level if level == Level::Avx2 as u8 => Level::Avx2,
        _ => Level::Best,
    }
}

/// What the attention loops use.
pub(crate) fn arch() -> Arch {
    let level = LEVEL.load(Ordering::Relaxed);
    if level == Level::Scalar as u8 {
        return Arch::Scalar;
    }
    #[cfg(target_arch = "x86_64")]
    if level == Level::Avx2 as u8
        && let Some(simd) = pulp::x86::V3::try_new()
    {
        return Arch::V3(simd);
    }
    Arch::new()
}
