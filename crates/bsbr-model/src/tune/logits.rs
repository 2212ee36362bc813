//! The loss of the whole model: the divergence of its next tokens from the original's.

use burn::tensor::{Int, Tensor, TensorData, activation::log_softmax};

use super::{layer::Student, parameters::Parameters, scalar};
use crate::{Decoder, ModelError, layer_attention::SharedRows};

/// Tokens whose scores exist at once.
const SLAB: usize = 128;

/// The loss of one text and, where asked for, its gradients.
pub(super) struct LogitsObjective {
    pub(super) cross_entropy: f64,
}

impl LogitsObjective {
    /// Mean divergence in nats, plus the cross entropy by its weight; a tensor whose backward pass gives the gradients of
    /// `share` times it, if any parameter is tracked.
    pub(super) fn of(
        &self,
        original: &Decoder,
        decoder: &Decoder,
        parameters: &Parameters,
        tokens: &[u32],
        share: f64,
    ) -> Result<(f64, Option<Tensor<1>>), ModelError> {
        let mut cache = original.new_cache(&[tokens.len()])?;
        let wanted = original.hidden(&[tokens.to_vec()], &mut cache)?;
        drop(cache);
        let decoder = parameters.placed(decoder);
        let (student, mut x) = Student::new(&decoder, tokens)?;
        let mut shared = SharedRows::of(&decoder.config.decoder);
        for (layer, block) in decoder.blocks.iter().enumerate() {
            x = block.forward(x, student.inputs_of(layer), |projections, norm, x| {
                student.read(layer, (projections, norm), x, &mut shared).map(|(read, _)| read)
            })?;
        }
        let hidden = match &decoder.final_norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let tracked = hidden.is_tracked();
        let mut loss = 0.0;
        let mut gradients = Vec::new();
        for start in (0..tokens.len()).step_by(SLAB) {
            let count = SLAB.min(tokens.len() - start);
            // The graph of the head ends here: its gradients are taken before that of the next slab is made.
            let rows = hidden.clone().inner().narrow(0, start, count);
            let rows = if tracked { rows.autodiff().require_grad() } else { rows };
            let teacher = log_softmax(original.logits(wanted.clone().narrow(0, start, count)), 1);
            let own = log_softmax(decoder.logits(rows.clone()), 1);
            let mut slab = (teacher.clone().exp() * (teacher - own.clone())).sum() / tokens.len() as f64;
            let next = &tokens[(start + 1).min(tokens.len())..(start + count + 1).min(tokens.len())];
            if self.cross_entropy > 0.0 && !next.is_empty() {
                let ids: Vec<i32> = next.iter().map(|&id| id as i32).collect();
                let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [next.len(), 1]), &rows.device());
                let surprise = own.narrow(0, 0, next.len()).gather(1, ids).sum() / -((tokens.len() - 1) as f64);
                slab = slab + surprise * self.cross_entropy;
            }
            loss += scalar(slab.clone())?;
            if tracked {
                let found = rows.grad(&slab.backward());
                gradients.push(found.unwrap_or_else(|| rows.inner().zeros_like()));
            }
        }
        let backward = tracked.then(|| (hidden * Tensor::cat(gradients, 0) * share).sum());
        Ok((loss, backward))
    }
}
