//! The decoder: embedding, layers, norm, head.

use burn::{
    module::{Module, Param},
    tensor::{Device, Int, Tensor, module::embedding},
};

use crate::{
    DecoderConfig, State, ZooError,
    heads::Rotation,
    init::Init,
    layer::{Mlp, Norm, ShortConvolution, copied},
    mixers::Mixer,
    state::LayerState,
};

/// A small decoder: embedding, layers of `x + mixer(norm(x))` and `x + mlp(norm(x))`, norm and head.
#[derive(Module, Debug)]
pub struct SmallDecoder {
    /// `[vocabulary, width]`.
    embedding: Param<Tensor<2>>,
    layers: Vec<Layer>,
    norm: Norm,
    /// `[width, vocabulary]`; the embedding, transposed, where there is none.
    head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    config: DecoderConfig,
}

#[derive(Module, Debug)]
struct Layer {
    norm: Norm,
    convolution: Option<ShortConvolution>,
    mixer: Mixer,
    mlp_norm: Option<Norm>,
    mlp: Option<Mlp>,
}

impl SmallDecoder {
    /// A decoder with start values that depend on `seed` alone. Parts that families share start the same in each.
    ///
    /// # Errors
    ///
    /// [`ZooError`] as [`DecoderConfig::validate`].
    pub fn new(config: &DecoderConfig, seed: u64, device: &Device) -> Result<Self, ZooError> {
        config.validate()?;
        let init = Init::new(seed, device);
        let (vocabulary, width) = (config.vocabulary, config.width);
        let layer = |at: usize| {
            let mlp = Mlp::new(config, &format!("{at}.mlp"), &init);
            Layer {
                norm: Norm::new(width, &init),
                convolution: ShortConvolution::new(config, &format!("{at}.convolution"), &init),
                mixer: Mixer::new(config, &format!("{at}.mixer"), &init),
                mlp_norm: mlp.is_some().then(|| Norm::new(width, &init)),
                mlp,
            }
        };
        Ok(Self {
            embedding: init.normal("embedding", [vocabulary, width], 1.0 / (width as f64).sqrt()),
            layers: (0..config.layers).map(layer).collect(),
            norm: Norm::new(width, &init),
            head: (!config.tied_head).then(|| init.weight("head", width, vocabulary)),
            config: config.clone(),
        })
    }

    /// The settings it was made with.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Numbers that are learned.
    pub fn parameters(&self) -> usize {
        self.num_params()
    }

    /// The parallel form: logits `[batch, tokens, vocabulary]` for the token after each of `tokens` `[batch, tokens]`.
    /// Differentiable.
    ///
    /// # Errors
    ///
    /// [`ZooError::Empty`] or [`ZooError::Token`].
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Result<Tensor<3>, ZooError> {
        let hidden = self.hidden(tokens)?;
        let [batch, tokens, width] = hidden.dims();
        let logits = self.logits(hidden.reshape([batch * tokens, width]));
        Ok(logits.reshape([batch, tokens, self.config.vocabulary]))
    }

    /// [`SmallDecoder::forward`] up to the head: `[batch, tokens, width]`, normed.
    ///
    /// # Errors
    ///
    /// As [`SmallDecoder::forward`].
    pub fn hidden(&self, tokens: Tensor<2, Int>) -> Result<Tensor<3>, ZooError> {
        self.check(&tokens)?;
        let rotation = self.rotation(0, tokens.dims()[1]);
        let table = self.embedding.val();
        let mut x = embedding(table.clone(), tokens);
        for layer in &self.layers {
            let mixed = layer.norm.forward(x.clone());
            let mixed = match &layer.convolution {
                Some(convolution) => convolution.forward(mixed, None).0,
                None => mixed,
            };
            x = layer.mlp(x + layer.mixer.forward(mixed, rotation.as_ref(), &table)?);
        }
        Ok(self.norm.forward(x))
    }

    /// Logits `[rows, vocabulary]` for rows `[rows, width]` of [`SmallDecoder::hidden`].
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let weight = match &self.head {
            Some(head) => head.val(),
            None => self.embedding.val().transpose(),
        };
        hidden.matmul(weight)
    }

    /// [`SmallDecoder::forward`] at some places alone: logits `[places, vocabulary]`, where place `text * length + position`
    /// of texts of `length` tokens is the token at `position` of text `text`.
    ///
    /// # Errors
    ///
    /// As [`SmallDecoder::forward`], and [`ZooError::Place`] for a place outside the texts.
    pub fn logits_at(&self, tokens: Tensor<2, Int>, places: Tensor<1, Int>) -> Result<Tensor<2>, ZooError> {
        let [batch, length] = tokens.dims();
        let count = batch * length;
        if let Some(place) = numbers(&places).into_iter().find(|place| !(0..count as i64).contains(place)) {
            return Err(ZooError::Place { place, places: count });
        }
        let hidden = self.hidden(tokens)?.reshape([count, self.config.width]);
        Ok(self.logits(hidden.select(0, places)))
    }

    /// The state before the first token of `batch` texts.
    ///
    /// # Errors
    ///
    /// [`ZooError::Empty`] without a text.
    pub fn start(&self, batch: usize) -> Result<State, ZooError> {
        if batch == 0 {
            return Err(ZooError::Empty { batch, tokens: 0 });
        }
        let like = self.embedding.val();
        let layer = |layer: &Layer| -> Result<LayerState, ZooError> {
            Ok(LayerState { convolution: None, mixer: layer.mixer.start(batch, &like)? })
        };
        let layers = self.layers.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(State { config: self.config.clone(), batch, length: 0, layers })
    }

    /// The recurrent form: takes the next tokens `[batch, tokens]` in, any number of them, and returns their logits
    /// `[batch, tokens, vocabulary]`. However a text is cut into pieces, the logits are those of [`SmallDecoder::forward`].
    ///
    /// # Errors
    ///
    /// As [`SmallDecoder::forward`], and [`ZooError::State`] for the state of another decoder or batch. The state is unchanged
    /// then.
    pub fn step(&self, tokens: Tensor<2, Int>, state: &mut State) -> Result<Tensor<3>, ZooError> {
        let hidden = self.step_hidden(tokens, state)?;
        let [batch, length, width] = hidden.dims();
        Ok(self.logits(hidden.reshape([batch * length, width])).reshape([batch, length, self.config.vocabulary]))
    }

    /// [`SmallDecoder::step`] up to the head, as [`SmallDecoder::hidden`]: for a prefill of which only the last logits are
    /// wanted.
    ///
    /// # Errors
    ///
    /// As [`SmallDecoder::step`].
    pub fn step_hidden(&self, tokens: Tensor<2, Int>, state: &mut State) -> Result<Tensor<3>, ZooError> {
        self.check(&tokens)?;
        let [batch, length] = tokens.dims();
        state.check(&self.config, batch)?;
        let rotation = self.rotation(state.length, length);
        let mut x = embedding(self.embedding.val(), tokens);
        for (layer, state) in self.layers.iter().zip(&mut state.layers) {
            let mut mixed = layer.norm.forward(x.clone());
            if let Some(convolution) = &layer.convolution {
                let past;
                (mixed, past) = convolution.forward(mixed, state.convolution.take());
                state.convolution = past.map(copied);
            }
            x = layer.mlp(x + layer.mixer.step(mixed, rotation.as_ref(), &mut state.mixer)?);
        }
        state.length += length;
        Ok(self.norm.forward(x))
    }

    fn rotation(&self, first: usize, tokens: usize) -> Option<Rotation> {
        let width = self.config.rotary_width()?;
        Some(Rotation::new(first, tokens, width, &self.embedding.val().device()))
    }

    fn check(&self, tokens: &Tensor<2, Int>) -> Result<(), ZooError> {
        let [batch, length] = tokens.dims();
        if batch == 0 || length == 0 {
            return Err(ZooError::Empty { batch, tokens: length });
        }
        let vocabulary = self.config.vocabulary;
        let wrong = numbers(tokens).into_iter().enumerate().find(|(_, token)| !(0..vocabulary as i64).contains(token));
        match wrong {
            Some((at, token)) => Err(ZooError::Token { token, text: at / length, position: at % length, vocabulary }),
            None => Ok(()),
        }
    }
}

impl Layer {
    fn mlp(&self, x: Tensor<3>) -> Tensor<3> {
        match (&self.mlp_norm, &self.mlp) {
            (Some(norm), Some(mlp)) => x.clone() + mlp.forward(norm.forward(x)),
            _ => x,
        }
    }
}

fn numbers<const D: usize>(tensor: &Tensor<D, Int>) -> Vec<i64> {
    tensor.to_data().iter::<i64>().collect()
}
