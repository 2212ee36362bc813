//! Keys and values that grow without copying their past at every step, and attention to all of them.

use burn::tensor::{Tensor, activation::softmax};

use crate::layer::bytes;

/// Queries handled together: their scores are `heads x QUERY_TILE x rows` numbers.
const QUERY_TILE: usize = 128;

/// Keys and values `[batch, heads, room, head_dim]`, of which the first `length` rows are filled.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    room: Option<[Tensor<4>; 2]>,
    length: usize,
}

impl Rows {
    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of the room.
    pub(crate) fn bytes(&self) -> usize {
        self.room.iter().flatten().map(bytes).sum()
    }

    /// Appends `[batch, heads, n, head_dim]`. The room doubles when it runs out.
    pub(crate) fn push(&mut self, keys: Tensor<4>, values: Tensor<4>) {
        let [batch, heads, added, width] = keys.dims();
        let (start, end) = (self.length, self.length + added);
        let have = self.room.as_ref().map_or(0, |room| room[0].dims()[2]);
        if end > have {
            let shape = [batch, heads, end.max(2 * have), width];
            let old = self.filled();
            let mut room = [(); 2].map(|()| Tensor::zeros(shape, &keys.device()));
            if let Some(old) = old {
                for (room, old) in room.iter_mut().zip(old) {
                    room.inplace(|all| all.slice_assign([0..batch, 0..heads, 0..start, 0..width], old));
                }
            }
            self.room = Some(room);
        }
        for (room, new) in self.room.iter_mut().flatten().zip([keys, values]) {
            room.inplace(|all| all.slice_assign([0..batch, 0..heads, start..end, 0..width], new));
        }
        self.length = end;
    }

    /// Every key and value so far; `None` before the first.
    pub(crate) fn filled(&self) -> Option<[Tensor<4>; 2]> {
        let room = self.room.clone()?;
        (self.length > 0).then(|| room.map(|rows| rows.narrow(2, 0, self.length)))
    }
}

/// Causal softmax attention of scaled queries `[batch, heads, n, head_dim]` to keys and values of `m >= n` rows: the queries
/// are the last `n` positions.
pub(crate) fn attend_to_all(query: Tensor<4>, keys: &Tensor<4>, values: &Tensor<4>) -> Tensor<4> {
    let (tokens, rows) = (query.dims()[2], keys.dims()[2]);
    let tiles = (0..tokens).step_by(QUERY_TILE).map(|at| {
        let count = QUERY_TILE.min(tokens - at);
        let seen = rows - tokens + at + count;
        let part = |rows: &Tensor<4>| rows.clone().narrow(2, 0, seen);
        let scores = query.clone().narrow(2, at, count).matmul(part(keys).transpose());
        // Only its own tile holds keys after a query.
        let hidden = Tensor::<2>::full([count, seen], -1e30, &scores.device()).triu((seen - count + 1) as i64);
        let scores = if count == 1 { scores } else { scores + hidden.unsqueeze() };
        softmax(scores, 3).matmul(part(values))
    });
    Tensor::cat(tiles.collect(), 2)
}
