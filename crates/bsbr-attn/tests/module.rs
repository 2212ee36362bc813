//! The layer with projections: against full attention written out, in pieces, and its gradients.

mod common;

use bsbr_attn::{AttentionError, BlockAttention, BlockAttentionConfig, BlockAttentionLayer, Padding, Retrieval};
use burn::tensor::{Device, Distribution, Tensor};
use common::devices;

fn random(batch: usize, tokens: usize, width: usize, device: &Device) -> Tensor<3> {
    Tensor::random([batch, tokens, width], Distribution::Normal(0.0, 1.0), device)
}

fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.try_into_vec_as::<f32>().expect("numbers").into_iter().map(f64::from).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Causal self-attention of one text with rotated queries and keys, in f64.
fn by_hand(layer: &BlockAttention, x: &[f64], tokens: usize) -> Vec<f64> {
    let sizes = layer.layer();
    let (width, head) = (sizes.width, sizes.head_dim());
    let project = |x: &[f64], linear: &burn::nn::Linear| {
        let [inputs, outputs] = linear.weight.val().dims();
        let weight = numbers(linear.weight.val());
        let row = |t: usize, o: usize| (0..inputs).map(|i| x[t * inputs + i] * weight[i * outputs + o]).sum::<f64>();
        (0..tokens * outputs).map(|at| row(at / outputs, at % outputs)).collect::<Vec<f64>>()
    };
    let (mut q, mut k, v) = (project(x, &layer.query), project(x, &layer.key), project(x, &layer.value));
    for (rows, heads) in [(&mut q, sizes.heads), (&mut k, sizes.kv_heads)] {
        for token in 0..tokens {
            for h in 0..heads {
                for pair in 0..head / 2 {
                    let angle = token as f64 * sizes.rotary_base.unwrap().powf(-(2.0 * pair as f64) / head as f64);
                    let at = (token * heads + h) * head + pair;
                    let (a, b) = (rows[at], rows[at + head / 2]);
                    rows[at] = a * angle.cos() - b * angle.sin();
                    rows[at + head / 2] = a * angle.sin() + b * angle.cos();
                }
            }
        }
    }
    let mut read = vec![0.0; tokens * width];
    for token in 0..tokens {
        for h in 0..sizes.heads {
            let kv = h * sizes.kv_heads / sizes.heads;
            let score = |j: usize| {
                let dot = (0..head)
                    .map(|i| q[(token * sizes.heads + h) * head + i] * k[(j * sizes.kv_heads + kv) * head + i]);
                (dot.sum::<f64>() / (head as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = (0..=token).map(score).collect();
            let total: f64 = weights.iter().sum();
            for i in 0..head {
                let sum: f64 =
                    weights.iter().enumerate().map(|(j, w)| w * v[(j * sizes.kv_heads + kv) * head + i]).sum();
                read[(token * sizes.heads + h) * head + i] = sum / total;
            }
        }
    }
    project(&read, &layer.output)
}

#[test]
fn a_short_text_is_read_as_by_full_attention_with_rotated_keys() {
    for device in devices() {
        let sizes = BlockAttentionLayer { kv_heads: 2, ..BlockAttentionLayer::new(32, 4) };
        let layer = sizes.init(&device).unwrap();
        let x = random(1, 40, 32, &device);
        let expected = by_hand(&layer, &numbers(x.clone()), 40);
        let off = largest_difference(&numbers(layer.forward(x).unwrap()), &expected);
        assert!(off < 1e-5, "{off}");
    }
}

#[test]
fn a_text_in_pieces_is_the_text_at_once() {
    for device in devices() {
        for retrieval in [None, Some(Retrieval::Blocks), Some(Retrieval::State)] {
            let attention = retrieval.map(|retrieval| BlockAttentionConfig {
                chunk_size: 64,
                local_chunks: 0,
                max_keys: 8,
                exact_tokens: 0,
                retrieval,
                ..Default::default()
            });
            let layer = BlockAttentionLayer { attention, ..BlockAttentionLayer::new(32, 4) }.init(&device).unwrap();
            let x = random(2, 200, 32, &device);
            let whole = numbers(layer.forward(x.clone()).unwrap());
            let mut cache = layer.new_cache(2).unwrap();
            let mut pieces = Vec::new();
            for (first, tokens) in [(0, 70), (70, 1), (71, 100), (171, 29)] {
                pieces.push(layer.step(x.clone().narrow(1, first, tokens), &mut cache).unwrap());
            }
            let off = largest_difference(&numbers(Tensor::cat(pieces, 1)), &whole);
            assert!(off < 1e-4, "{retrieval:?} {off}");
        }
    }
}

#[test]
fn every_weight_has_a_gradient() {
    for device in devices() {
        let device = Device::clone(&device).autodiff();
        let layer = BlockAttentionLayer::new(32, 4).init(&device).unwrap();
        let loss = layer.forward(random(1, 50, 32, &device)).unwrap().powi_scalar(2).sum();
        let gradients = loss.backward();
        for linear in [&layer.query, &layer.key, &layer.value, &layer.output] {
            let gradient = linear.weight.val().grad(&gradients).expect("a gradient");
            let largest = numbers(gradient).into_iter().map(f64::abs).fold(0.0, f64::max);
            assert!(largest.is_finite() && largest > 0.0, "{largest}");
        }
    }
}

#[test]
fn impossible_layers_are_refused() {
    let device = &devices()[0];
    let fails = |layer: BlockAttentionLayer, name: &str| {
        let result = layer.init(device);
        assert!(matches!(&result, Err(AttentionError::Config { setting, .. }) if *setting == name), "{result:?}");
    };
    fails(BlockAttentionLayer::new(30, 4), "heads");
    fails(BlockAttentionLayer::new(0, 0), "heads");
    fails(BlockAttentionLayer { kv_heads: 3, ..BlockAttentionLayer::new(32, 4) }, "kv_heads");
    fails(BlockAttentionLayer::new(12, 4), "head_dim");
    let attention = Some(BlockAttentionConfig::default().with_retrieval(Retrieval::Additive));
    fails(BlockAttentionLayer { attention, ..BlockAttentionLayer::new(32, 4) }, "attention");
}

#[test]
fn positions_count_real_tokens() {
    let mask = [vec![false, false, true, true, true], vec![true, false, true, false, true]];
    let padding = Padding::new(&mask).unwrap();
    assert_eq!(padding.positions(), [[0, 0, 0, 1, 2], [0, 1, 1, 2, 2]]);
}
