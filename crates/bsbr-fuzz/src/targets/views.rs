//! Shapes and strides of views, and what is computed over them.

use std::panic::catch_unwind;

use bsbr_kernels::Heads;
use bsbr_kernels::attention::{CausalOptions, causal_attention};
use bsbr_kernels::layer::{Panels, Rows};

use super::Target;

/// Numbers behind a view.
const LENGTH: usize = 96;
/// What is small enough to be computed.
const SMALL: u128 = 4096;

/// A view of ninety-six numbers, which are as many as it is told or refused; and attention and packed rows over it.
pub(super) const VIEWS: Target = Target {
    name: "views",
    prepare: |_| Box::new(|bytes| format!("{} {}", view(bytes), rows(bytes))),
    fixtures: || {
        let of = |numbers: [u64; 7]| numbers.into_iter().flat_map(u64::to_le_bytes).collect();
        [[1, 2, 3, 4, 24, 12, 4], [2, 2, 3, 8, 48, 24, 8], [1, 1, 3, 4, 0, 0, 1 << 63], [0, 1, 5, 8, 1, 1, u64::MAX]]
            .map(of)
            .into()
    },
    words: &[],
    longest: 7 * 8,
};

/// The `at`-th number of an input.
fn number(bytes: &[u8], at: usize) -> usize {
    let mut number = [0; 8];
    for (to, from) in number.iter_mut().zip(bytes.iter().skip(8 * at)) {
        *to = *from;
    }
    u64::from_le_bytes(number) as usize
}

/// How many numbers a view reaches over, and how many it shows, counted without a border.
fn reach(dims: [usize; 4], strides: [usize; 3]) -> Option<(u128, u128)> {
    if dims.contains(&0) {
        return Some((0, 0));
    }
    let shown = dims.iter().try_fold(1_u128, |product, &size| product.checked_mul(size as u128))?;
    let steps = dims.iter().zip(strides).map(|(&size, stride)| (size as u128 - 1).checked_mul(stride as u128));
    let reach = steps.into_iter().try_fold(dims[3] as u128, |sum, step| sum.checked_add(step?))?;
    Some((reach, shown))
}

fn view(bytes: &[u8]) -> &'static str {
    let numbers: [f32; LENGTH] = std::array::from_fn(|n| n as f32 / LENGTH as f32);
    let [a, b, c, d, e, f, g] = std::array::from_fn(|at| number(bytes, at));
    let (dims, strides) = ([a, b, c, d], [e, f, g]);
    let allowed = reach(dims, strides).filter(|&(reach, shown)| reach <= LENGTH as u128 && shown <= usize::MAX as u128);
    let made = catch_unwind(|| Heads::new(&numbers, dims, strides)).ok();
    assert_eq!(made.is_some(), allowed.is_some(), "a view of {dims:?} by {strides:?}");
    let (Some(heads), Some((_, shown))) = (made, allowed) else { return "refused" };
    if shown == 0 || shown > SMALL {
        return "not computed";
    }
    let options = CausalOptions { scale: 0.5, softcap: None, window: None, slopes: None, sink_logits: None };
    let (output, _) = causal_attention(heads, heads, heads, &options);
    assert_eq!(output.len() as u128, shown);
    // Each is a mean of numbers from 0 to 1.
    assert!(output.iter().all(|x| (-1e-6..=1.0).contains(x)), "{output:?} of {dims:?} by {strides:?}");
    let one = heads.some_heads(a - 1, b - 1..b);
    assert_eq!(one.dims(), [1, 1, c, d]);
    "computed"
}

fn rows(bytes: &[u8]) -> &'static str {
    let numbers: [f32; LENGTH] = std::array::from_fn(|n| n as f32);
    let [tokens, token_stride, groups, group_stride, group_width] = std::array::from_fn(|at| number(bytes, at + 1));
    let allowed = reach([1, tokens, groups, group_width], [0, token_stride, group_stride]);
    let allowed = allowed.filter(|&(reach, shown)| reach <= LENGTH as u128 && shown <= usize::MAX as u128);
    if allowed.is_some_and(|(_, shown)| shown > SMALL) {
        return "not packed";
    }
    let rows = Rows { data: &numbers, tokens, token_stride, groups, group_stride, group_width };
    let packed = catch_unwind(|| {
        let panels = Panels::pack(rows, None);
        let mut out = vec![0.0; panels.tokens() * panels.width()];
        panels.write(&mut out);
        out
    });
    if allowed.is_none_or(|(_, shown)| shown > 0) {
        assert_eq!(packed.is_ok(), allowed.is_some(), "{rows:?}");
    }
    let (Ok(packed), Some((_, shown))) = (packed, allowed) else { return "refused" };
    assert_eq!(packed.len() as u128, shown);
    for (at, &found) in packed.iter().enumerate() {
        let (token, group, number) = (at / (groups * group_width), at / group_width % groups, at % group_width);
        assert_eq!(found, (token * token_stride + group * group_stride + number) as f32);
    }
    "packed"
}
