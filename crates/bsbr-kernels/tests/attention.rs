//! Attention against the definition in f64.

mod common;

use std::ops::Range;

use bsbr_kernels::{
    Heads, Level,
    attention::{BlockInput, BlockOptions, CausalOptions, block_attention, causal_attention},
    limit_level,
};
use common::{Numbers, StoredAs, numbers};
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

    fn output(&self, head: usize, token: usize, settings: Option<&BlockOptions>) -> Vec<f64> {
        let position = self.case.past + token;
        let first = self.case.options.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let sink = self.case.options.sink_logits.as_ref().map(|sinks| f64::from(sinks[head]));
        let mut columns: Vec<(f64, Vec<f64>)> =
            sink.map(|sink| (sink, vec![0.0; self.case.width])).into_iter().collect();
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
            let input = BlockInput { query: q, keys: k, values: v, first: 0, sinks: None, index: None, near: None };
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
    let sinks = prop::option::weighted(0.4, prop_oneof![Just(0.0f32), -8.0f32..8.0, Just(-90.0), Just(90.0)]);
    let stored = prop_oneof![2 => Just(StoredAs::F32), 1 => Just(StoredAs::F16), 1 => Just(StoredAs::Bf16)];
    (sizes, features, sinks, stored).prop_map(
        |((kv_heads, group, width, past, tokens), (softcap, window, alibi, seed), sink, stored)| {
            let heads = kv_heads * group;
            let sink_logits = sink.map(|sink| (0..heads).map(|h| sink - h as f32).collect());
            let slopes = alibi.then(|| (1..=heads).map(|h| 0.5 / h as f32).collect());
            let options = CausalOptions { scale: 1.0 / (width as f32).sqrt(), softcap, window, slopes, sink_logits };
            Case { heads, kv_heads, width, past, tokens, options, seed: u64::from(seed), stored }
        },
    )
}

fn settings() -> impl Strategy<Value = BlockOptions> {
    (1usize..30, 0usize..3, 0usize..7).prop_map(|(chunk_size, local_chunks, sink_tokens)| BlockOptions {
        chunk_size,
        local_chunks,
        sink_tokens,
        index: None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn causal_attention_is_its_definition(case in case()) {
        check(&case, None)?;
    }

    #[test]
    fn local_attention_is_its_definition(case in case(), settings in settings()) {
        check(&case, Some(&settings))?;
    }
}

#[test]
fn many_steps_of_keys_give_one_softmax() {
    let options = CausalOptions { scale: 0.5, softcap: None, window: None, slopes: None, sink_logits: None };
    let case =
        Case { heads: 3, kv_heads: 1, width: 16, past: 1500, tokens: 70, options, seed: 7, stored: StoredAs::F32 };
    check(&case, None).expect("equal");
    let windowed = CausalOptions { window: Some(700), ..case.options.clone() };
    check(&Case { options: windowed, ..case.clone() }, None).expect("equal");
}
