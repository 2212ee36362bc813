//! Attention of whole texts as one operation: without a cache that copies keys and values, and with a backward pass of its
//! own. A graph of plain operations would keep the scores of every tile, `tokens x tokens` numbers for each head.

use bsbr_kernels::{
    Heads,
    attention::{
        BlockInput, CausalOptions, Forward, block_attention_backward, block_attention_into, causal_attention,
        causal_attention_backward,
    },
    index::{KeyIndex, SECTION},
};
use burn::{
    backend::{
        Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{DType, Device, Tensor, TensorData},
};

use super::{Memory, block_options, causal_options};
use crate::{AttentionOptions, BlockAttentionConfig};

/// What to compute.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    attention: Option<BlockAttentionConfig>,
    options: AttentionOptions,
}

/// Attention of whole texts and its gradients, of tensors `[batch, heads, tokens, head_dim]`.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait AttentionOps: Backend {
    /// The output, and the logarithm of the denominator of each row, `[batch, heads, tokens]`.
    fn whole_attention(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        problem: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of query, keys and values; `output` and `log_mass` are what the forward pass returned.
    #[allow(clippy::too_many_arguments)]
    fn whole_attention_backward(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_mass: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        problem: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// Attention of a whole text, with gradients where they are asked for; `None` where the plain form must serve.
pub(crate) fn attend(
    query: &Tensor<4>,
    keys: &Tensor<4>,
    values: &Tensor<4>,
    attention: Option<&BlockAttentionConfig>,
    options: &AttentionOptions,
) -> Option<Tensor<4>> {
    let device = query.device();
    let tracked = device.is_autodiff();
    let here = device.inner() == Device::flex() && [query, keys, values].iter().all(|rows| rows.dtype() == DType::F32);
    if !here || !attention.is_none_or(super::covers) {
        return None;
    }
    let problem = Problem { attention: attention.cloned(), options: options.clone() };
    if !tracked {
        let memory = [Memory::new(query)?, Memory::new(keys)?, Memory::new(values)?];
        return Some(super::tensor(whole(&memory, &problem).0, query.dims()));
    }
    let dispatch = |tensor: &Tensor<4>| tensor.clone().into_dispatch();
    let (output, _) = Dispatch::whole_attention(dispatch(query), dispatch(keys), dispatch(values), problem);
    Some(Tensor::from_dispatch(output))
}

/// Rows of queries that go through the kernel together.
const ROWS_TOGETHER: usize = 1 << 13;

/// The output and the logarithms of the denominators.
fn whole(memory: &[Memory; 3], problem: &Problem) -> (Vec<f32>, Vec<f32>) {
    let [query, keys, values] = [0, 1, 2].map(|at| memory[at].heads());
    let [batch, heads, tokens, width] = query.dims();
    let options = causal_options(&problem.options, heads);
    let reads_less = |attention: &&BlockAttentionConfig| match tokens.saturating_sub(1) / attention.chunk_size {
        last if attention.uses_index() => attention.candidates(last, &problem.options).is_some(),
        _ => tokens > attention.local_tokens(),
    };
    let Some(attention) = problem.attention.as_ref().filter(reads_less) else {
        return causal_attention(query, keys, values, &options);
    };
    let kv_heads = keys.dims()[1];
    let group = heads / kv_heads;
    let step = (ROWS_TOGETHER / (group * tokens).max(1)).clamp(1, kv_heads);
    let mut output = vec![0.0; batch * heads * tokens * width];
    let mut log_mass = vec![0.0; batch * heads * tokens];
    for row in 0..batch {
        for first in (0..kv_heads).step_by(step) {
            let some = first..(first + step).min(kv_heads);
            let some_queries = some.start * group..some.end * group;
            let slopes = options.slopes.as_ref().map(|slopes| slopes[some_queries.clone()].to_vec());
            let sink_logits = options.sink_logits.as_ref().map(|sinks| sinks[some_queries.clone()].to_vec());
            let options = CausalOptions { slopes, sink_logits, ..options.clone() };
            let (keys, values) = (keys.some_heads(row, some.clone()), values.some_heads(row, some));
            let query = query.some_heads(row, some_queries.clone());
            let index = index_of(query, keys, values, problem);
            let input = input(query, keys, values, index.as_ref());
            let rows = (row * heads + some_queries.start) * tokens..(row * heads + some_queries.end) * tokens;
            let output = &mut output[rows.start * width..rows.end * width];
            block_attention_into(&input, &block_options(attention), &options, output, &mut log_mass[rows]);
        }
    }
    (output, log_mass)
}

/// The index of a whole text, where any of its tokens chooses by one.
fn index_of(query: Heads<'_>, keys: Heads<'_>, values: Heads<'_>, problem: &Problem) -> Option<KeyIndex> {
    let attention = problem.attention.as_ref().filter(|attention| attention.uses_index())?;
    let [batch, kv_heads, tokens, width] = keys.dims();
    attention.candidates(tokens.saturating_sub(1) / attention.chunk_size, &problem.options)?;
    let channels = attention.residual_channels(width);
    let mut index = KeyIndex::new([batch, kv_heads, width], channels, attention.sink_tokens);
    index.watch(query, 0..attention.index_founding());
    index.found(keys, attention.index_founding());
    index.extend(keys, values, attention.local_start((tokens - 1) / attention.chunk_size) / SECTION);
    Some(index)
}

fn input<'a>(query: Heads<'a>, keys: Heads<'a>, values: Heads<'a>, index: Option<&'a KeyIndex>) -> BlockInput<'a> {
    BlockInput { query, keys: keys.into(), values: values.into(), first: 0, sinks: None, index, near: None }
}

fn primitive(numbers: Vec<f32>, shape: &[usize]) -> FloatTensor<Flex> {
    burn::backend::flex::FlexTensor::from_data(TensorData::new(numbers, shape.to_vec()))
}

impl AttentionOps for Flex {
    fn whole_attention(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        problem: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shape = query.shape().to_vec();
        let (output, log_mass) = whole(&[query, keys, values].map(Memory::of), &problem);
        (primitive(output, &shape), primitive(log_mass, &shape[..3]))
    }

    fn whole_attention_backward(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_mass: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        problem: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (shape, kv_shape) = (query.shape().to_vec(), keys.shape().to_vec());
        let memory = [query, keys, values].map(Memory::of);
        let (output, gradient) = (Memory::of(output), Memory::of(gradient));
        let log_mass = log_mass.to_contiguous();
        let log_mass = log_mass.as_slice().unwrap_or_else(|| unreachable!("contiguous numbers"));
        let forward = Forward { output: output.heads(), log_mass, gradient: gradient.heads() };
        let options = causal_options(&problem.options, shape[1]);
        let [query, keys, values] = [0, 1, 2].map(|at| memory[at].heads());
        let index = index_of(query, keys, values, &problem);
        let input = input(query, keys, values, index.as_ref());
        let gradients = match &problem.attention {
            None => causal_attention_backward((query, keys, values), &forward, &options),
            Some(attention) => block_attention_backward(&input, &forward, &block_options(attention), &options),
        };
        (
            primitive(gradients.query, &shape),
            primitive(gradients.keys, &kv_shape),
            primitive(gradients.values, &kv_shape),
        )
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn whole_attention(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        problem: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct WholeAttention;

        impl<B: AttentionOps> Backward<B, 3> for WholeAttention {
            type State = ([FloatTensor<B>; 5], Problem);

            fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
                let gradient = gradients.consume::<B>(&ops.node);
                let ([query, keys, values, output, log_mass], problem) = ops.state;
                let (query, keys, values) =
                    B::whole_attention_backward(query, keys, values, output, log_mass, gradient, problem);
                for (node, gradient) in ops.parents.into_iter().zip([query, keys, values]) {
                    if let Some(node) = node {
                        gradients.register::<B>(node.id, gradient);
                    }
                }
            }
        }

        let (query, query_node) = query.into_parts();
        let (keys, keys_node) = keys.into_parts();
        let (values, values_node) = values.into_parts();
        let forward = || B::whole_attention(query.clone(), keys.clone(), values.clone(), problem.clone());
        match WholeAttention.prepare::<C>([query_node, keys_node, values_node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let (output, log_mass) = forward();
                let state = [query, keys, values, output.clone(), log_mass.clone()];
                (prepared.finish((state, problem), output), Self::from_inner(log_mass))
            }
            OpsKind::UnTracked(prepared) => {
                let (output, log_mass) = forward();
                (prepared.finish(output), Self::from_inner(log_mass))
            }
        }
    }

    fn whole_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Problem,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("attention has no gradients of gradients")
    }
}
