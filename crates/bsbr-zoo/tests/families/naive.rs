//! The decoder and every family as their definitions say, token by token in f64.

use bsbr_attn::Retrieval;
use bsbr_zoo::{DecoderConfig, Family, Positions};

use crate::common::Weight;

type Rows = Vec<Vec<f64>>;

/// A decoder of numbers.
pub(crate) struct Naive<'a> {
    pub(crate) config: &'a DecoderConfig,
    pub(crate) weights: &'a [Weight],
}

/// A weight `[rows, columns]`.
struct Matrix<'a> {
    columns: usize,
    numbers: &'a [f64],
}

impl Matrix<'_> {
    fn row(&self, row: usize) -> &[f64] {
        &self.numbers[row * self.columns..(row + 1) * self.columns]
    }

    /// `x W`.
    fn of(&self, x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; self.columns];
        for (row, x) in x.iter().enumerate() {
            for (y, w) in y.iter_mut().zip(self.row(row)) {
                *y += x * w;
            }
        }
        y
    }
}

impl Naive<'_> {
    /// Logits after every token, one row after the other.
    pub(crate) fn logits(&self, tokens: &[i64]) -> Vec<f64> {
        let embedding = self.matrix(None, "embedding");
        let mut x: Rows = tokens.iter().map(|&token| embedding.row(token as usize).to_vec()).collect();
        for layer in 0..self.config.layers {
            let normed: Rows = x.iter().map(|x| self.norm(x, Some(layer), ".norm.gain")).collect();
            let mixed = self.mix(layer, &self.convolved(layer, &normed));
            for (x, mixed) in x.iter_mut().zip(&mixed) {
                add(x, mixed, 1.0);
            }
            if self.config.mlp_factor > 0 {
                for x in &mut x {
                    let normed = self.norm(x, Some(layer), "mlp_norm.gain");
                    let inner = self.matrix(Some(layer), "mlp.up").of(&normed);
                    let inner: Vec<f64> = inner.iter().map(|y| y.max(0.0).powi(2)).collect();
                    let output = self.matrix(Some(layer), "mlp.down").of(&inner);
                    add(x, &output, 1.0);
                }
            }
        }
        let head = |x: &[f64]| match self.config.tied_head {
            true => (0..self.config.vocabulary).map(|token| dot(x, embedding.row(token))).collect(),
            false => self.matrix(None, "head").of(x),
        };
        x.iter().flat_map(|x| head(&self.norm(x, None, "norm.gain"))).collect::<Vec<f64>>()
    }

    fn weight(&self, layer: Option<usize>, end: &str) -> &Weight {
        let wanted = |weight: &&Weight| {
            let part = match layer {
                Some(layer) => weight.name.starts_with(&format!("layers.{layer}.")),
                None => !weight.name.starts_with("layers"),
            };
            part && weight.name.ends_with(end)
        };
        let found: Vec<&Weight> = self.weights.iter().filter(wanted).collect();
        let names: Vec<&str> = self.weights.iter().map(|weight| weight.name.as_str()).collect();
        assert_eq!(found.len(), 1, "`{end}` of {layer:?} in {names:?}");
        found[0]
    }

    fn matrix(&self, layer: Option<usize>, end: &str) -> Matrix<'_> {
        let weight = self.weight(layer, end);
        Matrix { columns: weight.shape[1], numbers: &weight.numbers }
    }

    fn norm(&self, x: &[f64], layer: Option<usize>, gain: &str) -> Vec<f64> {
        let root = (dot(x, x) / x.len() as f64 + 1e-6).sqrt();
        x.iter().zip(&self.weight(layer, gain).numbers).map(|(x, gain)| x / root * gain).collect()
    }

    fn convolved(&self, layer: usize, x: &Rows) -> Rows {
        if self.config.short_convolution == 0 {
            return x.clone();
        }
        let weight = self.matrix(Some(layer), "convolution.weight");
        let channel = |t: usize, c: usize| {
            (0..self.config.short_convolution.min(t + 1)).map(|j| weight.row(j)[c] * x[t - j][c]).sum()
        };
        (0..x.len()).map(|t| (0..self.config.width).map(|c| channel(t, c)).collect()).collect()
    }

    fn rotated(&self, mut x: Vec<f64>, position: usize) -> Vec<f64> {
        if self.config.positions == Positions::None {
            return x;
        }
        let half = x.len() / 2;
        for i in 0..half {
            let angle = position as f64 * 10_000_f64.powf(-(2.0 * i as f64) / (2.0 * half as f64));
            let (a, b) = (x[i], x[i + half]);
            x[i] = a * angle.cos() - b * angle.sin();
            x[i + half] = b * angle.cos() + a * angle.sin();
        }
        x
    }

    fn mix(&self, layer: usize, x: &Rows) -> Rows {
        if self.config.family == Family::Gau {
            return self.gau(layer, x);
        }
        let (heads, width) = (self.config.heads, self.config.head_dim());
        let both = self.matrix(Some(layer), "projections.query_key");
        let both: Rows = x.iter().map(|x| both.of(x)).collect();
        let values = self.matrix(Some(layer), "projections.value");
        let values: Rows = x.iter().map(|x| values.of(x)).collect();
        let mut read = vec![Vec::new(); x.len()];
        for head in 0..heads {
            let part = |rows: &Rows, at: usize| -> Rows {
                rows.iter().map(|row| row[at * width..(at + 1) * width].to_vec()).collect()
            };
            let (q, k, v) = (part(&both, head), part(&both, heads + head), part(&values, head));
            let of_head = match self.config.family {
                Family::Linear => linear(&q, &k, &v),
                Family::Delta => {
                    let rate = self.matrix(Some(layer), "rate");
                    delta(&q, &k, &v, &x.iter().map(|x| sigmoid(rate.of(x)[head])).collect::<Vec<f64>>())
                }
                _ => {
                    let turned =
                        |rows: Rows| rows.into_iter().enumerate().map(|(at, x)| self.rotated(x, at)).collect::<Rows>();
                    self.softmax_family(layer, head, turned(q), &turned(k), &v)
                }
            };
            for (read, of_head) in read.iter_mut().zip(of_head) {
                read.extend(of_head);
            }
        }
        let output = self.matrix(Some(layer), "projections.output");
        read.iter().map(|read| output.of(read)).collect()
    }

    /// Softmax over the keys each family may see.
    fn softmax_family(&self, layer: usize, head: usize, q: Rows, k: &Rows, v: &Rows) -> Rows {
        let config = self.config;
        let root = (config.head_dim() as f64).sqrt();
        let sees = |t: usize, i: usize| match config.family {
            Family::Window => i + config.window > t || i < config.sinks,
            Family::Bsbr if config.bsbr.retrieval == Retrieval::None => {
                let first = (t / config.bsbr.chunk_size).saturating_sub(config.bsbr.local_chunks);
                i >= first * config.bsbr.chunk_size || i < config.bsbr.sink_tokens
            }
            _ => true,
        };
        let beta = match config.family {
            Family::Hopfield if config.hopfield_learned => self.weight(Some(layer), "log_beta").numbers[head].exp(),
            Family::Hopfield => config.hopfield_beta,
            _ => 1.0,
        };
        let steps = if config.family == Family::Hopfield { config.hopfield_steps } else { 1 };
        let mut output = Vec::new();
        for (t, query) in q.into_iter().enumerate() {
            let mut state = query;
            for step in 1..=steps {
                let seen: Vec<usize> = (0..=t).filter(|&i| sees(t, i)).collect();
                let weights: Vec<f64> = seen.iter().map(|&i| (beta * dot(&state, &k[i]) / root).exp()).collect();
                let total: f64 = weights.iter().sum();
                let rows = if step == steps { v } else { k };
                state = vec![0.0; state.len()];
                for (&i, weight) in seen.iter().zip(weights) {
                    add(&mut state, &rows[i], weight / total);
                }
            }
            output.push(state);
        }
        output
    }

    fn gau(&self, layer: usize, x: &Rows) -> Rows {
        let weight = self.weight(Some(layer), "scale");
        let shared = weight.shape[1];
        let (scale, offset) = (self.matrix(Some(layer), "scale"), self.matrix(Some(layer), "offset"));
        let output = self.matrix(Some(layer), "mixer.Gau.output");
        let inner = output.numbers.len() / output.columns;
        let input = self.matrix(Some(layer), "mixer.Gau.input");
        let active: Rows = x.iter().map(|x| input.of(x).iter().map(|y| y * sigmoid(*y)).collect()).collect();
        let of = |which: usize, t: usize| {
            let z = &active[t][2 * inner..];
            let channels = z.iter().zip(scale.row(which)).zip(offset.row(which)).map(|((z, s), o)| z * s + o).collect();
            self.rotated(channels, t)
        };
        assert_eq!(active[0].len(), 2 * inner + shared);
        let size = self.config.chunk_size;
        let mut rows = Vec::new();
        for t in 0..x.len() {
            let mut read = vec![0.0; inner];
            for i in 0..=t {
                let weight = if i / size == t / size {
                    (dot(&of(0, t), &of(1, i)) / size as f64).max(0.0).powi(2)
                } else {
                    dot(&of(2, t), &of(3, i)) / size as f64
                };
                add(&mut read, &active[i][inner..2 * inner], weight);
            }
            let gated: Vec<f64> = read.iter().zip(&active[t]).map(|(read, gate)| read * gate).collect();
            rows.push(output.of(&gated));
        }
        rows
    }
}

/// `S += phi(k) v^T`, `z += phi(k)`, `o = S^T phi(q) / z.phi(q)`.
fn linear(q: &Rows, k: &Rows, v: &Rows) -> Rows {
    let width = v[0].len();
    let features = |x: &[f64]| -> Vec<f64> { x.iter().map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() }).collect() };
    let (mut state, mut mass) = (vec![vec![0.0; width]; width], vec![0.0; width]);
    let mut output = Vec::new();
    for t in 0..q.len() {
        let (query, key) = (features(&q[t]), features(&k[t]));
        for c in 0..width {
            add(&mut state[c], &v[t], key[c]);
            mass[c] += key[c];
        }
        let mut read = vec![0.0; width];
        for c in 0..width {
            add(&mut read, &state[c], query[c] / dot(&query, &mass));
        }
        output.push(read);
    }
    output
}

/// `S += b k (v - S^T k)^T`, `o = S^T q`.
fn delta(q: &Rows, k: &Rows, v: &Rows, rates: &[f64]) -> Rows {
    let width = v[0].len();
    let unit = |x: &[f64]| -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|&x| x * sigmoid(x)).collect();
        x.iter().map(|y| y / (dot(&x, &x) + 1e-6).sqrt()).collect()
    };
    let mut state = vec![vec![0.0; width]; width];
    let mut output = Vec::new();
    for t in 0..q.len() {
        let (query, key) = (unit(&q[t]), unit(&k[t]));
        let mut correction = v[t].clone();
        for c in 0..width {
            add(&mut correction, &state[c], -key[c]);
        }
        let mut read = vec![0.0; width];
        for c in 0..width {
            add(&mut state[c], &correction, rates[t] * key[c]);
            add(&mut read, &state[c], query[c]);
        }
        output.push(read);
    }
    output
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

fn add(to: &mut [f64], row: &[f64], factor: f64) {
    for (to, row) in to.iter_mut().zip(row) {
        *to += factor * row;
    }
}
