//! Output cut into the tiles that are computed in parallel.

use std::ops::Range;

/// The queries of one tile and where their output goes.
pub(crate) struct Task<'a> {
    /// `batch * kv_heads + kv_head`.
    pub(crate) pair: usize,
    /// Queries, counted from the first of the call.
    pub(crate) tokens: Range<usize>,
    /// For each head of the group: rows of the output, and one number for each row.
    pub(crate) outputs: Vec<(&'a mut [f32], &'a mut [f32])>,
}

/// Cuts `output` `[pairs, group, tokens, width]` and `numbers` `[pairs, group, tokens]` into tiles; `next` tells for the first
/// token of a tile the first of the next.
pub(crate) fn split<'a>(
    output: &'a mut [f32],
    numbers: &'a mut [f32],
    group: usize,
    tokens: usize,
    width: usize,
    next: impl Fn(usize) -> usize,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    if output.is_empty() {
        return tasks;
    }
    let pairs = output.chunks_mut(group * tokens * width).zip(numbers.chunks_mut(group * tokens));
    for (pair, (output, numbers)) in pairs.enumerate() {
        let mut rest: Vec<_> = output.chunks_mut(tokens * width).zip(numbers.chunks_mut(tokens)).collect();
        let mut from = 0;
        while from < tokens {
            let to = next(from).clamp(from + 1, tokens);
            let outputs = rest
                .iter_mut()
                .map(|(rows, numbers)| {
                    let (now, later) = std::mem::take(rows).split_at_mut((to - from) * width);
                    let (number, numbers_later) = std::mem::take(numbers).split_at_mut(to - from);
                    (*rows, *numbers) = (later, numbers_later);
                    (now, number)
                })
                .collect();
            tasks.push(Task { pair, tokens: from..to, outputs });
            from = to;
        }
    }
    tasks
}
