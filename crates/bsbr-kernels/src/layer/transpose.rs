//! Squares of numbers, transposed in registers where the processor has enough of them.
#![allow(unsafe_code)]

use pulp::Arch;

/// Numbers to a side: as many as are in a cache line.
pub(super) const SIDE: usize = 16;

pub(super) type Square = [[f32; SIDE]; SIDE];

/// The transpose. To be called in code that is compiled for `arch`.
#[inline(always)]
pub(super) fn transposed(arch: Arch, rows: &Square) -> Square {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(simd) => in_registers(simd, rows),
        _ => {
            let mut columns = [[0.0; SIDE]; SIDE];
            for (at, column) in columns.iter_mut().enumerate() {
                for (x, row) in column.iter_mut().zip(rows) {
                    *x = row[at];
                }
            }
            columns
        }
    }
}

/// Pairs of rows, then pairs of pairs, until quarters of registers hold four rows of one column; these are then sorted.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn in_registers(simd: pulp::x86::V4, rows: &Square) -> Square {
    use std::arch::x86_64::__m512;
    let avx = simd.avx512f;
    let unpack = |a: __m512, b: __m512| [avx._mm512_unpacklo_ps(a, b), avx._mm512_unpackhi_ps(a, b)];
    let unpack_pairs = |a: __m512, b: __m512| {
        let (a, b) = (avx._mm512_castps_pd(a), avx._mm512_castps_pd(b));
        [avx._mm512_unpacklo_pd(a, b), avx._mm512_unpackhi_pd(a, b)].map(|x| avx._mm512_castpd_ps(x))
    };
    // Quarters 0 and 2, and 1 and 3, of both.
    let even = |a: __m512, b: __m512| avx._mm512_shuffle_f32x4::<0x88>(a, b);
    let odd = |a: __m512, b: __m512| avx._mm512_shuffle_f32x4::<0xdd>(a, b);

    // SAFETY: both are 64 bytes that any numbers may stand in.
    let rows: [__m512; SIDE] = rows.map(|row| unsafe { std::mem::transmute::<[f32; SIDE], __m512>(row) });
    let mut fours = rows;
    for (fours, rows) in fours.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let ([a, b], [c, d]) = (unpack(rows[0], rows[1]), unpack(rows[2], rows[3]));
        let ([a, b], [c, d]) = (unpack_pairs(a, c), unpack_pairs(b, d));
        *fours = [a, b, c, d];
    }
    let mut columns = rows;
    for at in 0..4 {
        let (a, b) = (even(fours[at], fours[4 + at]), odd(fours[at], fours[4 + at]));
        let (c, d) = (even(fours[8 + at], fours[12 + at]), odd(fours[8 + at], fours[12 + at]));
        columns[at] = even(a, c);
        columns[4 + at] = even(b, d);
        columns[8 + at] = odd(a, c);
        columns[12 + at] = odd(b, d);
    }
    // SAFETY: as above.
    columns.map(|column| unsafe { std::mem::transmute::<__m512, [f32; SIDE]>(column) })
}

#[cfg(test)]
mod tests {
    use pulp::{Simd, WithSimd};

    use super::*;
    use crate::layer::level::levels;

    #[test]
    fn rows_become_columns_at_every_level() {
        struct Run(Arch, Square);
        impl WithSimd for Run {
            type Output = Square;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> Square {
                transposed(self.0, &self.1)
            }
        }
        for arch in levels() {
            let square: Square = std::array::from_fn(|row| std::array::from_fn(|column| (100 * row + column) as f32));
            let found = arch.dispatch(Run(arch, square));
            for (row, numbers) in found.iter().enumerate() {
                for (column, &x) in numbers.iter().enumerate() {
                    assert_eq!(x, (100 * column + row) as f32, "{arch:?}");
                }
            }
        }
    }
}
