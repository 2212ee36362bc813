//! The loss of one layer: what its attention gives for the original's inputs against what the original gave.

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Meta, Retrieval, attend, block_shares};
use burn::{
    module::Param,
    tensor::{DType, Tensor, activation::log_softmax},
};

use super::{config::LayerLoss, parameters::LayerParameters};
use crate::{
    AdapterTarget, Decoder, DecoderCache, LayerTrace, ModelError,
    embedding::Inputs,
    layer_attention::{SharedRows, meta_inputs},
    modules::{Normalisation, Projections},
    ops::{self, Packing},
    recurrent::RecurrentState,
    rotary::{Places, Rotation, rotary_set},
};

/// Attention of whole texts with gradients, one text at a time.
pub(super) struct Student<'a> {
    decoder: &'a Decoder,
    /// Empty: it says how each layer is configured and where its chunks are.
    cache: DecoderCache,
    /// The same for tensors with gradients.
    tracked: DecoderCache,
    rotations: Vec<Rotation>,
    temperature: Option<Vec<f32>>,
    /// Inputs of all layers, where they have some.
    per_layer: Option<Tensor<2>>,
    tokens: usize,
}

impl<'a> Student<'a> {
    /// For one text of `tokens`; also what enters its blocks, `[tokens, hidden_size]`.
    pub(super) fn new(decoder: &'a Decoder, tokens: &[u32]) -> Result<(Self, Tensor<2>), ModelError> {
        let cache = decoder.new_cache(&[tokens.len()])?;
        let device = decoder.device().autodiff();
        let tracked =
            DecoderCache::with_kernel(&decoder.config, &[tokens.len()], (decoder.kernel, DType::F32), &device)?;
        let tracked = tracked.with_sinks(|layer| decoder.blocks[layer].attention.sink_logits.clone())?;
        let basis = |layer: usize| decoder.blocks[layer].attention.state_basis.as_ref().map(Param::val);
        let tracked = tracked.with_state_bases(|layer| basis(layer).map(Tensor::autodiff))?;
        let Inputs { x, rotations, temperature, per_layer } =
            decoder.inputs(&[tokens.to_vec()], &cache, Packing::ByNumber);
        Ok((Self { decoder, cache, tracked, rotations, temperature, per_layer, tokens: tokens.len() }, x))
    }

    /// The inputs of a layer, where it has some.
    pub(super) fn inputs_of(&self, layer: usize) -> Option<Tensor<2>> {
        self.per_layer.as_ref().map(|all| self.decoder.inputs_of(layer, all))
    }

    fn options(&self, layer: usize) -> AttentionOptions {
        self.cache.texts[0].layers[layer].config().options.clone()
    }

    /// What the heads read in layer `layer` from inputs `x` `[tokens, hidden_size]` before `norm`,
    /// `[1, heads, tokens, head_dim]`, and the meta queries and keys where there are any. `shared` has the keys and values of
    /// layers that others read.
    pub(super) fn read(
        &self,
        layer: usize,
        (projections, norm): (&Projections, Option<&Normalisation>),
        x: &Tensor<2>,
        shared: &mut SharedRows,
    ) -> Result<(Tensor<4>, Option<Meta>), ModelError> {
        if let Some(rule) = &projections.recurrent {
            // A whole text, from nothing.
            let state = RecurrentState::new(&rule.config, &x.device());
            let pieces = vec![(0..self.tokens, state)];
            return Ok((ops::recurrent(x, norm, (projections, rule), pieces, Packing::ByNumber).0, None));
        }
        let cache = &self.cache.texts[0].layers[layer];
        let made = cache.config();
        let rotation = rotary_set(&self.decoder.config.decoder, layer).and_then(|set| self.rotations.get(set));
        let places = Places { rotation, temperature: self.temperature.as_deref(), packing: Packing::ByNumber };
        let heads = ops::heads(x, norm, projections, places, made.head_dim);
        let heads = shared.complete(&self.decoder.config.decoder, layer, heads)?;
        let meta = made.attention.as_ref().is_some_and(BlockAttentionConfig::needs_meta).then(|| {
            let normed = norm.map_or_else(|| x.clone(), |norm| norm.forward(x.clone()));
            meta_inputs(projections, &normed, rotation, &(0..self.tokens), cache)
        });
        let parts = |meta: &Meta| [meta.query.clone(), meta.key.clone()];
        let based = made.attention.as_ref().is_some_and(BlockAttentionConfig::needs_state_basis);
        let basis = projections.state_basis.as_ref().filter(|_| based).map(Param::val);
        let gated = made.attention.as_ref().is_some_and(|attention| attention.needs_gates());
        let gates = projections.gates.as_ref().filter(|_| gated).map(Param::val);
        let tracked = heads.iter().any(Tensor::is_autodiff)
            || gates.as_ref().is_some_and(Tensor::is_autodiff)
            || basis.as_ref().is_some_and(Tensor::is_autodiff)
            || meta.iter().flat_map(parts).flatten().any(|tensor| tensor.is_autodiff());
        // All of one kind: a graph does not begin in the middle of an operation.
        let (heads, meta) = if tracked {
            let of = |tensor: Option<Tensor<4>>| tensor.map(Tensor::autodiff);
            (heads.map(Tensor::autodiff), meta.map(|meta| Meta { query: of(meta.query), key: of(meta.key) }))
        } else {
            (heads, meta)
        };
        let [query, keys, values] = heads;
        let read = if based || gated || cache.far_positions().is_some() {
            let mut cache = if tracked { &self.tracked } else { &self.cache }.texts[0].layers[layer].clone();
            if let Some(basis) = basis {
                cache = cache.with_state_basis(if tracked { basis.autodiff() } else { basis })?;
            }
            if let Some(gates) = gates {
                cache = cache.with_gates(if tracked { gates.autodiff() } else { gates })?;
            }
            cache.prefill(query, keys, values, meta.clone())?
        } else {
            attend(query, keys, values, meta.clone(), made.attention.as_ref(), made.options.clone())?
        };
        Ok((read, meta))
    }
}

/// The loss of a layer for one text, and the settings that make it.
pub(super) struct LayerObjective {
    pub(super) loss: LayerLoss,
    pub(super) meta_weight: f64,
}

impl LayerObjective {
    /// `[1]`, from what the original's layer saw and read.
    pub(super) fn of(
        &self,
        student: &Student<'_>,
        trace: &LayerTrace,
        parameters: &LayerParameters,
    ) -> Result<Tensor<1>, ModelError> {
        let layer = trace.layer;
        let Some(attention) = student.decoder.config.layer_attention(layer) else {
            return Ok(Tensor::zeros([1], &trace.normed.device()));
        };
        let mut projections = student.decoder.blocks[layer].attention.clone();
        parameters.place(&mut projections);
        let mut shared = match student.decoder.config.decoder.key_owner(layer) {
            Some(owner) => SharedRows::holding(owner, [trace.keys.clone(), trace.values.clone()]),
            None => SharedRows::default(),
        };
        let (read, meta) = student.read(layer, (&projections, None), &trace.normed, &mut shared)?;
        let opened = |own: &Projections, read: Tensor<4>| own.opened(read, || trace.normed.clone(), Packing::ByNumber);
        let adapter = projections.adapter(AdapterTarget::Output);
        let found =
            ops::join_heads(opened(&projections, read), (&projections.output, adapter), None, Packing::ByNumber);
        let through = |read: Tensor<4>| {
            ops::join_heads(opened(&projections, read), (&projections.output, None), None, Packing::ByNumber)
        };
        let wanted = through(trace.read.clone());
        let error = match self.loss {
            LayerLoss::All => {
                let centred = wanted.clone() - wanted.clone().mean_dim(0);
                relative(found - wanted, &centred)
            }
            LayerLoss::Far => {
                let exact = if attention.retrieval == Retrieval::Blocks { attention.exact_tokens } else { 0 };
                let first = attention.local_chunks.saturating_add(1).saturating_mul(attention.chunk_size);
                let first = first.max(attention.sink_tokens).max(exact).min(student.tokens);
                if first == student.tokens {
                    (found - wanted).square().sum() * 0.0
                } else {
                    let none = attention.without_retrieval();
                    let (query, keys, values) = (trace.query.clone(), trace.keys.clone(), trace.values.clone());
                    let near = attend(query, keys, values, None, Some(&none), student.options(layer))?;
                    let far = |x: Tensor<2>| x.narrow(0, first, student.tokens - first);
                    relative(far(found - wanted.clone()), &far(through(near) - wanted))
                }
            }
        };
        match meta {
            Some(meta) if self.meta_weight > 0.0 => {
                let divergence = meta_divergence(&meta, trace, attention, &student.options(layer));
                Ok(match divergence {
                    Some(divergence) => error + divergence * self.meta_weight,
                    None => error,
                })
            }
            _ => Ok(error),
        }
    }
}

/// Squares of `error` relative to those of `scale`.
fn relative(error: Tensor<2>, scale: &Tensor<2>) -> Tensor<1> {
    error.square().sum() / (scale.clone().square().sum() + 1e-20)
}

/// Divergence of the softmax of meta scores from the shares of attention that the blocks have in truth, in nats, weighted
/// by how much of its attention a chunk pays to them. A hard choice of blocks has no gradient: this is what trains it.
fn meta_divergence(
    meta: &Meta,
    trace: &LayerTrace,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Option<Tensor<1>> {
    let (queries, keys) = (meta.query.as_ref()?, meta.key.as_ref()?);
    let kv_heads = trace.keys.dims()[1];
    let mut sum: Option<Tensor<1>> = None;
    let mut weight: Option<Tensor<1>> = None;
    for chunk in block_shares(&trace.query, &trace.keys, attention, options) {
        let query = queries.clone().narrow(2, chunk.chunk, 1);
        let keys = keys.clone().narrow(2, chunk.blocks.start, chunk.blocks.len());
        let scores = query.matmul(keys.swap_dims(2, 3)) * options.scale;
        let [batch, heads, _, blocks] = scores.dims();
        let (scores, shares) = (scores.reshape([batch, heads, blocks]), chunk.shares);
        // Blocks are chosen by a KV head for all its queries, states are mixed by each head for itself.
        let (scores, shares) = if attention.retrieval == Retrieval::Blocks {
            let grouped = |x: Tensor<3>| x.reshape([batch, kv_heads, heads / kv_heads, blocks]).sum_dim(2);
            let together = |x: Tensor<3>| grouped(x).reshape([batch, kv_heads, blocks]);
            (together(scores), together(shares))
        } else {
            (scores, shares)
        };
        let mass = shares.clone().sum_dim(2);
        let share = shares.clone() / (mass.clone() + 1e-20);
        let surprise = (share.clone() + 1e-20).log() - log_softmax(scores, 2);
        let divergence = (share * surprise * mass.clone()).sum();
        let mass = mass.sum();
        (sum, weight) = match (sum, weight) {
            (Some(sum), Some(weight)) => (Some(sum + divergence), Some(weight + mass)),
            _ => (Some(divergence), Some(mass)),
        };
    }
    Some(sum? / (weight? + 1e-20))
}
