//! Attention of whole texts as one operation with a backward pass of its own: a graph of plain operations would keep the
//! scores of every tile, `tokens x tokens` numbers for each head.

use bsbr_kernels::attention::{
    BlockInput, Forward, block_attention, block_attention_backward, causal_attention, causal_attention_backward,
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
use crate::{AttentionOptions, BlockAttentionConfig, Retrieval};

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

/// Attention of a whole text whose gradients are asked for; `None` where the plain form must serve.
pub(crate) fn attend(
    query: &Tensor<4>,
    keys: &Tensor<4>,
    values: &Tensor<4>,
    attention: Option<&BlockAttentionConfig>,
    options: &AttentionOptions,
) -> Option<Tensor<4>> {
    let device = query.device();
    let tracked = device.is_autodiff() && device.inner() == Device::flex() && query.dtype() == DType::F32;
    let covered = attention.is_none_or(super::covers) && options.softcap.is_none();
    if !tracked || !covered {
        return None;
    }
    let problem = Problem { attention: attention.cloned(), options: *options };
    let dispatch = |tensor: &Tensor<4>| tensor.clone().into_dispatch();
    let (output, _) = Dispatch::whole_attention(dispatch(query), dispatch(keys), dispatch(values), problem);
    Some(Tensor::from_dispatch(output))
}

/// The mean rows that a problem needs, kept while views of them are used.
struct MeanRows {
    size: usize,
    count: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl MeanRows {
    fn new(keys: &Memory, values: &Memory, size: usize, sinks: usize) -> Self {
        let count = keys.heads().dims()[2] / size;
        let means = |rows: &Memory| bsbr_kernels::attention::block_means(rows.heads(), 0, size, sinks, 0..count);
        Self { size, count, keys: means(keys), values: means(values) }
    }

    fn views(&self, [batch, heads, _, width]: [usize; 4]) -> (bsbr_kernels::Heads<'_>, bsbr_kernels::Heads<'_>) {
        let of = |rows| bsbr_kernels::Heads::contiguous(rows, [batch, heads, self.count, width]);
        debug_assert!(self.size > 0);
        (of(&self.keys), of(&self.values))
    }
}

/// Blocks and chunks, where anything is retrieved.
fn mean_rows(keys: &Memory, values: &Memory, problem: &Problem) -> Option<(MeanRows, MeanRows)> {
    let attention = problem.attention.as_ref().filter(|attention| attention.retrieval == Retrieval::Blocks)?;
    let of = |size| MeanRows::new(keys, values, size, attention.sink_tokens);
    Some((of(attention.block_size), of(attention.chunk_size)))
}

fn input<'a>([query, keys, values]: &'a [Memory; 3], means: Option<&'a (MeanRows, MeanRows)>) -> BlockInput<'a> {
    let dims = keys.heads().dims();
    BlockInput {
        query: query.heads(),
        keys: keys.heads(),
        values: values.heads(),
        first: 0,
        sinks: None,
        means: means.map(|(blocks, _)| blocks.views(dims)),
        chunk_means: means.map(|(_, chunks)| chunks.views(dims)),
    }
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
        let memory = [query, keys, values].map(Memory::of);
        let options = causal_options(&problem.options, shape[1]);
        let means = mean_rows(&memory[1], &memory[2], &problem);
        let input = input(&memory, means.as_ref());
        let (output, log_mass) = match &problem.attention {
            None => causal_attention(input.query, input.keys, input.values, &options),
            Some(attention) => block_attention(&input, &block_options(attention), &options),
        };
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
        let means = mean_rows(&memory[1], &memory[2], &problem);
        let input = input(&memory, means.as_ref());
        let gradients = match &problem.attention {
            None => causal_attention_backward((input.query, input.keys, input.values), &forward, &options),
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
        unimplemented!("attention has no gradients of gradients")
    }
}
