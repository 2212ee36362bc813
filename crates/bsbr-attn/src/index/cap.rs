//! What passes a limit, and no more of it than allowed.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::founding::host;

#[cfg(all(test, feature = "flex"))]
mod tests;

/// Columns of each row that pass.
pub(super) struct Passed {
    /// 1 where one does, 0 elsewhere, of the shape of what was looked at.
    pub(super) mask: Tensor<4>,
    /// Rows in which more would have passed.
    pub(super) capped: u64,
}

/// What a row leaves out where too much passes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cap {
    /// All but the furthest above the limit, of equals the later.
    Best,
    /// What does not pass a threshold that is doubled until no more do than may.
    Doubled,
}

/// The columns of `[batch, kv_heads, tokens, columns]` above `limit`, a logarithm, at most `most` in a row.
pub(super) fn passing(excess: Tensor<4>, limit: f64, most: usize, cap: Cap) -> Passed {
    let shape = excess.dims();
    let columns = shape[3];
    let mask = excess.clone().greater_elem(limit).float().cast(DType::F32);
    if columns <= most {
        return Passed { mask, capped: 0 };
    }
    // Only a few rows are above the cap, if any: they are looked at on the host.
    let counts = host(mask.clone().sum_dim(3));
    let most_passed = counts.iter().copied().fold(0.0, f32::max);
    if most_passed as usize <= most {
        return Passed { mask, capped: 0 };
    }
    let device = mask.device();
    let (mut passes, excess) = (host(mask), host(excess));
    let mut capped = 0;
    let rows = passes.chunks_exact_mut(columns).zip(excess.chunks_exact(columns)).zip(counts);
    for ((passes, excess), _) in rows.filter(|(_, count)| *count as usize > most) {
        match cap {
            Cap::Best => keep_best(passes, excess, most),
            Cap::Doubled => double(passes, excess, limit as f32, most),
        }
        capped += 1;
    }
    Passed { mask: mask_of(passes, shape, &device), capped }
}

fn mask_of(numbers: Vec<f32>, shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(numbers, shape), (device, DType::F32))
}

/// Leaves the `most` best of those that pass.
fn keep_best(passes: &mut [f32], excess: &[f32], most: usize) {
    let mut passing: Vec<usize> = (0..passes.len()).filter(|&at| passes[at] > 0.0).collect();
    passing.sort_unstable_by(|&a, &b| excess[b].total_cmp(&excess[a]).then(b.cmp(&a)));
    passing[most..].iter().for_each(|&at| passes[at] = 0.0);
}

/// Doublings of a threshold after which scores are no numbers to compare.
const MOST_DOUBLINGS: usize = 1000;

/// Leaves what passes a limit that is raised by `ln 2` until no more than `most` do.
fn double(passes: &mut [f32], excess: &[f32], limit: f32, most: usize) {
    for doublings in 1..=MOST_DOUBLINGS {
        let raised = limit + doublings as f32 * std::f32::consts::LN_2;
        let passing = |excess: &f32| *excess > raised;
        if excess.iter().filter(|excess| passing(excess)).count() <= most || doublings == MOST_DOUBLINGS {
            passes.iter_mut().zip(excess).for_each(|(pass, excess)| *pass = if passing(excess) { 1.0 } else { 0.0 });
            return;
        }
    }
}
