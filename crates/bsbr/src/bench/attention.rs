//! Attention of one layer: the arms of this project and burn's own.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bsbr_attn::index::SECTION;
use bsbr_attn::{AttentionCache, AttentionOptions, BlockAttentionConfig, CacheConfig, Kernel, Retrieved, attend};
use burn::tensor::{DType, Device, Tensor, module::attention, ops::AttentionModuleOptions};
use serde::{Deserialize, Serialize};

use super::{
    Arm, DECODE_ROOM, DECODE_TOKENS, Phase, Subject,
    data::{Data, random},
    glued::ModelRows,
    sync,
};

/// Sizes of the attention of one layer, and what its numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: DType,
    /// Of keys and values in a cache.
    pub(crate) stored: DType,
    pub(crate) data: Data,
    pub(crate) seed: u64,
}

impl Shape {
    /// Bytes of the keys and values of `tokens` tokens.
    pub(crate) fn kv_bytes(&self, tokens: usize) -> u64 {
        (2 * self.batch * self.kv_heads * tokens * self.head_dim * self.dtype.size()) as u64
    }

    /// Bytes of queries, keys and values as they are made, in f32; no number is too large for this.
    pub(crate) fn input_bytes(&self, tokens: usize) -> f64 {
        let heads = self.heads as f64 + 2.0 * self.kv_heads as f64;
        self.batch as f64 * heads * tokens as f64 * self.head_dim as f64 * size_of::<f32>() as f64
    }

    /// Bytes an arm keeps of every pair of tokens, or of every token and what it reads, at most; 0 where it works tile by
    /// tile.
    pub(crate) fn kept_numbers_bytes(
        &self,
        arm: Arm,
        phase: Phase,
        attention: &BlockAttentionConfig,
        tokens: usize,
    ) -> f64 {
        let pairs = match (arm, phase) {
            // Scores, mask and softmax.
            (Arm::TorchOriginal, Phase::Prefill) => 3 * tokens,
            // Scores before and after masking, weights, and gradients of two of these.
            (Arm::TorchOriginal | Arm::Burn, Phase::Training) => 5 * tokens,
            // The scores and masks of the keys a token may choose from, of the local region and of blocks.
            (Arm::BsbrPlain, Phase::Training) => {
                let candidates = tokens.min(attention.fine_tokens.saturating_add(SECTION * attention.max_sections));
                let local = attention.local_chunks.saturating_add(1).saturating_mul(attention.chunk_size).min(tokens);
                5 * (candidates + local + tokens / attention.statistics_block())
            }
            _ => 0,
        };
        (self.batch * self.heads * self.dtype.size()) as f64 * tokens as f64 * pairs as f64
    }

    /// Bytes of queries, or of what attention returns.
    pub(crate) fn output_bytes(&self, tokens: usize) -> u64 {
        (self.batch * self.heads * tokens * self.head_dim * self.dtype.size()) as u64
    }
}

/// Queries, keys and values of a text and of what is decoded behind it.
pub(crate) struct Inputs {
    text: [Tensor<4>; 3],
    /// One token each, used in turn.
    next: Vec<[Tensor<4>; 3]>,
}

impl Inputs {
    /// Of a model where there are `rows` of one, else random ones.
    pub(crate) fn new(shape: &Shape, rows: Option<&ModelRows>, tokens: usize, device: &Device) -> Self {
        if let Some(rows) = rows {
            let next = (tokens..tokens + DECODE_TOKENS).map(|at| rows.inputs(shape, &(at..at + 1), device));
            return Self { text: rows.inputs(shape, &(0..tokens), device), next: next.collect() };
        }
        let make = |tokens: usize, seed: u64| {
            [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| [shape.batch, heads, tokens, shape.head_dim]).map(
                {
                    let mut nth = 0;
                    move |size| {
                        nth += 1;
                        random(size, shape.data, seed.wrapping_add(nth << 20), device, shape.dtype)
                    }
                },
            )
        };
        let next = (0..DECODE_TOKENS).map(|at| make(1, shape.seed.wrapping_add((at as u64 + 1) << 32)));
        Self { text: make(tokens, shape.seed), next: next.collect() }
    }
}

/// The cache of an arm of this project.
fn new_cache(
    arm: Arm,
    shape: &Shape,
    attention: &BlockAttentionConfig,
    device: &Device,
) -> Result<Option<AttentionCache>> {
    let (attention, kernel) = match arm {
        Arm::Bsbr => (Some(attention.clone()), Kernel::Fastest),
        Arm::BsbrPlain => (Some(attention.clone()), Kernel::Plain),
        Arm::Dense => (None, Kernel::Fastest),
        Arm::Burn | Arm::TorchSdpa | Arm::TorchOriginal | Arm::Transformers | Arm::LlamaCpp => return Ok(None),
    };
    let config = CacheConfig {
        batch: shape.batch,
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        options: AttentionOptions::new(shape.head_dim),
        attention,
        dtype: shape.dtype,
        stored: shape.stored,
        kernel,
    };
    Ok(Some(AttentionCache::new(config, device)?))
}

/// One of the arms that run in this process.
pub(crate) struct AttentionSubject {
    arm: Arm,
    shape: Shape,
    attention: BlockAttentionConfig,
    inputs: Rc<Inputs>,
    device: Device,
    decoding: Option<AttentionCache>,
    /// What the index retrieved of the text, once asked.
    retrieved: Option<Retrieved>,
    /// Keys and values repeated to the query heads, where burn's attention needs that.
    repeated: Option<[Tensor<4>; 2]>,
}

impl AttentionSubject {
    pub(crate) fn new(
        arm: Arm,
        shape: Shape,
        attention: &BlockAttentionConfig,
        inputs: Rc<Inputs>,
        device: &Device,
    ) -> Self {
        let repeated = (arm == Arm::Burn && shape.heads != shape.kv_heads).then(|| {
            let repeat = |rows: &Tensor<4>| repeat_heads(rows.clone(), shape.heads);
            [repeat(&inputs.text[1]), repeat(&inputs.text[2])]
        });
        Self {
            arm,
            shape,
            attention: attention.clone(),
            inputs,
            device: device.clone(),
            decoding: None,
            retrieved: None,
            repeated,
        }
    }

    /// Attention of the whole text, `[batch, heads, tokens, head_dim]`, and the time it took.
    pub(crate) fn prefill(&self) -> Result<(Tensor<4>, Duration)> {
        let [query, keys, values] = self.inputs.text.clone();
        let start = Instant::now();
        let output = if self.arm == Arm::Burn { self.burn(query) } else { self.own(query, keys, values)? };
        sync(&self.device)?;
        Ok((output, start.elapsed()))
    }

    /// Attention of the whole text and the gradients of queries, keys and values, and the time both took together. The
    /// gradient of the output is the queries.
    pub(crate) fn training(&self) -> Result<([Tensor<4>; 3], Duration)> {
        let leaves = self.inputs.text.clone().map(|rows| rows.autodiff().require_grad());
        let [query, keys, values] = leaves.clone();
        let start = Instant::now();
        let output = match self.arm {
            Arm::Burn if self.repeated.is_some() => {
                let [keys, values] = [keys, values].map(|rows| repeat_heads(rows, self.shape.heads));
                burn_causal(query, keys, values)
            }
            Arm::Burn => burn_causal(query, keys, values),
            _ => self.own(query, keys, values)?,
        };
        let mut all = (output * self.inputs.text[0].clone().autodiff()).sum().backward();
        let gradients = leaves.map(|leaf| leaf.grad_remove(&mut all));
        sync(&self.device)?;
        let elapsed = start.elapsed();
        let [Some(query), Some(keys), Some(values)] = gradients else {
            anyhow::bail!("{} has no gradients", self.arm.name())
        };
        Ok(([query, keys, values], elapsed))
    }

    /// Attention of a text by an arm of this project.
    fn own(&self, query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>) -> Result<Tensor<4>> {
        if matches!(self.arm, Arm::Bsbr | Arm::Dense) {
            let attention = self.arm.is_bsbr().then_some(&self.attention);
            return Ok(attend(query, keys, values, None, attention, AttentionOptions::new(self.shape.head_dim))?);
        }
        let cache = new_cache(self.arm, &self.shape, &self.attention, &query.device())?;
        Ok(cache.context("it has no cache")?.prefill(query, keys, values, None)?)
    }

    /// burn's causal attention of `query` behind the text; nobody appends for it.
    fn burn(&self, query: Tensor<4>) -> Tensor<4> {
        let [keys, values] = match &self.repeated {
            Some(repeated) => repeated.clone(),
            None => [self.inputs.text[1].clone(), self.inputs.text[2].clone()],
        };
        burn_causal(query, keys, values)
    }
}

impl Subject for AttentionSubject {
    fn prepare(&mut self, phase: Phase) -> Result<()> {
        if phase == Phase::Decode
            && self.decoding.is_none()
            && let Some(mut cache) = new_cache(self.arm, &self.shape, &self.attention, &self.device)?
        {
            let [query, keys, values] = self.inputs.text.clone();
            cache.reserve(keys.dims()[2] + DECODE_ROOM);
            // Some settings need the queries as well.
            if cache.append(keys.clone(), values.clone(), None).is_err() {
                cache.prefill(query, keys, values, None)?;
            }
            sync(&self.device)?;
            self.decoding = Some(cache);
        }
        Ok(())
    }

    fn run(&mut self, phase: Phase) -> Result<Duration> {
        match phase {
            Phase::Prefill => return Ok(self.prefill()?.1),
            Phase::Training => return Ok(self.training()?.1),
            Phase::Decode => {}
        }
        let inputs = Rc::clone(&self.inputs);
        let start = Instant::now();
        for [query, key, value] in inputs.next.iter().cloned() {
            if self.arm == Arm::Burn {
                self.burn(query);
            } else {
                let cache = self.decoding.as_mut().context("decoding was not prepared")?;
                cache.decode(query, key, value, None)?;
            }
        }
        sync(&self.device)?;
        Ok(start.elapsed() / inputs.next.len() as u32)
    }

    fn kept_bytes(&self) -> Option<u64> {
        self.decoding.as_ref().map(|cache| cache.bytes() as u64)
    }

    /// One more run, which nothing times: whole texts are measured without a cache, and a cache counts.
    fn retrieved(&mut self) -> Result<Option<Retrieved>> {
        if !self.arm.is_bsbr() || !self.attention.uses_index() {
            return Ok(None);
        }
        if self.retrieved.is_none() {
            let Some(mut cache) = new_cache(self.arm, &self.shape, &self.attention, &self.device)? else {
                return Ok(None);
            };
            let [query, keys, values] = self.inputs.text.clone();
            cache.prefill(query, keys, values, None)?;
            self.retrieved = Some(cache.retrieved());
        }
        Ok(self.retrieved)
    }
}

/// burn's causal attention, of as many heads of keys and values as of queries.
fn burn_causal(query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>) -> Tensor<4> {
    let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
    attention(query, keys, values, None, None, options)
}

/// KV heads repeated so that there is one for each query head.
fn repeat_heads(rows: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, tokens, width] = rows.dims();
    let group = heads / kv_heads;
    rows.unsqueeze_dim::<5>(2).repeat_dim(2, group).reshape([batch, heads, tokens, width])
}

/// How far two arms' outputs for the same text are apart: the largest difference and its root mean square, as shares of
/// the largest number and the root mean square of the second.
pub(crate) fn difference(found: &AttentionSubject, expected: &AttentionSubject) -> Result<(f64, f64)> {
    let (found, expected) = (found.prefill()?.0, expected.prefill()?.0);
    let numbers = |tensor: Tensor<4>| -> Result<Vec<f32>> {
        let read = tensor.cast(DType::F32).try_into_vec_as::<f32>();
        read.map_err(|error| anyhow::anyhow!("numbers cannot be read back: {error:?}"))
    };
    let (found, expected) = (numbers(found)?, numbers(expected)?);
    let pairs = || found.iter().zip(&expected).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    let largest = pairs().fold(0.0, f64::max);
    let squares: f64 = pairs().map(|difference| difference * difference).sum();
    let scale = expected.iter().map(|x| f64::from(x.abs())).fold(f64::MIN_POSITIVE, f64::max);
    let norm: f64 = expected.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    Ok((largest / scale, (squares / norm.max(f64::MIN_POSITIVE)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_that_compute_the_same_have_the_same_gradients() {
        let shape = Shape {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            dtype: DType::F32,
            stored: DType::F32,
            data: Data::Iid,
            seed: 3,
        };
        let attention = BlockAttentionConfig {
            chunk_size: 64,
            local_chunks: 0,
            max_keys: 5,
            exact_tokens: 0,
            ..Default::default()
        };
        let inputs = Rc::new(Inputs::new(&shape, None, 200, &Device::flex()));
        let gradients = |arm| {
            let subject = AttentionSubject::new(arm, shape, &attention, Rc::clone(&inputs), &Device::flex());
            subject.training().unwrap().0.map(|tensor| tensor.try_into_vec_as::<f32>().unwrap())
        };
        for (arm, other) in [(Arm::Dense, Arm::Burn), (Arm::Bsbr, Arm::BsbrPlain)] {
            for (found, expected) in gradients(arm).iter().zip(&gradients(other)) {
                assert_eq!(found.len(), expected.len());
                let largest = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(largest < 1e-4, "{} and {}: {largest}", arm.name(), other.name());
            }
        }
        // Keys that were not chosen count by their means alone.
        assert_ne!(gradients(Arm::Bsbr), gradients(Arm::Dense));
    }
}
