//! One tile of queries over sinks, the local region, chosen keys and the means of the rest.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{
    BlockOptions, CausalOptions, Retrieved,
    retrieval::{Retrieval, RetrievalScratch},
    sums::Sums,
    tile::{QueryTile, mask_positions, read, score},
};
use crate::{index::HeadIndex, stored::StoredRows, vector};

/// What one KV head brings.
pub(super) struct Head<'a> {
    pub(super) keys: StoredRows<'a>,
    pub(super) values: StoredRows<'a>,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) sinks: Option<(StoredRows<'a>, StoredRows<'a>)>,
    pub(super) index: Option<&'a HeadIndex>,
    pub(super) near: Option<NearHead<'a>>,
}

/// What reads the local region where it stands at other positions than the rest.
pub(super) struct NearHead<'a> {
    pub(super) tile: QueryTile<'a>,
    pub(super) keys: StoredRows<'a>,
    /// Position of the first row.
    pub(super) first: usize,
}

#[derive(Default)]
pub(super) struct Scratch {
    pub(super) query: Vec<f32>,
    pub(super) near_query: Vec<f32>,
    /// Weights of the runs, one row after the other.
    pub(super) exact: Vec<f32>,
    /// Keys or values of a run that were stored in fewer bytes.
    widened: Vec<f32>,
    output: Vec<f32>,
    highest: Vec<f32>,
    sum: Vec<f32>,
    pub(super) retrieval: RetrievalScratch,
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
pub(super) struct Run<'a> {
    pub(super) positions: Range<usize>,
    pub(super) keys: StoredRows<'a>,
    pub(super) values: StoredRows<'a>,
    /// Whether the keys are for the queries of [`NearHead`].
    near: bool,
}

impl WithSimd for BlockTile<'_, '_> {
    type Output = Retrieved;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Retrieved {
        let Self { tile, head, settings, options, scratch, outputs } = self;
        let read = read_tile(simd, tile, head, settings, options, scratch, None);
        let width = head.keys.width();
        for (g, (output, log_mass)) in outputs.iter_mut().enumerate() {
            for token in 0..tile.tokens {
                let row = g * tile.tokens + token;
                let output = &mut output[token * width..(token + 1) * width];
                output.copy_from_slice(&scratch.output[row * width..(row + 1) * width]);
                vector::scale(simd, output, 1.0 / scratch.sum[row]);
                log_mass[token] = scratch.sum[row].ln() + scratch.highest[row];
            }
        }
        read.retrieved
    }
}

/// What a tile read.
pub(super) struct TileRead<'a> {
    pub(super) runs: Vec<Run<'a>>,
    pub(super) retrieval: Option<Retrieval<'a>>,
    pub(super) retrieved: Retrieved,
}

/// Everything a tile reads: weights in the scratch, relative to its `highest`, and the sums of weights and weighted values.
///
/// With the logarithms of the denominators, `log_mass`, of an earlier call the weights come out divided by them.
#[inline(always)]
pub(super) fn read_tile<'a, S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    head: &Head<'a>,
    settings: &'a BlockOptions,
    options: &'a CausalOptions,
    scratch: &mut Scratch,
    log_mass: Option<&[f32]>,
) -> TileRead<'a> {
    let chunk = tile.start / settings.chunk_size;
    let end = tile.start + tile.tokens;
    let local_start = settings.local_start(chunk);
    let mut from = local_start;
    let mut retrieval = None;
    if let Some(index) = &settings.index {
        match (settings.candidates(chunk, index, options), head.index) {
            (Some(candidates), Some(keys)) => {
                let sinks = settings.sink_tokens;
                retrieval = Some(Retrieval { settings: index, sinks, candidates, options, index: keys });
            }
            // Everything is read: the exact keys are one run of positions.
            _ => from = options.first_visible(chunk * settings.chunk_size).min(local_start),
        }
    }
    let runs = exact_runs(tile, head, settings, options, from..end, local_start);
    let (rows, width) = (tile.count(), head.keys.width());
    let Scratch { highest, sum, output, exact, widened, retrieval: retrieval_scratch, .. } = scratch;
    output.clear();
    output.resize(rows * width, 0.0);
    match log_mass {
        Some(log_mass) => tile.begin_again(log_mass, highest, sum),
        None => tile.begin(highest, sum),
    }
    let mut sums = Sums { highest, sum, output, final_mass: log_mass.is_some() };
    read_exactly(simd, tile, head, options, &runs, (exact, widened), &mut sums);
    let mut retrieved = Retrieved::default();
    if let Some(retrieval) = &retrieval {
        retrieval_scratch.chosen.keep = log_mass.is_some();
        retrieved = retrieval.read(simd, tile, (head.keys, head.values), retrieval_scratch, &mut sums);
    }
    TileRead { runs, retrieval, retrieved }
}

/// Sinks and the run `positions`, as far as a query of the tile may see them.
fn exact_runs<'a>(
    tile: &QueryTile<'_>,
    head: &Head<'a>,
    settings: &BlockOptions,
    options: &CausalOptions,
    positions: Range<usize>,
    local_start: usize,
) -> Vec<Run<'a>> {
    let visible = options.first_visible(tile.start);
    let rows = |positions: Range<usize>| {
        let rows = positions.start - head.first..positions.end - head.first;
        Run { positions, keys: head.keys.range(rows.clone()), values: head.values.range(rows), near: false }
    };
    let mut runs = Vec::with_capacity(3);
    let mut start = positions.start;
    let sinks = 0..settings.sink_tokens.min(positions.start);
    if sinks.end > visible {
        match head.sinks {
            Some((keys, values)) => {
                let (keys, values) = (keys.range(sinks.clone()), values.range(sinks.clone()));
                runs.push(Run { positions: sinks, keys, values, near: false });
            }
            // Sinks that touch the run are part of it.
            None if sinks.end == positions.start => start = 0,
            None => runs.push(rows(sinks)),
        }
    }
    let Some(near) = &head.near else {
        runs.push(rows(start.max(visible)..positions.end));
        return runs;
    };
    let far = start.max(visible)..local_start;
    if !far.is_empty() {
        runs.push(rows(far));
    }
    let local = local_start.max(visible)..positions.end;
    let keys = near.keys.range(local.start - near.first..local.end - near.first);
    let values = head.values.range(local.start - head.first..local.end - head.first);
    runs.push(Run { positions: local, keys, values, near: true });
    runs
}

/// Reads the runs.
#[inline(always)]
fn read_exactly<S: Simd>(
    simd: S,
    tile: &QueryTile<'_>,
    head: &Head<'_>,
    options: &CausalOptions,
    runs: &[Run<'_>],
    (scores, widened): (&mut Vec<f32>, &mut Vec<f32>),
    sums: &mut Sums<'_>,
) {
    let rows = tile.count();
    let columns: usize = runs.iter().map(|run| run.positions.len()).sum();
    scores.resize(rows * columns, 0.0);
    let mut column = 0;
    for run in runs {
        let tile = head.near.as_ref().filter(|_| run.near).map_or(tile, |near| &near.tile);
        score(simd, tile, (run.keys, &mut *widened), scores, columns, column, options.softcap);
        mask_positions(tile, options, run.positions.clone(), scores, columns, column);
        column += run.positions.len();
    }
    for row in 0..rows {
        sums.add(simd, row, &mut scores[row * columns..(row + 1) * columns]);
    }
    let mut column = 0;
    for run in runs {
        read(simd, scores, columns, column, rows, (run.values, &mut *widened), sums.output);
        column += run.positions.len();
    }
}
