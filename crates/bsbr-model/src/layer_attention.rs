//! Attention of one layer over packed tokens.

use std::ops::Range;

use bsbr_attn::{AttentionCache, Meta};
use burn::{
    nn::Linear,
    tensor::{Device, Int, Tensor, TensorData},
};

use crate::{
    DecoderCache, ModelError,
    modules::{Normalisation, Projections},
    ops,
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
    /// Keys likewise, `[1, kv_heads, tokens, head_dim]`.
    pub keys: Tensor<4>,
    /// Values, `[1, kv_heads, tokens, head_dim]`.
    pub values: Tensor<4>,
    /// What the heads read, before the output projection, `[1, heads, tokens, head_dim]`.
    pub read: Tensor<4>,
}

/// Attention of one layer over packed tokens `[tokens, hidden_size]` before their `norm`: queries, keys and values, and
/// what the heads read, `[1, heads, tokens, head_dim]`. `pieces` are the texts with new tokens and where those stand.
pub(crate) fn attend(
    projections: &Projections,
    norm: Option<&Normalisation>,
    x: &Tensor<2>,
    places: Places<'_>,
    pieces: &[(usize, Range<usize>)],
    layer: usize,
    cache: &mut DecoderCache,
) -> Result<([Tensor<4>; 3], Tensor<4>), ModelError> {
    let Some((first, _)) = pieces.first() else { return Err(ModelError::EmptyInput) };
    let made = cache.texts[*first].layers[layer].config();
    let normed = made.attention.as_ref().is_some_and(|attention| attention.needs_meta()).then(|| match norm {
        Some(norm) => norm.forward(x.clone()),
        None => x.clone(),
    });
    let heads = ops::heads(x, norm, projections, places, made.head_dim).map(Tensor::unsqueeze::<4>);
    for (text, range) in pieces {
        cache.make_room(*text, layer, range.len());
    }
    let caches = caches_of(pieces, layer, cache);
    let read = |(cache, range): (&mut AttentionCache, &Range<usize>)| {
        let [query, key, value] = heads.each_ref().map(|heads| match pieces {
            [_] => heads.clone(),
            _ => heads.clone().narrow(2, range.start, range.len()),
        });
        let meta = normed.as_ref().map(|normed| meta_inputs(projections, normed, places.rotation, range, cache));
        cache.prefill(query, key, value, meta)
    };
    let mut outputs = ops::each(&heads[0], caches, read).into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok((heads, if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 2) }))
}

/// The caches of the texts with new tokens, and where these stand.
fn caches_of<'a>(
    pieces: &'a [(usize, Range<usize>)],
    layer: usize,
    cache: &'a mut DecoderCache,
) -> Vec<(&'a mut AttentionCache, &'a Range<usize>)> {
    let mut pieces = pieces.iter().peekable();
    let texts = cache.texts.iter_mut().enumerate();
    let of_text = texts.filter_map(|(text, held)| {
        let (_, range) = pieces.next_if(|(of, _)| *of == text)?;
        Some((&mut held.layers[layer], range))
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
