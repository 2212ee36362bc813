//! Beginnings of texts whose caches are kept, so that nobody reads them again.

use bsbr_model::{Decoder, DecoderCache, PREFILL_PIECE};

/// Most beginnings that are kept, whatever their size: each is compared with every new prompt.
const MOST: usize = 256;

/// Caches of texts that have ended, those used last at the end.
#[derive(Debug, Default)]
pub(super) struct Known {
    texts: Vec<Beginning>,
}

#[derive(Debug)]
struct Beginning {
    tokens: Vec<u32>,
    cache: DecoderCache,
    bytes: usize,
}

/// How many of the first tokens of `prompt` can be taken from a text that begins with `other`: whole pieces, as a piece gives the
/// same numbers only to those who read it as a whole, and not all of the prompt, as something must be read to have scores.
pub(super) fn common(prompt: &[u32], other: &[u32]) -> usize {
    let same = prompt.iter().zip(other).take_while(|(a, b)| a == b).count();
    same.min(prompt.len().saturating_sub(1)) / PREFILL_PIECE * PREFILL_PIECE
}

impl Known {
    /// The longest beginning of `prompt` that is known, as the cache of a text of this expected length, and its tokens.
    pub(super) fn begin(
        &mut self,
        decoder: &Decoder,
        prompt: &[u32],
        expected: usize,
    ) -> Option<(DecoderCache, usize)> {
        let lengths = self.texts.iter().map(|text| common(prompt, &text.tokens));
        let mut lengths: Vec<(usize, usize)> = lengths.enumerate().filter(|&(_, length)| length > 0).collect();
        lengths.sort_by_key(|&(_, length)| std::cmp::Reverse(length));
        // Not every cache can go back to where texts part.
        let begun = |&(at, length): &(usize, usize)| {
            Some((at, length, decoder.begin_with(&self.texts[at].cache, 0, length, expected)?))
        };
        let (at, length, cache) = lengths.iter().find_map(begun)?;
        let used = self.texts.remove(at);
        self.texts.push(used);
        Some((cache, length))
    }

    /// The length of the longest beginning of `prompt` that is known.
    pub(super) fn longest(&self, prompt: &[u32]) -> usize {
        self.texts.iter().map(|text| common(prompt, &text.tokens)).max().unwrap_or(0)
    }

    /// Keeps what a text of these prompt tokens has read: all whole pieces of it. Where layers are recurrent a shorter beginning stays
    /// beside a longer one, whose cache cannot go back to it.
    pub(super) fn keep(&mut self, decoder: &Decoder, tokens: &[u32], cache: &DecoderCache, expected: usize) {
        let length = tokens.len() / PREFILL_PIECE * PREFILL_PIECE;
        let tokens = &tokens[..length];
        let known = |text: &Beginning| match decoder.config().decoder.recurrent {
            None => text.tokens.starts_with(tokens),
            Some(_) => text.tokens == tokens,
        };
        if length == 0 || self.texts.iter().any(known) {
            return;
        }
        let Some(cache) = decoder.begin_with(cache, 0, length, expected) else { return };
        if decoder.config().decoder.recurrent.is_none() {
            self.texts.retain(|text| !tokens.starts_with(&text.tokens));
        }
        if self.texts.len() == MOST {
            self.texts.remove(0);
        }
        let bytes = cache.bytes();
        self.texts.push(Beginning { tokens: tokens.to_vec(), cache, bytes });
    }

    /// Forgets what was used longest ago until no more than `most` bytes are left.
    pub(super) fn shrink_to(&mut self, most: usize) {
        let mut bytes = self.bytes();
        let gone = self.texts.iter().take_while(|text| {
            let over = bytes > most;
            bytes -= if over { text.bytes } else { 0 };
            over
        });
        let gone = gone.count();
        self.texts.drain(..gone);
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> usize {
        self.texts.iter().map(|text| text.bytes).sum()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pieces_are_common_and_never_all_of_a_prompt() {
        let text: Vec<u32> = (0..3 * PREFILL_PIECE as u32).collect();
        assert_eq!(common(&text, &text), 2 * PREFILL_PIECE);
        assert_eq!(common(&text, &text[..2 * PREFILL_PIECE + 7]), 2 * PREFILL_PIECE);
        assert_eq!(common(&text[..PREFILL_PIECE], &text), 0);
        assert_eq!(common(&text[..PREFILL_PIECE + 1], &text), PREFILL_PIECE);
        assert_eq!(common(&text, &text[1..]), 0);
        assert_eq!(common(&[], &text), 0);
    }
}
