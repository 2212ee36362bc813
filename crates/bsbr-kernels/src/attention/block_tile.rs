//! One tile of queries over sinks, the local region, chosen blocks and the means of the rest.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{
    BlockOptions, CausalOptions,
    candidates::{CandidateScratch, Means, Retrieval},
    sums::Sums,
    tile::{QueryTile, mask_positions, read, score},
};
use crate::{heads::Rows, vector};

/// What one KV head brings.
pub(super) struct Head<'a> {
    pub(super) keys: Rows<'a>,
    pub(super) values: Rows<'a>,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) sinks: Option<(Rows<'a>, Rows<'a>)>,
    pub(super) means: Option<Means<'a>>,
}

#[derive(Default)]
pub(super) struct Scratch {
    pub(super) query: Vec<f32>,
    exact: Vec<f32>,
    output: Vec<f32>,
    highest: Vec<f32>,
    sum: Vec<f32>,
    candidates: CandidateScratch,
    chosen_scores: Vec<f32>,
}

pub(super) struct BlockTile<'a, 'o> {
    pub(super) tile: &'a QueryTile<'a>,
    pub(super) head: &'a Head<'a>,
    pub(super) settings: &'a BlockOptions,
    pub(super) options: &'a CausalOptions,
    pub(super) scratch: &'a mut Scratch,
    pub(super) outputs: &'a mut [(&'o mut [f32], &'o mut [f32])],
}

/// A run of positions with their rows.
struct Run<'a> {
    positions: Range<usize>,
    keys: Rows<'a>,
    values: Rows<'a>,
}

impl WithSimd for BlockTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, head, settings, options, scratch, outputs } = self;
        let chunk = tile.start / settings.chunk_size;
        let end = tile.start + tile.tokens;
        let local_start = settings.local_start(chunk);
        let mut from = local_start;
        let mut retrieval = None;
        if let Some(blocks) = &settings.blocks {
            match settings.candidates(chunk, blocks, options) {
                Some(candidates) => retrieval = Some(Retrieval { settings, blocks, candidates, options }),
                // Every candidate is read: the exact keys are one run of positions.
                None => {
                    let first = settings.sink_tokens.max(options.first_visible(chunk * settings.chunk_size));
                    from = (first / blocks.size * blocks.size).min(local_start);
                }
            }
        }
        let runs = exact_runs(tile, head, settings, options, from..end);
        let (rows, width) = (tile.count(), head.keys.width());
        scratch.output.clear();
        scratch.output.resize(rows * width, 0.0);
        scratch.highest.clear();
        scratch.highest.resize(rows, f32::NEG_INFINITY);
        scratch.sum.clear();
        scratch.sum.resize(rows, 0.0);
        read_exactly(simd, tile, options, &runs, scratch);
        if let (Some(retrieval), Some(means)) = (retrieval, &head.means) {
            let Scratch { highest, sum, output, candidates, chosen_scores, .. } = scratch;
            let mut sums = Sums { highest, sum, output };
            retrieval.choose(simd, tile, means, candidates, &mut sums);
            retrieval.read_chosen(
                simd,
                tile,
                (head.keys, head.values),
                &mut candidates.chosen,
                chosen_scores,
                &mut sums,
            );
        }
        for (g, (output, log_mass)) in outputs.iter_mut().enumerate() {
            for token in 0..tile.tokens {
                let row = g * tile.tokens + token;
                let output = &mut output[token * width..(token + 1) * width];
                output.copy_from_slice(&scratch.output[row * width..(row + 1) * width]);
                vector::scale(simd, output, 1.0 / scratch.sum[row]);
                log_mass[token] = scratch.sum[row].ln() + scratch.highest[row];
            }
        }
    }
}

/// Sinks and the run `positions`, as far as a query of the tile may see them.
fn exact_runs<'a>(
    tile: &QueryTile<'_>,
    head: &Head<'a>,
    settings: &BlockOptions,
    options: &CausalOptions,
    positions: Range<usize>,
) -> Vec<Run<'a>> {
    let visible = options.first_visible(tile.start);
    let rows = |positions: Range<usize>| {
        let rows = positions.start - head.first..positions.end - head.first;
        Run { positions, keys: head.keys.range(rows.clone()), values: head.values.range(rows) }
    };
    let mut runs = Vec::with_capacity(2);
    let mut start = positions.start;
    let sinks = 0..settings.sink_tokens.min(positions.start);
    if sinks.end > visible {
        match head.sinks {
            Some((keys, values)) => {
                let (keys, values) = (keys.range(sinks.clone()), values.range(sinks.clone()));
                runs.push(Run { positions: sinks, keys, values });
            }
            // Sinks that touch the run are part of it.
            None if sinks.end == positions.start => start = 0,
            None => runs.push(rows(sinks)),
        }
    }
    runs.push(rows(start.max(visible)..positions.end));
    runs
}

/// Reads the runs: weights relative to the highest score so far, not yet divided by their sum.
#[inline(always)]
fn read_exactly<S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    options: &CausalOptions,
    runs: &[Run<'_>],
    scratch: &mut Scratch,
) {
    let rows = tile.count();
    let columns: usize = runs.iter().map(|run| run.positions.len()).sum();
    scratch.exact.resize(rows * columns, 0.0);
    let mut column = 0;
    for run in runs {
        score(simd, tile, run.keys, &mut scratch.exact, columns, column, options.softcap);
        mask_positions(tile, options, run.positions.clone(), &mut scratch.exact, columns, column);
        column += run.positions.len();
    }
    for row in 0..rows {
        let scores = &mut scratch.exact[row * columns..(row + 1) * columns];
        scratch.highest[row] = vector::max(simd, scores);
        scratch.sum[row] = vector::exp_sum(simd, scores, scratch.highest[row]);
    }
    let mut column = 0;
    for run in runs {
        read(simd, &scratch.exact, columns, column, rows, run.values, &mut scratch.output);
        column += run.positions.len();
    }
}
