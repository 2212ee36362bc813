//! Modern Hopfield network: a query is a state that falls into the stored pattern it is nearest to (Ramsauer et al. 2020).
//!
//! The stored patterns of token `t` are its keys up to its own, `K_t = [k_1 .. k_t]`. With the inverse temperature `beta` of
//! the head,
//!
//! ```text
//! x <- K_t^T softmax(beta K_t x / sqrt(d))     steps - 1 times, from x = q_t
//! o_t = V_t^T softmax(beta K_t x / sqrt(d))
//! ```
//!
//! One step with `beta = 1` is standard attention. What differs from it: each further step moves the query to where the
//! keys are, which completes patterns and sharpens what is read; and `beta`, learned for each head, separates patterns (large)
//! or averages them (small).
//!
//! Beside the Python original: that did one causal step at a constant temperature, which is standard attention, and returned
//! a sum over all tokens as a state that nothing read. Here further steps are causal too: each token retrieves among its
//! own past alone, in every step.

use bsbr_attn::{AttentionOptions, attend};
use burn::{
    module::{Module, Param},
    tensor::Tensor,
};

use crate::{
    DecoderConfig, ZooError,
    heads::{Projections, Rotation},
    init::Init,
    rows::{Rows, attend_to_all},
};

#[derive(Module, Debug)]
pub(crate) struct Hopfield {
    projections: Projections,
    /// Logarithm of the inverse temperature of each head, where it is learned.
    log_beta: Option<Param<Tensor<1>>>,
    #[module(skip)]
    beta: f64,
    #[module(skip)]
    steps: usize,
}

impl Hopfield {
    pub(crate) fn new(config: &DecoderConfig, name: &str, init: &Init) -> Self {
        Self {
            projections: Projections::new(config, name, init),
            log_beta: config.hopfield_learned.then(|| init.constant([config.heads], config.hopfield_beta.ln())),
            beta: config.hopfield_beta,
            steps: config.hopfield_steps,
        }
    }

    /// The parallel form.
    pub(crate) fn forward(&self, x: Tensor<3>, rotation: Option<&Rotation>) -> Result<Tensor<3>, ZooError> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        Ok(self.projections.output(self.read_whole(query, keys, values)?))
    }

    /// The recurrent form: the next tokens.
    pub(crate) fn step(
        &self,
        x: Tensor<3>,
        rotation: Option<&Rotation>,
        rows: &mut Rows,
    ) -> Result<Tensor<3>, ZooError> {
        let [query, keys, values] = self.projections.heads(&x, rotation);
        let first = rows.is_empty();
        rows.push(keys.clone(), values.clone());
        let read = match rows.filled() {
            Some([keys, values]) if !first => {
                let factor = 1.0 / (query.dims()[3] as f64).sqrt();
                self.retrieve(query, |query, last| {
                    Ok(attend_to_all(query * factor, &keys, if last { &values } else { &keys }))
                })?
            }
            _ => self.read_whole(query, keys, values)?,
        };
        Ok(self.projections.output(read))
    }

    fn read_whole(&self, query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>) -> Result<Tensor<4>, ZooError> {
        let options = AttentionOptions::new(query.dims()[3]);
        self.retrieve(query, |query, last| {
            let values = if last { &values } else { &keys };
            Ok(attend(query, keys.clone(), values.clone(), None, None, options.clone())?)
        })
    }

    /// All steps; `read` attends to values where it is told that the step is the last, to keys otherwise.
    fn retrieve(
        &self,
        query: Tensor<4>,
        read: impl Fn(Tensor<4>, bool) -> Result<Tensor<4>, ZooError>,
    ) -> Result<Tensor<4>, ZooError> {
        let mut state = query;
        for step in 1..=self.steps {
            state = read(self.sharpened(state), step == self.steps)?;
        }
        Ok(state)
    }

    fn sharpened(&self, query: Tensor<4>) -> Tensor<4> {
        match &self.log_beta {
            Some(log_beta) => {
                let heads = query.dims()[1];
                query * log_beta.val().exp().reshape([1, heads, 1, 1])
            }
            None => query * self.beta,
        }
    }
}
