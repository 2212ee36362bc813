//! Attention against the definition in f64.

use bsbr_kernels::{
    Heads,
    attention::{BlockInput, BlockOptions, Blocks, CausalOptions, block_attention, block_means, causal_attention},
};
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

    fn mean(&self, data: &[f32], head: usize, positions: &std::ops::Range<usize>) -> Vec<f64> {
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
        let mut exact = |range: std::ops::Range<usize>, columns: &mut Vec<(f64, Vec<f64>)>| {
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
                    let all: Vec<std::ops::Range<usize>> = (0..local / blocks.size)
                        .map(|j| (j * blocks.size).max(settings.sink_tokens)..(j + 1) * blocks.size)
                        .filter(|block| !block.is_empty() && block.end > first)
                        .collect();
                    let chosen = self.choice(head, token, settings, blocks, &all);
                    for (j, block) in all.iter().enumerate() {
                        if chosen.contains(&j) {
                            exact(block.clone(), &mut columns);
                        } else if blocks.far && block.start >= first {
                            columns.push((self.mass(head, token, block), self.mean(self.values, head, block)));
                        }
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

    fn mass(&self, head: usize, token: usize, block: &std::ops::Range<usize>) -> f64 {
        let middle = (block.start + block.end - 1) as f64 / 2.0;
        (block.len() as f64).ln() + self.logit(head, token, &self.mean(self.keys, head, block), middle)
    }

    fn choice(
        &self,
        head: usize,
        token: usize,
        settings: &BlockOptions,
        blocks: &Blocks,
        all: &[std::ops::Range<usize>],
    ) -> Vec<usize> {
        let group = self.case.heads / self.case.kv_heads;
        let position = self.case.past + token;
        let first = self.case.options.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let chunk = position / settings.chunk_size;
        let local = chunk.saturating_sub(settings.local_chunks) * settings.chunk_size;
        let mut scores = vec![0.0; all.len()];
        for head in head / group * group..(head / group + 1) * group {
            let masses: Vec<f64> = all.iter().map(|block| self.mass(head, token, block).exp()).collect();
            let exact: f64 = (0..settings.sink_tokens.min(local))
                .chain(local..position + 1)
                .filter(|&at| at >= first)
                .map(|at| self.logit(head, token, &self.kv(self.keys, head, at), at as f64).exp())
                .sum();
            let total: f64 = exact + masses.iter().sum::<f64>();
            for (score, mass) in scores.iter_mut().zip(masses) {
                *score += mass / total;
            }
        }
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(blocks.top_k);
        order
    }
}

fn check(case: &Case, settings: Option<&BlockOptions>) -> Result<(), TestCaseError> {
    let Case { heads, kv_heads, width, past, tokens, .. } = *case;
    let length = past + tokens;
    let query = numbers(case.seed, heads * tokens * width, 1.0);
    let keys = numbers(case.seed + 1, kv_heads * length * width, 1.0);
    let values = numbers(case.seed + 2, kv_heads * length * width, 1.0);
    let of = |data, rows, heads| Heads::contiguous(data, [1, heads, rows, width]);
    let (q, k, v) = (of(&query[..], tokens, heads), of(&keys[..], length, kv_heads), of(&values[..], length, kv_heads));
    let output = match settings {
        None => causal_attention(q, k, v, &case.options).0,
        Some(settings) => {
            let size = settings.blocks.as_ref().map_or(1, |blocks| blocks.size);
            let count = length / size;
            let means = |rows| block_means(rows, 0, size, settings.sink_tokens, 0..count);
            let (mean_keys, mean_values) = (means(k), means(v));
            let of = |data| Heads::contiguous(data, [1, kv_heads, count, width]);
            let input = BlockInput {
                query: q,
                keys: k,
                values: v,
                first: 0,
                sinks: None,
                means: Some((of(&mean_keys[..]), of(&mean_values[..]))),
            };
            block_attention(&input, settings, &case.options)
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
    (sizes, features).prop_map(|((kv_heads, group, width, past, tokens), (softcap, window, alibi, seed))| {
        let heads = kv_heads * group;
        let slopes = alibi.then(|| (1..=heads).map(|h| 0.5 / h as f32).collect());
        let options = CausalOptions { scale: 1.0 / (width as f32).sqrt(), softcap, window, slopes };
        Case { heads, kv_heads, width, past, tokens, options, seed: u64::from(seed) }
    })
}

fn settings() -> impl Strategy<Value = BlockOptions> {
    let chunk = (1usize..5, 1usize..6).prop_map(|(size, count)| (size, size * count));
    (chunk, 0usize..3, 0usize..7, prop::option::weighted(0.9, (1usize..20, any::<bool>()))).prop_map(
        |((size, chunk_size), local_chunks, sink_tokens, blocks)| BlockOptions {
            chunk_size,
            local_chunks,
            sink_tokens,
            blocks: blocks.map(|(top_k, far)| Blocks { size, top_k, far }),
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
    let case = Case { heads: 3, kv_heads: 1, width: 16, past: 1500, tokens: 70, options, seed: 7 };
    check(&case, None).expect("equal");
    let windowed = CausalOptions { window: Some(700), ..case.options.clone() };
    check(&Case { options: windowed, ..case.clone() }, None).expect("equal");
    for (size, top_k) in [(8, 32), (16, 16)] {
        let blocks = Some(Blocks { size, top_k, far: true });
        let settings = BlockOptions { chunk_size: 128, local_chunks: 1, sink_tokens: 4, blocks };
        check(&case, Some(&settings)).expect("equal");
        check(&Case { heads: 1, ..case.clone() }, Some(&settings)).expect("equal");
    }
}
