//! Rotary frequencies against Hugging Face transformers, which computed `golden/rotary.json`.

use bsbr_model::{RotaryScaling, rotary_frequencies};
use serde_json::Value;

const RELATIVE: f64 = 1e-6;

/// The scaling of one entry, with the defaults of transformers where it says nothing.
fn scaling(parameters: &Value, max_positions: f64) -> Option<RotaryScaling> {
    let number = |key: &str| parameters[key].as_f64();
    let numbers = |key: &str| parameters[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let trained = number("original_max_position_embeddings").unwrap_or(max_positions);
    let original_max_positions = trained as usize;
    let factor = number("factor").unwrap_or(max_positions / trained);
    match parameters["rope_type"].as_str().unwrap() {
        "default" => None,
        "linear" => Some(RotaryScaling::Linear { factor }),
        "dynamic" => Some(RotaryScaling::Dynamic { factor, original_max_positions }),
        "yarn" => Some(RotaryScaling::Yarn {
            factor,
            original_max_positions,
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor").unwrap_or(0.1 * factor.ln() + 1.0),
            truncate: parameters["truncate"].as_bool().unwrap_or(true),
        }),
        "llama3" => Some(RotaryScaling::Llama3 {
            factor,
            low_freq_factor: number("low_freq_factor").unwrap(),
            high_freq_factor: number("high_freq_factor").unwrap(),
            original_max_positions,
        }),
        "longrope" => Some(RotaryScaling::Longrope {
            short_factor: numbers("short_factor"),
            long_factor: numbers("long_factor"),
            original_max_positions,
            attention_factor: (1.0 + factor.ln() / trained.ln()).sqrt(),
            long_attention_factor: None,
        }),
        other => panic!("the golden file has a scaling of type {other}"),
    }
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= RELATIVE * expected.abs()
}

#[test]
fn frequencies_and_factors_are_those_of_transformers() {
    let golden: Vec<Value> = serde_json::from_str(include_str!("golden/rotary.json")).unwrap();
    let mut kinds = Vec::new();
    for entry in &golden {
        let (name, parameters) = (&entry["name"], &entry["rope_parameters"]);
        let max_positions = entry["max_position_embeddings"].as_f64().unwrap();
        let head_dim = entry["head_dim"].as_u64().unwrap() as usize;
        // Without a length in the file nothing depends on it: any will do.
        let length = entry["seq_len"].as_u64().unwrap_or(77) as usize;
        let theta = parameters["rope_theta"].as_f64().unwrap();
        let (found, factor) = rotary_frequencies(theta, head_dim, scaling(parameters, max_positions).as_ref(), length);
        let expected: Vec<f64> =
            entry["inv_freq"].as_array().unwrap().iter().map(|frequency| frequency.as_f64().unwrap()).collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
            assert!(close(found, expected), "{name}, frequency {i}: {found} instead of {expected}");
        }
        let expected = entry["attention_factor"].as_f64().unwrap();
        assert!(close(factor, expected), "{name}, attention factor: {factor} instead of {expected}");
        kinds.push(parameters["rope_type"].as_str().unwrap());
    }
    kinds.dedup();
    assert_eq!(kinds, ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]);
}

#[test]
fn dynamic_frequencies_are_unchanged_up_to_the_trained_length() {
    let dynamic = RotaryScaling::Dynamic { factor: 2.0, original_max_positions: 100 };
    let at = |length| rotary_frequencies(10000.0, 16, Some(&dynamic), length).0;
    let unscaled = rotary_frequencies(10000.0, 16, None, 1).0;
    assert_eq!(at(1), unscaled);
    assert_eq!(at(100), unscaled);
    assert!(at(101)[7] < unscaled[7], "the slowest dimension turns more slowly");
}

#[test]
fn longrope_changes_its_divisors_after_the_trained_length() {
    let longrope = RotaryScaling::Longrope {
        short_factor: vec![1.0; 4],
        long_factor: vec![2.0; 4],
        original_max_positions: 100,
        attention_factor: 1.0,
        long_attention_factor: None,
    };
    let first = |length| rotary_frequencies(10000.0, 8, Some(&longrope), length).0[0];
    assert_eq!([first(100), first(101)], [1.0, 0.5]);
}

#[test]
fn an_unrounded_yarn_ramp_lies_between_the_rounded_ends() {
    let yarn = |truncate| {
        let scaling = RotaryScaling::Yarn {
            factor: 4.0,
            original_max_positions: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.0,
            truncate,
        };
        rotary_frequencies(1e6, 128, Some(&scaling), 1).0
    };
    // By hand: the dimension that turns r times over 32768 tokens is 64 ln(32768 / (2 pi r)) / ln(1e6).
    let dimension = |turns: f64| 64.0 * (32768.0 / (std::f64::consts::TAU * turns)).ln() / 1e6f64.ln();
    let (low, high) = (dimension(32.0), dimension(1.0));
    let expected = |i: usize, low: f64, high: f64| {
        let base = 1e6f64.powf(-(i as f64) / 64.0);
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        base * (1.0 - ramp) + base / 4.0 * ramp
    };
    for i in 0..64 {
        assert!(close(yarn(false)[i], expected(i, low, high)), "dimension {i}");
        assert!(close(yarn(true)[i], expected(i, low.floor(), high.ceil())), "dimension {i}, rounded");
    }
    assert_ne!(yarn(false)[30], yarn(true)[30]);
}
