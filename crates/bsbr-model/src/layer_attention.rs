//! Attention of one layer over packed tokens.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bsbr_attn::{AttentionCache, Meta};
use burn::{
    nn::Linear,
    tensor::{Device, Int, Tensor, TensorData},
};

use crate::{
    DecoderCache, DecoderConfig, ModelConfig, ModelError,
    modules::{Normalisation, Projections},
    ops::{self, Heads, Packing},
    recurrent::DeltaRule,
    rotary::{Places, Rotation},
};

/// What the attention of one layer made of the tokens of one text.
#[derive(Debug, Clone)]
pub struct LayerTrace {
    /// Number of the layer.
    pub layer: usize,
    /// Inputs of the projections, `[tokens, hidden_size]`.
    pub normed: Tensor<2>,
    /// Queries, rotated where the layer rotates, `[1, heads, tokens, head_dim]`.
    pub query: Tensor<4>,
    /// Keys likewise, `[1, kv_heads, tokens, head_dim]`: those it reads, whichever layer made them.
    pub keys: Tensor<4>,
    /// Values, `[1, kv_heads, tokens, head_dim]`.
    pub values: Tensor<4>,
    /// What the heads read, before their gate and the output projection, `[1, heads, tokens, head_dim]`.
    pub read: Tensor<4>,
}

/// Keys and values of the tokens of one pass, `[1, kv_heads, tokens, head_dim]`, of the layers that later ones read.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedRows {
    owners: BTreeSet<usize>,
    rows: BTreeMap<usize, [Tensor<4>; 2]>,
    /// Queries of the same layers.
    queries: BTreeMap<usize, Tensor<4>>,
}

impl SharedRows {
    pub(crate) fn of(decoder: &DecoderConfig) -> Self {
        let owners = (0..decoder.layer_shapes.len()).filter_map(|layer| decoder.key_owner(layer)).collect();
        Self { owners, ..Self::default() }
    }

    /// The rows of one layer.
    pub(crate) fn holding(owner: usize, rows: [Tensor<4>; 2]) -> Self {
        Self { rows: BTreeMap::from([(owner, rows)]), ..Self::default() }
    }

    /// The layers whose rows are read by others.
    pub(crate) fn owners(&self) -> impl Iterator<Item = usize> + '_ {
        self.owners.iter().copied()
    }

    /// The rows of a layer, once it has run.
    pub(crate) fn get(&self, layer: usize) -> Option<&[Tensor<4>; 2]> {
        self.rows.get(&layer)
    }

    /// Keeps the rows of a layer, if others read them.
    pub(crate) fn keep(&mut self, layer: usize, rows: &[Tensor<4>; 2]) {
        if self.owners.contains(&layer) {
            self.rows.insert(layer, rows.clone());
        }
    }

    /// Queries, keys and values of a layer from its heads, whichever layer made the keys and values.
    pub(crate) fn complete(
        &mut self,
        decoder: &DecoderConfig,
        layer: usize,
        heads: Heads,
    ) -> Result<[Tensor<4>; 3], ModelError> {
        let rows = match heads.rows {
            Some(rows) => {
                let rows = rows.map(Tensor::unsqueeze::<4>);
                self.keep(layer, &rows);
                rows
            }
            None => decoder.key_owner(layer).and_then(|owner| self.get(owner)).cloned().ok_or_else(|| {
                ModelError::Input(format!("layer {layer} reads keys of another layer, which has not run"))
            })?,
        };
        let ([keys, values], query) = (rows, heads.query.unsqueeze::<4>());
        if self.owners.contains(&layer) {
            self.queries.insert(layer, query.clone());
        }
        Ok([query, keys, values])
    }
}

/// One way of packed tokens through the layers.
pub(crate) struct Pass<'a> {
    pub(crate) config: &'a ModelConfig,
    /// The texts with new tokens, and where those stand.
    pub(crate) pieces: &'a [(usize, Range<usize>)],
    pub(crate) cache: &'a mut DecoderCache,
    pub(crate) shared: SharedRows,
    /// The caches hold this layer alone: nothing can be read through that of another.
    pub(crate) alone: bool,
}

impl Pass<'_> {
    /// Attention of one layer over packed tokens `[tokens, hidden_size]` before their `norm`: queries, keys and values, and
    /// what the heads read, `[1, heads, tokens, head_dim]`. Of a recurrent layer what is read alone.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        (projections, norm): (&Projections, Option<&Normalisation>),
        x: &Tensor<2>,
        places: Places<'_>,
    ) -> Result<(Option<[Tensor<4>; 3]>, Tensor<4>), ModelError> {
        let Some((first, _)) = self.pieces.first() else { return Err(ModelError::EmptyInput) };
        if let Some(rule) = &projections.recurrent {
            return Ok((None, self.recur(layer, (projections, rule, norm), x, places.packing)?));
        }
        let made = self.cache.texts[*first].layers[layer].config();
        let normed = made.attention.as_ref().is_some_and(|attention| attention.needs_meta()).then(|| match norm {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        });
        let heads = ops::heads(x, norm, projections, places, made.head_dim);
        let heads = self.shared.complete(&self.config.decoder, layer, heads)?;
        let owner = self.config.cache_owner(layer).filter(|_| !self.alone);
        let pieces = self.pieces;
        if owner.is_none() {
            for (text, range) in pieces {
                self.cache.make_room(*text, layer, range.len());
            }
        }
        let founder = self.config.index_founder(layer).filter(|_| !self.alone);
        let founding = founder.and_then(|founder| self.shared.queries.get(&founder));
        let caches = caches_of(pieces, layer, owner, self.cache);
        let read = |(cache, owner, range): (&mut AttentionCache, Option<&AttentionCache>, &Range<usize>)| {
            let of_text = |heads: &Tensor<4>| match pieces {
                [_] => heads.clone(),
                _ => heads.clone().narrow(2, range.start, range.len()),
            };
            let [query, key, value] = heads.each_ref().map(of_text);
            if let Some(owner) = owner {
                return cache.read_shared(owner, query);
            }
            if let Some(founding) = founding {
                cache.found_with(&of_text(founding))?;
            }
            let meta = normed.as_ref().map(|normed| meta_inputs(projections, normed, places.rotation, range, cache));
            cache.prefill(query, key, value, meta)
        };
        let mut outputs = ops::each(&heads[0], caches, read).into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok((Some(heads), if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 2) }))
    }
}

impl Pass<'_> {
    /// What a recurrent layer reads of packed tokens, `[1, value_heads, tokens, value_dim]`; its states are those behind them.
    fn recur(
        &mut self,
        layer: usize,
        (projections, rule, norm): (&Projections, &DeltaRule, Option<&Normalisation>),
        x: &Tensor<2>,
        packing: Packing,
    ) -> Result<Tensor<4>, ModelError> {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for (text, range) in self.pieces {
            let state = self.cache.texts[*text].states.get(layer).cloned().flatten();
            let state = state.ok_or_else(|| ModelError::Input(format!("the cache has no state of layer {layer}")))?;
            pieces.push((range.clone(), state));
        }
        let (read, states) = ops::recurrent(x, norm, (projections, rule), pieces, packing);
        for ((text, _), state) in self.pieces.iter().zip(states) {
            self.cache.texts[*text].states[layer] = Some(state);
        }
        Ok(read)
    }
}

/// The cache of a layer, that of the layer whose keys it reads there, and where new tokens stand.
type OfText<'a> = (&'a mut AttentionCache, Option<&'a AttentionCache>, &'a Range<usize>);

/// The caches of the texts with new tokens.
fn caches_of<'a>(
    pieces: &'a [(usize, Range<usize>)],
    layer: usize,
    owner: Option<usize>,
    cache: &'a mut DecoderCache,
) -> Vec<OfText<'a>> {
    let mut pieces = pieces.iter().peekable();
    let texts = cache.texts.iter_mut().enumerate();
    let of_text = texts.filter_map(|(text, held)| {
        let (_, range) = pieces.next_if(|(of, _)| *of == text)?;
        let (before, from) = held.layers.split_at_mut(layer);
        let own = from.first_mut()?;
        Some((own, owner.and_then(|owner| before.get(owner)), range))
    });
    of_text.collect()
}

/// Meta queries of the tokens that begin a chunk and meta keys of those that end a block, rotated as queries and keys are.
pub(crate) fn meta_inputs(
    projections: &Projections,
    normed: &Tensor<2>,
    rotation: Option<&Rotation>,
    range: &Range<usize>,
    cache: &AttentionCache,
) -> Meta {
    let (heads, width) = (cache.config().heads, cache.config().head_dim);
    let project = |linear: &Option<Linear>, at: Vec<usize>| {
        let linear = linear.as_ref()?;
        if at.is_empty() {
            return None;
        }
        let count = at.len();
        let index: Vec<i32> = at.into_iter().map(|at| (range.start + at) as i32).collect();
        // Rotations have no gradients, the inputs may: they can be on two kinds of one device.
        let index = |device: &Device| Tensor::<1, Int>::from_data(TensorData::new(index.clone(), [count]), device);
        let rows = linear.forward(normed.clone().select(0, index(&normed.device())));
        let rows = rows.reshape([count, heads, width]);
        let rows = match rotation {
            Some(rotation) => rotation.at(index(&rotation.cos.device())).apply(rows),
            None => rows,
        };
        Some(rows.unsqueeze::<4>().swap_dims(1, 2))
    };
    let count = range.len();
    Meta {
        query: project(&projections.meta_query, cache.chunk_starts(count)),
        key: project(&projections.meta_key, cache.block_ends(count)),
    }
}
