//! The definition of retrieval by an index, one token after the other: integers in f32 as the rule has them, all else in f64.
#![allow(clippy::needless_range_loop)] // Sums run over the indices of the formulas.

use std::{collections::HashMap, ops::Range};

use bsbr_attn::{
    Far,
    index::{BLOCK, SECTION},
};
use burn::tensor::Tensor;
use proptest::prelude::*;

use super::{
    Case, Inputs,
    naive::{self, Vector, dot, softmax},
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

/// One token, as it reads the keys of one KV head.
struct Token<'a> {
    case: &'a Case,
    inputs: &'a Inputs,
    index: &'a Index,
    b: usize,
    kv: usize,
    t: usize,
    group: usize,
}

/// What decides about columns: those above `limit`, at most `most` of them.
struct Contest {
    chosen: Vec<usize>,
    margin: f64,
}

/// Those above `limit`, which is raised by `ln 2` as long as there are more than `most`.
fn doubled(columns: &[(usize, f64)], limit: f64, most: usize) -> Contest {
    let mut margin = f64::INFINITY;
    for doublings in 0.. {
        let raised = f64::from(limit as f32 + doublings as f32 * std::f32::consts::LN_2);
        margin = columns.iter().map(|(_, excess)| (excess - raised).abs()).fold(margin, f64::min);
        let chosen: Vec<usize> = columns.iter().filter(|(_, excess)| *excess > raised).map(|&(i, _)| i).collect();
        if chosen.len() <= most {
            return Contest { chosen, margin };
        }
    }
    unreachable!("no score is above every limit")
}

/// `columns` are numbers of columns and their excess.
fn contest(columns: &[(usize, f64)], limit: f64, most: usize) -> Contest {
    let mut margin = columns.iter().map(|(_, excess)| (excess - limit).abs()).fold(f64::INFINITY, f64::min);
    let mut chosen: Vec<(usize, f64)> = columns.iter().copied().filter(|(_, excess)| *excess > limit).collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
    if chosen.len() > most && most > 0 {
        margin = margin.min(chosen[most - 1].1 - chosen[most].1);
    }
    Contest { chosen: chosen.into_iter().take(most).map(|(column, _)| column).collect(), margin }
}

impl Token<'_> {
    /// Softcap and bias of a score at `position`.
    fn biased(&self, head: usize, score: f64, position: f64) -> f64 {
        let score = self.case.options.softcap.map_or(score, |cap| cap * (score / cap).tanh());
        score - self.case.options.alibi.unwrap_or(0.0) * self.case.slope(head) * (self.t as f64 - position)
    }

    /// The score of the key at `i`: at its true position where it is near, at that of the stage elsewhere.
    fn key_score(&self, query: &Query, i: usize, near: bool) -> f64 {
        let score = if near {
            let key = self.inputs.keys.row(self.b, self.kv, i);
            self.case.options.scale * dot(&self.inputs.query.row(self.b, query.head, self.t), &key)
        } else {
            let key: Vector = self.index.keys[i].iter().map(|&x| f64::from(x)).collect();
            self.case.options.scale * dot(&query.row, &key)
        };
        self.biased(query.head, score, i as f64)
    }

    fn query(&self, head: usize) -> Query {
        let row = self.case.held_query(self.inputs, (self.b, head, self.t), self.group);
        let scaled: Vec<f32> = row.iter().map(|x| x * self.case.options.scale as f32).collect();
        let channels = self.index.channels.iter().zip(&self.index.balance);
        let chosen: Vec<f32> = channels.map(|(&c, balance)| scaled[c] * balance).collect();
        let pairs = scaled.iter().zip(&self.index.centre);
        Query {
            head,
            row: row.iter().map(|&x| f64::from(x)).collect(),
            whole: Quantised::of(&scaled),
            chosen: Quantised::of(&chosen),
            centre: pairs.map(|(&q, &c)| f64::from(q) * f64::from(c)).sum(),
        }
    }

    /// Whether the chunk reads everything it sees.
    fn reads_everything(&self) -> bool {
        let config = &self.case.config;
        let chunk = self.t / config.chunk_size;
        let of_chunk = self.case.first_seen(chunk * config.chunk_size);
        (chunk + 1) * config.chunk_size - of_chunk <= config.exact_tokens
            || config.local_start(chunk) / BLOCK <= config.sink_tokens.max(of_chunk) / BLOCK
    }

    fn local(&self) -> usize {
        self.case.config.local_start(self.t / self.case.config.chunk_size)
    }

    /// Whether a section has no token that the window hides.
    fn whole(&self, section: usize) -> bool {
        (section * SECTION).max(self.case.config.sink_tokens) >= self.case.first_seen(self.t)
    }

    /// Where a run of `size` tokens stands.
    fn middle(&self, run: usize, size: usize) -> f64 {
        ((run * size).max(self.case.config.sink_tokens) + (run + 1) * size - 1) as f64 / 2.0
    }

    /// What every head of the group reads.
    fn choose(&self) -> Choice {
        let (case, config, t) = (self.case, &self.case.config, self.t);
        let heads = case.heads / case.kv_heads;
        let (local, sinks, seen) = (self.local(), config.sink_tokens, case.first_seen(t));
        let everything = self.reads_everything();
        let exact: Vec<usize> = (seen..=t).filter(|&i| everything || i >= local || i < sinks).collect();
        if everything {
            return Choice { exact, passed: vec![], blocks: vec![], closed: vec![], margin: f64::INFINITY };
        }
        let queries: Vec<Query> = (self.kv * heads..(self.kv + 1) * heads).map(|head| self.query(head)).collect();

        let first = case.first_seen(t / config.chunk_size * config.chunk_size) / SECTION;
        let sections = first..local / SECTION;
        let far_end = (local.saturating_sub(config.fine_tokens) / SECTION).max(first);
        let far_end = if far_end - first <= config.max_sections { first } else { far_end };
        let base = |query: &Query, block: usize| {
            self.biased(query.head, query.base(&self.index.blocks[block].mean), self.middle(block, BLOCK))
        };
        let of_section =
            |query: &Query, section: usize, score: f64| self.biased(query.head, score, self.middle(section, SECTION));
        let total = |query: &Query| {
            let near = exact.iter().map(|&i| self.key_score(query, i, i >= local).exp());
            let direct = (far_end..sections.end).filter(|&s| self.whole(s)).flat_map(blocks_of);
            let direct = direct.map(|block| self.index.blocks[block].count as f64 * base(query, block).exp());
            let far = (first..far_end).filter(|&s| self.whole(s)).map(|s| {
                let section = &self.index.sections[s];
                section.count as f64 * of_section(query, s, query.base(&section.mean)).exp()
            });
            near.chain(direct).chain(far).sum::<f64>().ln()
        };
        let totals: Vec<f64> = queries.iter().map(total).collect();
        let best = |score: &dyn Fn(&Query) -> f64| {
            queries.iter().zip(&totals).map(|(query, total)| score(query) - total).fold(f64::NEG_INFINITY, f64::max)
        };
        // Nothing counts that is less likely.
        let limit = config.threshold.ln().max(-100.0);

        let bounds: Vec<(usize, f64)> = (first..far_end)
            .filter(|&s| self.index.sections[s].count > 0 && (s + 1) * SECTION > seen)
            .map(|s| (s, best(&|query| of_section(query, s, query.bound(&self.index.sections[s])))))
            .collect();
        let opened = contest(&bounds, limit, config.max_sections);
        let blocks: Vec<usize> =
            (far_end..sections.end).chain(opened.chosen.iter().copied()).flat_map(blocks_of).collect();
        let mut estimates: Vec<(usize, f64)> = Vec::new();
        for &block in &blocks {
            let start = (block * BLOCK).max(sinks);
            for i in start.max(seen)..(block + 1) * BLOCK {
                let of = |query: &Query| {
                    let estimate = query.estimate(&self.index.blocks[block], i - start);
                    self.biased(query.head, estimate, self.middle(block, BLOCK))
                };
                estimates.push((i, best(&of)));
            }
        }
        let passed = doubled(&estimates, limit, config.max_keys);
        let closed = (first..far_end).filter(|s| !opened.chosen.contains(s)).collect();
        Choice { exact, passed: passed.chosen, blocks, closed, margin: opened.margin.min(passed.margin) }
    }

    /// What a head reads of a choice; `base` are the scores of runs of so many tokens by their means.
    fn weigh(&self, own: &Query, choice: &Choice, base: &dyn Fn(usize, usize) -> f64) -> Vector {
        let (config, local) = (&self.case.config, self.local());
        let read = choice.exact.iter().chain(&choice.passed);
        let near = |i: usize| i >= local || self.group == 1;
        let mut logits: Vec<f64> = read.clone().map(|&i| self.key_score(own, i, near(i))).collect();
        let mut values: Vec<Vector> = read.map(|&i| self.inputs.values.row(self.b, self.kv, i)).collect();
        if config.far == Far::Mean {
            let mut count = |(run, size): (usize, usize), left: usize| {
                let section = run * size / SECTION;
                if left > 0 && self.whole(section) {
                    let score = self.biased(own.head, base(run, size), self.middle(run, size));
                    logits.push((left as f64).ln() + score + config.far_shift);
                    values.push(self.value(section));
                }
            };
            let held = |run: usize, size: usize| size - config.sink_tokens.saturating_sub(run * size).min(size);
            for &block in &choice.blocks {
                let read = choice.passed.iter().filter(|&&i| i / BLOCK == block).count();
                count((block, BLOCK), held(block, BLOCK) - read);
            }
            for &section in &choice.closed {
                count((section, SECTION), held(section, SECTION));
            }
        }
        weighted(&logits, &values)
    }

    /// Positions of a run that are no sinks.
    fn positions(&self, run: usize, size: usize) -> Range<usize> {
        (run * size).max(self.case.config.sink_tokens).min((run + 1) * size)..(run + 1) * size
    }

    /// Mean value of a section.
    fn value(&self, section: usize) -> Vector {
        let values = self.positions(section, SECTION).map(|i| self.inputs.values.row(self.b, self.kv, i));
        naive::mean(&values.collect::<Vec<_>>(), self.case.head_dim)
    }

    /// Mean of the keys of a run.
    fn mean_key(&self, run: usize, size: usize) -> Vector {
        let keys = self.positions(run, size).map(|i| self.inputs.keys.row(self.b, self.kv, i));
        naive::mean(&keys.collect::<Vec<_>>(), self.case.head_dim)
    }

    fn read(&self, h: usize) -> Read {
        let choice = self.choose();
        let own = self.query(h);
        let base = |run: usize, size: usize| own.base(self.mean(run, size));
        Read { output: self.weigh(&own, &choice, &base), margin: choice.margin }
    }

    fn mean(&self, run: usize, size: usize) -> &Quantised {
        if size == BLOCK { &self.index.blocks[run].mean } else { &self.index.sections[run].mean }
    }
}

/// What a token reads.
struct Choice {
    /// Positions read whatever the text says.
    exact: Vec<usize>,
    /// Positions that pass.
    passed: Vec<usize>,
    /// Blocks whose keys are scored.
    blocks: Vec<usize>,
    /// Sections that are not open.
    closed: Vec<usize>,
    margin: f64,
}

fn blocks_of(section: usize) -> Range<usize> {
    section * SECTION / BLOCK..(section + 1) * SECTION / BLOCK
}

impl Reference<'_> {
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

fn weighted(logits: &[f64], values: &[Vector]) -> Vector {
    let weights = softmax(logits);
    (0..values[0].len()).map(|x| weights.iter().zip(values).map(|(weight, value)| weight * value[x]).sum()).collect()
}
