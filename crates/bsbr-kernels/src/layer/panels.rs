//! Rows of numbers, transposed in strips of a few tokens: the form that linear maps read and write.

use std::{ops::Range, sync::OnceLock};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    level::{TASK, registers},
    norm::RowNorm,
    scratch::Scratch,
    transpose::{SIDE, transposed},
    weights::{
        bf16::StripPairs,
        int8::{TokenCodes, strips::StripCodes},
    },
};

/// Numbers of some tokens where they lie in memory: token `t` has `groups` runs of `group_width` numbers, run `g` at
/// `t * token_stride + g * group_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Everything.
    pub data: &'a [f32],
    /// Tokens.
    pub tokens: usize,
    /// From one token to the next.
    pub token_stride: usize,
    /// Runs of a token.
    pub groups: usize,
    /// From one run to the next.
    pub group_stride: usize,
    /// Numbers of a run.
    pub group_width: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `width` numbers, one after the other.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        let tokens = data.len() / width;
        Self { data, tokens, token_stride: width, groups: 1, group_stride: width, group_width: width }
    }

    /// Numbers of a token.
    ///
    /// # Panics
    ///
    /// If the runs reach beyond the data, or all of them are more numbers than can be counted.
    fn checked_width(&self) -> usize {
        let Self { tokens, groups, group_width, .. } = *self;
        let Some(width) = groups.checked_mul(group_width) else { panic!("{groups} runs of {group_width} numbers") };
        assert!(tokens.checked_mul(width).is_some(), "{tokens} tokens of {width} numbers");
        if tokens > 0 && width > 0 {
            let far = |count: usize, stride: usize| (count - 1).checked_mul(stride);
            let last = far(tokens, self.token_stride)
                .zip(far(groups, self.group_stride))
                .and_then(|(token, group)| token.checked_add(group)?.checked_add(group_width));
            let fits = last.is_some_and(|last| last <= self.data.len());
            assert!(fits, "{tokens} tokens of {groups} x {group_width} numbers reach past {}", self.data.len());
        }
        width
    }

    /// Copies token `token` to `row`.
    fn copy(&self, token: usize, row: &mut [f32]) {
        for (group, run) in row.chunks_exact_mut(self.group_width.max(1)).enumerate() {
            let start = token * self.token_stride + group * self.group_stride;
            run.copy_from_slice(&self.data[start..start + self.group_width]);
        }
    }
}

/// How tokens are packed. It decides the order in which a linear map sums: what is made of a token is the same, bit for bit,
/// whichever others are packed with it in the same way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Packing {
    /// As rows where they are few, in strips where they are many.
    #[default]
    ByNumber,
    /// As rows, however many there are.
    Rows,
    /// In strips, however few there are.
    Strips,
}

impl Packing {
    /// What becomes of so many tokens by their number.
    pub fn of(tokens: usize) -> Self {
        Self::of_at(Arch::new(), tokens)
    }

    fn of_at(arch: Arch, tokens: usize) -> Self {
        if lanes_for(arch, tokens) == 1 { Self::Rows } else { Self::Strips }
    }

    fn lanes(self, arch: Arch, tokens: usize) -> usize {
        match (self, lanes_for(arch, tokens)) {
            (Self::Rows, _) => 1,
            // Two where a register holds one number: a strip of one would be rows again.
            (Self::Strips, 1) => registers(arch).0.max(2),
            // A strip sums in the same order whatever its width.
            (Self::ByNumber | Self::Strips, own) => own,
        }
    }
}

/// `[tokens, width]` in strips of `lanes` tokens, each strip `[width, lanes]`. The last strip may hold fewer tokens;
/// its other lanes mean nothing.
#[derive(Debug)]
pub struct Panels {
    pub(super) data: Scratch,
    tokens: usize,
    width: usize,
    lanes: usize,
    pub(super) arch: Arch,
    shorter: Shorter,
}

/// The same numbers in fewer bits, made where a map asks for them.
#[derive(Debug, Default)]
struct Shorter {
    /// Rows in 8 bits.
    codes: OnceLock<TokenCodes>,
    /// Strips in 8 bits.
    strip_codes: OnceLock<StripCodes>,
    /// Strips in bf16.
    strip_pairs: OnceLock<StripPairs>,
}

impl Panels {
    /// From rows, normalised on the way if wanted.
    ///
    /// # Panics
    ///
    /// If the rows reach past their data or the norm is of another width.
    pub fn pack(rows: Rows<'_>, norm: Option<&RowNorm<'_>>) -> Self {
        Self::pack_at(Arch::new(), rows, norm)
    }

    /// From rows that are packed in this way.
    ///
    /// # Panics
    ///
    /// As [`Panels::pack`].
    pub fn pack_as(rows: Rows<'_>, norm: Option<&RowNorm<'_>>, packing: Packing) -> Self {
        let arch = Arch::new();
        Self::pack_lanes(arch, rows, norm, packing.lanes(arch, rows.tokens))
    }

    /// From some rows of a text of `tokens`, packed as all of them would be.
    #[cfg(test)]
    pub(super) fn pack_among_at(arch: Arch, rows: Rows<'_>, tokens: usize) -> Self {
        Self::pack_lanes(arch, rows, None, Packing::of_at(arch, tokens).lanes(arch, rows.tokens))
    }

    pub(super) fn pack_at(arch: Arch, rows: Rows<'_>, norm: Option<&RowNorm<'_>>) -> Self {
        Self::pack_lanes(arch, rows, norm, lanes_for(arch, rows.tokens))
    }

    fn pack_lanes(arch: Arch, rows: Rows<'_>, norm: Option<&RowNorm<'_>>, lanes: usize) -> Self {
        struct Run<'a> {
            rows: Rows<'a>,
            norm: Option<&'a RowNorm<'a>>,
            first: usize,
            lanes: usize,
            panel: &'a mut [f32],
            arch: Arch,
        }
        impl WithSimd for Run<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let width = self.panel.len() / self.lanes;
                // Rows a power of two apart would share the same few lines of the cache.
                let apart = width + SIDE;
                let mut gathered = Scratch::new(SIDE * apart);
                for lane in (0..self.lanes).step_by(SIDE) {
                    let lanes = SIDE.min(self.lanes - lane);
                    for (at, row) in gathered.chunks_exact_mut(apart).take(lanes).enumerate() {
                        let row = &mut row[..width];
                        let token = self.first + lane + at;
                        if token >= self.rows.tokens {
                            row.fill(0.0);
                            continue;
                        }
                        self.rows.copy(token, row);
                        if let Some(norm) = self.norm {
                            norm.apply(simd, row);
                        }
                    }
                    let squares = if lanes == SIDE { width / SIDE } else { 0 };
                    for at in (0..squares * SIDE).step_by(SIDE) {
                        let mut square = [[0.0; SIDE]; SIDE];
                        for (row, numbers) in square.iter_mut().zip(gathered.chunks_exact(apart)) {
                            row.copy_from_slice(&numbers[at..at + SIDE]);
                        }
                        let lines = self.panel[at * self.lanes..].chunks_exact_mut(self.lanes);
                        for (line, column) in lines.zip(&transposed(self.arch, &square)) {
                            line[lane..lane + SIDE].copy_from_slice(column);
                        }
                    }
                    let lines = self.panel.chunks_exact_mut(self.lanes).enumerate().skip(squares * SIDE);
                    for (at, line) in lines {
                        for (token, x) in line[lane..lane + lanes].iter_mut().enumerate() {
                            *x = gathered[token * apart + at];
                        }
                    }
                }
            }
        }
        let width = rows.checked_width();
        if let Some(norm) = norm {
            norm.check(width);
        }
        let mut panels = Self::new(arch, rows.tokens, width, lanes);
        panels.data.par_chunks_mut((width * lanes).max(1)).enumerate().for_each(|(at, panel)| {
            arch.dispatch(Run { rows, norm, first: at * lanes, lanes, panel, arch });
        });
        panels
    }

    /// With whatever numbers.
    pub(super) fn new(arch: Arch, tokens: usize, width: usize, lanes: usize) -> Self {
        let size = tokens.checked_next_multiple_of(lanes).and_then(|tokens| tokens.checked_mul(width));
        let Some(size) = size else { panic!("{tokens} tokens of {width} numbers cannot be counted") };
        let data = Scratch::new(size);
        Self { data, tokens, width, lanes, arch, shorter: Shorter::default() }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers to a token.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens of a strip.
    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }

    /// All numbers, strip by strip, to be changed.
    pub(super) fn numbers_mut(&mut self) -> &mut [f32] {
        self.shorter = Shorter::default();
        &mut self.data
    }

    /// Tokens that stand as rows in 8 bits.
    pub(super) fn codes(&self) -> &TokenCodes {
        assert_eq!(self.lanes, 1, "only rows become codes");
        let rows = &self.data[..self.tokens * self.width];
        self.shorter.codes.get_or_init(|| TokenCodes::new(self.arch, rows, self.width))
    }

    /// Tokens that stand in strips in 8 bits.
    pub(super) fn strip_codes(&self) -> &StripCodes {
        let of = || StripCodes::new(self.arch, &self.data, self.width, self.lanes);
        self.shorter.strip_codes.get_or_init(of)
    }

    /// Tokens that stand in strips in bf16.
    pub(super) fn strip_pairs(&self) -> &StripPairs {
        let of = || StripPairs::new(self.arch, &self.data, self.width, self.lanes);
        self.shorter.strip_pairs.get_or_init(of)
    }

    /// The strips, each with its number of tokens.
    pub(super) fn strips(&self) -> impl Iterator<Item = (&[f32], usize)> {
        let strips = self.data.chunks_exact((self.width * self.lanes).max(1)).enumerate();
        strips.map(|(at, strip)| (strip, self.lanes.min(self.tokens - at * self.lanes)))
    }

    /// The same tokens with their numbers in another order: number `i` is number `order[i]` of before.
    ///
    /// # Panics
    ///
    /// If the order is not as long as a token is wide, or names a number that is not there.
    pub(super) fn ordered(&self, order: &[u32]) -> Self {
        assert_eq!(order.len(), self.width, "an order of {} numbers", self.width);
        let mut ordered = Self::new(self.arch, self.tokens, self.width, self.lanes);
        let (lanes, size) = (self.lanes, (self.width * self.lanes).max(1));
        let copy = |(to, from): (&mut [f32], &[f32])| {
            for (to, &number) in to.chunks_exact_mut(lanes).zip(order) {
                to.copy_from_slice(&from[number as usize * lanes..][..lanes]);
            }
        };
        if lanes == 1 {
            // So few numbers that handing them over costs more than copying them.
            ordered.data.chunks_exact_mut(size).zip(self.data.chunks_exact(size)).for_each(copy);
        } else {
            ordered.data.par_chunks_exact_mut(size).zip(self.data.par_chunks_exact(size)).for_each(copy);
        }
        ordered
    }

    /// Every number through `f`.
    pub fn each(&mut self, f: impl Fn(f32) -> f32 + Sync) {
        self.numbers_mut().par_chunks_mut(TASK).for_each(|numbers| numbers.iter_mut().for_each(|x| *x = f(*x)));
    }

    /// As rows `[tokens, width]`, written to `out`.
    ///
    /// # Panics
    ///
    /// If `out` is of another size.
    pub fn write(&self, out: &mut [f32]) {
        self.each_run(out, |out, x| out.copy_from_slice(x));
    }

    /// `factor` times the rows, added to `out` `[tokens, width]`.
    ///
    /// # Panics
    ///
    /// If `out` is of another size.
    pub fn add(&self, factor: f32, out: &mut [f32]) {
        if factor == 1.0 {
            self.each_run(out, |out, x| out.iter_mut().zip(x).for_each(|(out, x)| *out += x));
        } else {
            self.each_run(out, |out, x| out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x));
        }
    }

    fn each_run(&self, out: &mut [f32], each: impl Fn(&mut [f32], &[f32]) + Send + Sync) {
        assert_eq!(out.len(), self.tokens * self.width, "{} x {} numbers", self.tokens, self.width);
        let strips: Vec<_> = self.strips().map(|(strip, _)| strip).collect();
        let rows = out.par_chunks_mut((self.lanes * self.width).max(1));
        strips.into_par_iter().zip(rows).for_each(|(strip, rows)| {
            self.unpack(strip, 0..self.width, |token, at, run| {
                if let Some(row) = rows.get_mut(token * self.width + at..).filter(|row| !row.is_empty()) {
                    each(&mut row[..run.len()], run);
                }
            });
        });
    }

    /// Hands over columns `columns` of a strip in runs: token, first column of the run, its numbers. Tokens may be more
    /// than there are.
    pub(super) fn unpack(&self, strip: &[f32], columns: Range<usize>, mut each: impl FnMut(usize, usize, &[f32])) {
        if self.lanes == 1 {
            // A row already.
            return each(0, columns.start, &strip[columns]);
        }
        struct Run<'a, F> {
            strip: &'a [f32],
            lanes: usize,
            columns: Range<usize>,
            each: F,
            arch: Arch,
        }
        impl<F: FnMut(usize, usize, &[f32])> WithSimd for Run<'_, F> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(mut self, _: S) {
                for first in self.columns.clone().step_by(SIDE) {
                    let count = SIDE.min(self.columns.end - first);
                    let lines = &self.strip[first * self.lanes..(first + count) * self.lanes];
                    for lane in (0..self.lanes).step_by(SIDE) {
                        let tokens = SIDE.min(self.lanes - lane);
                        let mut square = [[0.0; SIDE]; SIDE];
                        for (line, numbers) in square.iter_mut().zip(lines.chunks_exact(self.lanes)) {
                            line[..tokens].copy_from_slice(&numbers[lane..lane + tokens]);
                        }
                        let rows = transposed(self.arch, &square);
                        for (token, row) in rows[..tokens].iter().enumerate() {
                            (self.each)(lane + token, first, &row[..count]);
                        }
                    }
                }
            }
        }
        self.arch.dispatch(Run { strip, lanes: self.lanes, columns, each, arch: self.arch });
    }
}

/// Tokens to a strip: as many registers as leave room for the sums of six outputs, fewer for few tokens. Tokens too few
/// to fill half a register stay rows.
fn lanes_for(arch: Arch, tokens: usize) -> usize {
    let (width, count) = registers(arch);
    if 2 * tokens <= width {
        return 1;
    }
    let most = if count >= 32 { 4 } else { 2 };
    [1, 2].into_iter().find(|&registers| registers < most && tokens <= registers * width).unwrap_or(most) * width
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{NormKind, level::levels, normalise, testing::Numbers};

    #[test]
    fn rows_come_back_as_they_were_packed() {
        let mut numbers = Numbers::new(1);
        for arch in levels() {
            for (tokens, width) in [(1, 1), (1, 70), (3, 5), (9, 33), (16, 16), (40, 17), (64, 64), (130, 50)] {
                let x = numbers.normal(tokens * width, 0.0, 1.0);
                let panels = Panels::pack_at(arch, Rows::new(&x, width), None);
                let mut out = vec![f32::NAN; x.len()];
                panels.write(&mut out);
                assert_eq!(out, x, "{arch:?} {tokens} x {width}");
                panels.add(1.0, &mut out);
                panels.add(0.5, &mut out);
                assert!(out.iter().zip(&x).all(|(out, x)| (out - 2.5 * x).abs() <= 1e-6 * x.abs()));
            }
        }
    }

    #[test]
    fn heads_that_lie_apart_are_packed_as_rows() {
        let (heads, tokens, width) = (3, 21, 8);
        let x = Numbers::new(2).normal(heads * tokens * width, 0.0, 1.0);
        let rows = Rows {
            data: &x,
            tokens,
            token_stride: width,
            groups: heads,
            group_stride: tokens * width,
            group_width: width,
        };
        let mut out = vec![0.0; x.len()];
        Panels::pack(rows, None).write(&mut out);
        for (at, &found) in out.iter().enumerate() {
            let (token, head, number) = (at / (heads * width), at / width % heads, at % width);
            assert_eq!(found, x[(head * tokens + token) * width + number]);
        }
    }

    #[test]
    fn rows_that_reach_past_their_data_or_cannot_be_counted_are_refused() {
        let data = [0.0_f32; 24];
        let whole = Rows { data: &data, tokens: 3, token_stride: 8, groups: 2, group_stride: 4, group_width: 4 };
        let refused = |rows: Rows<'_>| std::panic::catch_unwind(|| Panels::pack(rows, None)).is_err();
        let half = 1 << (usize::BITS - 1);
        assert!(!refused(whole));
        assert!(!refused(Rows { tokens: 1, token_stride: usize::MAX, ..whole }));
        assert!(!refused(Rows { group_width: 0, group_stride: usize::MAX, ..whole }));
        assert!(refused(Rows { tokens: 4, ..whole }));
        // Each of them wraps to something within the data.
        assert!(refused(Rows { token_stride: half, ..whole }));
        assert!(refused(Rows { groups: 3, group_stride: half, ..whole }));
        assert!(refused(Rows { groups: half, group_width: 2, group_stride: 0, ..whole }));
        assert!(refused(Rows { tokens: half, token_stride: 0, ..whole }));
    }

    #[test]
    fn normalised_on_the_way_is_normalised_before() {
        let mut numbers = Numbers::new(3);
        for (tokens, width) in [(1, 40), (30, 33), (100, 64)] {
            let mut x = numbers.normal(tokens * width, 1.0, 1.0);
            let weight = numbers.normal(width, 0.0, 1.0);
            let norm =
                RowNorm { kind: NormKind::Layer, epsilon: 1e-5, weight: Some(&weight), plus_one: false, bias: None };
            let mut out = vec![0.0; x.len()];
            Panels::pack(Rows::new(&x, width), Some(&norm)).write(&mut out);
            normalise(&mut x, width, &norm);
            assert_eq!(out, x);
        }
    }
}
