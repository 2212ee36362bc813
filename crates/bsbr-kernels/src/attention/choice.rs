//! What each token of a tile chooses among its candidates.

use pulp::Simd;

use super::{
    candidates::{CandidateScratch, Level, LevelScratch, Means, Retrieval},
    readers::{Readers, Runs},
    sums::Sums,
    tile::{HIDDEN, LOWEST_SCORE, QueryTile, read, score},
};
use crate::{heads::Rows, select, stored::StoredRows, vector};

impl Retrieval<'_> {
    /// Chooses blocks for each token, leaves them in `scratch.chosen` and brings what is not chosen into the sums. `means` are
    /// those of each level.
    #[inline(always)]
    pub(super) fn choose<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        means: &[Means<'_>],
        scratch: &mut CandidateScratch,
        sums: &mut Sums<'_>,
    ) {
        scratch.shifts.clear();
        let exact = sums.highest.iter().zip(&*sums.sum);
        // A share of the whole can be too small for an f32; its logarithm is not. What is hidden stays so in a text of NaN.
        let shift = exact.map(|(highest, sum)| -(highest + sum.max(f32::MIN_POSITIVE).ln()));
        // The masses hold the shift of what counts by its means, which a choice leaves out.
        let shift = shift.map(|shift| shift - self.blocks.far_shift);
        scratch.shifts.extend(shift.map(|shift| if shift < -LOWEST_SCORE { shift } else { 0.0 }));
        if means[0].radii.is_some() {
            scratch.magnitudes.resize(tile.rows.len(), 0.0);
            vector::magnitudes(simd, tile.rows, self.blocks.reach, &mut scratch.magnitudes);
        }
        if scratch.levels.len() < self.levels.len() {
            scratch.levels.resize_with(self.levels.len(), LevelScratch::default);
        }
        // From the longest runs down: what is opened decides which of the shorter ones are scored.
        for at in (0..self.levels.len()).rev() {
            let CandidateScratch { levels, magnitudes, .. } = scratch;
            self.score_level(simd, tile, at, &means[at], magnitudes, &mut levels[at]);
            self.choose_in_level(simd, tile, at, scratch, sums);
        }
        if !self.blocks.far {
            return;
        }
        let rows = tile.count();
        for ((level, means), scratch) in self.levels.iter().zip(means).zip(&mut scratch.levels) {
            let LevelScratch { masses, opened, .. } = scratch;
            let columns = level.columns();
            read(simd, masses, columns, 0, rows, means.values.range(level.direct.clone()), sums.output);
            if level.opened > 0 {
                opened.read(simd, tile, &opened_runs(level, means.values, tile.tokens), masses, sums.output);
            }
        }
    }

    /// Scores of the mean keys of one level, and what their radii add to them.
    #[inline(always)]
    fn score_level<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        at: usize,
        means: &Means<'_>,
        magnitudes: &[f32],
        scratch: &mut LevelScratch,
    ) {
        let (level, rows) = (&self.levels[at], tile.count());
        let (columns, direct) = (level.columns(), level.direct.clone());
        let LevelScratch { masses, reach, opened } = scratch;
        masses.resize(rows * columns, 0.0);
        reach.resize(if means.radii.is_some() { rows * columns } else { 0 }, 0.0);
        score(simd, tile, means.keys.range(direct.clone()), masses, columns, 0, self.options.softcap);
        let magnitude_tile = QueryTile { rows: magnitudes, ..*tile };
        if let Some(radii) = means.radii {
            score(simd, &magnitude_tile, radii.range(direct.clone()), reach, columns, 0, None);
        }
        if level.opened > 0 {
            opened.score(simd, tile, &opened_runs(level, means.keys, tile.tokens), masses);
            if let Some(radii) = means.radii {
                opened.score(simd, &magnitude_tile, &opened_runs(level, radii, tile.tokens), reach);
            }
        }
    }

    /// Scores of mean keys in one row become log-masses.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, tile: &QueryTile<'_>, row: usize, at: usize, scratch: &mut LevelScratch) {
        let level = &self.levels[at];
        let (columns, direct) = (level.columns(), level.direct.clone());
        let LevelScratch { masses, reach, opened } = scratch;
        let (near, behind) = masses[row * columns..(row + 1) * columns].split_at_mut(direct.len());
        self.finish_row(tile, row, near, direct.clone(), level.size);
        if level.opened == 0 {
            return;
        }
        let opened = opened.of(row % tile.tokens);
        let used = opened.len() * level.per_opened;
        behind[used..].fill(HIDDEN);
        if !reach.is_empty() {
            // Nothing was written there, and what an earlier tile left may be anything.
            reach[row * columns + direct.len() + used..(row + 1) * columns].fill(0.0);
        }
        if let Some(cap) = self.options.softcap {
            vector::softcap(simd, &mut behind[..used], cap);
        }
        for (&run, masses) in opened.iter().zip(behind.chunks_exact_mut(level.per_opened)) {
            let first = run as usize * level.per_opened;
            self.finish_row(tile, row, masses, first..first + level.per_opened, level.size);
        }
    }

    /// What each token chooses of one level: blocks into `scratch.chosen`, longer runs as opened of the level below. What it
    /// chose no longer counts by its means; after the blocks, the rest of all levels is weighed. All that while the masses of a
    /// token are at hand.
    #[inline(always)]
    fn choose_in_level<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        at: usize,
        scratch: &mut CandidateScratch,
        sums: &mut Sums<'_>,
    ) {
        let CandidateScratch { levels, scores, contest, choice, shifts, chosen, .. } = scratch;
        let level = &self.levels[at];
        let columns = level.columns();
        let (below, rest) = levels.split_at_mut(at);
        let reaching = !rest[0].reach.is_empty();
        let target = below.last_mut().map_or(chosen, |below| &mut below.opened);
        target.clear();
        for token in 0..tile.tokens {
            let rows = (0..tile.group).map(|g| g * tile.tokens + token);
            let own = &mut rest[0];
            for row in rows.clone() {
                self.finish(simd, tile, row, at, own);
            }
            let of_token = if tile.group == 1 && !reaching {
                // One shift for all of them changes no choice.
                &own.masses[token * columns..(token + 1) * columns]
            } else {
                let reach = reaching.then_some(&own.reach[..]);
                combine(simd, tile, token, columns, &own.masses, reach, shifts, scores);
                &scores[..]
            };
            select::largest(simd, of_token, level.chosen, LOWEST_SCORE, contest, choice);
            let opened: &[u32] = if level.opened > 0 { own.opened.of(token) } else { &[] };
            target.push_all(choice.iter().map(|&column| level.run(column as usize, opened) as u32));
            if self.blocks.far {
                self.hide_read(tile, token, level, choice, own);
                if at == 0 {
                    // Not `for_each`: a closure is not compiled for the wide registers.
                    for row in rows {
                        self.weigh(simd, row, rest, sums);
                    }
                }
            }
        }
        target.sort(level.direct.end);
    }
}

/// The runs of `level` in opened ones of the next, as runs of rows, scored behind the direct ones of each row.
fn opened_runs<'b>(
    level: &Level,
    rows: Rows<'b>,
    tokens: usize,
) -> Runs<'b, impl Fn(u32) -> usize + use<>, impl Fn(&Readers, usize, usize, usize) -> usize + use<>> {
    let (per_opened, direct, columns) = (level.per_opened, level.direct.len(), level.columns());
    Runs {
        rows: StoredRows::F32(rows),
        size: per_opened,
        first: move |run| run as usize * per_opened,
        place: move |opened: &Readers, g, token, place: usize| {
            (g * tokens + token) * columns + direct + (place - opened.places(token).start) * per_opened
        },
    }
}

/// The scores of one token, over all heads of the group: the highest of mass, reach and the shift of the head.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn combine<S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    token: usize,
    columns: usize,
    masses: &[f32],
    reach: Option<&[f32]>,
    shifts: &[f32],
    scores: &mut Vec<f32>,
) {
    scores.clear();
    scores.resize(columns, f32::NEG_INFINITY);
    for row in (0..tile.group).map(|g| g * tile.tokens + token) {
        let range = row * columns..(row + 1) * columns;
        match reach {
            Some(reach) => vector::max_sum(simd, &masses[range.clone()], &reach[range], shifts[row], scores),
            None => vector::max_shifted(simd, &masses[range], shifts[row], scores),
        }
    }
}
