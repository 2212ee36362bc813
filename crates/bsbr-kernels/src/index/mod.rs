//! An index of keys in 8 bits, by which a query finds those that matter to it without reading them.
//!
//! Every complete block of [`BLOCK`] keys has the mean of its keys and, for each key, what it has beyond that mean (its
//! residual) in some of the channels, as integers of 8 bits with one scale for a block. Four blocks make a section of
//! [`SECTION`] tokens with its own mean key, the radius of its keys and the mean of its values. The score of a key is estimated
//! as `q . mean + q . residual`, two products of integers.
//!
//! What a head's integers are measured by, its centre, channels and balance, is [founded](KeyIndex::found) once on the first
//! tokens of the text. Every step is done by the same operations in the same order whatever the instructions of the machine
//! and however the text is cut into pieces: so are the integers the same.

mod build;
mod head;
pub(crate) mod integer;
pub(crate) mod query;

use std::ops::Range;

use build::{Extend, Found, Watch};
pub(crate) use head::{Codes, HeadIndex};
use rayon::prelude::*;

use crate::{Heads, Stored, level};

/// Tokens of a block.
pub const BLOCK: usize = 16;
/// Tokens of a section.
pub const SECTION: usize = 64;
/// Blocks of a section.
pub(crate) const BLOCKS_OF_SECTION: usize = SECTION / BLOCK;

/// The index of the keys of a layer, for each batch entry and KV head, from the first token on.
#[derive(Debug, Clone)]
pub struct KeyIndex {
    batch: usize,
    kv_heads: usize,
    width: usize,
    sinks: usize,
    sections: usize,
    founded: bool,
    heads: Vec<HeadIndex>,
}

impl KeyIndex {
    /// The empty index of keys of `width` numbers that keeps residuals in `channels` of their channels. The first `sinks`
    /// tokens enter nothing.
    ///
    /// # Panics
    ///
    /// If there are no channels, or more than `width`.
    pub fn new([batch, kv_heads, width]: [usize; 3], channels: usize, sinks: usize) -> Self {
        assert!((1..=width).contains(&channels), "{channels} channels of {width}");
        let heads = vec![HeadIndex::new(width, channels); batch * kv_heads];
        Self { batch, kv_heads, width, sinks, sections: 0, founded: false, heads }
    }

    /// Counts the queries at `tokens` of `query`, `[batch, heads, tokens, width]`: the index is founded on the channels in
    /// which keys and queries are large. To be called with every query of the founding tokens once, in order of position.
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn watch(&mut self, query: Heads<'_>, tokens: Range<usize>) {
        let [batch, heads, _, width] = query.dims();
        assert!([batch, width] == [self.batch, self.width] && heads.is_multiple_of(self.kv_heads));
        let group = heads / self.kv_heads;
        let kv_heads = self.kv_heads;
        self.heads.par_iter_mut().enumerate().for_each(|(pair, head)| {
            let (batch, kv_head) = (pair / kv_heads, pair % kv_heads);
            let queries = (kv_head * group..(kv_head + 1) * group).map(|head| query.head(batch, head));
            let queries = queries.collect::<Vec<_>>();
            level::arch().dispatch(Watch { head, queries: &queries, tokens: tokens.clone() });
        });
    }

    /// Decides from the first `tokens` keys, of which whole blocks count, and the queries that were
    /// [watched](KeyIndex::watch) what the integers of every block are measured by.
    ///
    /// # Panics
    ///
    /// If the shapes do not fit or there are fewer keys.
    pub fn found<'a>(&mut self, keys: impl Into<Stored<'a>>, tokens: usize) {
        let (keys, kv_heads, sinks) = (keys.into(), self.kv_heads, self.sinks);
        self.check(&keys);
        self.heads.par_iter_mut().enumerate().for_each(|(pair, head)| {
            let keys = keys.head(pair / kv_heads, pair % kv_heads);
            level::arch().dispatch(Found { head, keys, blocks: tokens / BLOCK, sinks });
        });
        self.founded = true;
    }

    /// Whether it was [founded](KeyIndex::found).
    pub fn is_founded(&self) -> bool {
        self.founded
    }

    /// Sections that are in it.
    pub fn sections(&self) -> usize {
        self.sections
    }

    /// Takes in the sections up to the `sections`th, of the keys and values of the text from its first token on.
    ///
    /// # Panics
    ///
    /// If it was not founded, the shapes do not fit or there are fewer keys.
    pub fn extend<'a>(&mut self, keys: impl Into<Stored<'a>>, values: impl Into<Stored<'a>>, sections: usize) {
        let (keys, values) = (keys.into(), values.into());
        let new = self.sections..sections;
        if new.is_empty() {
            return;
        }
        assert!(self.founded, "an index is founded before anything is taken in");
        self.check(&keys);
        assert_eq!(keys.dims(), values.dims());
        let (kv_heads, sinks) = (self.kv_heads, self.sinks);
        self.heads.par_iter_mut().enumerate().with_max_len(1).for_each(|(pair, head)| {
            let (keys, values) =
                (keys.head(pair / kv_heads, pair % kv_heads), values.head(pair / kv_heads, pair % kv_heads));
            level::arch().dispatch(Extend { head, keys, values, sections: new.clone(), sinks });
        });
        self.sections = sections;
    }

    /// Forgets the sections behind the first `sections`; what the index was founded on stays.
    pub fn truncate(&mut self, sections: usize) {
        if sections < self.sections {
            self.sections = sections;
            self.heads.iter_mut().for_each(|head| head.resize(sections));
        }
    }

    /// Makes room for the sections of a text of `tokens` tokens.
    pub fn reserve(&mut self, tokens: usize) {
        for head in &mut self.heads {
            head.reserve(tokens / SECTION);
        }
    }

    /// Forgets every section, and what it was founded on but the queries.
    pub fn clear(&mut self) {
        self.founded = false;
        self.sections = 0;
        for head in &mut self.heads {
            head.clear();
        }
    }

    /// Bytes of everything kept, room for growth included.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(HeadIndex::bytes).sum()
    }

    /// `[batch, kv_heads, width]`.
    pub fn dims(&self) -> [usize; 3] {
        [self.batch, self.kv_heads, self.width]
    }

    pub(crate) fn head(&self, batch: usize, kv_head: usize) -> &HeadIndex {
        &self.heads[batch * self.kv_heads + kv_head]
    }

    fn check(&self, keys: &Stored<'_>) {
        let [batch, kv_heads, _, width] = keys.dims();
        assert_eq!([batch, kv_heads, width], self.dims());
    }
}

/// Positions of the run `index` of `size` tokens, sinks left out.
#[inline(always)]
pub(crate) fn positions(index: usize, size: usize, sinks: usize) -> Range<usize> {
    let end = (index + 1) * size;
    (index * size).max(sinks).min(end)..end
}
