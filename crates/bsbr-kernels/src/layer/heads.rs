//! From the outputs of a query or key projection to heads: normalised, rotated and with the tokens of a head together.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{level::TASK, norm::RowNorm, panels::Panels};

/// Cosines and sines of some tokens, `[tokens, rotated / 2]` each: the first `rotated` numbers of a head are rotated.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// `rotated / 2`.
    pub half: usize,
    /// Number 2i turns with number 2i + 1, not number i with number `half + i`.
    pub interleaved: bool,
}

/// Which of the two comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadOrder {
    /// A head is normalised, then rotated.
    NormThenRotate,
    /// A head is rotated, then normalised.
    RotateThenNorm,
}

/// Writes `x`, `[tokens, heads * width]`, to `out` as `[heads, tokens, width]`; each head is normalised and
/// rotated, where wanted, in this `order`. Weight and bias of the norm are as wide as a head, or hold such a one for each head.
///
/// # Panics
///
/// If sizes do not fit.
pub fn write_heads(
    x: &Panels,
    width: usize,
    norm: Option<&RowNorm<'_>>,
    rotation: Option<&Rotation<'_>>,
    order: HeadOrder,
    out: &mut [f32],
) {
    struct Run<'a> {
        rows: &'a mut [f32],
        width: usize,
        norm: Option<RowNorm<'a>>,
        rotation: Option<Rotation<'a>>,
        order: HeadOrder,
        first: usize,
    }
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for (token, row) in self.rows.chunks_exact_mut(self.width).enumerate() {
                if let (Some(norm), HeadOrder::NormThenRotate) = (self.norm, self.order) {
                    norm.apply(simd, row);
                }
                if let Some(rotation) = self.rotation {
                    rotation.apply(self.first + token, row);
                }
                if let (Some(norm), HeadOrder::RotateThenNorm) = (self.norm, self.order) {
                    norm.apply(simd, row);
                }
            }
        }
    }
    let (tokens, lanes) = (x.tokens(), x.lanes());
    assert_eq!(out.len(), tokens * x.width(), "{tokens} x {} numbers", x.width());
    assert!(x.width().is_multiple_of(width), "{} numbers are not heads of {width}", x.width());
    if let Some(rotation) = rotation {
        rotation.check(tokens, width);
    }
    let parameters = |all: Option<&[f32]>| all.is_none_or(|all| all.len() == width || all.len() == x.width());
    let fits = norm.is_none_or(|norm| parameters(norm.weight) && parameters(norm.bias));
    assert!(fits, "a norm of heads has weights for one head or for each");
    let write = |(head, out): (usize, &mut [f32])| {
        let columns = head * width..(head + 1) * width;
        let of_head = |all: &'_ [f32]| if all.len() == width { 0..width } else { columns.clone() };
        let norm = norm.map(|norm| RowNorm {
            weight: norm.weight.map(|all| &all[of_head(all)]),
            bias: norm.bias.map(|all| &all[of_head(all)]),
            ..*norm
        });
        for (at, ((strip, _), rows)) in x.strips().zip(out.chunks_mut(lanes * width)).enumerate() {
            x.unpack(strip, columns.clone(), |token, column, run| {
                let start = token * width + column - columns.start;
                if let Some(numbers) = rows.get_mut(start..start + run.len()) {
                    numbers.copy_from_slice(run);
                }
            });
            if norm.is_some() || rotation.is_some() {
                x.arch.dispatch(Run { rows, width, norm, rotation: rotation.copied(), order, first: at * lanes });
            }
        }
    };
    let size = (tokens * width).max(1);
    if out.len() < TASK {
        out.chunks_mut(size).enumerate().for_each(write);
    } else {
        out.par_chunks_mut(size).enumerate().for_each(write);
    }
}

impl Rotation<'_> {
    fn check(&self, tokens: usize, width: usize) {
        assert!(self.half <= width / 2, "twice {} numbers of a head of {width} are rotated", self.half);
        for angles in [self.cos, self.sin] {
            assert_eq!(angles.len(), tokens * self.half, "angles of {tokens} tokens, {} to each", self.half);
        }
    }

    /// Turns one head of token `token`.
    #[inline(always)]
    fn apply(&self, token: usize, head: &mut [f32]) {
        let angles = token * self.half..(token + 1) * self.half;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        let rotated = &mut head[..2 * self.half];
        if self.interleaved {
            for ((pair, cos), sin) in rotated.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let [first, second] = *pair;
                *pair = [first * cos - second * sin, second * cos + first * sin];
            }
        } else {
            let (first, second) = rotated.split_at_mut(self.half);
            for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{NormKind, level::levels, panels::Rows, testing::Numbers};

    const HEADS: usize = 3;

    /// What it should be, in f64: normalised, rotated, `[heads, tokens, width]`.
    fn exact(
        x: &[f32],
        width: usize,
        norm: Option<&RowNorm<'_>>,
        rotation: Option<&Rotation<'_>>,
        order: HeadOrder,
    ) -> Vec<f64> {
        let tokens = x.len() / (HEADS * width);
        let mut out = Vec::new();
        for head in 0..HEADS {
            for token in 0..tokens {
                let start = (token * HEADS + head) * width;
                let mut row: Vec<f64> = x[start..start + width].iter().map(|&x| x as f64).collect();
                let normed = |row: &mut Vec<f64>| {
                    let Some(norm) = norm else { return };
                    let square = row.iter().map(|x| x * x).sum::<f64>() / width as f64 + norm.epsilon as f64;
                    let weight = norm.weight.unwrap();
                    let weight = if weight.len() == width { weight } else { &weight[head * width..] };
                    for (x, &weight) in row.iter_mut().zip(weight) {
                        *x *= weight as f64 / square.sqrt();
                    }
                };
                if order == HeadOrder::NormThenRotate {
                    normed(&mut row);
                }
                if let Some(rotation) = rotation {
                    for pair in 0..rotation.half {
                        let (a, b) =
                            if rotation.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, rotation.half + pair) };
                        let at = token * rotation.half + pair;
                        let (cos, sin) = (rotation.cos[at] as f64, rotation.sin[at] as f64);
                        (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
                    }
                }
                if order == HeadOrder::RotateThenNorm {
                    normed(&mut row);
                }
                out.extend(row);
            }
        }
        out
    }

    #[test]
    fn heads_are_normalised_and_rotated_as_in_f64_at_every_level() {
        let mut numbers = Numbers::new(4);
        for arch in levels() {
            for (tokens, width) in [(1, 8), (5, 6), (30, 64), (70, 20), (129, 16)] {
                let x = numbers.normal(tokens * HEADS * width, 0.0, 1.0);
                let panels = Panels::pack_at(arch, Rows::new(&x, HEADS * width), None);
                let weight = numbers.normal(HEADS * width, 1.0, 0.2);
                // The whole head and a part of it.
                for half in [width / 2, width / 4, 0] {
                    let angles = numbers.normal(tokens * half, 0.0, 3.0);
                    let cos: Vec<f32> = angles.iter().map(|angle| angle.cos()).collect();
                    let sin: Vec<f32> = angles.iter().map(|angle| angle.sin()).collect();
                    for (interleaved, weight) in
                        [(false, None), (true, None), (false, Some(&weight[..width])), (true, Some(&weight[..]))]
                    {
                        let rotation = Rotation { cos: &cos, sin: &sin, half, interleaved };
                        let rotation = (half > 0).then_some(rotation);
                        let norm = weight.map(|weight| RowNorm {
                            kind: NormKind::Rms,
                            epsilon: 1e-6,
                            weight: Some(weight),
                            plus_one: false,
                            bias: None,
                        });
                        for order in [HeadOrder::NormThenRotate, HeadOrder::RotateThenNorm] {
                            let mut out = vec![f32::NAN; x.len()];
                            write_heads(&panels, width, norm.as_ref(), rotation.as_ref(), order, &mut out);
                            let expected = exact(&x, width, norm.as_ref(), rotation.as_ref(), order);
                            for (found, expected) in out.iter().zip(expected) {
                                let error = (*found as f64 - expected).abs();
                                assert!(error <= 2e-6, "{arch:?} {tokens} x {width}: {found}, expected {expected}");
                            }
                        }
                    }
                }
            }
        }
    }
}
