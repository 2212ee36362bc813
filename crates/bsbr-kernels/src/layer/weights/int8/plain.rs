//! Products of codes in loops that any processor runs, by the definition of the groups.

use bsbr_weights::{Group, Matrix};

use super::{GROUP, HALF, TokenCodes};

/// As [`super::dots`].
pub(super) fn dots(weights: Matrix<'_>, x: &TokenCodes, sums: &mut [f32]) {
    let (format, outputs) = (weights.format(), weights.outputs());
    sums.fill(0.0);
    for output in 0..outputs {
        let row = weights.rows(output..output + 1).bytes();
        for group in 0..x.inputs / GROUP {
            let block = group * GROUP / format.block();
            let own = Group::of(format, &row[block * format.block_bytes()..], group % (format.block() / GROUP));
            for token in 0..x.tokens {
                let half = |half: usize| {
                    let codes = &x.codes[x.half_at(token, group, half)..][..HALF];
                    let own = &own.codes[half * HALF..][..HALF];
                    own.iter().zip(codes).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>() as f32
                };
                let at = x.scale_at(token, group);
                let product = own.scales[0] * half(0) + own.scales[1] * half(1);
                sums[token * outputs + output] += product * x.scales[at] - own.offset * x.totals[at];
            }
        }
    }
}
