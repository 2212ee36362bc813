//! What each token of a tile chooses among its candidates.

use pulp::Simd;

use super::{
    candidates::{CandidateScratch, Candidates, Means, Retrieval},
    readers::{Readers, Runs},
    sums::Sums,
    tile::{HIDDEN, LOWEST_SCORE, QueryTile, read, score},
};
use crate::{heads::Rows, select, vector};

impl Retrieval<'_> {
    /// The block in a column of the block masses of a token that opened the distant sections `opened`.
    #[inline(always)]
    fn block(&self, column: usize, opened: &[u32]) -> usize {
        let fine = self.candidates.fine.len();
        if column < fine {
            return self.candidates.fine.start + column;
        }
        let (slot, within) = ((column - fine) / self.per_section(), (column - fine) % self.per_section());
        (self.candidates.distant.start + opened[slot] as usize) * self.per_section() + within
    }

    /// Chooses blocks for each token, leaves them in `scratch.chosen` and brings what is not chosen into the sums. `radii`
    /// are those of blocks and of sections.
    #[inline(always)]
    pub(super) fn choose<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        means: &Means<'_>,
        radii: (Option<Rows<'_>>, Option<Rows<'_>>),
        scratch: &mut CandidateScratch,
        sums: &mut Sums<'_>,
    ) {
        let (rows, far) = (tile.count(), self.blocks.far);
        let Candidates { distant, fine } = self.candidates.clone();
        let most_opened = if distant.is_empty() { 0 } else { self.blocks.top_sections };
        let columns = fine.len() + most_opened * self.per_section();
        scratch.blocks.resize(rows * columns, 0.0);
        let fine_keys = means.blocks.0.range(fine.clone());
        score(simd, tile, fine_keys, &mut scratch.blocks, columns, 0, self.options.softcap);
        let size = self.blocks.size;
        self.finish_masses(tile, &mut scratch.blocks, columns, fine.clone(), size);
        if let (Some((section_keys, _)), false) = (means.sections, distant.is_empty()) {
            let keys = section_keys.range(distant.clone());
            scratch.distant.resize(rows * distant.len(), 0.0);
            score(simd, tile, keys, &mut scratch.distant, distant.len(), 0, self.options.softcap);
            self.finish_masses(tile, &mut scratch.distant, distant.len(), distant.clone(), self.blocks.section_size);
        }
        self.find_reach(simd, tile, radii, columns, scratch);
        scratch.shifts.clear();
        let exact = sums.highest.iter().zip(&*sums.sum);
        // A share of the whole can be too small for an f32; its logarithm is not. What is hidden stays so in a text of NaN.
        let shift = exact.map(|(highest, sum)| -(highest + sum.max(f32::MIN_POSITIVE).ln()));
        // The masses hold the shift of what counts by its means, which a choice leaves out.
        let shift = shift.map(|shift| shift - self.blocks.far_shift);
        scratch.shifts.extend(shift.map(|shift| if shift < -LOWEST_SCORE { shift } else { 0.0 }));
        self.open(simd, tile, means, radii.0, columns, scratch);
        scratch.chosen.clear();
        for token in 0..tile.tokens {
            self.choose_for(simd, tile, token, (columns, radii.0.is_some()), scratch);
            if far {
                self.weigh(simd, tile, token, columns, scratch, sums);
            }
        }
        if !far {
            return;
        }
        let output = &mut *sums.output;
        read(simd, &scratch.blocks, columns, 0, rows, means.blocks.1.range(fine.clone()), output);
        if let (Some((_, section_values)), false) = (means.sections, distant.is_empty()) {
            let values = section_values.range(distant.clone());
            read(simd, &scratch.distant, distant.len(), 0, rows, values, output);
            let CandidateScratch { opened, blocks, .. } = scratch;
            opened.read(simd, tile, &self.opened_runs(means.blocks.1, tile.tokens, columns), blocks, output);
        }
    }

    /// What the radii add to the scores of fine blocks and distant sections.
    #[inline(always)]
    fn find_reach<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        (radii, section_radii): (Option<Rows<'_>>, Option<Rows<'_>>),
        columns: usize,
        scratch: &mut CandidateScratch,
    ) {
        let Some(radii) = radii else { return };
        let Candidates { distant, fine } = &self.candidates;
        let CandidateScratch { magnitudes, reach, distant_reach, .. } = scratch;
        magnitudes.resize(tile.rows.len(), 0.0);
        vector::magnitudes(simd, tile.rows, self.blocks.reach, magnitudes);
        let tile = QueryTile { rows: magnitudes, ..*tile };
        reach.resize(tile.count() * columns, 0.0);
        score(simd, &tile, radii.range(fine.clone()), reach, columns, 0, None);
        if let (Some(radii), false) = (section_radii, distant.is_empty()) {
            distant_reach.resize(tile.count() * distant.len(), 0.0);
            score(simd, &tile, radii.range(distant.clone()), distant_reach, distant.len(), 0, None);
        }
    }

    /// The blocks of opened sections as runs of rows, scored behind the fine blocks of each row.
    fn opened_runs<'b>(
        &self,
        rows: Rows<'b>,
        tokens: usize,
        columns: usize,
    ) -> Runs<'b, impl Fn(u32) -> usize + use<>, impl Fn(&Readers, usize, usize, usize) -> usize + use<>> {
        let (per_section, fine, first) =
            (self.per_section(), self.candidates.fine.len(), self.candidates.distant.start);
        Runs {
            rows,
            size: per_section,
            first: move |section| (first + section as usize) * per_section,
            place: move |opened: &Readers, g, token, place: usize| {
                (g * tokens + token) * columns + fine + (place - opened.places(token).start) * per_section
            },
        }
    }

    /// The sections each token opens, with the masses of their blocks and what the radii add to them.
    #[inline(always)]
    fn open<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        means: &Means<'_>,
        radii: Option<Rows<'_>>,
        columns: usize,
        scratch: &mut CandidateScratch,
    ) {
        let Candidates { distant, fine } = &self.candidates;
        scratch.opened.clear();
        if distant.is_empty() {
            return;
        }
        let count = distant.len();
        for token in 0..tile.tokens {
            let CandidateScratch { scores, contest, choice, distant: masses, distant_reach, shifts, opened, .. } =
                scratch;
            let reach = radii.is_some().then_some(&distant_reach[..]);
            combine(simd, tile, token, count, masses, reach, shifts, scores);
            select::largest(simd, scores, self.blocks.top_sections, LOWEST_SCORE, contest, choice);
            opened.push_all(choice.iter().copied());
        }
        scratch.opened.sort(count);
        let CandidateScratch { opened, blocks, reach, magnitudes, .. } = scratch;
        opened.score(simd, tile, &self.opened_runs(means.blocks.0, tile.tokens, columns), blocks);
        if let Some(radii) = radii {
            let tile = QueryTile { rows: magnitudes, ..*tile };
            opened.score(simd, &tile, &self.opened_runs(radii, tile.tokens, columns), reach);
        }
        let per_section = self.per_section();
        for row in 0..tile.count() {
            let token = row % tile.tokens;
            let masses = &mut blocks[row * columns + fine.len()..(row + 1) * columns];
            let used = opened.of(token).len() * per_section;
            masses[used..].fill(HIDDEN);
            if radii.is_some() {
                // Nothing was written there, and what an earlier tile left may be anything.
                reach[row * columns + fine.len() + used..(row + 1) * columns].fill(0.0);
            }
            if let Some(cap) = self.options.softcap {
                vector::softcap(simd, &mut masses[..used], cap);
            }
            for (&section, masses) in opened.of(token).iter().zip(masses.chunks_exact_mut(per_section)) {
                let first = (distant.start + section as usize) * per_section;
                self.finish_row(tile, row, masses, first..first + per_section, self.blocks.size);
            }
        }
    }

    /// What one token reads exactly, into `scratch.chosen`, and the columns of it in `scratch.choice`.
    #[inline(always)]
    fn choose_for<S: Simd>(
        &self,
        simd: S,
        tile: &QueryTile<'_>,
        token: usize,
        (columns, reaching): (usize, bool),
        scratch: &mut CandidateScratch,
    ) {
        let CandidateScratch { scores, contest, choice, blocks, reach, shifts, opened, chosen, .. } = scratch;
        let reach = reaching.then_some(&reach[..]);
        combine(simd, tile, token, columns, blocks, reach, shifts, scores);
        select::largest(simd, scores, self.blocks.top_k, LOWEST_SCORE, contest, choice);
        let opened: &[u32] = if self.candidates.distant.is_empty() { &[] } else { opened.of(token) };
        chosen.push_all(choice.iter().map(|&column| self.block(column as usize, opened) as u32));
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
