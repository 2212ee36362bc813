//! What single tokens are said to read, against the definitions in f64 and against what attention gives.

mod common;

use std::collections::BTreeMap;

use bsbr_attn::{AttentionCache, AttentionError, Far, HeadReads, Kernel, Retrieval, TokenReads, full_reads};
use burn::tensor::Device;
use common::{
    Case, Inputs, cpu_devices,
    index::{DECIDED, Reference, Source},
    index_cases, naive, other_cases, settings,
};
use proptest::prelude::*;

/// A cache that watches `positions`, and the text read through it in pieces.
fn watched(case: &Case, inputs: &Inputs, positions: &[usize], device: &Device, pieces: &[usize]) -> Vec<TokenReads> {
    let config = bsbr_attn::CacheConfig { kernel: Kernel::Plain, ..case.cache_config() };
    let mut cache = AttentionCache::new(config, device).unwrap();
    if let Some(far) = &case.far {
        cache = cache.with_far_positions(far.clone()).unwrap();
    }
    let mut cache = cache.watching(positions).unwrap();
    let mut from = 0;
    for end in pieces.iter().copied().filter(|&end| end < case.tokens).chain([case.tokens]) {
        if end > from {
            case.feed(&mut cache, inputs, from..end, device);
            from = end;
        }
    }
    cache.seen().to_vec()
}

/// Everything a head reads, by what it stands for.
fn by_source(head: &HeadReads) -> BTreeMap<(u8, usize, usize), f64> {
    let key = |kind| move |&(at, p): &(usize, f32)| ((kind, at, at + 1), f64::from(p));
    let runs = head.runs.iter().map(|(run, p)| ((2, run.start, run.end), f64::from(*p)));
    let sink = (head.sink > 0.0).then_some(((3, 0, 0), f64::from(head.sink)));
    head.near.iter().map(key(0)).chain(head.chosen.iter().map(key(1))).chain(runs).chain(sink).collect()
}

fn expected(weights: Vec<(Source, f64)>) -> BTreeMap<(u8, usize, usize), f64> {
    let named = |(source, p)| match source {
        Source::Near(at) => ((0, at, at + 1), p),
        Source::Chosen(at) => ((1, at, at + 1), p),
        Source::Run(run) => ((2, run.start, run.end), p),
        Source::Sink => ((3, 0, 0), p),
    };
    weights.into_iter().map(named).collect()
}

fn alike(found: &BTreeMap<(u8, usize, usize), f64>, expected: &BTreeMap<(u8, usize, usize), f64>) -> bool {
    found.keys().eq(expected.keys()) && found.values().zip(expected.values()).all(|(a, b)| (a - b).abs() <= 2e-5)
}

proptest! {
    #![proptest_config(settings(96))]

    #[test]
    fn every_key_and_run_that_an_index_has_read_is_named_with_its_probability(
        mut case in index_cases(), pieces in prop::collection::btree_set(1usize..450, 0..3),
    ) {
        case.batch = 1;
        let inputs = case.inputs();
        let pieces: Vec<usize> = pieces.into_iter().collect();
        // The last token has most to read.
        let positions: Vec<usize> = (0..case.tokens).rev().step_by(7).collect();
        for device in cpu_devices() {
            let mut stored = case.clone();
            if !device.supports_dtype(case.stored) {
                stored.stored = burn::tensor::DType::F32;
            }
            let seen = watched(&stored, &inputs, &positions, &device, &pieces);
            let found: Vec<usize> = seen.iter().map(|token| token.position).collect();
            prop_assert_eq!(&found, &positions.iter().rev().copied().collect::<Vec<_>>());
            let mut reference = Reference::new(&case, &inputs);
            for token in &seen {
                prop_assert_eq!(token.heads.len(), case.heads);
                for (h, head) in token.heads.iter().enumerate() {
                    let (weights, margin) = reference.weights(h, token.position);
                    let (found, expected) = (by_source(head), expected(weights));
                    prop_assert!(
                        alike(&found, &expected) || margin < DECIDED,
                        "token {} of head {h}: {found:?} instead of {expected:?}", token.position
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(settings(192))]

    /// What a token reads gives its output again: keys by their values, runs by the mean value of theirs. With states the values
    /// of runs are others, and the probabilities alone are left to compare.
    #[test]
    fn the_values_of_what_was_read_by_its_probability_are_the_output(mut case in other_cases()) {
        case.batch = 1;
        let inputs = case.inputs();
        let positions: Vec<usize> = (0..case.tokens).collect();
        let device = &cpu_devices()[0];
        let seen = watched(&case, &inputs, &positions, device, &[case.tokens / 2]);
        prop_assert_eq!(seen.len(), case.tokens);
        let plain = matches!(case.config.retrieval, Retrieval::None | Retrieval::Blocks) && case.config.far != Far::State;
        for (token, h) in seen.iter().flat_map(|token| (0..case.heads).map(move |h| (token, h))) {
            let (t, head, kv) = (token.position, &token.heads[h], h / (case.heads / case.kv_heads));
            let all: f64 = by_source(head).values().sum();
            prop_assert!((all - 1.0).abs() < 1e-4, "token {t}: {all}");
            prop_assert!(head.near.iter().chain(&head.chosen).all(|(at, _)| *at <= t));
            let local = case.config.local_start(t / case.config.chunk_size);
            prop_assert!(head.runs.iter().all(|(run, _)| run.end <= local && run.start >= case.config.sink_tokens.min(local)));
            if !plain {
                continue;
            }
            let mut output = vec![0.0; case.head_dim];
            let mut add = |p: f32, value: Vec<f64>| output.iter_mut().zip(value).for_each(|(sum, x)| *sum += f64::from(p) * x);
            let value = |at: usize| inputs.values.row(0, kv, at);
            head.near.iter().chain(&head.chosen).for_each(|&(at, p)| add(p, value(at)));
            for (run, p) in &head.runs {
                add(*p, naive::mean(&run.clone().map(value).collect::<Vec<_>>(), case.head_dim));
            }
            let defined = case.naive(&inputs, 0, h, t);
            let right = output.iter().zip(&defined).all(|(found, defined)| (found - defined).abs() < 5e-5 * (1.0 + defined.abs()));
            prop_assert!(right, "token {t} of head {h}: {output:?} instead of {defined:?}");
        }
    }

    #[test]
    fn full_attention_reads_every_key_by_a_softmax_over_all_it_sees(mut case in other_cases()) {
        case.batch = 1;
        let inputs = case.inputs();
        let device = &cpu_devices()[0];
        let [query, keys, values] = [&inputs.query, &inputs.keys, &inputs.values].map(|rows| rows.tensor(device));
        let positions: Vec<usize> = (0..case.tokens).step_by(3).collect();
        let seen = full_reads(&query, &keys, &positions, &case.options).unwrap();
        for token in &seen {
            let first = case.options.window.map_or(0, |window| (token.position + 1).saturating_sub(window));
            for (h, head) in token.heads.iter().enumerate() {
                let score = |at| case.key_score(&inputs, (0, h, token.position), at, None);
                let scores: Vec<f64> = (first..=token.position).map(score).chain(case.sink(h)).collect();
                let keys = (first..=token.position).map(|at| (0, at, at + 1));
                let expected: BTreeMap<_, _> = keys.chain([(3, 0, 0)]).zip(naive::softmax(&scores)).collect();
                prop_assert!(alike(&by_source(head), &expected), "token {}", token.position);
            }
        }
        // The same through a cache.
        let config = bsbr_attn::CacheConfig { attention: None, kernel: Kernel::Plain, ..case.cache_config() };
        let mut cache = AttentionCache::new(config, device).unwrap().watching(&positions).unwrap();
        cache.prefill(query, keys, values, None).unwrap();
        for (a, b) in cache.seen().iter().zip(&seen) {
            prop_assert_eq!(a.position, b.position);
            for (a, b) in a.heads.iter().zip(&b.heads) {
                prop_assert!(alike(&by_source(a), &by_source(b)));
            }
        }
    }
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let case = Case {
        batch: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 4,
        tokens: 8,
        config: Default::default(),
        options: bsbr_attn::AttentionOptions::new(4),
        seed: 1,
        far: None,
        stored: burn::tensor::DType::F32,
    };
    let device = &cpu_devices()[0];
    let config = case.cache_config();
    let refused = |config| AttentionCache::new(config, device).unwrap().watching(&[0]).unwrap_err().to_string();
    assert!(refused(config.clone()).starts_with("setting `kernel` is Fastest, expected Plain"));
    let plain = bsbr_attn::CacheConfig { kernel: Kernel::Plain, ..config };
    assert!(refused(plain.clone()).starts_with("setting `batch` is 2, expected 1"));
    let one = Case { batch: 1, ..case };
    let inputs = one.inputs();
    let mut cache = AttentionCache::new(bsbr_attn::CacheConfig { batch: 1, ..plain }, device).unwrap();
    one.feed(&mut cache, &inputs, 0..8, device);
    let held = cache.watching(&[0]).unwrap_err();
    assert_eq!(held, AttentionError::Input("8 tokens are in already: watch tokens from the first on".into()));
    let (query, keys) = (inputs.query.tensor(device), inputs.keys.tensor(device));
    let beyond = full_reads(&query, &keys, &[3, 8], &one.options).unwrap_err();
    assert_eq!(beyond, AttentionError::Input("the token at 8 was asked for, the text has 8".into()));
    let short = full_reads(&query, &keys.narrow(2, 0, 7), &[3], &one.options).unwrap_err();
    assert!(short.to_string().starts_with("`keys` has shape [1, 1, 7, 4]"), "{short}");
}
