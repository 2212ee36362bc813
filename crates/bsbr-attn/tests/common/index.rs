//! The definition of retrieval by an index, one token after the other: integers in f32 as the rule has them, all else in f64.
#![allow(clippy::needless_range_loop)] // Sums run over the indices of the formulas.

mod token;

use std::collections::HashMap;

use bsbr_attn::index::{BLOCK, SECTION};
use burn::tensor::Tensor;
use proptest::prelude::*;
pub(crate) use token::Source;
use token::{Choice, Token};

use super::{
    Case, Inputs,
    naive::{Vector, dot},
    numbers,
};

/// A score that lies so close to what decides about it may fall on either side by rounding.
pub(crate) const DECIDED: f64 = 2e-5;

/// What a token reads, and how close a choice came to another.
pub(crate) struct Read {
    pub(crate) output: Vector,
    /// Smallest distance, in nats, of a score from what decides about it.
    pub(crate) margin: f64,
}

/// Integers and their scale.
#[derive(Clone)]
struct Quantised {
    numbers: Vec<i64>,
    scale: f32,
}

impl Quantised {
    fn of(row: &[f32]) -> Self {
        let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let factor = 127.0f32 / most;
        if !factor.is_finite() {
            return Self { numbers: vec![0; row.len()], scale: 0.0 };
        }
        let numbers = row.iter().map(|x| (x * factor).round_ties_even() as i64).collect();
        Self { numbers, scale: most / 127.0 }
    }

    fn floats(&self) -> Vector {
        self.numbers.iter().map(|&x| x as f64 * f64::from(self.scale)).collect()
    }

    fn dot(&self, other: &[i64]) -> f64 {
        self.numbers.iter().zip(other).map(|(a, b)| a * b).sum::<i64>() as f64
    }
}

struct Block {
    count: usize,
    mean: Quantised,
    /// Those of all keys of the block, one after the other.
    residuals: Quantised,
}

struct Section {
    count: usize,
    mean: Quantised,
    radius: Quantised,
}

/// Everything that is known of the keys of one KV head that stand at the positions of one stage.
struct Index {
    centre: Vec<f32>,
    channels: Vec<usize>,
    balance: Vec<f32>,
    blocks: Vec<Block>,
    sections: Vec<Section>,
    keys: Vec<Vec<f32>>,
}

/// The definition, with what it needs more than once.
pub(crate) struct Reference<'a> {
    case: &'a Case,
    inputs: &'a Inputs,
    indices: HashMap<(usize, usize, usize), Index>,
    choices: HashMap<(usize, usize, usize), Choice>,
}

/// A mean of rows: their sum, one after the other, times one divided by their number.
fn mean(rows: &[&Vec<f32>], width: usize) -> Vec<f32> {
    let share = 1.0 / rows.len() as f32;
    sum(rows.iter().map(|row| row.as_slice()), width).into_iter().map(|x| x * share).collect()
}

fn sum<'a>(rows: impl Iterator<Item = &'a [f32]>, width: usize) -> Vec<f32> {
    let mut sum = vec![0.0f32; width];
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    sum
}

/// Pairs of dimensions turned by so many positions, in f32.
fn turned(row: &[f32], frequencies: &[f64], by: f64) -> Vec<f32> {
    let mut turned = row.to_vec();
    let half = frequencies.len();
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (by * frequency).sin_cos();
        let (sin, cos) = (sin as f32, cos as f32);
        turned[i] = row[i] * cos - row[i + half] * sin;
        turned[i + half] = row[i + half] * cos + row[i] * sin;
    }
    turned
}

impl Case {
    /// How many tokens share a position for the token at `t`: 1 within the trained length.
    pub(super) fn group(&self, t: usize) -> usize {
        let Some(positions) = self.far.as_ref().filter(|positions| t >= positions.trained) else { return 1 };
        let local = (self.config.local_chunks + 1) * self.config.chunk_size;
        (1..).find(|group| t <= local + group * (positions.trained - 1 - local)).unwrap()
    }

    /// A key as it is held where `group` tokens share a position: turned once for each stage it has seen.
    fn held_key(&self, inputs: &Inputs, (b, kv, i): (usize, usize, usize), group: usize) -> Vec<f32> {
        let mut row: Vec<f32> = inputs.keys.row(b, kv, i).into_iter().map(|x| x as f32).collect();
        let Some(positions) = &self.far else { return row };
        let mut stands = i;
        for stage in self.group(i).max(2)..=group {
            row = turned(&row, &positions.frequencies, (i / stage) as f64 - stands as f64);
            stands = i / stage;
        }
        row
    }

    fn held_query(&self, inputs: &Inputs, (b, h, t): (usize, usize, usize), group: usize) -> Vec<f32> {
        let row: Vec<f32> = inputs.query.row(b, h, t).into_iter().map(|x| x as f32).collect();
        let Some(positions) = self.far.as_ref().filter(|_| group > 1) else { return row };
        let local = (self.config.local_chunks + 1) * self.config.chunk_size;
        let stands = t / group + local - local / group;
        turned(&row, &positions.frequencies, stands as f64 - t as f64)
    }

    pub(super) fn first_seen(&self, t: usize) -> usize {
        self.options.window.map_or(0, |window| (t + 1).saturating_sub(window))
    }
}

impl Index {
    fn new(case: &Case, inputs: &Inputs, (b, kv): (usize, usize), group: usize) -> Self {
        let (config, width) = (&case.config, case.head_dim);
        let keys: Vec<Vec<f32>> = (0..case.tokens).map(|i| case.held_key(inputs, (b, kv, i), group)).collect();
        let of_run =
            |run: usize, size: usize| (run * size).max(config.sink_tokens).min((run + 1) * size)..(run + 1) * size;
        let rows = |range: std::ops::Range<usize>| range.map(|i| &keys[i]).collect::<Vec<_>>();

        let founding = (config.exact_tokens / config.chunk_size).max(config.local_chunks + 1) * config.chunk_size;
        let mut index =
            Self { centre: vec![], channels: vec![], balance: vec![], blocks: vec![], sections: vec![], keys: vec![] };
        if case.tokens < founding {
            return Self { keys, ..index };
        }
        let (mut centre, mut counted, mut spread) = (vec![0.0f32; width], 0, vec![0.0f32; width]);
        for block in (0..founding / BLOCK).map(|block| rows(of_run(block, BLOCK))).filter(|block| !block.is_empty()) {
            let mean = mean(&block, width);
            counted += 1;
            for c in 0..width {
                centre[c] += mean[c];
                block.iter().for_each(|key| spread[c] += (key[c] - mean[c]) * (key[c] - mean[c]));
            }
        }
        let share = 1.0 / counted.max(1) as f32;
        index.centre = centre.into_iter().map(|x| x * share).collect();
        let heads = case.heads / case.kv_heads;
        let mut squares = vec![0.0f32; width];
        for t in 0..founding {
            for h in kv * heads..(kv + 1) * heads {
                let query = inputs.query.row(b, h, t);
                squares.iter_mut().zip(&query).for_each(|(sum, &x)| *sum += x as f32 * x as f32);
            }
        }
        let mut channels: Vec<usize> = (0..width).collect();
        channels.sort_by(|&a, &b| (spread[b] * squares[b]).total_cmp(&(spread[a] * squares[a])));
        channels.truncate(config.index_channels.unwrap_or((width / 2).max(32)).min(width));
        channels.sort_unstable();
        index.balance = (channels.iter())
            .map(|&c| if spread[c] > 0.0 && squares[c] > 0.0 { (spread[c] / squares[c]).sqrt().sqrt() } else { 1.0 })
            .collect();
        index.channels = channels;

        let last = config.local_start((case.tokens - 1) / config.chunk_size);
        let from_centre = |mean: &[f32]| {
            Quantised::of(&mean.iter().zip(&index.centre).map(|(x, centre)| x - centre).collect::<Vec<_>>())
        };
        for section in 0..last / SECTION {
            let mut parts = vec![0.0f32; width];
            for block in section * SECTION / BLOCK..(section + 1) * SECTION / BLOCK {
                let block = rows(of_run(block, BLOCK));
                let count = block.len();
                let mean = if count > 0 { mean(&block, width) } else { vec![0.0; width] };
                let residual = |key: &&Vec<f32>| {
                    let channels = index.channels.iter().zip(&index.balance);
                    channels.map(|(&c, balance)| (key[c] - mean[c]) / balance).collect::<Vec<_>>()
                };
                let residuals: Vec<f32> = block.iter().flat_map(residual).collect();
                parts.iter_mut().zip(&mean).for_each(|(sum, x)| *sum += count as f32 * x);
                index.blocks.push(Block { count, mean: from_centre(&mean), residuals: Quantised::of(&residuals) });
            }
            let positions = of_run(section, SECTION);
            let count = positions.len();
            let share = if count > 0 { 1.0 / count as f32 } else { 0.0 };
            let mean: Vec<f32> = parts.into_iter().map(|x| x * share).collect();
            let radius = |c: usize| positions.clone().fold(0.0f32, |most, i| most.max((keys[i][c] - mean[c]).abs()));
            index.sections.push(Section {
                count,
                mean: from_centre(&mean),
                radius: Quantised::of(&(0..width).map(radius).collect::<Vec<_>>()),
            });
        }
        Self { keys, ..index }
    }
}

/// A query of one head, whole and in the channels of residuals.
struct Query {
    head: usize,
    row: Vector,
    whole: Quantised,
    chosen: Quantised,
    centre: f64,
}

impl Query {
    fn base(&self, mean: &Quantised) -> f64 {
        self.centre + f64::from(self.whole.scale) * f64::from(mean.scale) * self.whole.dot(&mean.numbers)
    }

    fn bound(&self, section: &Section) -> f64 {
        let sizes = self.whole.numbers.iter().zip(&section.radius.numbers).map(|(q, r)| q.abs() * r).sum::<i64>();
        self.base(&section.mean) + 0.5 * f64::from(self.whole.scale) * f64::from(section.radius.scale) * sizes as f64
    }

    fn estimate(&self, block: &Block, key: usize) -> f64 {
        let width = self.chosen.numbers.len();
        let residual = &block.residuals.numbers[key * width..(key + 1) * width];
        let scale = f64::from(self.chosen.scale) * f64::from(block.residuals.scale);
        self.base(&block.mean) + scale * self.chosen.dot(residual)
    }
}

impl<'a> Reference<'a> {
    pub(crate) fn new(case: &'a Case, inputs: &'a Inputs) -> Self {
        Self { case, inputs, indices: HashMap::new(), choices: HashMap::new() }
    }

    /// What token `t` of query head `h` reads.
    pub(crate) fn read(&mut self, b: usize, h: usize, t: usize) -> Read {
        let case = self.case;
        if !case.config.uses_index() {
            return Read { output: case.naive(self.inputs, b, h, t), margin: f64::INFINITY };
        }
        let kv = h / (case.heads / case.kv_heads);
        let group = case.group(t);
        let index = self.indices.entry((b, kv, group)).or_insert_with(|| Index::new(case, self.inputs, (b, kv), group));
        Token { case, inputs: self.inputs, index, b, kv, t, group }.read(h)
    }
}

impl Reference<'_> {
    /// The probabilities of everything that token `t` of query head `h` reads by an index, and how close a choice came to another.
    pub(crate) fn weights(&mut self, h: usize, t: usize) -> (Vec<(Source, f64)>, f64) {
        let (case, inputs) = (self.case, self.inputs);
        let kv = h / (case.heads / case.kv_heads);
        let group = case.group(t);
        let index = self.indices.entry((0, kv, group)).or_insert_with(|| Index::new(case, inputs, (0, kv), group));
        Token { case, inputs, index, b: 0, kv, t, group }.weights(h)
    }

    /// What token `t` of head `h` would read of inputs that have `moved` a little: integers let every number through, so the
    /// choice stays and what rounding takes from a query or a mean stays. Positions are those of the tokens.
    pub(crate) fn moved(&mut self, moved: &Inputs, b: usize, h: usize, t: usize) -> Vector {
        let (case, inputs) = (self.case, self.inputs);
        let kv = h / (case.heads / case.kv_heads);
        let index = self.indices.entry((b, kv, 1)).or_insert_with(|| Index::new(case, inputs, (b, kv), 1));
        let here = Token { case, inputs, index, b, kv, t, group: 1 };
        let choice = self.choices.entry((b, kv, t)).or_insert_with(|| here.choose());
        let there = Token { inputs: moved, ..here };
        let row = moved.query.row(b, h, t);
        if choice.margin == f64::INFINITY {
            // The index may not be founded yet, and nothing asks it.
            let nothing = || Quantised { numbers: vec![], scale: 0.0 };
            let own = Query { head: h, row, whole: nothing(), chosen: nothing(), centre: 0.0 };
            return there.weigh(&own, choice, &|_, _| unreachable!("everything is read"));
        }
        let scale = case.options.scale;
        let query = here.query(h);
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vector>();
        let plus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vector>();
        let scaled = |row: &[f64]| row.iter().map(|x| x * scale).collect::<Vector>();
        let taken = minus(&query.whole.floats(), &scaled(&query.row));
        let base = |run: usize, size: usize| {
            let centre: Vector = index.centre.iter().map(|&x| f64::from(x)).collect();
            let held = plus(&here.mean(run, size).floats(), &centre);
            let taken_of_mean = minus(&held, &here.mean_key(run, size));
            dot(&plus(&scaled(&row), &taken), &plus(&there.mean_key(run, size), &taken_of_mean))
        };
        let own = Query { row: row.clone(), ..here.query(h) };
        there.weigh(&own, choice, &base)
    }
}

/// Whether outputs of the tokens from `first` on are the same, or differ only where a choice is so close that rounding decides.
/// Returns how many rows do.
pub(crate) fn agree(
    case: &Case,
    inputs: &Inputs,
    (found, expected): (Tensor<4>, Tensor<4>),
    first: usize,
    tolerance: f64,
) -> Result<usize, TestCaseError> {
    assert_eq!(found.dims(), expected.dims());
    let [batch, heads, tokens, width] = found.dims();
    let (found, expected) = (numbers(found), numbers(expected));
    let mut reference = Reference::new(case, inputs);
    let mut flipped = 0;
    for (row, (found, expected)) in found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let right = |(a, b): (&f32, &f32)| f64::from((a - b).abs()) <= tolerance * (1.0 + f64::from(b.abs()));
        if found.iter().zip(expected).all(right) {
            continue;
        }
        let (b, h, t) = (row / (heads * tokens), row / tokens % heads, first + row % tokens);
        assert!(b < batch);
        let margin = reference.read(b, h, t).margin;
        prop_assert!(
            margin < DECIDED,
            "token {t} of head {h} of row {b}: {found:?} and {expected:?}; the closest choice is {margin} nats from another"
        );
        flipped += 1;
    }
    Ok(flipped)
}
