//! What a key must score to be read.

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
