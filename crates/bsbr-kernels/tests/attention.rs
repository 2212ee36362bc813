//! Attention against the definition in f64.

use std::ops::Range;

use bsbr_kernels::{
    Heads, Level, Stored,
    attention::{
        BlockInput, BlockOptions, Blocks, CausalOptions, Coarse, RunMeans, block_attention, block_means, block_radii,
        causal_attention, run_radii,
    },
    limit_level,
};
use half::{bf16, f16};
use proptest::prelude::*;

/// Query heads, KV heads, width, tokens of the past, tokens asked.
#[derive(Debug, Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    width: usize,
    past: usize,
    tokens: usize,
    options: CausalOptions,
    seed: u64,
    stored: StoredAs,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy)]
enum StoredAs {
    F32,
    F16,
    Bf16,
}

/// Rows in one of the types, and what they say in f32.
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    fn new(numbers: &[f32], stored: StoredAs) -> Self {
        match stored {
            StoredAs::F32 => Self::F32(numbers.to_vec()),
            StoredAs::F16 => Self::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect()),
            StoredAs::Bf16 => Self::Bf16(numbers.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn view(&self, dims: [usize; 4]) -> Stored<'_> {
        match self {
            Self::F32(numbers) => Heads::contiguous(numbers, dims).into(),
            Self::F16(numbers) => Heads::contiguous(numbers, dims).into(),
            Self::Bf16(numbers) => Heads::contiguous(numbers, dims).into(),
        }
    }

    fn in_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(numbers) => numbers.clone(),
            Self::F16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

fn numbers(seed: u64, count: usize, size: f64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    // Two of them give something close enough to a normal distribution.
    (0..count).map(|_| ((next() + next() + next() - 1.5) * 2.0 * size) as f32).collect()
}

struct Naive<'a> {
    case: &'a Case,
    query: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
}

impl Naive<'_> {
    fn row<'b>(&self, data: &'b [f32], head: usize, row: usize) -> &'b [f32] {
        let (width, length) = (self.case.width, self.case.past + self.case.tokens);
        let rows = if data.len() == self.case.heads * self.case.tokens * width { self.case.tokens } else { length };
        &data[(head * rows + row) * width..][..width]
    }

    fn logit(&self, head: usize, token: usize, key: &[f64], position: f64) -> f64 {
        let options = &self.case.options;
        let query = self.row(self.query, head, token);
        let mut score: f64 =
            query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum::<f64>() * f64::from(options.scale);
        if let Some(cap) = options.softcap {
            score = f64::from(cap) * (score / f64::from(cap)).tanh();
        }
        let slope = options.slopes.as_ref().map_or(0.0, |slopes| f64::from(slopes[head]));
        score + slope * (position - (self.case.past + token) as f64)
    }

    fn kv(&self, data: &[f32], head: usize, position: usize) -> Vec<f64> {
        let kv_head = head / (self.case.heads / self.case.kv_heads);
        let length = self.case.past + self.case.tokens;
        data[(kv_head * length + position) * self.case.width..][..self.case.width]
            .iter()
            .map(|&x| f64::from(x))
            .collect()
    }

    fn mean(&self, data: &[f32], head: usize, positions: &Range<usize>) -> Vec<f64> {
        let mut mean = vec![0.0; self.case.width];
        for position in positions.clone() {
            for (sum, value) in mean.iter_mut().zip(self.kv(data, head, position)) {
                *sum += value / positions.len() as f64;
            }
        }
        mean
    }

    fn output(&self, head: usize, token: usize, settings: Option<&BlockOptions>) -> Vec<f64> {
        let position = self.case.past + token;
        let first = self.case.options.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut columns: Vec<(f64, Vec<f64>)> = Vec::new();
        let exact = |range: Range<usize>, columns: &mut Vec<(f64, Vec<f64>)>| {
            for at in range.start.max(first)..range.end {
                let logit = self.logit(head, token, &self.kv(self.keys, head, at), at as f64);
                columns.push((logit, self.kv(self.values, head, at)));
            }
        };
        match settings {
            None => exact(0..position + 1, &mut columns),
            Some(settings) => {
                let chunk = position / settings.chunk_size;
                let local = chunk.saturating_sub(settings.local_chunks) * settings.chunk_size;
                exact(0..settings.sink_tokens.min(local), &mut columns);
                exact(local..position + 1, &mut columns);
                if let Some(blocks) = &settings.blocks {
                    let (read, by_means) = self.retrieved(head, token, settings, blocks);
                    for block in read {
                        exact(block, &mut columns);
                    }
                    for run in by_means.into_iter().filter(|run| blocks.far && run.start >= first) {
                        let mass = self.mass(head, token, &run) + f64::from(blocks.far_shift);
                        columns.push((mass, self.mean(self.values, head, &run)));
                    }
                }
            }
        }
        let highest = columns.iter().map(|column| column.0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = columns.iter().map(|column| (column.0 - highest).exp()).sum();
        let mut output = vec![0.0; self.case.width];
        for (logit, value) in &columns {
            for (out, value) in output.iter_mut().zip(value) {
                *out += (logit - highest).exp() / sum * value;
            }
        }
        output
    }

    fn mass(&self, head: usize, token: usize, block: &Range<usize>) -> f64 {
        let middle = (block.start + block.end - 1) as f64 / 2.0;
        (block.len() as f64).ln() + self.logit(head, token, &self.mean(self.keys, head, block), middle)
    }

    /// `reach scale sum_c |q_c| r_c` of a block, or of a chunk: no key of its blocks lies further from its mean than that.
    fn reach(&self, head: usize, token: usize, run: &Range<usize>, settings: &BlockOptions, blocks: &Blocks) -> f64 {
        let mean = self.mean(self.keys, head, run);
        let far = |block: &Range<usize>| {
            let centre = self.mean(self.keys, head, block);
            let mut radius = vec![0.0f64; self.case.width];
            for position in block.clone() {
                for ((radius, x), mean) in radius.iter_mut().zip(self.kv(self.keys, head, position)).zip(&centre) {
                    *radius = radius.max((x - mean).abs());
                }
            }
            radius.iter().zip(&centre).zip(&mean).map(|((r, a), b)| r + (a - b).abs()).collect::<Vec<f64>>()
        };
        let parts = run.start / blocks.size..run.end.div_ceil(blocks.size);
        let parts = parts.map(|at| (at * blocks.size).max(settings.sink_tokens)..(at + 1) * blocks.size);
        let radii: Vec<Vec<f64>> = parts.filter(|part| !part.is_empty()).map(|part| far(&part)).collect();
        let query = &self.query[(head * self.case.tokens + token) * self.case.width..][..self.case.width];
        let reach = query
            .iter()
            .enumerate()
            .map(|(c, q)| f64::from(q.abs()) * radii.iter().map(|radius| radius[c]).fold(0.0, f64::max));
        f64::from(blocks.reach) * f64::from(self.case.options.scale) * reach.sum::<f64>()
    }

    /// The blocks a token reads exactly, and the runs that count by their means.
    fn retrieved(
        &self,
        head: usize,
        token: usize,
        settings: &BlockOptions,
        blocks: &Blocks,
    ) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
        let group = self.case.heads / self.case.kv_heads;
        let heads = head / group * group..(head / group + 1) * group;
        let position = self.case.past + token;
        let visible = |token: usize| self.case.options.window.map_or(0, |window| (token + 1).saturating_sub(window));
        let first = visible(position);
        let chunk = position / settings.chunk_size;
        let local = chunk.saturating_sub(settings.local_chunks) * settings.chunk_size;
        let runs = |indices: Range<usize>, size: usize| -> Vec<Range<usize>> {
            let positions = indices.map(|j| (j * size).max(settings.sink_tokens)..(j + 1) * size);
            positions.filter(|run| !run.is_empty() && run.end > first).collect()
        };
        let oldest = settings.sink_tokens.max(visible(chunk * settings.chunk_size)) / blocks.size;
        let end = local / blocks.size;
        if end.saturating_sub(oldest) <= blocks.top_k || (chunk + 1) * settings.chunk_size <= blocks.exact_tokens {
            return (runs(oldest.min(end)..end, blocks.size), vec![]);
        }
        // Kinds of runs, the longest last, with where the text that they stand for begins and ends.
        let mut kinds = vec![(blocks.size, blocks.top_k, oldest * blocks.size, end * blocks.size)];
        for coarse in &blocks.coarse {
            let border = local.saturating_sub(coarse.beyond) / coarse.size * coarse.size;
            let start = settings.sink_tokens.max(visible(chunk * settings.chunk_size)) / coarse.size * coarse.size;
            if border.saturating_sub(start) / coarse.size <= coarse.opened {
                break;
            }
            kinds.last_mut().expect("blocks").2 = border;
            kinds.push((coarse.size, coarse.opened, start, border));
        }
        // Relative to the log-mass of what a head reads exactly, each head scores a run; the highest of these counts.
        let exact: Vec<f64> = heads
            .clone()
            .map(|head| {
                let exact = (0..settings.sink_tokens.min(local)).chain(local..position + 1).filter(|&at| at >= first);
                exact
                    .map(|at| self.logit(head, token, &self.kv(self.keys, head, at), at as f64).exp())
                    .sum::<f64>()
                    .ln()
            })
            .collect();
        let best = |runs: &[Range<usize>], count: usize| -> Vec<bool> {
            let score = |run| {
                let of = |(head, exact)| {
                    self.mass(head, token, run) + self.reach(head, token, run, settings, blocks) - exact
                };
                heads.clone().zip(&exact).map(of).fold(f64::NEG_INFINITY, f64::max)
            };
            let scores: Vec<f64> = runs.iter().map(score).collect();
            let mut order: Vec<usize> = (0..runs.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            (0..runs.len()).map(|at| order.iter().take(count).any(|&best| best == at)).collect()
        };
        let (mut read, mut by_means) = (Vec::new(), Vec::new());
        // The text that the longer runs leave to shorter ones.
        let mut opened: Vec<Range<usize>> = Vec::new();
        for (level, (size, count, start, end)) in kinds.into_iter().enumerate().rev() {
            opened.push(start..end);
            let candidates: Vec<Range<usize>> =
                opened.iter().flat_map(|part| runs(part.start / size..part.end / size, size)).collect();
            let chosen = best(&candidates, count);
            opened.clear();
            for (run, chosen) in candidates.into_iter().zip(chosen) {
                if !chosen {
                    by_means.push(run);
                } else if level == 0 {
                    read.push(run);
                } else {
                    // With the sinks that its blocks hold.
                    opened.push(run.start / size * size..run.end);
                }
            }
        }
        (read, by_means)
    }
}

/// Holds attention to its definition, at every level of vector instructions. Tests that run at the same time change the level
/// for each other, which is as good: what counts is that every level computes many cases.
fn check(case: &Case, settings: Option<&BlockOptions>) -> Result<(), TestCaseError> {
    for level in [Level::Scalar, Level::Avx2, Level::Best] {
        limit_level(level);
        check_once(case, settings)?;
    }
    Ok(())
}

fn check_once(case: &Case, settings: Option<&BlockOptions>) -> Result<(), TestCaseError> {
    let Case { heads, kv_heads, width, past, tokens, .. } = *case;
    let length = past + tokens;
    let query = numbers(case.seed, heads * tokens * width, 1.0);
    let of = |seed| Numbers::new(&numbers(seed, kv_heads * length * width, 1.0), case.stored);
    let (stored_keys, stored_values) = (of(case.seed + 1), of(case.seed + 2));
    let (keys, values) = (stored_keys.in_f32(), stored_values.in_f32());
    let q = Heads::contiguous(&query[..], [1, heads, tokens, width]);
    let [k, v] = [&stored_keys, &stored_values].map(|numbers| numbers.view([1, kv_heads, length, width]));
    let output = match settings {
        None => causal_attention(q, k, v, &case.options).0,
        Some(settings) => {
            let sinks = settings.sink_tokens;
            let sizes: Vec<usize> = (settings.blocks.iter())
                .flat_map(|blocks| std::iter::once(blocks.size).chain(blocks.coarse.iter().map(|coarse| coarse.size)))
                .collect();
            let reaching = settings.blocks.as_ref().is_some_and(|blocks| blocks.reach > 0.0);
            let mut means: Vec<[Vec<f32>; 3]> = Vec::new();
            for &size in &sizes {
                let runs = 0..length / size;
                let of = |rows| block_means(rows, 0, size, sinks, runs.clone());
                let (mean_keys, mean_values) = (of(k), of(v));
                let of_runs = |means, size| Heads::contiguous(means, [1, kv_heads, length / size, width]);
                let radii = match means.first() {
                    None => block_radii(k, of_runs(&mean_keys[..], size), 0, size, sinks, runs),
                    Some([block_keys, _, radii]) => {
                        let of_blocks = (of_runs(&block_keys[..], sizes[0]), of_runs(&radii[..], sizes[0]));
                        run_radii(of_runs(&mean_keys[..], size), of_blocks, sizes[0], size / sizes[0], sinks, runs)
                    }
                };
                means.push([mean_keys, mean_values, radii]);
            }
            let views: Vec<RunMeans<'_>> = (means.iter().zip(&sizes))
                .map(|([keys, values, radii], size)| {
                    let of = |rows| Heads::contiguous(rows, [1, kv_heads, length / size, width]);
                    RunMeans { keys: of(&keys[..]), values: of(&values[..]), radii: reaching.then(|| of(&radii[..])) }
                })
                .collect();
            let input = BlockInput { query: q, keys: k, values: v, first: 0, sinks: None, means: &views, near: None };
            block_attention(&input, settings, &case.options).0
        }
    };
    let naive = Naive { case, query: &query, keys: &keys, values: &values };
    for head in 0..heads {
        for token in 0..tokens {
            let expected = naive.output(head, token, settings);
            let found = &output[(head * tokens + token) * width..][..width];
            for (at, (&found, expected)) in found.iter().zip(&expected).enumerate() {
                let difference = (f64::from(found) - expected).abs();
                prop_assert!(
                    difference < 1e-5,
                    "head {head}, token {token}, number {at}: {found}, expected {expected}"
                );
            }
        }
    }
    Ok(())
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (1usize..4, 1usize..6, prop_oneof![1usize..20, Just(32), Just(64), Just(80)], 0usize..80, 1usize..90);
    let features = (prop::option::of(2.0f32..20.0), prop::option::of(1usize..90), any::<bool>(), any::<u32>());
    let stored = prop_oneof![2 => Just(StoredAs::F32), 1 => Just(StoredAs::F16), 1 => Just(StoredAs::Bf16)];
    (sizes, features, stored).prop_map(
        |((kv_heads, group, width, past, tokens), (softcap, window, alibi, seed), stored)| {
            let heads = kv_heads * group;
            let slopes = alibi.then(|| (1..=heads).map(|h| 0.5 / h as f32).collect());
            let options = CausalOptions { scale: 1.0 / (width as f32).sqrt(), softcap, window, slopes };
            Case { heads, kv_heads, width, past, tokens, options, seed: u64::from(seed), stored }
        },
    )
}

fn settings() -> impl Strategy<Value = BlockOptions> {
    let chunk = (1usize..5, 1usize..6).prop_map(|(size, count)| (size, size * count));
    // Times the size of the runs before, how much further back, how many are opened.
    let coarse = prop::collection::vec((1usize..4, prop_oneof![Just(1000usize), 0usize..30], 1usize..4), 0..3);
    let levels = (prop_oneof![Just(0usize), 0usize..100], coarse);
    let reach = prop_oneof![Just(0.0f32), 0.1f32..1.0];
    let far = (any::<bool>(), prop_oneof![Just(0.0f32), -3.0f32..1.0]);
    let blocks = (1usize..20, (far, reach), levels);
    (chunk, 0usize..3, 0usize..7, prop::option::weighted(0.9, blocks)).prop_map(
        |((size, chunk_size), local_chunks, sink_tokens, blocks)| BlockOptions {
            chunk_size,
            local_chunks,
            sink_tokens,
            blocks: blocks.map(|(top_k, ((far, far_shift), reach), (exact_tokens, levels))| {
                let longer = |(run, before): &mut (usize, usize), (times, further, opened): (usize, usize, usize)| {
                    (*run, *before) = (*run * times, *before + further);
                    Some(Coarse { size: *run, beyond: *before, opened })
                };
                let coarse = levels.into_iter().scan((size, 0), longer).collect();
                Blocks { size, top_k, reach, far, far_shift, exact_tokens, coarse }
            }),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn causal_attention_is_its_definition(case in case()) {
        check(&case, None)?;
    }

    #[test]
    fn block_attention_is_its_definition(case in case(), settings in settings()) {
        check(&case, Some(&settings))?;
    }
}

#[test]
fn many_steps_of_keys_give_one_softmax() {
    let options = CausalOptions { scale: 0.5, softcap: None, window: None, slopes: None };
    let case =
        Case { heads: 3, kv_heads: 1, width: 16, past: 1500, tokens: 70, options, seed: 7, stored: StoredAs::F32 };
    check(&case, None).expect("equal");
    let windowed = CausalOptions { window: Some(700), ..case.options.clone() };
    check(&Case { options: windowed, ..case.clone() }, None).expect("equal");
    let coarse = |size, beyond| Coarse { size, beyond, opened: 3 };
    for (size, top_k, coarse) in [
        (8, 32, vec![coarse(128, 8192)]),
        (16, 16, vec![coarse(128, 8192)]),
        (16, 16, vec![coarse(128, 256)]),
        (8, 16, vec![coarse(128, 256)]),
        (4, 76, vec![]),
        (4, 76, vec![coarse(32, 256)]),
        (4, 16, vec![coarse(32, 256)]),
        (4, 16, vec![coarse(32, 128), coarse(256, 256)]),
        (16, 8, vec![coarse(64, 64), coarse(128, 128), coarse(256, 256)]),
    ] {
        let reach = if top_k == 32 { 0.0 } else { 0.75 };
        let blocks = Some(Blocks { size, top_k, reach, far: true, far_shift: -0.5, exact_tokens: 0, coarse });
        let settings = BlockOptions { chunk_size: 128, local_chunks: 1, sink_tokens: 4, blocks };
        check(&case, Some(&settings)).unwrap_or_else(|error| panic!("{error} {settings:?}"));
        check(&Case { heads: 1, ..case.clone() }, Some(&settings)).expect("equal");
    }
}
