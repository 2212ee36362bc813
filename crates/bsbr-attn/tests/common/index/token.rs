//! One token: what it chooses and reads.

use std::ops::Range;

use bsbr_attn::{
    Far,
    index::{BLOCK, SECTION},
};

use super::{Index, Quantised, Query, Read};
use crate::common::{
    Case, Inputs,
    naive::{self, Vector, dot, softmax, softmax_beside},
};

/// One token, as it reads the keys of one KV head.
pub(super) struct Token<'a> {
    pub(super) case: &'a Case,
    pub(super) inputs: &'a Inputs,
    pub(super) index: &'a Index,
    pub(super) b: usize,
    pub(super) kv: usize,
    pub(super) t: usize,
    pub(super) group: usize,
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

    pub(super) fn query(&self, head: usize) -> Query {
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
    pub(super) fn choose(&self) -> Choice {
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
            let sink = case.sink(query.head).map(f64::exp);
            near.chain(direct).chain(far).chain(sink).sum::<f64>().ln()
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
    pub(super) fn weigh(&self, own: &Query, choice: &Choice, base: &dyn Fn(usize, usize) -> f64) -> Vector {
        let (logits, values, _) = self.columns(own, choice, base);
        weighted(&softmax_beside(self.case.sink(own.head), &logits), &values)
    }

    /// The same as scores, values and what each of them stands for: a key, or the tokens of a run.
    fn columns(
        &self,
        own: &Query,
        choice: &Choice,
        base: &dyn Fn(usize, usize) -> f64,
    ) -> (Vec<f64>, Vec<Vector>, Vec<Source>) {
        let (config, local) = (&self.case.config, self.local());
        let read = choice.exact.iter().chain(&choice.passed);
        let near = |i: usize| i >= local || self.group == 1;
        let mut logits: Vec<f64> = read.clone().map(|&i| self.key_score(own, i, near(i))).collect();
        let mut values: Vec<Vector> = read.map(|&i| self.inputs.values.row(self.b, self.kv, i)).collect();
        let mut sources: Vec<Source> = choice.exact.iter().map(|&i| Source::Near(i)).collect();
        sources.extend(choice.passed.iter().map(|&i| Source::Chosen(i)));
        if config.far == Far::Mean {
            let mut count = |(run, size): (usize, usize), left: usize| {
                let section = run * size / SECTION;
                if left > 0 && self.whole(section) {
                    let score = self.biased(own.head, base(run, size), self.middle(run, size));
                    logits.push((left as f64).ln() + score + config.far_shift);
                    values.push(self.value(section));
                    sources.push(Source::Run(self.positions(run, size)));
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
        (logits, values, sources)
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
    pub(super) fn mean_key(&self, run: usize, size: usize) -> Vector {
        let keys = self.positions(run, size).map(|i| self.inputs.keys.row(self.b, self.kv, i));
        naive::mean(&keys.collect::<Vec<_>>(), self.case.head_dim)
    }

    pub(super) fn read(&self, h: usize) -> Read {
        let choice = self.choose();
        let own = self.query(h);
        let base = |run: usize, size: usize| own.base(self.mean(run, size));
        Read { output: self.weigh(&own, &choice, &base), margin: choice.margin }
    }

    /// What head `h` reads, each with its probability.
    pub(super) fn weights(&self, h: usize) -> (Vec<(Source, f64)>, f64) {
        let choice = self.choose();
        // The sink is one more column, and the last.
        let sink = self.case.sink(h);
        let of = |sources: Vec<Source>, scores: Vec<f64>| {
            let scores: Vec<f64> = scores.into_iter().chain(sink).collect();
            sources.into_iter().chain([Source::Sink]).zip(softmax(&scores)).collect()
        };
        if choice.margin == f64::INFINITY && choice.blocks.is_empty() && choice.passed.is_empty() {
            // The index may not be founded yet, and nothing asks it.
            let scores: Vec<f64> = choice.exact.iter().map(|&i| self.own_score(h, i)).collect();
            return (of(choice.exact.iter().map(|&i| Source::Near(i)).collect(), scores), f64::INFINITY);
        }
        let own = self.query(h);
        let (logits, _, sources) = self.columns(&own, &choice, &|run, size| own.base(self.mean(run, size)));
        (of(sources, logits), choice.margin)
    }

    fn own_score(&self, head: usize, i: usize) -> f64 {
        let far = Some(self.group).filter(|&group| group > 1 && i < self.local());
        self.case.key_score(self.inputs, (self.b, head, self.t), i, far)
    }

    pub(super) fn mean(&self, run: usize, size: usize) -> &Quantised {
        if size == BLOCK { &self.index.blocks[run].mean } else { &self.index.sections[run].mean }
    }
}

/// What a probability stands for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    /// A key that is read whatever the text says.
    Near(usize),
    /// A key that passes.
    Chosen(usize),
    /// Statistics of these tokens.
    Run(Range<usize>),
    /// The sink of the head.
    Sink,
}

/// What a token reads.
pub(super) struct Choice {
    /// Positions read whatever the text says.
    pub(super) exact: Vec<usize>,
    /// Positions that pass.
    pub(super) passed: Vec<usize>,
    /// Blocks whose keys are scored.
    pub(super) blocks: Vec<usize>,
    /// Sections that are not open.
    pub(super) closed: Vec<usize>,
    pub(super) margin: f64,
}

fn blocks_of(section: usize) -> Range<usize> {
    section * SECTION / BLOCK..(section + 1) * SECTION / BLOCK
}

fn weighted(weights: &[f64], values: &[Vector]) -> Vector {
    (0..values[0].len()).map(|x| weights.iter().zip(values).map(|(weight, value)| weight * value[x]).sum()).collect()
}
