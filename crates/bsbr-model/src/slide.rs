//! Reading on where learned positions end: in a new window, which begins with the last tokens of the one before.

use burn::tensor::Tensor;

use crate::{Decoder, DecoderCache, LayerTrace, ModelError, Reads, cache::TextCache};

impl Decoder {
    /// [`Decoder::hidden`] under the `slide` policy. Texts that reach the last position go on one after the other.
    pub(crate) fn hidden_sliding(
        &self,
        tokens: &[Vec<u32>],
        cache: &mut DecoderCache,
        mut visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        let positions = self.config.decoder.max_positions;
        if cache.texts.iter().zip(tokens).all(|(text, new)| text.position() + new.len() <= positions) {
            return self.hidden_held(tokens, cache, visit);
        }
        let mut outputs = Vec::new();
        for (text, new) in tokens.iter().enumerate() {
            let mut rest = new.as_slice();
            while !rest.is_empty() {
                if cache.texts[text].position() == positions {
                    self.slide(text, cache)?;
                }
                let (piece, later) = rest.split_at(rest.len().min(positions - cache.texts[text].position()));
                // Not `as_deref_mut`: the lifetime of the trait object must be free to shrink.
                let visit: Option<&mut (dyn FnMut(LayerTrace) + Send)> = match &mut visit {
                    Some(visit) => Some(&mut **visit),
                    None => None,
                };
                outputs.push(self.hidden_held(&alone(text, piece, cache.batch()), cache, visit)?);
                rest = later;
            }
        }
        Ok(Tensor::cat(outputs, 0))
    }

    /// Reads tokens within the positions and remembers which they are.
    fn hidden_held(
        &self,
        tokens: &[Vec<u32>],
        cache: &mut DecoderCache,
        visit: Option<&mut (dyn FnMut(LayerTrace) + Send)>,
    ) -> Result<Tensor<2>, ModelError> {
        let hidden = self.hidden_within(tokens, cache, visit)?;
        for (text, new) in cache.texts.iter_mut().zip(tokens) {
            text.held.extend(new);
        }
        Ok(hidden)
    }

    /// Begins a new window with the last half of the tokens that are held.
    fn slide(&self, text: usize, cache: &mut DecoderCache) -> Result<(), ModelError> {
        let old = &cache.texts[text];
        let again = old.held[old.held.len() - self.config.decoder.max_positions / 2..].to_vec();
        let before = old.length - again.len();
        let mut retrieved = old.retrieved;
        old.layers.iter().for_each(|layer| retrieved += Reads::retrieved(layer));
        let mut fresh = self.new_cache(&[old.expected])?.texts;
        let Some(new) = fresh.pop() else { return Ok(()) };
        cache.texts[text] = TextCache { retrieved, ..new };
        (cache.texts[text].length, cache.texts[text].forgotten) = (before, before);
        if !again.is_empty() {
            self.hidden_held(&alone(text, &again, cache.batch()), cache, None)?;
        }
        Ok(())
    }
}

/// New tokens for one text of a batch.
fn alone(text: usize, tokens: &[u32], batch: usize) -> Vec<Vec<u32>> {
    (0..batch).map(|other| if other == text { tokens.to_vec() } else { Vec::new() }).collect()
}
