//! The decoder written out in f64, number by number: the independent reference.

use std::{collections::HashMap, f64::consts::PI};

use bsbr_model::{
    Activation, BlockForm, ClampedGate, ExpertsConfig, GatedDelta, HeadNorm, LayerKeys, LayerRotary, ModelConfig, Norm,
    PositionPolicy, Positions, RotaryScaling, RouterKind, weight_specs,
};

use super::weight;

type Rows = Vec<Vec<f64>>;

/// A decoder with the weights of [`super::NamedWeights`] and its original attention.
pub(crate) struct Naive {
    config: ModelConfig,
    weights: HashMap<String, Vec<f64>>,
    /// Inverse frequencies and the factor on cos and sin: those without scaling unless a test says otherwise.
    pub(crate) rotation: (Vec<f64>, f64),
    /// Where query and key stand when the token at the first position reads the key at the second: there, unless a test says
    /// otherwise.
    pub(crate) standing: fn(usize, usize) -> (usize, usize),
}

impl Naive {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let weights = weight_specs(config).into_iter().map(|spec| {
            let numbers = weight(&spec).into_iter().map(f64::from).collect();
            (spec.name, numbers)
        });
        let frequencies = match config.decoder.positions {
            Positions::Learned | Positions::Alibi { .. } => Vec::new(),
            Positions::Rotary {
                theta,
                rotary_dim,
                scaling: Some(RotaryScaling::Proportional { rotating, factor }),
            } => {
                let all = frequencies(theta, rotary_dim).into_iter().enumerate();
                all.map(|(pair, frequency)| if pair < rotating / 2 { frequency / factor } else { 0.0 }).collect()
            }
            Positions::Rotary { theta, rotary_dim, .. } => frequencies(theta, rotary_dim),
        };
        Self {
            config: config.clone(),
            weights: weights.collect(),
            rotation: (frequencies, 1.0),
            standing: |token, key| (token, key),
        }
    }

    /// Scores after each token, `[tokens][vocab_size]`.
    pub(crate) fn logits(&self, tokens: &[u32]) -> Rows {
        let decoder = &self.config.decoder;
        let mut stream: Rows = Vec::new();
        for (position, &token) in tokens.iter().enumerate() {
            let mut x =
                self.row("embed.weight", token as usize, decoder.embedding.width.unwrap_or(decoder.hidden_size));
            x.iter_mut().for_each(|x| *x *= decoder.embedding.scale.unwrap_or(1.0));
            if decoder.embedding.width.is_some() {
                x = self.linear("project_in", &x);
            }
            if decoder.positions == Positions::Learned {
                add(&mut x, &self.learned_position(position, tokens.len()));
            }
            stream.push(if decoder.embedding.norm { self.norm("embed_norm", &x) } else { x });
        }
        let entered = stream.clone();
        let mut shared = HashMap::new();
        for layer in 0..decoder.layers {
            stream = self.block(layer, &stream, &mut shared);
            for ((x, &token), entered) in stream.iter_mut().zip(tokens).zip(&entered) {
                if decoder.embedding.per_layer.is_some() {
                    let added = self.layer_inputs(layer, token, entered, x);
                    add(x, &added);
                }
                if decoder.block.scalar {
                    x.iter_mut().for_each(|x| *x *= self.weights[&format!("layers.{layer}.scalar")][0]);
                }
            }
        }
        let head = if decoder.tied_head { "embed" } else { "head" };
        let last = |x: &Vec<f64>| {
            let mut x = if decoder.block.form == BlockForm::NormAfter { x.clone() } else { self.norm("final_norm", x) };
            if decoder.embedding.width.is_some() {
                x = self.linear("project_out", &x);
            }
            let mut logits = self.linear(head, &x);
            if decoder.head.bias && decoder.tied_head {
                add(&mut logits, &self.weights["head.bias"]);
            }
            logits.iter_mut().for_each(|logit| {
                *logit *= decoder.head.scale.unwrap_or(1.0);
                *logit = decoder.head.softcap.map_or(*logit, |cap| cap * (*logit / cap).tanh());
            });
            logits
        };
        stream.iter().map(last).collect()
    }

    /// What the inputs of a layer for one token add to its stream.
    fn layer_inputs(&self, layer: usize, token: u32, entered: &[f64], x: &[f64]) -> Vec<f64> {
        let decoder = &self.config.decoder;
        let width = decoder.embedding.per_layer.unwrap().width;
        let of_layer = layer * width..(layer + 1) * width;
        let table = &self.row("per_layer.embed.weight", token as usize, decoder.layers * width)[of_layer.clone()];
        let projected: Vec<f64> = self.linear("per_layer.project", entered)[of_layer]
            .iter()
            .map(|x| x / (decoder.hidden_size as f64).sqrt())
            .collect();
        let projected = self.norm("per_layer.norm", &projected);
        let mut inner = self.linear(&format!("layers.{layer}.per_layer.gate"), x);
        for (at, x) in inner.iter_mut().enumerate() {
            let input = ((width as f64).sqrt() * table[at] + projected[at]) / 2f64.sqrt();
            *x = self.activate(layer, *x) * input;
        }
        self.norm(
            &format!("layers.{layer}.per_layer.norm"),
            &self.linear(&format!("layers.{layer}.per_layer.down"), &inner),
        )
    }

    fn block(&self, layer: usize, stream: &Rows, shared: &mut HashMap<usize, [Rows; 2]>) -> Rows {
        let decoder = &self.config.decoder;
        let at = |part: &str| format!("layers.{layer}.{part}");
        let norm = |part: &str, x: &[f64]| self.norm(&at(part), x);
        let mut attention = |rows: &Rows| -> Rows {
            let read = self.attention(layer, rows, shared);
            read.iter().map(|x| self.linear(&format!("layers.{layer}.attention.output"), x)).collect()
        };
        let plus = |x: &[f64], y: &[f64]| -> Vec<f64> {
            let factor = decoder.block.residual_multiplier.unwrap_or(1.0);
            x.iter().zip(y).map(|(x, y)| x + factor * y).collect()
        };
        let normed: Rows = stream.iter().map(|x| norm_or_not(decoder.block.form, &norm, x)).collect();
        let rows = stream.iter().zip(attention(&normed)).zip(&normed);
        rows.map(|((x, read), normed)| match decoder.block.form {
            BlockForm::Sequential => {
                let x = plus(x, &read);
                plus(&x, &self.mlp(layer, &norm("mlp_norm", &x)))
            }
            BlockForm::Sandwich => {
                let x = plus(x, &norm("attention_post_norm", &read));
                let beside = decoder.experts.as_ref().filter(|experts| experts.beside_mlp);
                let made = match beside {
                    Some(experts) => {
                        let mut made =
                            norm("mlp.dense_post_norm", &self.one_mlp(layer, &at("mlp"), &norm("mlp_norm", &x)));
                        let routed = self.mixture(layer, &at("mlp"), experts, (&norm("mlp.experts_norm", &x), &x));
                        add(&mut made, &norm("mlp.experts_post_norm", &routed));
                        made
                    }
                    None => self.mlp(layer, &norm("mlp_norm", &x)),
                };
                plus(&x, &norm("mlp_post_norm", &made))
            }
            BlockForm::NormedBranches => {
                let x = plus(x, &norm("attention_post_norm", &read));
                plus(&x, &norm("mlp_post_norm", &self.mlp(layer, &x)))
            }
            BlockForm::NormAfter => {
                let x = norm("attention_post_norm", &plus(x, &read));
                norm("mlp_post_norm", &plus(&x, &self.mlp(layer, &x)))
            }
            BlockForm::Parallel => plus(&plus(x, &read), &self.mlp(layer, &norm("mlp_norm", x))),
            BlockForm::ParallelSharedNorm => plus(&plus(x, &read), &self.mlp(layer, normed)),
        })
        .collect()
    }

    fn mlp(&self, layer: usize, x: &[f64]) -> Vec<f64> {
        let name = format!("layers.{layer}.mlp");
        let dense = |experts: &ExpertsConfig| experts.dense_layers.contains(&layer);
        match self.config.decoder.experts.as_ref().filter(|experts| !dense(experts)) {
            None => self.one_mlp(layer, &name, x),
            Some(experts) => self.mixture(layer, &name, experts, (x, x)),
        }
    }

    /// Every expert is computed, and most count for nothing.
    fn mixture(&self, layer: usize, name: &str, experts: &ExpertsConfig, (x, stream): (&[f64], &[f64])) -> Vec<f64> {
        let scores = if experts.router.own_norm {
            let normed = self.norm(&format!("{name}.router.norm"), stream);
            let width = (stream.len() as f64).sqrt();
            self.linear(&format!("{name}.router"), &normed.iter().map(|x| x / width).collect::<Vec<_>>())
        } else {
            self.linear(&format!("{name}.router"), x)
        };
        let weights = expert_weights(&scores, self.weights.get(&format!("{name}.router.correction")), experts);
        let mut sum = vec![0.0; x.len()];
        for (expert, weight) in weights.into_iter().enumerate() {
            let made = self.one_mlp(layer, &format!("{name}.experts.{expert}"), x);
            let factors = self.weights.get(&format!("{name}.router.expert_scale"));
            let weight = weight * factors.map_or(1.0, |factors| factors[expert]);
            sum.iter_mut().zip(made).for_each(|(sum, made)| *sum += weight * made);
        }
        if let Some(shared) = experts.shared {
            let made = self.one_mlp(layer, &format!("{name}.shared"), x);
            let gate = || self.linear(&format!("{name}.shared_gate"), x)[0];
            let weight = if shared.gate { 1.0 / (1.0 + (-gate()).exp()) } else { 1.0 };
            sum.iter_mut().zip(made).for_each(|(sum, made)| *sum += weight * made);
        }
        sum
    }

    fn one_mlp(&self, layer: usize, name: &str, x: &[f64]) -> Vec<f64> {
        let at = |part: &str| format!("{name}.{part}");
        let mut inner = self.linear(&at("up"), x);
        if self.config.decoder.gated_mlp {
            let gate = self.linear(&at("gate"), x);
            let clamped = self.config.decoder.clamped_gate;
            inner.iter_mut().zip(gate).for_each(|(up, gate)| match clamped {
                None => *up *= self.activate(layer, gate),
                Some(ClampedGate { limit, alpha }) => {
                    let gate = gate.min(limit);
                    *up = (up.clamp(-limit, limit) + 1.0) * gate / (1.0 + (-alpha * gate).exp());
                }
            });
        } else {
            inner.iter_mut().for_each(|x| *x = self.activate(layer, *x));
        }
        self.linear(&at("down"), &inner)
    }

    /// What each token reads, `[tokens][heads * head_dim]`.
    fn attention(&self, layer: usize, normed: &Rows, shared: &mut HashMap<usize, [Rows; 2]>) -> Rows {
        let decoder = &self.config.decoder;
        if let Some(recurrent) = decoder.layer_recurrent(layer) {
            return self.recurrent(layer, recurrent, normed);
        }
        let shape = decoder.shape(layer);
        let width = shape.head_dim;
        let project = |part: &str| -> Rows {
            normed.iter().map(|x| self.linear(&format!("layers.{layer}.attention.{part}"), x)).collect()
        };
        let latent = decoder.latent.map(|_| self.latent_rows(layer, normed));
        let mut queries = latent.as_ref().map_or_else(|| project("query"), |[queries, ..]| queries.clone());
        let owner = decoder.key_owner(layer);
        let [mut keys, mut values] = match (owner, shape.keys) {
            _ if latent.is_some() => latent.map(|[_, keys, values]| [keys, values]).unwrap(),
            (Some(owner), _) => shared[&owner].clone(),
            (None, LayerKeys::AlsoValues) => [project("key"), project("key")],
            (None, _) => [project("key"), project("value")],
        };
        if decoder.block.value_norm && owner.is_none() {
            let heads = values.iter_mut().flat_map(|row| row.chunks_exact_mut(width));
            heads.for_each(|head| head.copy_from_slice(&self.normalise(head)));
        }
        let (query_norm, key_norm) =
            ["query_norm", "key_norm"].map(|name| format!("layers.{layer}.attention.{name}.weight")).into();
        let last = decoder.block.head_norm_after_rotary;
        for (rows, name) in [(&mut queries, &query_norm), (&mut keys, &key_norm)] {
            if !last && (name == &query_norm || owner.is_none()) {
                rows.iter_mut().for_each(|row| self.norm_heads(name, row, width));
            }
        }
        shared.insert(layer, [keys.clone(), values.clone()]);
        let rotated = |head: &[f64], position, name: &str, number: usize| {
            let mut head = head.to_vec();
            self.rotate(layer, &mut head, position);
            if last {
                self.norm_head(name, number, &mut head);
            }
            head
        };
        let warmed = |mut query: Vec<f64>, position: usize| {
            if let Some(temperature) = decoder.query_temperature {
                let steps = (position / temperature.length) as f64;
                query.iter_mut().for_each(|x| *x *= 1.0 + temperature.beta * (1.0 + steps).ln());
            }
            query
        };
        let divisor = if decoder.scale_by_layer { (layer + 1) as f64 } else { 1.0 };
        let window = decoder.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
        let mut read = vec![vec![0.0; decoder.heads * width]; normed.len()];
        for (token, read) in read.iter_mut().enumerate() {
            for head in 0..decoder.heads {
                let query = &queries[token][head * width..][..width];
                let kv = head / (decoder.heads / shape.kv_heads) * width;
                let seen = (0..=token).filter(|key| token - key < window);
                let weights: Vec<(usize, f64)> = seen
                    .map(|key| {
                        let (query_position, key_position) = (self.standing)(token, key);
                        let query = warmed(rotated(query, query_position, &query_norm, head), token);
                        let key_head = rotated(&keys[key][kv..][..width], key_position, &key_norm, kv / width);
                        let score = decoder.attention_scale / divisor * dot(&query, &key_head);
                        let capped = decoder.attention_softcap.map_or(score, |cap| cap * (score / cap).tanh());
                        (key, (capped + self.bias(head, token - key)).exp())
                    })
                    .collect();
                let sink = self.weights.get(&format!("layers.{layer}.attention.sink_logits"));
                let sink = sink.map(|sinks| sinks[head].exp());
                let total: f64 = weights.iter().map(|(_, weight)| *weight).chain(sink).sum();
                for (key, weight) in weights {
                    for i in 0..width {
                        read[head * width + i] += weight / total * values[key][kv + i];
                    }
                }
            }
        }
        if let Some(latent) = decoder.latent {
            let whole =
                |row: &Vec<f64>| row.chunks_exact(width).flat_map(|head| head[..latent.value_dim].to_vec()).collect();
            read = read.iter().map(whole).collect();
        }
        if decoder.attention_gate {
            for (read, gate) in read.iter_mut().zip(project("gate")) {
                read.iter_mut().zip(gate).for_each(|(x, gate)| *x /= 1.0 + (-gate).exp());
            }
        }
        read
    }

    /// What each token reads in a recurrent layer, by the rule token by token, `[tokens][value_heads * value_dim]`.
    fn recurrent(&self, layer: usize, sizes: &GatedDelta, normed: &Rows) -> Rows {
        let GatedDelta { key_heads, value_heads, key_dim, value_dim, kernel, .. } = *sizes;
        let at = |part: &str| format!("layers.{layer}.attention.{part}");
        let (silu, sigmoid) = (|x: f64| x / (1.0 + (-x).exp()), |x: f64| 1.0 / (1.0 + (-x).exp()));
        let inputs: Rows = normed
            .iter()
            .map(|x| ["query", "key", "value"].iter().flat_map(|part| self.linear(&at(part), x)).collect())
            .collect();
        let conv = &self.weights[&at("conv.weight")];
        let mut states = vec![vec![vec![0.0; value_dim]; key_dim]; value_heads];
        let mut made = Vec::new();
        for (token, x) in normed.iter().enumerate() {
            let mixed: Vec<f64> = (0..inputs[token].len())
                .map(|channel| {
                    let seen = (0..kernel).filter(|back| *back <= token);
                    silu(
                        seen.map(|back| conv[channel * kernel + kernel - 1 - back] * inputs[token - back][channel])
                            .sum(),
                    )
                })
                .collect();
            let unit = |head: &[f64]| -> Vec<f64> {
                let length = (dot(head, head) + 1e-6).sqrt();
                head.iter().map(|x| x / length).collect()
            };
            let decay = self.linear(&at("decay"), x);
            let rate = self.linear(&at("rate"), x);
            let gate = self.linear(&at("gate"), x);
            let mut read = Vec::new();
            for (head, state) in states.iter_mut().enumerate() {
                let shared = head / (value_heads / key_heads) * key_dim;
                let query = unit(&mixed[shared..][..key_dim]);
                let key = unit(&mixed[key_heads * key_dim + shared..][..key_dim]);
                let value = &mixed[2 * key_heads * key_dim + head * value_dim..][..value_dim];
                let fading = (-self.weights[&at("decay_log")][head].exp() * decay[head].exp().ln_1p()).exp();
                state.iter_mut().flatten().for_each(|x| *x *= fading);
                let mut out = vec![0.0; value_dim];
                for column in 0..value_dim {
                    let stored: f64 = (0..key_dim).map(|row| key[row] * state[row][column]).sum();
                    let correction = sigmoid(rate[head]) * (value[column] - stored);
                    (0..key_dim).for_each(|row| state[row][column] += key[row] * correction);
                    out[column] =
                        (0..key_dim).map(|row| query[row] * state[row][column]).sum::<f64>() / (key_dim as f64).sqrt();
                }
                let size = (dot(&out, &out) / value_dim as f64 + self.config.decoder.norm_eps).sqrt();
                let weight = &self.weights[&at("read_norm.weight")];
                let gates = &gate[head * value_dim..][..value_dim];
                read.extend(
                    out.iter().zip(weight).zip(gates).map(|((x, weight), gate)| x / size * weight * silu(*gate)),
                );
            }
            made.push(read);
        }
        made
    }

    /// Queries, keys and values of latent attention, values filled up with zeros.
    fn latent_rows(&self, layer: usize, normed: &Rows) -> [Rows; 3] {
        let decoder = &self.config.decoder;
        let latent = decoder.latent.unwrap();
        let (rotary, still) = decoder.latent_parts().unwrap();
        let at = |part: &str| format!("layers.{layer}.attention.{part}");
        let narrow = |name: &str, x: &[f64]| -> Vec<f64> {
            let y = self.linear(&at(name), x);
            let size = (y.iter().map(|x| x * x).sum::<f64>() / y.len() as f64 + latent.norm_eps).sqrt();
            let weight = &self.weights[&format!("{}_norm.weight", at(name))];
            y.iter().zip(weight).map(|(x, weight)| x / size * weight).collect()
        };
        // Of each head some numbers of the first, then some of the second.
        let joined = |first: &[f64], a: usize, second: &[f64], b: usize| -> Vec<f64> {
            (0..decoder.heads).flat_map(|head| [&first[head * a..][..a], &second[head * b..][..b]].concat()).collect()
        };
        let rows = normed.iter().map(|x| {
            let (source, from) = match latent.query_rank {
                Some(_) => (narrow("query_latent", x), "from_latent."),
                None => (x.clone(), ""),
            };
            let [turning, query] =
                ["query_rotary", "query"].map(|part| self.linear(&at(&format!("{from}{part}")), &source));
            let vector = narrow("latent", x);
            let key_turning = self.linear(&at("key_rotary"), x).repeat(decoder.heads);
            let [key, value] = ["from_latent.key", "from_latent.value"].map(|part| self.linear(&at(part), &vector));
            let missing = decoder.head_dim - latent.value_dim;
            let zeros = vec![0.0; decoder.heads * missing];
            [
                joined(&turning, rotary, &query, still),
                joined(&key_turning, rotary, &key, still),
                joined(&value, latent.value_dim, &zeros, missing),
            ]
        });
        let rows: Vec<[Vec<f64>; 3]> = rows.collect();
        [0, 1, 2].map(|at| rows.iter().map(|row| row[at].clone()).collect())
    }

    /// ALiBi; the tests have powers of two and one more than that.
    fn bias(&self, head: usize, distance: usize) -> f64 {
        let Positions::Alibi { factor } = self.config.decoder.positions else { return 0.0 };
        let slope: f64 = match self.config.decoder.heads {
            3 => [2f64.powi(-4), 2f64.powi(-8), 2f64.powi(-2)][head],
            heads => 2f64.powf(-8.0 * (head + 1) as f64 / heads as f64),
        };
        -factor * slope * distance as f64
    }

    fn norm_heads(&self, name: &str, row: &mut [f64], width: usize) {
        let decoder = &self.config.decoder;
        let Some(over) = decoder.block.head_norm else { return };
        let size = if over == HeadNorm::AllHeads { row.len() } else { width };
        for (n, head) in row.chunks_exact_mut(size).enumerate() {
            self.norm_head(name, n, head);
        }
    }

    fn norm_head(&self, name: &str, number: usize, head: &mut [f64]) {
        let each = self.config.decoder.block.head_norm == Some(HeadNorm::EachHead);
        let from = if each { number * head.len() } else { 0 };
        let normed = self.normalise(head);
        head.copy_from_slice(&normed);
        if let Some(weight) = self.weights.get(name) {
            head.iter_mut().zip(&weight[from..]).for_each(|(x, weight)| *x *= self.weight_of_norm(*weight));
        }
    }

    fn rotate(&self, layer: usize, head: &mut [f64], position: usize) {
        let local;
        let (frequencies, factor) = match (self.config.decoder.layer_rotary.get(layer), &self.config.decoder.positions)
        {
            (Some(LayerRotary::Off), _) => return,
            (Some(LayerRotary::Local { theta }), Positions::Rotary { rotary_dim, .. }) => {
                local = (frequencies(*theta, *rotary_dim), 1.0);
                &local
            }
            (Some(LayerRotary::Whole { theta }), _) => {
                local = (frequencies(*theta, head.len()), 1.0);
                &local
            }
            _ => &self.rotation,
        };
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
        let width = self.config.decoder.hidden_size;
        let row = |row: usize| self.row("position.weight", row + self.config.decoder.embedding.position_offset, width);
        if self.config.position_policy != PositionPolicy::Interpolate || length <= last + 1 {
            return row(position.min(last));
        }
        let place = position as f64 * last as f64 / (length - 1) as f64;
        let (below, above) = (row(place as usize), row(last.min(place as usize + 1)));
        below.iter().zip(above).map(|(below, above)| below + (above - below) * place.fract()).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mut normed = self.normalise(x);
        if let Some(weight) = self.weights.get(&format!("{name}.weight")) {
            normed.iter_mut().zip(weight).for_each(|(x, weight)| *x *= self.weight_of_norm(*weight));
        }
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            add(&mut normed, bias);
        }
        normed
    }

    fn weight_of_norm(&self, weight: f64) -> f64 {
        if matches!(self.config.decoder.norm, Norm::RmsPlusOne | Norm::LayerPlusOne) { 1.0 + weight } else { weight }
    }

    fn normalise(&self, x: &[f64]) -> Vec<f64> {
        let decoder = &self.config.decoder;
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let centre = if matches!(decoder.norm, Norm::Rms | Norm::RmsPlusOne | Norm::RmsPlain) { 0.0 } else { mean(x) };
        let centred: Vec<f64> = x.iter().map(|x| x - centre).collect();
        let squares: Vec<f64> = centred.iter().map(|x| x * x).collect();
        let size = (mean(&squares) + decoder.norm_eps).sqrt();
        centred.iter().map(|x| x / size).collect()
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

    fn row(&self, table: &str, row: usize, width: usize) -> Vec<f64> {
        self.weights[table][row * width..][..width].to_vec()
    }

    fn activate(&self, layer: usize, x: f64) -> f64 {
        match self.config.decoder.activation {
            Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            Activation::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
            Activation::Relu2 => x.max(0.0).powi(2),
            Activation::Xielu => {
                let [positive, negative, linear, limit] = ["alpha_p", "alpha_n", "beta", "eps"]
                    .map(|part| self.weights[&format!("layers.{layer}.mlp.xielu.{part}")][0]);
                let softplus = |x: f64| x.exp().ln_1p();
                if x > 0.0 {
                    softplus(positive) * x * x + linear * x
                } else {
                    (linear + softplus(negative)) * (x.min(limit).exp_m1() - x) + linear * x
                }
            }
        }
    }
}

fn frequencies(theta: f64, rotary_dim: usize) -> Vec<f64> {
    (0..rotary_dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / rotary_dim as f64)).collect()
}

/// The weight of each expert, from the definition: how many are better than it decides whether it is chosen.
pub(crate) fn expert_weights(scores: &[f64], correction: Option<&Vec<f64>>, experts: &ExpertsConfig) -> Vec<f64> {
    let router = &experts.router;
    let count = scores.len();
    let powers = |among: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let powers: Vec<f64> = (0..count).map(|it| if among(it) { scores[it].exp() } else { 0.0 }).collect();
        let total: f64 = powers.iter().sum();
        powers.into_iter().map(|power| power / total).collect()
    };
    let better = |ranks: &[f64], a: usize, b: usize| ranks[a] > ranks[b] || (ranks[a] == ranks[b] && a < b);
    let place = |ranks: &[f64], it: usize| (0..ranks.len()).filter(|&other| better(ranks, other, it)).count();
    if let RouterKind::Sparsemixer { jitter } = router.kind {
        let near =
            |best: usize, it: usize| (scores[best] - scores[it]) / scores[it].abs().max(scores[best]) <= 2.0 * jitter;
        let first = (0..count).find(|&it| place(scores, it) == 0).unwrap();
        let second = (0..count).find(|&it| place(scores, it) == 1).unwrap();
        let (one, two) = (
            powers(&|it| it == first || near(first, it)),
            powers(&|it| it != first && (it == second || near(second, it))),
        );
        return (0..count)
            .map(|it| {
                if it == first {
                    one[it]
                } else if it == second {
                    two[it]
                } else {
                    0.0
                }
            })
            .collect();
    }
    let all = match router.kind {
        RouterKind::Sigmoid => scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect(),
        _ => powers(&|_| true),
    };
    let mut ranks: Vec<f64> =
        (0..count).map(|it| all[it] + correction.map_or(0.0, |correction| correction[it])).collect();
    if let Some(groups) = router.groups {
        let size = count / groups.count;
        let sums: Vec<f64> = ranks
            .chunks(size)
            .map(|group| {
                let mut group = group.to_vec();
                group.sort_by(|a, b| b.total_cmp(a));
                group.iter().take(if groups.by_highest { 1 } else { 2 }).sum()
            })
            .collect();
        for (it, rank) in ranks.iter_mut().enumerate() {
            if place(&sums, it / size) >= groups.kept {
                *rank = f64::NEG_INFINITY;
            }
        }
    }
    let weights: Vec<f64> =
        (0..count).map(|it| if place(&ranks, it) < experts.chosen { all[it] } else { 0.0 }).collect();
    let total = router.normalised.map_or(1.0, |least| weights.iter().sum::<f64>().max(least));
    weights.into_iter().map(|weight| weight / total * router.scale.unwrap_or(1.0)).collect()
}

/// What attention reads of the stream.
fn norm_or_not(form: BlockForm, norm: &impl Fn(&str, &[f64]) -> Vec<f64>, x: &[f64]) -> Vec<f64> {
    if matches!(form, BlockForm::NormedBranches | BlockForm::NormAfter) {
        x.to_vec()
    } else {
        norm("attention_norm", x)
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
