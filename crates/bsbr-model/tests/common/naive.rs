//! The decoder written out in f64, number by number: the independent reference.

use std::{collections::HashMap, f64::consts::PI};

use bsbr_model::{Activation, ModelConfig, Norm, PositionPolicy, Positions, weight_specs};

use super::weight;

type Rows = Vec<Vec<f64>>;

/// A decoder with the weights of [`super::NamedWeights`] and its original attention.
pub(crate) struct Naive {
    config: ModelConfig,
    weights: HashMap<String, Vec<f64>>,
    /// Inverse frequencies and the factor on cos and sin: those without scaling unless a test says otherwise.
    pub(crate) rotation: (Vec<f64>, f64),
}

impl Naive {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let weights = weight_specs(config).into_iter().map(|spec| {
            let numbers = weight(&spec).into_iter().map(f64::from).collect();
            (spec.name, numbers)
        });
        let frequencies = match config.decoder.positions {
            Positions::Learned => Vec::new(),
            Positions::Rotary { theta, rotary_dim, .. } => {
                (0..rotary_dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / rotary_dim as f64)).collect()
            }
        };
        Self { config: config.clone(), weights: weights.collect(), rotation: (frequencies, 1.0) }
    }

    /// Scores after each token, `[tokens][vocab_size]`.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Rows {
        let decoder = &self.config.decoder;
        let mut stream: Rows = Vec::new();
        for (position, &token) in tokens.iter().enumerate() {
            let mut x = self.row("embed.weight", token as usize);
            if decoder.positions == Positions::Learned {
                add(&mut x, &self.learned_position(position, tokens.len()));
            }
            stream.push(x);
        }
        for layer in 0..decoder.layers {
            let at = |part: &str| format!("layers.{layer}.{part}");
            let normed: Rows = stream.iter().map(|x| self.norm(&at("attention_norm"), x)).collect();
            for (x, read) in stream.iter_mut().zip(self.attention(layer, &normed)) {
                add(x, &self.linear(&at("attention.output"), &read));
            }
            for x in &mut stream {
                let normed = self.norm(&at("mlp_norm"), x);
                let mut inner = self.linear(&at("mlp.up"), &normed);
                if decoder.gated_mlp {
                    let gate = self.linear(&at("mlp.gate"), &normed);
                    inner.iter_mut().zip(gate).for_each(|(up, gate)| *up *= self.activate(gate));
                } else {
                    inner.iter_mut().for_each(|x| *x = self.activate(*x));
                }
                add(x, &self.linear(&at("mlp.down"), &inner));
            }
        }
        let head = if decoder.tied_head { "embed" } else { "head" };
        stream.iter().map(|x| self.linear(head, &self.norm("final_norm", x))).collect()
    }

    /// What each token reads, `[tokens][heads * head_dim]`.
    fn attention(&self, layer: usize, normed: &Rows) -> Rows {
        let decoder = &self.config.decoder;
        let width = decoder.head_dim;
        let project = |part: &str| -> Rows {
            normed.iter().map(|x| self.linear(&format!("layers.{layer}.attention.{part}"), x)).collect()
        };
        let (mut queries, mut keys, values) = (project("query"), project("key"), project("value"));
        for rows in [&mut queries, &mut keys] {
            for (position, row) in rows.iter_mut().enumerate() {
                row.chunks_exact_mut(width).for_each(|head| self.rotate(head, position));
            }
        }
        let divisor = if decoder.scale_by_layer { (layer + 1) as f64 } else { 1.0 };
        let window = decoder.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
        let mut read = vec![vec![0.0; decoder.heads * width]; normed.len()];
        for (token, read) in read.iter_mut().enumerate() {
            for head in 0..decoder.heads {
                let query = &queries[token][head * width..][..width];
                let kv = head / (decoder.heads / decoder.kv_heads) * width;
                let seen = (0..=token).filter(|key| token - key < window);
                let weights: Vec<(usize, f64)> = seen
                    .map(|key| {
                        let score = decoder.attention_scale / divisor * dot(query, &keys[key][kv..][..width]);
                        (key, decoder.attention_softcap.map_or(score, |cap| cap * (score / cap).tanh()).exp())
                    })
                    .collect();
                let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
                for (key, weight) in weights {
                    for i in 0..width {
                        read[head * width + i] += weight / total * values[key][kv + i];
                    }
                }
            }
        }
        read
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let (frequencies, factor) = &self.rotation;
        let half = frequencies.len();
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (a, b) = (head[i], head[half + i]);
            head[i] = factor * (a * cos - b * sin);
            head[half + i] = factor * (b * cos + a * sin);
        }
    }

    fn learned_position(&self, position: usize, length: usize) -> Vec<f64> {
        let last = self.config.decoder.max_positions - 1;
        if self.config.position_policy != PositionPolicy::Interpolate || length <= last + 1 {
            return self.row("position.weight", position.min(last));
        }
        let place = position as f64 * last as f64 / (length - 1) as f64;
        let (below, above) =
            (self.row("position.weight", place as usize), self.row("position.weight", last.min(place as usize + 1)));
        below.iter().zip(above).map(|(below, above)| below + (above - below) * place.fract()).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let decoder = &self.config.decoder;
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let centre = if decoder.norm == Norm::Layer { mean(x) } else { 0.0 };
        let centred: Vec<f64> = x.iter().map(|x| x - centre).collect();
        let squares: Vec<f64> = centred.iter().map(|x| x * x).collect();
        let size = (mean(&squares) + decoder.norm_eps).sqrt();
        let weight = &self.weights[&format!("{name}.weight")];
        let mut normed: Vec<f64> = centred.iter().zip(weight).map(|(x, weight)| x / size * weight).collect();
        if decoder.norm == Norm::Layer {
            add(&mut normed, &self.weights[&format!("{name}.bias")]);
        }
        normed
    }

    /// `W x + b` with `W` `[out, in]`; `b` where there is one.
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mut y: Vec<f64> =
            self.weights[&format!("{name}.weight")].chunks_exact(x.len()).map(|row| dot(row, x)).collect();
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            add(&mut y, bias);
        }
        y
    }

    fn row(&self, table: &str, row: usize) -> Vec<f64> {
        let width = self.config.decoder.hidden_size;
        self.weights[table][row * width..][..width].to_vec()
    }

    fn activate(&self, x: f64) -> f64 {
        match self.config.decoder.activation {
            Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            Activation::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
        }
    }
}

/// `erf x = 2 / sqrt(pi) e^(-x^2) sum_n 2^n x^(2n+1) / (1 3 5 .. 2n+1)`: terms of one sign, so nothing cancels.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, 0.0);
    for n in 0..400 {
        sum += term;
        term *= 2.0 * x * x / (2 * n + 3) as f64;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    assert_eq!(x.len(), y.len());
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
