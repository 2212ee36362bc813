//! What the processor can do.

use pulp::{Arch, Simd, WithSimd};

/// Numbers handled by one task where an operation goes over them one by one: enough that handing it over costs little.
pub(super) const TASK: usize = 1 << 14;

/// Width and number of the registers of a level.
pub(super) fn registers(arch: Arch) -> (usize, usize) {
    struct Ask;
    impl WithSimd for Ask {
        type Output = (usize, usize);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            (S::F32_LANES, S::REGISTER_COUNT)
        }
    }
    arch.dispatch(Ask)
}

/// Every level this processor has, the best last.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Arch> {
    let mut levels = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(pulp::x86::V3::try_new().map(Arch::V3));
        levels.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    levels
}
