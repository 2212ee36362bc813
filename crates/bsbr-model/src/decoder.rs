//! The decoder: embeddings, blocks, head.

use std::ops::Range;

use bsbr_attn::{AttentionCache, Kernel};
use bsbr_weights::Arithmetic;
use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{DType, Device, Tensor},
};

use crate::{
    DecoderCache, ModelConfig, ModelError, PositionPolicy, Projection, Table,
    cache::TextCache,
    embedding::Inputs,
    layer_attention::{LayerTrace, Pass, SharedRows},
    modules::{Block, LayerInputs, Normalisation},
    ops::{self, Packing},
    recurrent::RecurrentState,
    rotary::{Places, Rotation, rotary_set, rotary_sets},
    stored::Weight,
};

/// A decoder with its weights.
///
/// Texts of a batch are packed: the new tokens of all of them stand one after the other in `[tokens, hidden_size]`, so
/// there is no padding anywhere.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[vocab_size, hidden_size]`, or of the width of the embedding where that is another.
    pub embed: Table,
    /// `[position_offset + max_positions, hidden_size]` where positions are learned.
    pub position: Option<Param<Tensor<2>>>,
    /// Of the embeddings.
    pub embed_norm: Option<Normalisation>,
    /// From the width of the embedding to `[hidden_size]`.
    pub project_in: Option<Linear>,
    /// Makes inputs of each layer.
    pub per_layer_inputs: Option<LayerInputs>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub final_norm: Option<Normalisation>,
    /// From `[hidden_size]` to the width of the embedding.
    pub project_out: Option<Linear>,
    /// `[hidden_size]` to `[vocab_size]` unless the embedding serves.
    pub head: Option<Projection>,
    /// Of the embedding as a head.
    pub head_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(crate) config: ModelConfig,
    #[module(skip)]
    pub(crate) kernel: Kernel,
    #[module(skip)]
    pub(crate) stored: DType,
}

impl Decoder {
    /// The configuration it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        match &self.embed {
            Table::Dense(table) => table.weight.val().device(),
            // Weights are stored as in their file on the CPU alone.
            Table::Stored(_) => self.devices().into_iter().next().unwrap_or_default(),
        }
    }

    /// The same weights with another attention. Meta projections are not invented: changing to the `meta` selector needs
    /// a model that has them.
    ///
    /// # Errors
    ///
    /// [`ModelError`] if the new settings are impossible or need weights this model lacks.
    pub fn with_config(&self, change: impl FnOnce(&mut ModelConfig)) -> Result<Self, ModelError> {
        let mut config = self.config.clone();
        change(&mut config);
        config.validate()?;
        if config.decoder != self.config.decoder {
            let problem = "cannot change once the weights are loaded".to_owned();
            return Err(ModelError::Config { setting: "decoder", problem });
        }
        if config.split != self.config.split {
            let problem = "cannot change once the weights are loaded".to_owned();
            return Err(ModelError::Config { setting: "split", problem });
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let needs = config.layer_attention(layer).is_some_and(|a| a.needs_meta());
            if needs && (block.attention.meta_query.is_none() || block.attention.meta_key.is_none()) {
                let problem =
                    format!("= meta needs meta projections, layer {layer} has none: convert with that selector");
                return Err(ModelError::Config { setting: "selector", problem });
            }
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let needs = config.layer_attention(layer).is_some_and(|a| a.needs_state_basis());
            if needs && block.attention.state_basis.is_none() {
                let problem =
                    format!("needs a basis for the states of each layer, layer {layer} has none: calibrate the model");
                return Err(ModelError::Config { setting: "calibrated_states", problem });
            }
            let gated = config.layer_attention(layer).is_some_and(|a| a.needs_gates());
            if gated && block.attention.gates.is_none() {
                let problem = format!("needs a gate for each head, layer {layer} has none: tune the model with gates");
                return Err(ModelError::Config { setting: "head_gates", problem });
            }
        }
        if config.adapters != self.config.adapters {
            let problem = "cannot change once the weights are loaded".to_owned();
            return Err(ModelError::Config { setting: "adapters", problem });
        }
        let mut blocks = self.blocks.clone();
        for (layer, block) in blocks.iter_mut().enumerate() {
            let used = config.layer_attention(layer).is_some();
            match &mut block.attention.adapters {
                Some(adapters) => adapters.used = used,
                None if used && config.adapters.is_some() => {
                    let problem = format!("= BSBR needs adapters, layer {layer} has none: load the model with it");
                    return Err(ModelError::Config { setting: "attention", problem });
                }
                None => {}
            }
        }
        Ok(Self { config, blocks, ..self.clone() })
    }

    /// The same weights with another choice of the code that computes attention; [`Kernel::Fastest`] unless changed.
    pub fn with_kernel(self, kernel: Kernel) -> Self {
        Self { kernel, ..self }
    }

    /// The same weights with caches that keep keys and values in this type: f32 unless changed, f16 or bf16, which take half
    /// the bytes. Arithmetic stays f32; a key or value is rounded as it comes in (and again where
    /// [grouped positions](crate::PositionPolicy::Grouped) move it).
    pub fn with_cache_type(self, stored: DType) -> Self {
        Self { stored, ..self }
    }

    /// The same weights multiplied in another arithmetic on the CPU; f32 unless changed. Weights that training made tensors of stay
    /// in f32.
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        for place in self.config.decoder.linear_places() {
            if let Some(projection) = self.projection_mut(place) {
                projection.set_arithmetic(arithmetic);
            }
        }
        if let Some(head) = &mut self.head {
            head.set_arithmetic(arithmetic);
        }
        if let Some(inputs) = &mut self.per_layer_inputs {
            inputs.project.set_arithmetic(arithmetic);
        }
        if let Table::Stored(table) = &mut self.embed {
            table.arithmetic = arithmetic;
        }
        self
    }

    /// An empty cache for texts expected to reach these lengths; see [`DecoderCache::new`].
    ///
    /// # Errors
    ///
    /// As [`DecoderCache::new`].
    pub fn new_cache(&self, expected_lengths: &[usize]) -> Result<DecoderCache, ModelError> {
        let cache =
            DecoderCache::with_kernel(&self.config, expected_lengths, (self.kernel, self.stored), &self.device())?;
        let cache = cache.with_sinks(|layer| self.blocks[layer].attention.sink_logits.clone())?;
        let cache =
            cache.with_state_bases(|layer| self.blocks[layer].attention.state_basis.as_ref().map(Param::val))?;
        cache.with_gates(|layer| self.blocks[layer].attention.gates.as_ref().map(Param::val))
    }

    /// A cache of one text that begins with the first `tokens` tokens of text `text` of another, which are not read again:
    /// memory is shared until either of them grows. `expected_length` is that of the new text, as for [`Decoder::new_cache`].
    ///
    /// `None` where it would differ from reading these tokens anew: where the cache has let go of what that needs (kinds of
    /// attention that keep statistics in place of keys; recurrent layers, whose states are those behind all tokens or where
    /// [`DecoderCache::mark`] was called; the tokens on which the index of the keys is founded, unless all of them
    /// are taken over), where positions depend on how long the text becomes and that differs, and under the `slide` and `grouped`
    /// policies. [`bsbr_attn::AttentionCache::first`] says more.
    pub fn begin_with(
        &self,
        cache: &DecoderCache,
        text: usize,
        tokens: usize,
        expected_length: usize,
    ) -> Option<DecoderCache> {
        let old = cache.texts.get(text)?;
        let policy = self.config.position_policy;
        let stretched = policy == PositionPolicy::Interpolate && self.position.is_some();
        if policy == PositionPolicy::Slide || (stretched && old.expected != expected_length) || tokens > old.length {
            return None;
        }
        let states = old.states_at(tokens)?;
        let mut fresh = self.new_cache(&[expected_length]).ok()?;
        let new = fresh.texts.first_mut()?;
        if new.frequencies != old.frequencies {
            return None;
        }
        new.states = states;
        // Layers that read the cache of another hold nothing, and recurrent ones no keys.
        let empty = |layer: usize| {
            self.config.cache_owner(layer).is_some() || self.config.decoder.layer_recurrent(layer).is_some()
        };
        let held = |layer: usize| if empty(layer) { 0 } else { tokens };
        let of_layer = |(layer, cache): (usize, &AttentionCache)| cache.first(held(layer));
        new.layers = old.layers.iter().enumerate().map(of_layer).collect::<Option<_>>()?;
        new.length = tokens;
        Some(fresh)
    }

    /// Bytes of the cache of a text of so many tokens, before it is there: of kinds of attention that keep statistics, without
    /// them.
    ///
    /// # Errors
    ///
    /// As [`Decoder::new_cache`].
    pub fn expected_cache_bytes(&self, tokens: usize) -> Result<usize, ModelError> {
        let mut cache = self.new_cache(&[tokens])?;
        let keeps = |&layer: &usize| {
            self.config.cache_owner(layer).is_none() && self.config.decoder.layer_recurrent(layer).is_none()
        };
        let own = (0..self.blocks.len()).filter(keeps);
        own.for_each(|layer| cache.make_room(0, layer, 1));
        Ok(cache.bytes())
    }

    /// Reads the next tokens of each text and returns their final normed hidden states, packed: `[tokens, hidden_size]`,
    /// the new tokens of text 0 first. A text may have no new token, not all of them.
    ///
    /// On the CPU with its own loops a text gets the same numbers, bit for bit, whichever others are read beside it.
    ///
    /// # Errors
    ///
    /// [`ModelError::EmptyInput`], [`ModelError::TokenOutOfRange`], [`ModelError::TooLong`] and [`ModelError::Input`] for
    /// inputs that cannot be read; the cache is unchanged then.
    pub fn hidden(&self, tokens: &[Vec<u32>], cache: &mut DecoderCache) -> Result<Tensor<2>, ModelError> {
        self.hidden_seen(tokens, cache, None)
    }

    /// [`Decoder::hidden`] of the next tokens of one text; `visit` sees what attention read in every layer that has it, first to
    /// last.
    ///
    /// # Errors
    ///
    /// As [`Decoder::hidden`].
    pub fn trace(
        &self,
        tokens: &[u32],
        cache: &mut DecoderCache,
        visit: &mut (dyn FnMut(LayerTrace) + Send),
    ) -> Result<Tensor<2>, ModelError> {
        self.hidden_seen(&[tokens.to_vec()], cache, Some(visit))
    }

    /// Queries or keys of a layer, `[batch, heads, tokens, head_dim]` as [`Decoder::trace`] shows them, as they would be if
    /// their text began `by` tokens later: turned by so many positions where the layer has a rotary embedding, and otherwise
    /// the same.
    ///
    /// Scores between rows that were moved alike do not change. So texts that were read one by one can be put one behind
    /// the other. Nothing but the rotation follows: a norm after it and a factor of the position stay as they were.
    pub fn moved(&self, layer: usize, rows: Tensor<4>, by: usize) -> Tensor<4> {
        let [batch, heads, tokens, width] = rows.dims();
        let Some(set) = rotary_set(&self.config.decoder, layer) else { return rows };
        let (frequencies, _) = rotary_sets(&self.config.decoder, tokens).swap_remove(set);
        let rotation = Rotation::new([(by, &(frequencies, 1.0))].into_iter(), &rows.device(), rows.dtype());
        rotation.apply(rows.reshape([1, batch * heads * tokens, width])).reshape([batch, heads, tokens, width])
    }

    fn hidden_seen(
        &self,
        tokens: &[Vec<u32>],
        cache: &mut DecoderCache,
        visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        self.check(tokens, cache)?;
        if self.config.position_policy == PositionPolicy::Slide {
            return self.hidden_sliding(tokens, cache, visit);
        }
        self.hidden_within(tokens, cache, visit)
    }

    /// [`Decoder::hidden`] of tokens that can be read where the texts stand.
    pub(crate) fn hidden_within(
        &self,
        tokens: &[Vec<u32>],
        cache: &mut DecoderCache,
        visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        let device = self.device();
        let packing = |new: &Vec<u32>| Packing::of(&device, new.len());
        let mut ways: Vec<Packing> = Vec::with_capacity(2);
        for way in tokens.iter().filter(|new| !new.is_empty()).map(packing) {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        if let [way] = ways[..] {
            return self.hidden_packed(tokens, cache, way, visit);
        }
        // Texts of which few tokens are read are summed in another order than others, and so they are beside them: what a text
        // gives must not depend on its neighbours.
        let mut visit = visit;
        let mut made = Vec::with_capacity(ways.len());
        for &way in &ways {
            let own = |new: &Vec<u32>| if packing(new) == way { new.clone() } else { Vec::new() };
            let own: Vec<Vec<u32>> = tokens.iter().map(own).collect();
            // Not `as_deref_mut`: the lifetime of the trait object must be free to shrink.
            let visit: Option<&mut (dyn FnMut(LayerTrace) + Send)> = match &mut visit {
                Some(visit) => Some(&mut **visit),
                None => None,
            };
            made.push(self.hidden_packed(&own, cache, way, visit)?);
        }
        let mut starts = vec![0; ways.len()];
        let rows = tokens.iter().filter(|new| !new.is_empty()).filter_map(|new| {
            let way = ways.iter().position(|&way| way == packing(new))?;
            starts[way] += new.len();
            Some(made[way].clone().narrow(0, starts[way] - new.len(), new.len()))
        });
        Ok(Tensor::cat(rows.collect(), 0))
    }

    /// [`Decoder::hidden`] of tokens that are all packed in one way.
    fn hidden_packed(
        &self,
        tokens: &[Vec<u32>],
        cache: &mut DecoderCache,
        packing: Packing,
        visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        let inputs = self.inputs(tokens, cache, packing);
        let mut pieces: Vec<(usize, Range<usize>)> = Vec::with_capacity(tokens.len());
        let mut start = 0;
        for (text, new) in tokens.iter().enumerate() {
            if !new.is_empty() {
                pieces.push((text, start..start + new.len()));
            }
            start += new.len();
        }
        let pass = Pass {
            config: &self.config,
            pieces: &pieces,
            cache,
            shared: SharedRows::of(&self.config.decoder),
            alone: false,
        };
        let x = ops::run(&self.device(), || self.through_blocks(inputs, packing, pass, visit))?;
        for (text, new) in cache.texts.iter_mut().zip(tokens) {
            text.length += new.len();
        }
        Ok(x)
    }

    /// The blocks and the last norm over packed tokens.
    fn through_blocks(
        &self,
        inputs: Inputs,
        packing: Packing,
        mut pass: Pass<'_>,
        mut visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        let Inputs { mut x, rotations, temperature, per_layer } = inputs;
        for (layer, block) in self.blocks.iter().enumerate() {
            let rotation = rotary_set(&self.config.decoder, layer).and_then(|set| rotations.get(set));
            let places = Places { rotation, temperature: temperature.as_deref(), packing };
            let own = per_layer.as_ref().map(|all| self.inputs_of(layer, all));
            x = block.forward_packed((x, own), packing, |projections, norm, x| {
                let (heads, read) = pass.attend(layer, (projections, norm), x, places)?;
                if let (Some(visit), Some([query, keys, values])) = (&mut visit, heads) {
                    let normed = match norm {
                        Some(norm) => norm.forward(x.clone()),
                        None => x.clone(),
                    };
                    visit(LayerTrace { layer, normed, query, keys, values, read: read.clone() });
                }
                Ok::<_, ModelError>(read)
            })?;
        }
        Ok(match &self.final_norm {
            Some(norm) => norm.forward(x),
            None => x,
        })
    }

    /// Scores of the next token, `[tokens, vocab_size]`, from final hidden states `[tokens, hidden_size]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.logits_packed(hidden, Packing::ByNumber)
    }

    /// [`Decoder::logits`] of states of different texts: each row has the numbers, bit for bit, that it has alone.
    pub fn logits_each(&self, hidden: Tensor<2>) -> Tensor<2> {
        let alone = Packing::of(&self.device(), 1);
        self.logits_packed(hidden, alone)
    }

    fn logits_packed(&self, hidden: Tensor<2>, packing: Packing) -> Tensor<2> {
        self.scores(self.head_inputs(hidden, packing), 0..self.config.decoder.vocab_size, packing)
    }

    /// What the head reads of final hidden states.
    pub(crate) fn head_inputs(&self, hidden: Tensor<2>, packing: Packing) -> Tensor<2> {
        match &self.project_out {
            Some(projection) => {
                let bias = projection.bias.as_ref().map(Param::val);
                ops::linear(hidden, Weight::Tensor(projection.weight.val()), bias, packing)
            }
            None => hidden,
        }
    }

    /// Scores of part of the vocabulary from [what the head reads](Self::head_inputs), `[tokens, part]`.
    pub(crate) fn scores(&self, inputs: Tensor<2>, part: Range<usize>, packing: Packing) -> Tensor<2> {
        let (mut weight, mut bias) = match &self.head {
            Some(head) => head.as_weight(),
            None => (self.embed.as_weight(), self.head_bias.as_ref().map(Param::val)),
        };
        if part != (0..self.config.decoder.vocab_size) {
            bias = bias.map(|bias| bias.narrow(0, part.start, part.len()));
            weight = weight.part(part);
        }
        let mut scores = ops::linear(inputs, weight, bias, packing);
        let settings = self.config.decoder.head;
        if let Some(scale) = settings.scale {
            scores = scores * scale;
        }
        match settings.softcap {
            Some(cap) => ops::softcap(scores, cap),
            None => scores,
        }
    }

    /// Logits of one whole text, `[tokens, vocab_size]`.
    ///
    /// # Errors
    ///
    /// As [`Decoder::hidden`].
    pub fn forward(&self, tokens: &[u32]) -> Result<Tensor<2>, ModelError> {
        let mut cache = self.new_cache(&[tokens.len()])?;
        Ok(self.logits(self.hidden(&[tokens.to_vec()], &mut cache)?))
    }

    pub(crate) fn check(&self, tokens: &[Vec<u32>], cache: &DecoderCache) -> Result<(), ModelError> {
        if tokens.len() != cache.batch() {
            let problem = format!("{} texts were given, the cache holds {}", tokens.len(), cache.batch());
            return Err(ModelError::Input(problem));
        }
        if tokens.iter().all(Vec::is_empty) {
            return Err(ModelError::EmptyInput);
        }
        let decoder = &self.config.decoder;
        let fits = |layers: &[AttentionCache]| {
            layers.len() == decoder.layers
                && layers.iter().enumerate().all(|(layer, cache)| {
                    let (made, shape) = (cache.config(), decoder.shape(layer));
                    (made.heads, made.kv_heads, made.head_dim) == (decoder.heads, shape.kv_heads, shape.head_dim)
                        && made.options.sink_logits == self.blocks[layer].attention.sink_logits
                        && made.attention == self.config.calibrated_attention(layer)
                        && cache.far_positions().map(|far| far.trained) == self.config.trained_length(layer)
                })
        };
        let slides = self.config.position_policy == PositionPolicy::Slide;
        let same_states = |states: &[Option<RecurrentState>]| {
            states.len() == decoder.layers
                && states.iter().enumerate().all(|(layer, state)| match (state, decoder.layer_recurrent(layer)) {
                    (Some(state), Some(recurrent)) => state.fits(recurrent),
                    (state, recurrent) => state.is_none() && recurrent.is_none(),
                })
        };
        let holds = |text: &TextCache| !slides || text.held.len() == text.position();
        if !cache.texts.iter().all(|text| fits(&text.layers) && same_states(&text.states) && holds(text)) {
            let problem = "the cache was made for another model or other settings: make it with Decoder::new_cache";
            return Err(ModelError::Input(problem.into()));
        }
        let vocab_size = self.config.decoder.vocab_size;
        for (text, new) in cache.texts.iter().zip(tokens) {
            if let Some(at) = new.iter().position(|&id| id as usize >= vocab_size) {
                let token = new[at] as i64;
                return Err(ModelError::TokenOutOfRange { token, position: text.length + at, vocab_size });
            }
            self.check_length(text.length + new.len())?;
        }
        Ok(())
    }

    /// Refuses a length past the learned positions, unless a policy says what to do there.
    pub(crate) fn check_length(&self, length: usize) -> Result<(), ModelError> {
        let max_positions = self.config.decoder.max_positions;
        let limited = self.position.is_some() && self.config.position_policy == PositionPolicy::Error;
        if limited && length > max_positions {
            return Err(ModelError::TooLong { length, max_positions });
        }
        Ok(())
    }
}
