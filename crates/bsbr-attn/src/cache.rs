//! The state of one layer's attention over a growing sequence, and attention itself: every way of running it, at once,
//! in pieces or token by token, goes through [`AttentionCache::prefill`].

mod checks;
mod first;
mod index_state;
mod kept;
#[cfg(feature = "flex")]
mod prefill;
mod rebase;
mod shared;
mod states;
mod walk;

use burn::tensor::{DType, Device, Tensor};
pub(crate) use checks::check_shape;
use index_state::IndexState;
use rebase::{Near, split};

#[cfg(feature = "flex")]
use crate::fused;
use crate::{
    AttentionError, AttentionOptions, BlockAttentionConfig, FarPositions, Kernel, Retrieval,
    buffer::{RowBuffer, copied, in_type},
    full::full_causal,
    index::{Counter, Retrieved},
    kept::KeptTokens,
    seen::Watch,
    statistics::{Sizes, Statistics},
    tile::{NearInput, TileInput, attend_tile},
};

/// Shape and settings of an [`AttentionCache`].
#[derive(Debug, Clone, PartialEq)]
pub struct CacheConfig {
    /// Sequences, all of the same length.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The model's own attention.
    pub options: AttentionOptions,
    /// BSBR attention; `None` is full causal attention.
    pub attention: Option<BlockAttentionConfig>,
    /// Type of queries and outputs. In f16 and bf16 everything is computed in f32 all the same: types of inputs, not of scores.
    pub dtype: DType,
    /// Type that keys and values are kept in: `dtype`, f16 or bf16. They are rounded to it once, as they come in.
    pub stored: DType,
    /// What computes it.
    pub kernel: Kernel,
}

impl CacheConfig {
    /// Type of what is computed, and of everything that is kept but keys and values.
    fn computed(&self) -> DType {
        type_of_computation(self.dtype)
    }

    fn validate(&self) -> Result<(), AttentionError> {
        let fail = |setting, value: usize, expected: String| {
            Err(AttentionError::Config { setting, value: value.to_string(), expected })
        };
        for (setting, value) in
            [("batch", self.batch), ("heads", self.heads), ("kv_heads", self.kv_heads), ("head_dim", self.head_dim)]
        {
            if value == 0 {
                return fail(setting, value, "at least 1".into());
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail("kv_heads", self.kv_heads, format!("a divisor of heads = {}", self.heads));
        }
        if self.stored != self.dtype && !matches!(self.stored, DType::F16 | DType::BF16) {
            let expected = format!("f16, bf16, or the type of queries = {:?}", self.dtype);
            return Err(AttentionError::Config { setting: "stored", value: format!("{:?}", self.stored), expected });
        }
        self.options.validate()?;
        self.options.check_sinks(self.heads)?;
        self.attention.as_ref().map_or(Ok(()), BlockAttentionConfig::validate)
    }
}

/// Meta queries and keys of a piece of text, for settings that [need them](BlockAttentionConfig::needs_meta).
#[derive(Debug, Clone)]
pub struct Meta {
    /// `[batch, heads, tokens that begin a chunk, head_dim]`: see [`AttentionCache::chunk_starts`]. `None` if no
    /// token of the piece begins a chunk.
    pub query: Option<Tensor<4>>,
    /// `[batch, heads, tokens that end a block, head_dim]`: see [`AttentionCache::block_ends`]. `None` if no token of
    /// the piece ends a block.
    pub key: Option<Tensor<4>>,
}

impl Meta {
    fn in_type(self, dtype: DType) -> Self {
        let of = |rows: Option<Tensor<4>>| rows.map(|rows| in_type(rows, dtype));
        Self { query: of(self.query), key: of(self.key) }
    }
}

/// Keys, values and block statistics of one layer for a batch of sequences of equal length.
///
/// What is kept depends on the kind: everything for full attention and `blocks`, there with the index of all keys; sinks and the local region for `none`;
/// these and one set of statistics per block for `state` and `additive`, at most `max_chunks` of them when set; with
/// `kept_tokens` also so many tokens, and statistics of the rest only.
#[derive(Debug, Clone)]
pub struct AttentionCache {
    config: CacheConfig,
    length: usize,
    /// Position of the first row of `keys` and `values`.
    start: usize,
    keys: RowBuffer,
    values: RowBuffer,
    /// Sinks, once the local region has moved past them and `keys` no longer holds them.
    sinks: Option<(Tensor<4>, Tensor<4>)>,
    /// Where keys are [chosen by an index](crate::index) once the text is long enough.
    index: Option<IndexState>,
    retrieved: Counter,
    /// The index has the queries of so many tokens from elsewhere.
    told: usize,
    statistics: Option<Statistics>,
    kept: Option<KeptTokens>,
    has_basis: bool,
    /// `[heads]`, where the settings have [head gates](BlockAttentionConfig::head_gates).
    gates: Option<Tensor<1>>,
    /// Blocks handed to `statistics` so far.
    summarised: usize,
    /// Meta query of the current chunk, `[batch, heads, 1, head_dim]`.
    chunk_query: Option<Tensor<4>>,
    /// Meta keys of blocks that are complete but not summarised yet, oldest first.
    pending_meta_keys: Vec<Tensor<4>>,
    far_positions: Option<FarPositions>,
    /// Keys at their own positions, once the text is longer than trained: everything else is about keys at the positions of
    /// [`FarPositions`] then.
    near: Option<Near>,
    /// Tokens that are [watched](AttentionCache::watching).
    watch: Option<Watch>,
}

impl AttentionCache {
    /// An empty cache.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] for impossible sizes or settings.
    pub fn new(config: CacheConfig, device: &Device) -> Result<Self, AttentionError> {
        config.validate()?;
        let CacheConfig { batch, heads, kv_heads, head_dim, .. } = config;
        let dtype = config.computed();
        if config.stored != dtype && !device.supports_dtype(config.stored) {
            let expected = format!("{dtype:?}: this device holds no other");
            return Err(AttentionError::Config { setting: "stored", value: format!("{:?}", config.stored), expected });
        }
        let attention = config.attention.as_ref();
        // Blocks are gathered out of the buffers as a whole.
        let granularity = attention.map_or(1, |a| if a.retrieval == Retrieval::Blocks { a.chunk_size } else { 1 });
        let rows = || RowBuffer::new(batch, kv_heads, head_dim, granularity, device, dtype).stored_as(config.stored);
        let sizes = Sizes { batch, heads, kv_heads, head_dim, dtype };
        let kept = attention.filter(|attention| attention.kept_tokens > 0);
        let kept = kept.map(|attention| KeptTokens::new(sizes, attention.kept_tokens, attention.watchers(), device));
        let statistics = states::new_statistics(&config, None, device);
        let index = attention.filter(|attention| attention.can_choose(&config.options));
        let index = index.map(|attention| IndexState::new(&config, attention, sizes, device));
        let (keys, values) = (rows(), rows());
        Ok(Self {
            config,
            length: 0,
            start: 0,
            keys,
            values,
            sinks: None,
            index,
            retrieved: Counter::default(),
            told: 0,
            statistics,
            kept,
            has_basis: false,
            gates: None,
            summarised: 0,
            chunk_query: None,
            pending_meta_keys: Vec::new(),
            far_positions: None,
            near: None,
            watch: None,
        })
    }

    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token was seen yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(crate) fn with_watch(self, watch: Watch) -> Self {
        Self { watch: Some(watch), ..self }
    }

    pub(crate) fn watch(&self) -> Option<&Watch> {
        self.watch.as_ref()
    }

    /// The settings it was made with.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Bytes of every tensor kept, room for growth included.
    pub fn bytes(&self) -> usize {
        let tensor = |t: &Tensor<4>| t.shape().num_elements() * t.dtype().size();
        self.keys.bytes()
            + self.values.bytes()
            + self.sinks.as_ref().map_or(0, |(keys, values)| tensor(keys) + tensor(values))
            + self.statistics.as_ref().map_or(0, Statistics::bytes)
            + self.kept.as_ref().map_or(0, KeptTokens::bytes)
            + self.index.as_ref().map_or(0, IndexState::bytes)
            + self.chunk_query.as_ref().map_or(0, tensor)
            + self.pending_meta_keys.iter().map(tensor).sum::<usize>()
            + self.near.as_ref().map_or(0, |near| near.keys.bytes())
    }

    /// What was retrieved so far through the [index](crate::index). On a GPU this waits for it.
    pub fn retrieved(&self) -> Retrieved {
        self.retrieved.counts()
    }

    /// Makes room for so many tokens in all, so that none is copied while the text grows up to there. What keeps only the local
    /// region has room for that much.
    pub fn reserve(&mut self, tokens: usize) {
        let kept = match &self.config.attention {
            Some(attention) if attention.retrieval != Retrieval::Blocks => tokens.min(attention.local_tokens()),
            _ => tokens,
        };
        self.keys.reserve(kept);
        self.values.reserve(kept);
        if let (Some(index), Some(attention)) = (&mut self.index, &self.config.attention) {
            let indexed = attention.local_start(tokens.saturating_sub(1) / attention.chunk_size);
            index.reserve(indexed);
        }
    }

    /// Which of the next `tokens` tokens begin a chunk, counted from 0: their inputs make the meta queries.
    pub fn chunk_starts(&self, tokens: usize) -> Vec<usize> {
        let Some(attention) = &self.config.attention else { return Vec::new() };
        (0..tokens).filter(|at| (self.length + at).is_multiple_of(attention.chunk_size)).collect()
    }

    /// Which of the next `tokens` tokens end a block, counted from 0: their inputs make the meta keys.
    pub fn block_ends(&self, tokens: usize) -> Vec<usize> {
        let Some(attention) = &self.config.attention else { return Vec::new() };
        (0..tokens).filter(|at| (self.length + at + 1).is_multiple_of(attention.statistics_block())).collect()
    }

    /// Takes the next tokens in and returns what each of them reads, `[batch, heads, tokens, head_dim]`.
    ///
    /// `query` is `[batch, heads, tokens, head_dim]`, `keys` and `values` `[batch, kv_heads, tokens, head_dim]`, rotated
    /// already where the model rotates. Any division of a text into pieces gives the same result.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Shape`], [`AttentionError::Type`] or [`AttentionError::Device`] if a tensor does not fit,
    /// [`AttentionError::Input`] if `meta` is missing or not wanted. The cache is unchanged then.
    pub fn prefill(
        &mut self,
        query: Tensor<4>,
        keys: Tensor<4>,
        values: Tensor<4>,
        meta: Option<Meta>,
    ) -> Result<Tensor<4>, AttentionError> {
        self.check_inputs(&query, &keys, &values, meta.as_ref())?;
        Ok(self.prefill_checked(query, keys, values, meta))
    }

    /// Has the index founded with these queries, `[batch, heads, tokens, head_dim]`, in place of those that the next tokens come in
    /// with: those of a layer whose keys these are. Where nothing is indexed they are not needed.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Shape`], [`AttentionError::Type`] or [`AttentionError::Device`] if they do not fit.
    pub fn found_with(&mut self, query: &Tensor<4>) -> Result<(), AttentionError> {
        let CacheConfig { batch, heads, head_dim, .. } = self.config;
        let tokens = query.dims()[2];
        check_shape("query", query, [batch, heads, tokens, head_dim])?;
        self.check_kind("query", query, false)?;
        let query = in_type(query.clone(), self.config.computed());
        if let Some(index) = &mut self.index {
            index.see(&query, self.length);
        }
        self.told = self.length + tokens;
        Ok(())
    }

    /// [`AttentionCache::prefill`] of inputs that fit.
    pub(crate) fn prefill_checked(
        &mut self,
        query: Tensor<4>,
        keys: Tensor<4>,
        values: Tensor<4>,
        meta: Option<Meta>,
    ) -> Tensor<4> {
        let (given, computed) = (query.dtype(), self.config.computed());
        let [query, keys, values] = [query, keys, values].map(|rows| in_type(rows, computed));
        let mut outputs = Vec::new();
        let mut rest = (query, keys, values, meta.map(|meta| meta.in_type(computed)));
        loop {
            let (query, keys, values, meta) = rest;
            let now = self.of_one_stage(keys.dims()[2]);
            if now == keys.dims()[2] {
                let output = self.read(query, keys, values, meta);
                if outputs.is_empty() {
                    return in_type(output, given);
                }
                outputs.push(output);
                return in_type(Tensor::cat(outputs, 2), given);
            }
            let [[query, later_query], [keys, later_keys], [values, later_values]] =
                [&query, &keys, &values].map(|rows| split(rows, now));
            let [meta, later_meta] = self.split_meta(meta, now);
            outputs.push(self.read(query, keys, values, meta));
            rest = (later_query, later_keys, later_values, later_meta);
        }
    }

    /// The same of inputs of the type of computation, all of one stage of [`FarPositions`].
    fn read(&mut self, query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, meta: Option<Meta>) -> Tensor<4> {
        let Some(attention) = self.config.attention.clone() else {
            self.push(keys, values);
            return self.read_all(query);
        };
        if let Some(index) = self.index.as_mut().filter(|_| self.length >= self.told) {
            index.see(&query, self.length);
        }
        self.enter_stage(&attention);
        let near = self.near.is_some().then(|| (query.clone(), keys.clone()));
        let (query, keys) = (self.far_queries(query), self.far_keys(keys));
        #[cfg(feature = "flex")]
        if self.reads_fused(&query, &attention) {
            return self.prefill_fused(query, keys, values, near, &attention);
        }
        let mut outputs = Vec::new();
        let near_keys = near.as_ref().map(|(_, keys)| keys.clone());
        self.walk(&attention, (keys, near_keys), values, meta, |cache, piece| {
            let near = near.as_ref().zip(cache.near.as_ref()).map(|((query, _), near)| {
                let query = query.clone().narrow(2, piece.start, piece.len());
                NearInput { query, keys: &near.keys, first: near.first }
            });
            let start = cache.length - piece.len();
            if reads_first_query(&attention) && start.is_multiple_of(attention.chunk_size) {
                cache.chunk_query = Some(copied(query.clone().narrow(2, piece.start, 1)));
            }
            if let Some(kept) = &mut cache.kept {
                let place = start % attention.chunk_size;
                let query = query.clone().narrow(2, piece.start, piece.len());
                kept.watch(&query, place..place + piece.len(), attention.chunk_size);
            }
            #[cfg(feature = "flex")]
            if cache.config.kernel == Kernel::Fastest && attention.retrieval == Retrieval::None {
                let rows = fused::Rows {
                    keys: cache.keys.stored(),
                    values: cache.values.stored(),
                    first: cache.start,
                    sinks: cache.sinks.as_ref(),
                    near: near.as_ref().map(|near| (near.query.clone(), near.keys.all(), near.first)),
                    index: None,
                };
                let query = query.clone().narrow(2, piece.start, piece.len());
                if let Some((output, _)) = fused::blocks(query, rows, &attention, &cache.config.options) {
                    outputs.push(output);
                    return;
                }
            }
            let input = TileInput {
                query: query.clone().narrow(2, piece.start, piece.len()),
                start,
                keys: &cache.keys,
                values: &cache.values,
                rows_start: cache.start,
                sinks: cache.sinks.as_ref(),
                kept: cache.kept.as_ref(),
                index: cache.index.as_ref().and_then(IndexState::plain),
                statistics: cache.statistics.as_ref(),
                chunk_query: cache.chunk_query.as_ref(),
                gates: cache.gates.as_ref(),
                near,
            };
            let (output, chosen) = attend_tile(input, &attention, &cache.config.options, cache.watch.as_mut());
            outputs.push(output);
            if let Some(chosen) = chosen {
                cache.retrieved.add(chosen);
            }
        });
        Tensor::cat(outputs, 2)
    }

    /// Whether one call of the fused kernel reads what settings with an index say.
    #[cfg(feature = "flex")]
    pub(super) fn reads_fused(&self, query: &Tensor<4>, attention: &BlockAttentionConfig) -> bool {
        let index = self.index.as_ref().is_none_or(|index| index.fused().is_some());
        attention.uses_index()
            && self.config.kernel == Kernel::Fastest
            && index
            && fused::Memory::new(query).is_some()
            && matches!(self.config.stored, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Takes the next tokens in without reading anything: for text whose outputs nobody needs in this layer.
    ///
    /// # Errors
    ///
    /// As [`AttentionCache::prefill`]. Settings that mix states by the first query of a chunk (`state` and `additive` without the
    /// `meta` selector) need every query and refuse; those with an [index](crate::index) need the queries of the tokens that found
    /// it and refuse as long as these are not in.
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>, meta: Option<Meta>) -> Result<(), AttentionError> {
        self.check_rows(&keys, &values, meta.as_ref())?;
        let Some(attention) = self.config.attention.clone() else {
            self.push(keys, values);
            return Ok(());
        };
        if reads_first_query(&attention) {
            return Err(AttentionError::Input(
                "these settings mix states by the first query of a chunk: use prefill, which brings the queries".into(),
            ));
        }
        if let Some(index) = &self.index
            && self.length < index.founding_tokens()
        {
            let problem = format!(
                "the first {} tokens found the index of the keys with their queries, and only {} of them are in: use prefill up to \
                 there, which brings the queries",
                index.founding_tokens(),
                self.length
            );
            return Err(AttentionError::Input(problem));
        }
        let computed = self.config.computed();
        let [keys, values] = [keys, values].map(|rows| in_type(rows, computed));
        let mut rest = (keys, values, meta.map(|meta| meta.in_type(computed)));
        loop {
            let (keys, values, meta) = rest;
            let now = self.of_one_stage(keys.dims()[2]);
            if now == keys.dims()[2] {
                self.take_in(&attention, keys, values, meta);
                return Ok(());
            }
            let [[keys, later_keys], [values, later_values]] = [&keys, &values].map(|rows| split(rows, now));
            let [meta, later_meta] = self.split_meta(meta, now);
            self.take_in(&attention, keys, values, meta);
            rest = (later_keys, later_values, later_meta);
        }
    }

    /// [`AttentionCache::append`] of inputs that fit, all of one stage of [`FarPositions`].
    fn take_in(&mut self, attention: &BlockAttentionConfig, keys: Tensor<4>, values: Tensor<4>, meta: Option<Meta>) {
        self.enter_stage(attention);
        let near_keys = self.near.is_some().then(|| keys.clone());
        let keys = self.far_keys(keys);
        self.walk(attention, (keys, near_keys), values, meta, |_, _| ());
    }

    /// [`AttentionCache::prefill`] of one token: `query` `[batch, heads, 1, head_dim]`.
    ///
    /// # Errors
    ///
    /// As [`AttentionCache::prefill`].
    pub fn decode(
        &mut self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        meta: Option<Meta>,
    ) -> Result<Tensor<4>, AttentionError> {
        let expected = [self.config.batch, self.config.kv_heads, 1, self.config.head_dim];
        check_shape("key", &key, expected)?;
        self.prefill(query, key, value, meta)
    }

    /// Full attention of the last queries.
    fn read_all(&mut self, query: Tensor<4>) -> Tensor<4> {
        let options = &self.config.options;
        #[cfg(feature = "flex")]
        if self.config.kernel == Kernel::Fastest
            && let Some(output) = fused::full_causal(&query, &self.keys.stored(), &self.values.stored(), options)
        {
            return output;
        }
        full_causal(query, self.keys.all(), self.values.all(), options, self.watch.as_mut())
    }
}

/// What is computed in where queries are of this type: scores in f16 or bf16 would be of little use.
pub(crate) fn type_of_computation(given: DType) -> DType {
    match given {
        DType::F16 | DType::BF16 => DType::F32,
        wide => wide,
    }
}

/// Whether states are mixed by the chunk's first own query (there being no meta query).
pub(crate) fn reads_first_query(attention: &BlockAttentionConfig) -> bool {
    matches!(attention.retrieval, Retrieval::State | Retrieval::Additive) && !attention.needs_meta()
}
