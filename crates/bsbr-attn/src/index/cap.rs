//! What passes a limit, and no more of it than allowed.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::founding::host;

/// Columns of each row that pass.
pub(super) struct Passed {
    /// 1 where one does, 0 elsewhere, of the shape of what was looked at.
    pub(super) mask: Tensor<4>,
    /// Rows in which more would have passed.
    pub(super) capped: u64,
}

/// The columns of `[batch, kv_heads, tokens, columns]` above `limit`, at most `most` in a row: those furthest above it, of equals
/// the later.
pub(super) fn passing(excess: Tensor<4>, limit: f64, most: usize) -> Passed {
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
        keep_best(passes, excess, most);
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    fn passed(excess: [f32; 6], most: usize) -> (Vec<f32>, u64) {
        // The second row passes nothing.
        let rows = [excess, [-1e30; 6]].concat();
        let passed = passing(mask_of(rows, [1, 1, 2, 6], &Device::flex()), -0.5, most);
        let mut mask = host(passed.mask);
        assert_eq!(mask.split_off(6), [0.0; 6]);
        (mask, passed.capped)
    }

    #[test]
    fn the_highest_pass_and_of_equals_the_later() {
        let excess = [0.0, 2.0, 0.0, -0.5, 0.0, -1e30];
        assert_eq!(passed(excess, 6), (vec![1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0));
        assert_eq!(passed(excess, 4), (vec![1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0));
        assert_eq!(passed(excess, 3), (vec![0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 1));
        assert_eq!(passed(excess, 1), (vec![0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1));
        assert_eq!(passed(excess, 0), (vec![0.0; 6], 1));
    }
}
