//! Attention by fused loops over the memory of `flex` tensors: f32, and f16 or bf16 for the keys and values of a cache.
//!
//! They compute what [`crate::plain`] and [`crate::index`] compute, without their intermediate tensors. Anything they do not
//! cover (another device, another type, meta projections, states, gradients through a cache) is left to the plain form;
//! gradients of whole texts are in [`whole`].

mod index;
pub(crate) mod whole;

use bsbr_kernels::{
    Heads, Stored,
    attention::{
        self, BlockInput, BlockOptions, CausalOptions, IndexOptions, Near, Sinks, block_attention, causal_attention,
    },
    index::KeyIndex,
};
use burn::{
    backend::{BackendTypes, Flex},
    tensor::{DType, Device, Tensor, TensorData, bf16, f16},
};

pub(crate) use index::FusedIndex;

use crate::{AttentionOptions, BlockAttentionConfig, Far, Retrieval, index::Retrieved};

/// The memory of a tensor with rows of neighbouring numbers.
pub(crate) struct Memory(<Flex as BackendTypes>::FloatTensorPrimitive);

impl Memory {
    /// `None` if the tensor is on another device, of another type, or part of a graph of gradients.
    pub(crate) fn new(tensor: &Tensor<4>) -> Option<Self> {
        if tensor.dtype() != DType::F32 {
            return None;
        }
        Some(Self::of(tensor.clone().try_into_primitive::<Flex>().ok()?))
    }

    fn of(memory: <Flex as BackendTypes>::FloatTensorPrimitive) -> Self {
        let layout = memory.layout();
        let rows = layout.strides()[3] == 1 && layout.has_positive_strides();
        Self(if rows { memory } else { memory.to_contiguous() })
    }

    /// `[batch, heads, rows, width]`.
    fn heads(&self) -> Heads<'_> {
        heads(&self.0, self.0.storage())
    }
}

/// A view of the numbers of a tensor.
fn heads<'a, T>(tensor: &<Flex as BackendTypes>::FloatTensorPrimitive, numbers: &'a [T]) -> Heads<'a, T> {
    let layout = tensor.layout();
    let (shape, strides) = (layout.shape(), layout.strides());
    let dims = [0, 1, 2, 3].map(|axis| shape[axis]);
    Heads::new(&numbers[layout.start_offset()..], dims, [0, 1, 2].map(|axis| strides[axis] as usize))
}

/// The memory of keys or values, in whatever type they are stored.
pub(crate) struct StoredMemory(<Flex as BackendTypes>::FloatTensorPrimitive);

impl StoredMemory {
    /// `None` if the tensor is on another device, of a type that is not read, or part of a graph of gradients.
    pub(crate) fn new(tensor: &Tensor<4>) -> Option<Self> {
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return None;
        }
        Some(Self(Memory::of(tensor.clone().try_into_primitive::<Flex>().ok()?).0))
    }

    /// `[batch, heads, rows, width]`.
    fn heads(&self) -> Stored<'_> {
        match self.0.dtype() {
            DType::F16 => heads(&self.0, self.0.storage::<f16>()).into(),
            DType::BF16 => heads(&self.0, self.0.storage::<bf16>()).into(),
            _ => heads(&self.0, self.0.storage::<f32>()).into(),
        }
    }
}

fn tensor(numbers: Vec<f32>, shape: [usize; 4]) -> Tensor<4> {
    Tensor::from_data(TensorData::new(numbers, shape), &Device::flex())
}

/// Whether the loops cover these settings.
pub(crate) fn covers(attention: &BlockAttentionConfig) -> bool {
    attention.retrieval == Retrieval::None || attention.uses_index()
}

/// Below this logarithm of a probability no key counts for anything: a threshold of 0.
const LOWEST_LOG_THRESHOLD: f64 = -100.0;

fn block_options(attention: &BlockAttentionConfig) -> BlockOptions {
    let index = IndexOptions {
        exact_tokens: attention.exact_tokens,
        log_threshold: attention.threshold.ln().max(LOWEST_LOG_THRESHOLD) as f32,
        max_keys: attention.max_keys,
        fine_tokens: attention.fine_tokens,
        max_sections: attention.max_sections,
        far: attention.far != Far::None,
        far_shift: attention.far_shift as f32,
    };
    BlockOptions {
        chunk_size: attention.chunk_size,
        local_chunks: attention.local_chunks,
        sink_tokens: attention.sink_tokens,
        index: attention.uses_index().then_some(index),
    }
}

fn causal_options(options: &AttentionOptions, heads: usize) -> CausalOptions {
    let slopes =
        |factor: f64| AttentionOptions::alibi_slopes(heads).into_iter().map(|slope| (slope * factor) as f32).collect();
    CausalOptions {
        scale: options.scale as f32,
        softcap: options.softcap.map(|cap| cap as f32),
        window: options.window,
        slopes: options.alibi.map(slopes),
        sink_logits: options.sink_logits.as_ref().map(|sinks| sinks.to_vec()),
    }
}

/// Full causal attention of the last queries, [`crate::full::full_causal`].
pub(crate) fn full_causal(
    query: &Tensor<4>,
    keys: &Tensor<4>,
    values: &Tensor<4>,
    options: &AttentionOptions,
) -> Option<Tensor<4>> {
    let shape = query.dims();
    let (query, keys, values) = (Memory::new(query)?, StoredMemory::new(keys)?, StoredMemory::new(values)?);
    let options = causal_options(options, shape[1]);
    let (output, _) = causal_attention(query.heads(), keys.heads(), values.heads(), &options);
    Some(tensor(output, shape))
}

/// Everything the last queries of a sequence may read.
pub(crate) struct Rows<'a> {
    /// Keys and values `[batch, kv_heads, rows, head_dim]` from position `first` up to the last query.
    pub(crate) keys: Tensor<4>,
    pub(crate) values: Tensor<4>,
    pub(crate) first: usize,
    /// Keys and values of the sinks where the rows do not reach back to them.
    pub(crate) sinks: Option<&'a (Tensor<4>, Tensor<4>)>,
    /// Queries and keys of the local region where it stands at other positions than the rest: the keys from this position up
    /// to the last query.
    pub(crate) near: Option<(Tensor<4>, Tensor<4>, usize)>,
    /// The index of the keys, where any are chosen by one.
    pub(crate) index: Option<&'a KeyIndex>,
}

/// What each query reads, as [`crate::tile::attend_tile`] does for one tile; here they may be of any number of chunks.
pub(crate) fn blocks(
    query: Tensor<4>,
    rows: Rows<'_>,
    attention: &BlockAttentionConfig,
    options: &AttentionOptions,
) -> Option<(Tensor<4>, Retrieved)> {
    let shape = query.dims();
    let query = Memory::new(&query)?;
    let (keys, values) = (StoredMemory::new(&rows.keys)?, StoredMemory::new(&rows.values)?);
    let sinks = match rows.sinks {
        Some((keys, values)) => Some((Memory::new(keys)?, Memory::new(values)?)),
        None => None,
    };
    let near = match &rows.near {
        Some((query, keys, first)) => Some((Memory::new(query)?, Memory::new(keys)?, *first)),
        None => None,
    };
    let settings = block_options(attention);
    let input = BlockInput {
        query: query.heads(),
        keys: keys.heads(),
        values: values.heads(),
        first: rows.first,
        sinks: sinks.as_ref().map(|(keys, values)| Sinks { keys: keys.heads().into(), values: values.heads().into() }),
        index: rows.index,
        near: near.as_ref().map(|(query, keys, first)| Near {
            query: query.heads(),
            keys: keys.heads(),
            first: *first,
        }),
    };
    let (output, _, retrieved) = block_attention(&input, &settings, &causal_options(options, shape[1]));
    let attention::Retrieved { tokens, keys, capped } = retrieved;
    Some((tensor(output, shape), Retrieved { tokens, keys, capped }))
}
