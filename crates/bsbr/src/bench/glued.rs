//! Queries, keys and values of a model, glued to the length that is measured.
//!
//! What attention costs by an index depends on how much its heads agree on, which no random rows imitate. Here they are those
//! of a model that reads windows of a text with its own attention, each as long as it was trained for. The windows lie one
//! behind the other: queries and keys of a later one are turned to the positions where it begins. A text that is longer than
//! all of them is the same rows again. So that no key has an equal elsewhere, the keys of each later copy are a little
//! shorter: times a factor from 0.9 to 1 of its own.

use std::ops::Range;

use anyhow::{Result, bail};
use bsbr_model::{Decoder, LayerTrace};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::{attention::Shape, data::uniform};

/// The least factor on the keys of a copy.
const LEAST_FACTOR: f64 = 0.9;

/// One KV head of one layer, rows of `[tokens, head_dim]`.
struct KvHead {
    /// Of each query head that reads it.
    queries: Vec<Vec<f32>>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// What the attention of some layers of a model read of a text.
pub(crate) struct ModelRows {
    heads: Vec<KvHead>,
    layers: Vec<usize>,
    tokens: usize,
    width: usize,
}

impl ModelRows {
    /// Those of `layers` of a model that reads each of `windows`, all of one length, with its original attention.
    pub(crate) fn of(decoder: &Decoder, windows: &[&[u32]], layers: &[usize]) -> Result<Self> {
        let model = &decoder.config().decoder;
        if let Some(layer) = layers.iter().find(|&&layer| layer >= model.layers) {
            bail!("--layers names layer {layer}, the model has layers 0 to {}", model.layers - 1);
        }
        if let Some(layer) = layers.iter().find(|&&layer| model.layer_recurrent(layer).is_some()) {
            bail!("--layers names layer {layer}, which is recurrent: expected layers with attention");
        }
        if let Some(&layer) = layers.iter().find(|&&layer| model.shape(layer).head_dim != model.head_dim) {
            let (width, found) = (model.head_dim, model.shape(layer).head_dim);
            bail!(
                "--layers names layer {layer} with heads of width {found}, expected layers with the usual width {width}"
            );
        }
        let original = decoder.with_config(|config| config.attention = None)?;
        let mut rows = Self { heads: Vec::new(), layers: layers.to_vec(), tokens: 0, width: model.head_dim };
        for window in windows {
            let heads = read_window(&original, window, layers, rows.tokens)?;
            rows.tokens += window.len();
            if rows.heads.is_empty() {
                rows.heads = heads;
                continue;
            }
            for (all, new) in rows.heads.iter_mut().zip(heads) {
                all.keys.extend(new.keys);
                all.values.extend(new.values);
                for (all, new) in all.queries.iter_mut().zip(new.queries) {
                    all.extend(new);
                }
            }
        }
        Ok(rows)
    }

    /// Tokens of all windows.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// The layers they are from.
    pub(crate) fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Head `nth` of `count`: spread over all there are, or all of them over and over.
    fn head(&self, nth: usize, count: usize) -> &KvHead {
        let there = self.heads.len();
        &self.heads[if count <= there { nth * there / count } else { nth % there }]
    }

    /// Queries, keys and values of tokens `range`, `[batch, heads, tokens, head_dim]`.
    pub(crate) fn inputs(&self, shape: &Shape, range: &Range<usize>, device: &Device) -> [Tensor<4>; 3] {
        let count = shape.batch * shape.kv_heads;
        let group = shape.heads / shape.kv_heads;
        let [mut queries, mut keys, mut values] = [const { Vec::new() }; 3];
        for nth in 0..count {
            let head = self.head(nth, count);
            for query in 0..group {
                self.glue(&head.queries[query % head.queries.len()], range, |_| 1.0, &mut queries);
            }
            self.glue(&head.keys, range, |copy| factor(shape.seed, copy), &mut keys);
            self.glue(&head.values, range, |_| 1.0, &mut values);
        }
        let heads = [(queries, shape.heads), (keys, shape.kv_heads), (values, shape.kv_heads)];
        heads.map(|(numbers, heads)| {
            let size = [shape.batch, heads, range.len(), self.width];
            Tensor::from_data(TensorData::new(numbers, size), (device, shape.dtype))
        })
    }

    /// Appends the rows of tokens `range` of the text, read over and over.
    fn glue(&self, rows: &[f32], range: &Range<usize>, factor: impl Fn(usize) -> f32, numbers: &mut Vec<f32>) {
        numbers.reserve(range.len() * self.width);
        let mut at = range.start;
        while at < range.end {
            let (copy, from) = (at / self.tokens, at % self.tokens);
            let count = (self.tokens - from).min(range.end - at);
            let factor = factor(copy);
            numbers.extend(rows[from * self.width..(from + count) * self.width].iter().map(|x| x * factor));
            at += count;
        }
    }
}

/// What `layers` read of a window that begins at `start`: the KV heads of one layer after the other.
fn read_window(original: &Decoder, window: &[u32], layers: &[usize], start: usize) -> Result<Vec<KvHead>> {
    let model = &original.config().decoder;
    let width = model.head_dim;
    let mut heads = Vec::new();
    let mut failed = None;
    let mut take = |trace: LayerTrace| {
        if !layers.contains(&trace.layer) {
            return;
        }
        let of_heads = |tensor: Tensor<4>| -> Result<Vec<Vec<f32>>> {
            let numbers = tensor.cast(DType::F32).try_into_vec_as::<f32>();
            let numbers = numbers.map_err(|error| anyhow::anyhow!("numbers cannot be read back: {error:?}"))?;
            Ok(numbers.chunks_exact(window.len() * width).map(<[f32]>::to_vec).collect())
        };
        let moved = |rows: Tensor<4>| original.moved(trace.layer, rows, start);
        match (of_heads(moved(trace.query)), of_heads(moved(trace.keys)), of_heads(trace.values)) {
            (Ok(mut queries), Ok(keys), Ok(values)) => {
                let group = queries.len() / keys.len();
                for (keys, values) in keys.into_iter().zip(values) {
                    let rest = queries.split_off(group);
                    heads.push(KvHead { queries: std::mem::replace(&mut queries, rest), keys, values });
                }
            }
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => failed = Some(error),
        }
    };
    original.trace(window, &mut original.new_cache(&[window.len()])?, &mut take)?;
    match failed {
        Some(error) => Err(error),
        None => Ok(heads),
    }
}

/// What the keys of a copy are multiplied by.
fn factor(seed: u64, copy: usize) -> f32 {
    if copy == 0 {
        return 1.0;
    }
    (LEAST_FACTOR + (1.0 - LEAST_FACTOR) * uniform(seed.wrapping_add(copy as u64))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::data::Data;

    fn rows() -> ModelRows {
        // Head `h` of 3: token `t` has the row [100 h + t, -t].
        let of = |head: usize| (0..10).flat_map(move |t| [(100 * head + t) as f32, -(t as f32)]).collect::<Vec<f32>>();
        let head = |h: usize| KvHead { queries: vec![of(h), of(h + 10)], keys: of(h + 20), values: of(h + 30) };
        ModelRows { heads: (0..3).map(head).collect(), layers: vec![1, 4, 7], tokens: 10, width: 2 }
    }

    fn shape(heads: usize, kv_heads: usize) -> Shape {
        let dtype = DType::F32;
        Shape { batch: 1, heads, kv_heads, head_dim: 2, dtype, stored: dtype, data: Data::Model, seed: 5 }
    }

    fn numbers(tensor: Tensor<4>) -> Vec<f32> {
        tensor.try_into_vec_as::<f32>().unwrap()
    }

    #[test]
    fn a_longer_text_is_the_rows_again_with_shorter_keys() {
        let [queries, keys, values] = rows().inputs(&shape(1, 1), &(0..25), &Device::flex()).map(numbers);
        let first = |rows: &[f32]| rows.chunks(2).map(|row| row[0]).collect::<Vec<f32>>();
        let expected = |start: f32| (0..25).map(|t| start + (t % 10) as f32).collect::<Vec<f32>>();
        assert_eq!((first(&queries), first(&values)), (expected(0.0), expected(3000.0)));
        let keys = first(&keys);
        let factors: Vec<f32> = keys.iter().zip(expected(2000.0)).map(|(key, whole)| key / whole).collect();
        assert!(factors[..10].iter().all(|&factor| factor == 1.0));
        for copy in [10..20, 20..25] {
            assert!(factors[copy.clone()].iter().all(|factor| (factor - factors[copy.start]).abs() < 1e-6));
            assert!((0.9..1.0).contains(&factors[copy.start]), "{factors:?}");
        }
        assert!((factors[10] - factors[20]).abs() > 1e-4, "each copy has a factor of its own");
    }

    #[test]
    fn any_range_is_what_the_whole_has_there() {
        let whole = rows().inputs(&shape(4, 2), &(0..30), &Device::flex()).map(numbers);
        let part = rows().inputs(&shape(4, 2), &(8..23), &Device::flex()).map(numbers);
        for (heads, (whole, part)) in [4, 2, 2].into_iter().zip(whole.iter().zip(&part)) {
            for head in 0..heads {
                assert_eq!(whole[(head * 30 + 8) * 2..(head * 30 + 23) * 2], part[head * 30..(head + 1) * 30]);
            }
        }
    }

    #[test]
    fn heads_are_spread_over_the_layers_and_repeat_where_there_are_too_few() {
        let firsts = |kv_heads: usize| -> Vec<f32> {
            let keys = numbers(rows().inputs(&shape(kv_heads, kv_heads), &(0..1), &Device::flex())[1].clone());
            keys.chunks(2).map(|row| row[0]).collect()
        };
        assert_eq!(firsts(1), [2000.0]);
        assert_eq!(firsts(3), [2000.0, 2100.0, 2200.0]);
        assert_eq!(firsts(5), [2000.0, 2100.0, 2200.0, 2000.0, 2100.0]);
        // A group that is wider than the model's reads its queries again.
        let queries = numbers(rows().inputs(&shape(3, 1), &(0..1), &Device::flex())[0].clone());
        assert_eq!([queries[0], queries[2], queries[4]], [0.0, 1000.0, 0.0]);
    }
}
