//! Softmax attention to the last `window` tokens (Beltagy et al. 2020) and to the first `sinks` tokens, which models learn
//! to rest their attention on (Xiao et al. 2023).
//!
//! ```text
//! o_t = sum_i softmax_i(q_t . k_i / sqrt(d)) v_i    over i <= t with i > t - window or i < sinks
//! ```
//!
//! In parallel, queries in chunks of `window` read their own chunk, the one before and the sinks: `tokens x (2 window +
//! sinks)` scores. Recurrently, the keys and values of the last `window - 1` tokens and of the sinks are kept.
//!
//! Beside the Python original: that had the same causal window, of `window + 1` tokens, built from all `tokens x tokens`
//! scores, and neither sinks nor a recurrent form.

use burn::{
    module::Module,
    tensor::{Tensor, TensorData, activation::softmax},
};

use crate::{
    DecoderConfig,
    heads::{Projections, Rotation},
    init::Init,
    layer::{bytes, copied},
};

/// Added to scores that do not count: their weight is exactly zero.
const MASKED: f32 = -1e30;

#[derive(Module, Debug)]
pub(crate) struct Window {
    projections: Projections,
    #[module(skip)]
    window: usize,
    #[module(skip)]
    sinks: usize,
}

/// Keys and values `[batch, heads, rows, head_dim]`.
type Pair = [Tensor<4>; 2];

/// What is kept of the tokens that are still read.
#[derive(Debug, Clone, Default)]
pub(crate) struct WindowState {
    /// The first tokens.
    sinks: Option<Pair>,
    /// The last ones, at most `window - 1`.
    rows: Option<Pair>,
    length: usize,
}

impl WindowState {
    pub(crate) fn bytes(&self) -> usize {
        self.sinks.iter().chain(&self.rows).flatten().map(bytes).sum()
    }
}

impl Window {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        Self { projections: Projections::new(config, name, init), window: config.window, sinks: config.sinks }
    }

    /// The parallel form.
    pub(crate) fn forward(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Tensor<3> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        let sinks = first_rows(&[keys.clone(), values.clone()], self.sinks);
        self.projections.output(self.read(query, [keys, values], sinks, 0))
    }

    /// The recurrent form: the next tokens.
    pub(crate) fn step(&self, x: Tensor<3>, rotation: Option<&Rotation>, state: &mut WindowState) -> Tensor<3> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        let new = [keys, values];
        if let Some(sinks) = first_rows(&new, self.sinks.saturating_sub(state.length)) {
            state.sinks = Some(appended(state.sinks.take(), sinks.map(copied)));
        }
        let tokens = new[0].dims()[2];
        let rows = appended(state.rows.take(), new);
        let count = rows[0].dims()[2];
        let kept = count.min(self.window - 1);
        state.rows = (kept > 0).then(|| rows.clone().map(|rows| copied(rows.narrow(2, count - kept, kept))));
        let read = self.read(query, rows, state.sinks.clone(), state.length);
        state.length += tokens;
        self.projections.output(read)
    }

    /// What `query`, from position `first` on, reads of `rows`, which end with its own tokens and begin with as many before
    /// them as it may see.
    fn read(&self, query: Tensor<4>, rows: Pair, sinks: Option<Pair>, first: usize) -> Tensor<4> {
        let [batch, heads, tokens, width] = query.dims();
        let past = rows[0].dims()[2] - tokens;
        let query = query * (1.0 / (width as f64).sqrt());
        if tokens <= self.window {
            let [query, keys, values] =
                [query, rows[0].clone(), rows[1].clone()].map(|x| flat(x, batch * heads).unsqueeze_dim(1));
            let read = self.softmax(query, [keys, values], sinks, first, past);
            return read.reshape([batch, heads, tokens, width]);
        }
        let size = self.window;
        let chunks = tokens.div_ceil(size);
        let missing = chunks * size - tokens;
        let query = filled(query, 0, missing).reshape([batch * heads, chunks, size, width]);
        // A chunk of rows before the first query, then one for each chunk of queries; each chunk beside the one before.
        let paired = rows.map(|rows| {
            let rows = filled(rows, size - past, missing);
            let from = |at| rows.clone().narrow(2, at, chunks * size).reshape([batch * heads, chunks, size, width]);
            Tensor::cat(vec![from(0), from(size)], 2)
        });
        let read = self.softmax(query, paired, sinks, first, size);
        read.reshape([batch, heads, chunks * size, width]).narrow(2, 0, tokens)
    }

    /// Softmax attention of `query` `[batch * heads, chunks, n, head_dim]`, from position `first` on, to the sinks and to rows
    /// `[batch * heads, chunks, m, head_dim]`, which begin `before` positions before the queries of their chunk.
    fn softmax(&self, query: Tensor<4>, rows: Pair, sinks: Option<Pair>, first: usize, before: usize) -> Tensor<4> {
        let [all, chunks, size, width] = query.dims();
        let count = rows[0].dims()[2];
        let sink_count = sinks.as_ref().map_or(0, |sinks| sinks[0].dims()[2]);
        let [keys, values] = match sinks {
            None => rows,
            Some([keys, values]) => {
                let everywhere = |sinks: Tensor<4>| {
                    let sinks: Tensor<4> = flat(sinks, all).unsqueeze_dim(1);
                    sinks.expand([all, chunks, sink_count, width])
                };
                let [row_keys, row_values] = rows;
                [(keys, row_keys), (values, row_values)]
                    .map(|(sinks, rows)| Tensor::cat(vec![everywhere(sinks), rows], 2))
            }
        };
        let mut mask = Vec::with_capacity(chunks * size * (sink_count + count));
        for at in 0..chunks * size {
            let position = first + at;
            mask.extend((0..sink_count).map(|sink| if sink <= position { 0.0 } else { MASKED }));
            // Rows of sinks count once, among the sinks.
            let start = (first + at / size * size) as i64 - before as i64;
            let oldest = (position as i64 + 1 - self.window as i64).max(self.sinks as i64);
            mask.extend(
                (start..start + count as i64).map(
                    |row| {
                        if (oldest..=position as i64).contains(&row) { 0.0 } else { MASKED }
                    },
                ),
            );
        }
        let mask = TensorData::new(mask, [1, chunks, size, sink_count + count]);
        let mask = Tensor::<4>::from_data(mask, &query.device());
        softmax(query.matmul(keys.transpose()) + mask, 3).matmul(values)
    }
}

/// `[batch, heads, rows, width]` to `[batch * heads, rows, width]`.
fn flat(x: Tensor<4>, all: usize) -> Tensor<3> {
    let [_, _, rows, width] = x.dims();
    x.reshape([all, rows, width])
}

/// With rows of zeros before and behind.
fn filled(rows: Tensor<4>, front: usize, back: usize) -> Tensor<4> {
    let [batch, heads, _, width] = rows.dims();
    let zeros = |count: usize| (count > 0).then(|| Tensor::zeros([batch, heads, count, width], &rows.device()));
    let parts: Vec<_> = [zeros(front), Some(rows.clone()), zeros(back)].into_iter().flatten().collect();
    if parts.len() == 1 { rows } else { Tensor::cat(parts, 2) }
}

/// The first `count` rows; `None` if that is none.
fn first_rows(rows: &Pair, count: usize) -> Option<Pair> {
    let count = count.min(rows[0].dims()[2]);
    (count > 0).then(|| rows.clone().map(|rows| rows.narrow(2, 0, count)))
}

fn appended(rows: Option<Pair>, new: Pair) -> Pair {
    match rows {
        None => new,
        Some([keys, values]) => {
            let [new_keys, new_values] = new;
            [Tensor::cat(vec![keys, new_keys], 2), Tensor::cat(vec![values, new_values], 2)]
        }
    }
}
