//! Choosing a token from its scores.

use bsbr_model::{ModelError, Sampler, SamplingConfig};

const SCORES: [f32; 5] = [0.3, 1.9, -1.2, 1.1, 0.8];
const DRAWS: usize = 20_000;

fn sampler(config: SamplingConfig) -> Sampler {
    Sampler::new(config).unwrap()
}

/// How often each of five tokens is chosen.
fn frequencies(config: SamplingConfig, scores: &[f32; 5]) -> [usize; 5] {
    let mut sampler = sampler(config);
    let mut counts = [0; 5];
    for _ in 0..DRAWS {
        counts[sampler.choose(scores).unwrap() as usize] += 1;
    }
    counts
}

/// Softmax of the scores of the allowed tokens; the others have none.
fn softmax(temperature: f64, allowed: &[usize]) -> [f64; 5] {
    let mut weights = [0.0; 5];
    for &token in allowed {
        weights[token] = (f64::from(SCORES[token]) / temperature).exp();
    }
    let total: f64 = weights.iter().sum();
    weights.map(|weight| weight / total)
}

/// Counts within four standard deviations of what the probabilities predict.
fn assert_distributed(counts: [usize; 5], probabilities: [f64; 5]) {
    for (token, (&count, p)) in counts.iter().zip(probabilities).enumerate() {
        let (expected, sigma) = (DRAWS as f64 * p, (DRAWS as f64 * p * (1.0 - p)).sqrt());
        let off = (count as f64 - expected).abs();
        assert!(off <= 4.0 * sigma, "token {token} came {count} times, expected {expected:.0} +- {sigma:.0}");
    }
}

#[test]
fn tokens_come_as_often_as_the_softmax_says() {
    for temperature in [0.5, 1.0, 2.0] {
        let config = SamplingConfig { temperature, seed: 3, ..Default::default() };
        assert_distributed(frequencies(config, &SCORES), softmax(temperature, &[0, 1, 2, 3, 4]));
    }
}

#[test]
fn top_k_leaves_the_best_tokens_their_shares() {
    let config = SamplingConfig { temperature: 1.0, top_k: Some(3), ..Default::default() };
    assert_distributed(frequencies(config, &SCORES), softmax(1.0, &[1, 3, 4]));
}

#[test]
fn top_p_leaves_the_smallest_sufficient_set() {
    // Probabilities by rank: token 1, 3, 4, 0, 2 with 0.48, 0.22, 0.16, 0.10, 0.02 together 0.48, 0.70, 0.86, 0.98, 1.
    let order = [1, 3, 4, 0, 2];
    let p = softmax(1.0, &order);
    let mut reached = 0.0;
    for (rank, &token) in order.iter().enumerate() {
        let below = reached;
        reached += p[token];
        // Just over what the better tokens reach, and just under what they reach with this one.
        for top_p in [below + 1e-6, reached - 1e-6] {
            let config = SamplingConfig { temperature: 1.0, top_p: Some(top_p), ..Default::default() };
            assert_distributed(frequencies(config, &SCORES), softmax(1.0, &order[..=rank]));
        }
    }
}

#[test]
fn top_p_counts_what_top_k_has_left() {
    // Of tokens 1 and 3 alone, token 1 holds 0.69.
    let config = |top_p| SamplingConfig { temperature: 1.0, top_k: Some(2), top_p: Some(top_p), ..Default::default() };
    assert_distributed(frequencies(config(0.68), &SCORES), softmax(1.0, &[1]));
    assert_distributed(frequencies(config(0.70), &SCORES), softmax(1.0, &[1, 3]));
}

#[test]
fn one_token_left_is_the_greedy_one() {
    let choices = [
        SamplingConfig::default(),
        SamplingConfig { temperature: 5.0, top_k: Some(1), ..Default::default() },
        SamplingConfig { temperature: 5.0, top_p: Some(1e-9), ..Default::default() },
        SamplingConfig { temperature: 1e-9, ..Default::default() },
    ];
    for config in choices {
        assert_eq!(frequencies(config, &SCORES), [0, DRAWS, 0, 0, 0]);
    }
}

#[test]
fn equal_scores_go_to_the_lower_token() {
    let scores = [0.0, 2.0, 2.0, 2.0, -1.0];
    for config in [
        SamplingConfig::default(),
        SamplingConfig { temperature: 1.0, top_k: Some(1), ..Default::default() },
        SamplingConfig { temperature: 1.0, top_p: Some(0.1), ..Default::default() },
    ] {
        assert_eq!(frequencies(config, &scores), [0, DRAWS, 0, 0, 0]);
    }
    let two = frequencies(SamplingConfig { temperature: 1.0, top_k: Some(2), ..Default::default() }, &scores);
    assert!(two[1] > 0 && two[2] > 0 && two[1] + two[2] == DRAWS, "{two:?}");
    assert_eq!(sampler(SamplingConfig::default()).choose(&[-0.0, 0.0]).unwrap(), 0, "zeros are equal");
}

#[test]
fn a_seed_decides_the_choices() {
    let draws = |seed| {
        let mut sampler = sampler(SamplingConfig { temperature: 1.0, seed, ..Default::default() });
        (0..50).map(|_| sampler.choose(&SCORES).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

#[test]
fn a_token_that_cannot_come_never_does() {
    let config = SamplingConfig { temperature: 1.0, ..Default::default() };
    let scores = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    let counts = frequencies(config, &scores);
    assert_eq!(counts[1] + counts[3], DRAWS);
    assert!(counts[1] > 0 && counts[3] > 0);
}

#[test]
fn scores_that_are_no_distribution_are_errors() {
    for temperature in [0.0, 1.0] {
        let mut sampler = sampler(SamplingConfig { temperature, ..Default::default() });
        let error = sampler.choose(&[1.0, f32::NAN, 2.0]).unwrap_err();
        assert_eq!(error.to_string(), "the score of token 1 is not a number");
        assert!(matches!(sampler.choose(&[]), Err(ModelError::EmptyInput)));
    }
    let mut sampler = sampler(SamplingConfig { temperature: 1.0, ..Default::default() });
    for scores in [[1.0, f32::INFINITY, 2.0], [f32::NEG_INFINITY; 3]] {
        assert!(matches!(sampler.choose(&scores), Err(ModelError::Input(_))), "{scores:?}");
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let default = SamplingConfig::default;
    let bad = [
        ("temperature", SamplingConfig { temperature: -0.1, ..default() }),
        ("temperature", SamplingConfig { temperature: f64::NAN, ..default() }),
        ("temperature", SamplingConfig { temperature: f64::INFINITY, ..default() }),
        ("top_k", SamplingConfig { top_k: Some(0), ..default() }),
        ("top_p", SamplingConfig { top_p: Some(0.0), ..default() }),
        ("top_p", SamplingConfig { top_p: Some(1.1), ..default() }),
        ("top_p", SamplingConfig { top_p: Some(f64::NAN), ..default() }),
        ("min_p", SamplingConfig { min_p: Some(-0.1), ..default() }),
        ("min_p", SamplingConfig { min_p: Some(1.1), ..default() }),
        ("repeat_penalty", SamplingConfig { repeat_penalty: 0.0, ..default() }),
        ("repeat_penalty", SamplingConfig { repeat_penalty: f64::NAN, ..default() }),
    ];
    for (name, config) in bad {
        let result = Sampler::new(config);
        assert!(matches!(result, Err(ModelError::Config { setting, .. }) if setting == name), "{result:?}");
    }
    let edge = SamplingConfig { temperature: 0.0, top_k: Some(1), top_p: Some(1.0), seed: u64::MAX, ..default() };
    assert!(Sampler::new(edge).is_ok());
}

#[test]
fn min_p_leaves_what_is_probable_beside_the_best() {
    // Beside the best, token 1: 3 has 0.45 of its probability, 4 has 0.33, 0 has 0.20, 2 has 0.05.
    for (min_p, allowed) in [(0.0, vec![0, 1, 2, 3, 4]), (0.15, vec![0, 1, 3, 4]), (0.4, vec![1, 3]), (1.0, vec![1])] {
        let config = SamplingConfig { temperature: 1.0, min_p: Some(min_p), seed: 5, ..Default::default() };
        assert_distributed(frequencies(config, &SCORES), softmax(1.0, &allowed));
    }
    // The temperature comes first, as in transformers.
    let config = SamplingConfig { temperature: 3.0, min_p: Some(0.5), seed: 5, ..Default::default() };
    assert_distributed(frequencies(config, &SCORES), softmax(3.0, &[0, 1, 3, 4]));
}

#[test]
fn a_repeat_penalty_makes_what_was_there_less_likely() {
    let config = |repeat_last| SamplingConfig { repeat_penalty: 2.0, repeat_last, ..Default::default() };
    // 1.9 becomes 0.95 once token 1 was chosen, and 1.1 becomes 0.55: then 0.95 is the best again.
    let mut sampler = Sampler::new(config(64)).unwrap();
    let chosen: Vec<u32> = (0..4).map(|_| sampler.choose(&SCORES).unwrap()).collect();
    assert_eq!(chosen, [1, 3, 1, 1]);
    // A prompt counts; a score below 0 falls.
    let mut sampler = Sampler::new(config(64)).unwrap();
    sampler.see(&[1, 3, 4, 0, 99]);
    assert_eq!(sampler.choose(&SCORES).unwrap(), 1);
    let mut sampler = Sampler::new(config(64)).unwrap();
    sampler.see(&[0]);
    assert_eq!(sampler.choose(&[-1.0, -1.5]).unwrap(), 1);
    // What is older than the newest tokens is forgotten.
    let mut sampler = Sampler::new(config(1)).unwrap();
    sampler.see(&[1, 3]);
    assert_eq!((sampler.choose(&SCORES).unwrap(), sampler.choose(&SCORES).unwrap()), (1, 3));
    let mut sampler = Sampler::new(config(0)).unwrap();
    sampler.see(&[1]);
    assert_eq!(sampler.choose(&SCORES).unwrap(), 1);
}
