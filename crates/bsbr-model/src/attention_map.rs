//! A map of what the tokens of a text read: layer by layer and head by head, the parts of the text that a token reads exactly,
//! those that count through statistics, the probability they hold, and what full attention would have given them.

use bsbr_attn::{AttentionCache, HeadReads, Kernel, Retrieval, TokenReads, full_reads};
use serde::{Deserialize, Serialize};

use crate::{
    Decoder, DecoderCache, LayerTrace, ModelError, PositionPolicy,
    layer_attention::meta_inputs,
    ops::Packing,
    rotary::{Rotation, rotary_set},
};

/// Shares are whole numbers of this.
pub const SHARE: f64 = 10_000.0;

/// Most cells of a whole map: what a page can show and a browser can hold.
const MOST_CELLS: usize = 600_000;

/// How much of a map is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionMapConfig {
    /// Most tokens whose reading is shown, at even distances, the last of the text among them. Models of many heads show fewer, so
    /// that a map stays below some megabytes.
    pub rows: usize,
    /// Most parts the text is cut into. A part has a power of two of tokens.
    pub parts: usize,
}

impl Default for AttentionMapConfig {
    fn default() -> Self {
        Self { rows: 64, parts: 64 }
    }
}

/// What tokens of a text read in every layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttentionMap {
    /// Of the text.
    pub tokens: usize,
    /// Tokens of a part of it; the last part may have fewer.
    pub part: usize,
    /// Positions of the tokens whose reading is shown.
    pub rows: Vec<usize>,
    /// Those with attention, first to last.
    pub layers: Vec<LayerMap>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMap {
    /// Number of the layer.
    pub layer: usize,
    /// How it reads what is far; `None` for the original attention.
    pub retrieval: Option<Retrieval>,
    /// The model's own window.
    pub window: Option<usize>,
    /// Query heads that share a KV head.
    pub group: usize,
    /// One for each query head.
    pub heads: Vec<HeadMap>,
}

/// One query head: lists with an entry for each of the map's rows. Shares are ten-thousandths.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadMap {
    /// Probability of what is read exactly whatever the text says: sinks, the local region, or everything.
    pub near: Vec<u16>,
    /// Of the keys that were chosen.
    pub chosen: Vec<u16>,
    /// Of what counts through statistics.
    pub statistics: Vec<u16>,
    /// Of the [sink](crate::DecoderConfig::sink_logits) of the head; empty for heads without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sink: Vec<u16>,
    /// Probability that full attention over the queries and keys of this layer gives to the keys that are read exactly.
    pub covered: Vec<u16>,
    /// How far what is read lies from full attention: half the sum, over parts and the sink, of the differences of probability.
    pub apart: Vec<u16>,
    /// Number of keys read exactly whatever the text says.
    pub near_keys: Vec<u32>,
    /// Number of keys chosen.
    pub chosen_keys: Vec<u32>,
    /// Number of statistics read.
    pub runs: Vec<u32>,
    /// Parts that hold anything.
    pub parts: Vec<Vec<PartShare>>,
}

/// What a token reads of one part: its number, keys read exactly, their probability, the probability of what counts through
/// statistics, and the probability that full attention gives to the part. Statistics of a run that reaches over parts are shared out
/// evenly among its tokens that are not read exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartShare(pub u32, pub u32, pub u16, pub u16, pub u16);

/// Reads a text and shows what its tokens read. `each` hears after every layer how many of how many are done.
///
/// The text runs through the model as it is, so that a layer reads what the layers before it, themselves converted, made of the text;
/// what full attention would read is taken over the same queries and keys.
///
/// # Errors
///
/// [`ModelError::Input`] if no row or part is asked for, or the text is longer than what a model under the `slide` policy holds at
/// once; what [`Decoder::hidden`] refuses.
pub fn attention_map(
    decoder: &Decoder,
    tokens: &[u32],
    config: AttentionMapConfig,
    mut each: impl FnMut(usize, usize) + Send,
) -> Result<AttentionMap, ModelError> {
    let settings = decoder.config();
    if config.rows == 0 || config.parts == 0 {
        let problem =
            format!("{} rows and {} parts are asked for, at least 1 of each is needed", config.rows, config.parts);
        return Err(ModelError::Input(problem));
    }
    if settings.position_policy == PositionPolicy::Slide && tokens.len() > settings.decoder.max_positions {
        let problem = format!(
            "under the policy `slide` a map shows what is held at once, at most {} tokens; the text has {}",
            settings.decoder.max_positions,
            tokens.len()
        );
        return Err(ModelError::Input(problem));
    }
    let mut cache = decoder.new_cache(&[tokens.len()])?;
    decoder.check(&[tokens.to_vec()], &cache)?;
    let part = part_size(tokens.len(), config.parts);
    let rows = rows(tokens.len(), settings.decoder.layers * settings.decoder.heads, part, config.rows);
    let watching = decoder.clone().with_kernel(Kernel::Plain).new_cache(&[tokens.len()])?;
    let rotations = decoder.inputs(&[tokens.to_vec()], &cache, Packing::ByNumber).rotations;
    let with_attention =
        (0..settings.decoder.layers).filter(|&it| settings.decoder.layer_recurrent(it).is_none()).count();
    let mut watcher = Watcher { decoder, watching, rotations, part, rows: &rows };
    let (mut layers, mut failed) = (Vec::with_capacity(settings.decoder.layers), None);
    decoder.trace(tokens, &mut cache, &mut |trace: LayerTrace| {
        if failed.is_some() {
            return;
        }
        match watcher.layer(trace) {
            Ok(layer) => layers.push(layer),
            Err(error) => failed = Some(error),
        }
        each(layers.len(), with_attention);
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok(AttentionMap { tokens: tokens.len(), part, rows, layers }),
    }
}

/// The smallest power of two that cuts a text into no more than so many parts.
fn part_size(tokens: usize, parts: usize) -> usize {
    let mut part = 1;
    while tokens.div_ceil(part) > parts {
        part *= 2;
    }
    part
}

/// Positions at even distances, the last among them.
fn rows(tokens: usize, heads: usize, part: usize, most: usize) -> Vec<usize> {
    let cells = heads.max(1) * tokens.div_ceil(part).max(1);
    let count = most.min(MOST_CELLS / cells).clamp(1, tokens.max(1));
    (1..=count).map(|at| at * tokens / count - 1).collect()
}

/// What turns the inputs of a layer's attention into a map.
struct Watcher<'a> {
    decoder: &'a Decoder,
    /// Empty caches of plain tensor operations, which can tell what they read.
    watching: DecoderCache,
    rotations: Vec<Rotation>,
    part: usize,
    rows: &'a [usize],
}

impl Watcher<'_> {
    /// Reads the same again in the form that can be watched.
    fn layer(&mut self, trace: LayerTrace) -> Result<LayerMap, ModelError> {
        let LayerTrace { layer, normed, query, keys, values, .. } = trace;
        let [_, heads, tokens, _] = query.dims();
        let kv_heads = keys.dims()[1];
        let made = &self.watching.texts[0].layers[layer];
        let (options, attention) = (made.config().options.clone(), made.config().attention.clone());
        let full = full_reads(&query, &keys, self.rows, &options)?;
        let mut cache: AttentionCache = made.clone().watching(self.rows)?;
        let meta = attention.as_ref().is_some_and(|attention| attention.needs_meta()).then(|| {
            let projections = &self.decoder.blocks[layer].attention;
            let rotation = rotary_set(&self.decoder.config().decoder, layer).and_then(|set| self.rotations.get(set));
            meta_inputs(projections, &normed, rotation, &(0..tokens), &cache)
        });
        cache.prefill(query, keys, values, meta)?;
        let mut maps = vec![HeadMap::default(); heads];
        for (read, full) in cache.seen().iter().zip(&full) {
            self.row(&mut maps, read, full, tokens);
        }
        let retrieval = attention.map(|attention| attention.retrieval);
        Ok(LayerMap { layer, retrieval, window: options.window, group: heads / kv_heads, heads: maps })
    }

    /// Adds one token to the maps of all heads.
    fn row(&self, maps: &mut [HeadMap], read: &TokenReads, full: &TokenReads, tokens: usize) {
        let count = tokens.div_ceil(self.part);
        for (map, (read, full)) in maps.iter_mut().zip(read.heads.iter().zip(&full.heads)) {
            let parts = Parts::new(read, full, (self.part, count), read_exactly(read, tokens));
            let sum = |keys: &[(usize, f32)]| keys.iter().map(|key| f64::from(key.1)).sum::<f64>();
            map.near.push(share(sum(&read.near)));
            map.chosen.push(share(sum(&read.chosen)));
            map.statistics.push(share(read.runs.iter().map(|run| f64::from(run.1)).sum()));
            if self.decoder.config().decoder.sink_logits {
                map.sink.push(share(f64::from(read.sink)));
            }
            map.covered.push(share(parts.covered));
            let of_sink = f64::from(read.sink - full.sink).abs() / 2.0;
            map.apart.push(share(parts.apart() + of_sink));
            map.near_keys.push(read.near.len() as u32);
            map.chosen_keys.push(read.chosen.len() as u32);
            map.runs.push(read.runs.len() as u32);
            map.parts.push(parts.shares());
        }
    }
}

fn share(probability: f64) -> u16 {
    (probability * SHARE).round().clamp(0.0, SHARE) as u16
}

/// Which positions are read exactly.
fn read_exactly(read: &HeadReads, tokens: usize) -> Vec<bool> {
    let mut exactly = vec![false; tokens];
    read.near.iter().chain(&read.chosen).for_each(|&(at, _)| exactly[at] = true);
    exactly
}

/// What one head of one token reads of each part.
struct Parts {
    keys: Vec<u32>,
    exact: Vec<f64>,
    statistics: Vec<f64>,
    full: Vec<f64>,
    /// What full attention gives to the keys that are read exactly.
    covered: f64,
}

impl Parts {
    fn new(read: &HeadReads, full: &HeadReads, (part, count): (usize, usize), exactly: Vec<bool>) -> Self {
        let mut parts = Self {
            keys: vec![0; count],
            exact: vec![0.0; count],
            statistics: vec![0.0; count],
            full: vec![0.0; count],
            covered: 0.0,
        };
        for &(at, probability) in read.near.iter().chain(&read.chosen) {
            parts.keys[at / part] += 1;
            parts.exact[at / part] += f64::from(probability);
        }
        for (run, probability) in &read.runs {
            let stands_for = || run.clone().filter(|&at| !exactly[at]);
            let each = f64::from(*probability) / stands_for().count().max(1) as f64;
            stands_for().for_each(|at| parts.statistics[at / part] += each);
        }
        for &(at, probability) in &full.near {
            parts.full[at / part] += f64::from(probability);
            if exactly[at] {
                parts.covered += f64::from(probability);
            }
        }
        parts
    }

    fn apart(&self) -> f64 {
        let read = self.exact.iter().zip(&self.statistics).map(|(exact, statistics)| exact + statistics);
        read.zip(&self.full).map(|(read, full)| (read - full).abs()).sum::<f64>() / 2.0
    }

    fn shares(&self) -> Vec<PartShare> {
        let of = |at: usize| {
            let [exact, statistics, full] = [&self.exact, &self.statistics, &self.full].map(|of| share(of[at]));
            PartShare(at as u32, self.keys[at], exact, statistics, full)
        };
        let held = |share: &PartShare| share.1 > 0 || share.2 > 0 || share.3 > 0 || share.4 > 0;
        (0..self.keys.len()).map(of).filter(held).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_into_as_many_parts_as_may_be_and_no_more() {
        assert_eq!([1, 64, 65, 4096, 4097].map(|tokens| part_size(tokens, 64)), [1, 1, 2, 64, 128]);
        assert_eq!(part_size(5, 1), 8);
    }

    #[test]
    fn rows_stand_at_even_distances_and_end_with_the_last_token() {
        assert_eq!(rows(5, 1, 1, 64), [0, 1, 2, 3, 4]);
        assert_eq!(rows(100, 1, 2, 4), [24, 49, 74, 99]);
        // A thousand heads of 60 parts each leave room for 10 rows.
        assert_eq!(rows(6000, 1000, 100, 64).len(), 10);
        assert_eq!(rows(6000, 10_000_000, 100, 64), [5999]);
    }
}
