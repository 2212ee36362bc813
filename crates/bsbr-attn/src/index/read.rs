//! One tile of queries that choose their keys by the index: the rule, step by step.
//!
//! The plain form estimates every key of every candidate block and masks what is not chosen, so its work for a token grows with
//! the text; for one tile at a time, so its memory does not grow faster. What it computes is what a faster form has to.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::{
    BLOCK, BLOCKS, Candidates, Chosen, PlainIndex, SECTION,
    cap::{Cap, Passed, passing},
    plain::View,
    scores::Queries,
    statistics::{Integers, held},
};
use crate::{
    AttentionOptions, BlockAttentionConfig, Far,
    buffer::RowBuffer,
    plain::{MASKED, Part, Tile, Values, biased, combine, contiguous_part, float_tensor, log_mass},
    seen::{Columns, Watch},
};

/// The logarithm of a threshold of 0: what lies lower has no weight.
const LOWEST: f64 = -100.0;

/// What a tile reads, `[batch, kv_heads, group, tokens, head_dim]`: `exact`, which it reads anyway, and what it chooses of
/// `candidates`. `keys` and `values` hold every token from the first on.
pub(crate) fn read_by_index(
    tile: &Tile,
    mut parts: Vec<Part>,
    (index, candidates): (&PlainIndex, &Candidates),
    (keys, values): (&RowBuffer, &RowBuffer),
    (attention, options): (&BlockAttentionConfig, &AttentionOptions),
    watch: Option<&mut Watch>,
) -> (Tensor<5>, Chosen) {
    let view = index.view(&candidates.sections);
    let view = view.unwrap_or_else(|| unreachable!("the index is founded before any chunk has candidates"));
    let queries = Queries::new(tile, view.founding, options.scale);
    let choice = Choice { tile, view: &view, queries: &queries, candidates, attention, options };

    let (blocks, far) = (choice.blocks(), choice.far_sections());
    // What a token reads anyway: a sink takes its share of the whole as a key does.
    let sinks = parts.first().and_then(|part| options.sink_column(&part.logits));
    let exact = parts.iter().map(|part| part.logits.clone()).chain(sinks);
    let exact: Vec<Tensor<5>> = exact.map(|logits| logits.inner().cast(DType::F32)).collect();
    let total = choice.total(exact, &blocks, far.as_ref());
    let open = far.as_ref().map(|far| choice.opened(far, &total));
    let passed = choice.passed(&blocks, open.as_ref(), &total);
    let chosen = choice.counted(&passed);

    let positions = candidates.sections.start * SECTION..candidates.sections.end * SECTION;
    let of = |rows: &RowBuffer| rows.range(positions.start, positions.end);
    let mut part = contiguous_part(tile, of(keys), of(values), positions.clone(), options);
    part.logits = part.logits + hidden_where_zero(passed.mask.clone().unsqueeze_dim(2)).cast(tile.query.dtype());
    part.columns = Columns::Chosen(positions);
    parts.push(part);
    if attention.far == Far::Mean {
        parts.push(choice.far_blocks(&blocks, &passed.mask, open.as_ref()));
        if let (Some(far), Some(open)) = (&far, open) {
            parts.push(choice.closed_sections(far, open));
        }
    }
    (combine(parts, None, options, (tile.start, watch)).0, chosen)
}

/// Everything a tile chooses by.
struct Choice<'a> {
    tile: &'a Tile,
    view: &'a View<'a>,
    queries: &'a Queries,
    candidates: &'a Candidates,
    attention: &'a BlockAttentionConfig,
    options: &'a AttentionOptions,
}

/// Blocks, or sections, as they are scored.
struct Scored {
    /// Numbers of them, counted from the first token.
    runs: Range<usize>,
    /// Tokens of each.
    size: usize,
    /// `base`, without gradient, `[batch, kv_heads, group * tokens, runs]`.
    base: Tensor<4>,
    /// `cap(base)` and its bias, `[batch, kv_heads, group, tokens, runs]`.
    scores: Tensor<5>,
}

impl Choice<'_> {
    /// Scores by head and token, with softcap and the bias of runs of `size` tokens; of `each` columns for every run.
    fn by_head(&self, scores: Tensor<4>, (runs, size, each): (&Range<usize>, usize, usize)) -> Tensor<5> {
        let [batch, kv_heads, group, tokens, _] = self.tile.query.dims();
        let scores = scores.reshape([batch, kv_heads, group, tokens, runs.len() * each]);
        let sinks = self.attention.sink_tokens;
        let middle =
            |run: usize| ((run * size).max(sinks).min((run + 1) * size - 1) + (run + 1) * size - 1) as f64 / 2.0;
        let positions = runs.clone().flat_map(|run| std::iter::repeat_n(middle(run), each));
        biased(self.tile, self.options.capped(scores), positions, self.options)
    }

    fn scored(&self, means: &Integers, runs: Range<usize>, size: usize) -> Scored {
        let base = self.queries.base(means);
        let scores = self.by_head(base.clone(), (&runs, size, 1));
        Scored { runs, size, base, scores }
    }

    /// Every candidate block.
    fn blocks(&self) -> Scored {
        let sections = &self.candidates.sections;
        self.scored(&self.view.block_means, sections.start * BLOCKS..sections.end * BLOCKS, BLOCK)
    }

    /// The first `far` of the candidates.
    fn first(&self, of_all: &Integers) -> Integers {
        let far = self.candidates.far;
        Integers { rows: of_all.rows.clone().narrow(2, 0, far), scales: of_all.scales.clone().narrow(2, 0, far) }
    }

    /// The sections scored as such.
    fn far_sections(&self) -> Option<Scored> {
        let first = self.candidates.sections.start;
        let runs = first..first + self.candidates.far;
        (!runs.is_empty()).then(|| self.scored(&self.first(&self.view.means), runs, SECTION))
    }

    /// A number for each column.
    fn columns(&self, numbers: impl Iterator<Item = f32>) -> Tensor<5> {
        let numbers: Vec<f32> = numbers.collect();
        let count = numbers.len();
        float_tensor(numbers, &self.tile.query.device().inner(), DType::F32).reshape([1, 1, 1, 1, count])
    }

    /// `log n` of each run, [`MASKED`] where it has no token.
    fn log_counts(&self, runs: &Scored) -> Tensor<5> {
        self.columns(runs.runs.clone().map(|run| match held(run, runs.size, self.attention.sink_tokens) {
            0 => MASKED as f32,
            count => (count as f32).ln(),
        }))
    }

    /// Hides from each token the runs whose section its window cuts.
    fn whole(&self, scores: Tensor<5>, runs: &Scored) -> Tensor<5> {
        if self.options.window.is_none() {
            return scores;
        }
        let start = |column: usize| (runs.runs.start + column) * runs.size / SECTION * SECTION;
        let whole = |token: usize, column: usize| {
            start(column).max(self.attention.sink_tokens) >= self.options.first_visible(self.tile.start + token)
        };
        add(scores, self.tile.mask(runs.runs.len(), whole))
    }

    /// `tot`, `[batch, kv_heads, group, tokens, 1]`.
    fn total(&self, mut logits: Vec<Tensor<5>>, blocks: &Scored, far: Option<&Scored>) -> Tensor<5> {
        let mass = |runs: &Scored| self.whole(runs.scores.clone() + self.log_counts(runs), runs);
        let near = far.map_or(0, |far| far.runs.len() * BLOCKS);
        if blocks.runs.len() > near {
            logits.push(mass(blocks).narrow(4, near, blocks.runs.len() - near));
        }
        logits.extend(far.map(mass));
        log_mass(logits)
    }

    /// The logarithm of the threshold.
    fn limit(&self) -> f64 {
        self.attention.threshold.ln().max(LOWEST)
    }

    /// What tokens see of runs of `size` tokens: [`MASKED`] where a run holds no token but sinks or lies behind the window.
    fn hide_unseen(&self, scores: Tensor<5>, first: usize, size: usize) -> Tensor<5> {
        let columns = scores.dims()[4];
        let sinks = self.attention.sink_tokens;
        let end = |column: usize| (first + column + 1) * size;
        let scores = match end(0) <= sinks {
            true => scores + self.columns((0..columns).map(|at| if end(at) <= sinks { MASKED as f32 } else { 0.0 })),
            false => scores,
        };
        if self.options.window.is_none() {
            return scores;
        }
        let seen = |token: usize, at: usize| end(at) > self.options.first_visible(self.tile.start + token);
        add(scores, self.tile.mask(columns, seen))
    }

    /// Which far sections are open, `[batch, kv_heads, tokens, sections]`: 1 or 0.
    fn opened(&self, far: &Scored, total: &Tensor<5>) -> Tensor<4> {
        let bounds = self.queries.bounds(&far.base, &self.first(&self.view.radii));
        let bounds = self.by_head(bounds, (&far.runs, SECTION, 1));
        let excess = self.hide_unseen((bounds - total.clone()).max_dim(2), far.runs.start, SECTION);
        passing(without_heads(excess), self.limit(), self.attention.max_sections, Cap::Best).mask
    }

    /// Which keys of the candidates pass, `[batch, kv_heads, tokens, keys]`.
    fn passed(&self, blocks: &Scored, open: Option<&Tensor<4>>, total: &Tensor<5>) -> Passed {
        let estimates = self.queries.estimates(&blocks.base, &self.view.residuals);
        let estimates = self.by_head(estimates, (&blocks.runs, BLOCK, BLOCK));
        let excess = (estimates - total.clone()).max_dim(2);
        let mut excess = without_heads(self.hide_unseen(excess, blocks.runs.start * BLOCK, 1));
        if let Some(open) = open {
            excess = excess + (self.by_section(open, SECTION, blocks.runs.len() * BLOCK) - 1.0) * -MASKED;
        }
        passing(excess, self.limit(), self.attention.max_keys, Cap::Doubled)
    }

    /// What holds of the far sections, for each of their `each` columns; 1 for the columns behind, of `columns` in all.
    fn by_section(&self, of: &Tensor<4>, each: usize, columns: usize) -> Tensor<4> {
        let [batch, kv_heads, tokens, far] = of.dims();
        let of = of.clone().unsqueeze_dim::<5>(4).expand([batch, kv_heads, tokens, far, each]);
        let of = of.reshape([batch, kv_heads, tokens, far * each]);
        let behind = columns - far * each;
        if behind == 0 {
            return of;
        }
        let ones = Tensor::ones([batch, kv_heads, tokens, behind], (&of.device(), of.dtype()));
        Tensor::cat(vec![of, ones], 3)
    }

    fn counted(&self, passed: &Passed) -> Chosen {
        let [batch, kv_heads, tokens, keys] = passed.mask.dims();
        let rows = (batch * kv_heads * tokens) as u64;
        let most = rows.saturating_mul(keys.min(self.attention.max_keys) as u64);
        Chosen { tokens: rows, keys: passed.mask.clone().int().sum(), most, capped: passed.capped }
    }

    /// Log-masses of runs as they count in the output, with a gradient where one is asked for.
    fn masses(&self, runs: &Scored, means: &Integers, through: Option<Tensor<4>>) -> Tensor<5> {
        let scores = match self.queries.carried(means, through, self.view.founding) {
            Some(carried) => self.by_head(runs.base.clone() + carried, (&runs.runs, runs.size, 1)),
            None => runs.scores.clone(),
        };
        self.whole(scores + self.attention.far_shift, runs)
    }

    /// What is left of the blocks that are scored.
    fn far_blocks(&self, blocks: &Scored, passed: &Tensor<4>, open: Option<&Tensor<4>>) -> Part {
        let [batch, kv_heads, tokens, keys] = passed.dims();
        let count = keys / BLOCK;
        let read = passed.clone().reshape([batch, kv_heads, tokens, count, BLOCK]).sum_dim(4);
        let held = blocks.runs.clone().map(|block| held(block, BLOCK, self.attention.sink_tokens) as f32);
        let left = self.columns(held) - read.reshape([batch, kv_heads, 1, tokens, count]);
        let mut logits = self.masses(blocks, &self.view.block_means, self.view.through.clone().map(|means| means.0));
        logits = logits + left.clone().clamp_min(1.0).log() + hidden_where_zero(left.clamp(0.0, 1.0));
        if let Some(open) = open {
            let open = self.by_section(open, BLOCKS, count).unsqueeze_dim(2);
            logits = logits + hidden_where_zero(open);
        }
        let width = self.view.values.dims()[3];
        let sections = self.candidates.sections.len();
        let values = self.view.values.clone().unsqueeze_dim::<5>(3);
        let values = values.expand([batch, kv_heads, sections, BLOCKS, width]);
        self.part(logits, values.reshape([batch, kv_heads, count, width]), blocks)
    }

    /// Far sections that are not open.
    fn closed_sections(&self, far: &Scored, open: Tensor<4>) -> Part {
        let first = |rows: Tensor<4>| rows.narrow(2, 0, self.candidates.far);
        let through = self.view.through.clone().map(|means| first(means.1));
        let logits = self.masses(far, &self.first(&self.view.means), through) + self.log_counts(far);
        let logits = logits + hidden_where_zero(open.unsqueeze_dim(2).neg() + 1.0);
        self.part(logits, first(self.view.values.clone()), far)
    }

    fn part(&self, logits: Tensor<5>, values: Tensor<4>, runs: &Scored) -> Part {
        let sinks = self.attention.sink_tokens;
        let tokens = |run: usize| (run * runs.size).max(sinks).min((run + 1) * runs.size)..(run + 1) * runs.size;
        Part {
            logits: logits.cast(self.tile.query.dtype()),
            values: Values::Shared(values),
            columns: Columns::Runs(runs.runs.clone().map(tokens).collect()),
        }
    }
}

/// [`MASKED`] where `mask` is 0, 0 where it is 1.
fn hidden_where_zero(mask: Tensor<5>) -> Tensor<5> {
    (mask - 1.0) * -MASKED
}

/// `[batch, kv_heads, 1, tokens, columns]` without the axis of heads.
fn without_heads(scores: Tensor<5>) -> Tensor<4> {
    let [batch, kv_heads, _, tokens, columns] = scores.dims();
    scores.reshape([batch, kv_heads, tokens, columns])
}

fn add(scores: Tensor<5>, mask: Option<Tensor<5>>) -> Tensor<5> {
    match mask {
        Some(mask) => scores + mask.inner().cast(DType::F32),
        None => scores,
    }
}
