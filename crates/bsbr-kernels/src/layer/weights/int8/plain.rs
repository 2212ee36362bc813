//! Products of codes in loops that any processor runs, by the definition of the groups.

use bsbr_weights::{Group, Matrix};

use super::{GROUP, QUAD, TokenCodes};

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
                let at = (group / QUAD * x.tokens + token) * QUAD + group % QUAD;
                let codes = &x.codes[at * GROUP..(at + 1) * GROUP];
                let mut halves = own
                    .codes
                    .chunks(GROUP / 2)
                    .zip(codes.chunks(GROUP / 2))
                    .map(|(a, b)| a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>() as f32);
                let halves = [halves.next().unwrap_or(0.0), halves.next().unwrap_or(0.0)];
                let product = own.scales[0] * halves[0] + own.scales[1] * halves[1];
                sums[token * outputs + output] += product * x.scales[at] - own.offset * x.totals[at];
            }
        }
    }
}
