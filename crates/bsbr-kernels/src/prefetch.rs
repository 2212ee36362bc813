//! Asking for memory before it is needed.
#![allow(unsafe_code)]

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Starts to bring numbers into the cache. Blocks lie anywhere in a long text: each would otherwise be waited for.
#[inline(always)]
pub(crate) fn prefetch<T>(numbers: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let bytes = size_of_val(numbers);
        let mut at = 0;
        while at < bytes {
            // SAFETY: the address is inside the slice. (A prefetch reads nothing that the program sees and never faults.)
            unsafe { _mm_prefetch::<_MM_HINT_T0>(numbers.as_ptr().cast::<i8>().add(at)) };
            at += LINE;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}
