//! What a key must score to be read.

/// A sum of products that no key reaches, and the negative of one that every key passes.
const BEYOND: f32 = 1e9;

/// For each row of a tile: what its weights are relative to, and the score that a key must pass.
#[derive(Default)]
pub(super) struct Limits {
    rows: Vec<(f32, f32)>,
}

impl Limits {
    pub(super) fn clear(&mut self, rows: usize) {
        self.rows.clear();
        self.rows.resize(rows, (0.0, 0.0));
    }

    pub(super) fn set(&mut self, row: usize, reference: f32, limit: f32) {
        self.rows[row] = (reference, limit);
    }

    #[inline(always)]
    pub(super) fn reference(&self, row: usize) -> f32 {
        self.rows[row].0
    }

    #[inline(always)]
    pub(super) fn limit(&self, row: usize) -> f32 {
        self.rows[row].1
    }
}

/// The score before the softcap from which on the capped score passes `limit`.
#[inline(always)]
pub(super) fn cap_inverse(limit: f32, softcap: Option<f32>) -> f32 {
    let Some(cap) = softcap else { return limit };
    match limit / cap {
        share if share >= 1.0 => f32::INFINITY,
        share if share <= -1.0 => f32::NEG_INFINITY,
        share => cap * share.atanh(),
    }
}

/// The largest integer that does not pass `sum`, plus what the offset of the codes adds; of what is no number nothing passes.
#[inline(always)]
pub(super) fn passes_from(sum: f32, offset: i32) -> i32 {
    let floor = sum.floor();
    let bound = if floor < BEYOND { floor.max(-BEYOND) } else { BEYOND };
    bound as i32 + offset
}
