use super::*;

fn passed(excess: [f32; 6], most: usize, cap: Cap) -> (Vec<f32>, u64) {
    // The second row passes nothing.
    let rows = [excess, [-1e30; 6]].concat();
    let passed = passing(mask_of(rows, [1, 1, 2, 6], &Device::flex()), -0.5, most, cap);
    let mut mask = host(passed.mask);
    assert_eq!(mask.split_off(6), [0.0; 6]);
    (mask, passed.capped)
}

#[test]
fn the_highest_pass_and_of_equals_the_later() {
    let excess = [0.0, 2.0, 0.0, -0.5, 0.0, -1e30];
    let passed = |most| passed(excess, most, Cap::Best);
    assert_eq!(passed(6), (vec![1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0));
    assert_eq!(passed(4), (vec![1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0));
    assert_eq!(passed(3), (vec![0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 1));
    assert_eq!(passed(1), (vec![0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1));
    assert_eq!(passed(0), (vec![0.0; 6], 1));
}

#[test]
fn a_threshold_is_doubled_until_no_more_pass_than_may() {
    // Limits are -0.5, 0.19, 0.89, 1.58, ..
    let excess = [0.0, 2.0, 0.5, -0.5, 0.6, -1e30];
    let passed = |most| passed(excess, most, Cap::Doubled);
    assert_eq!(passed(4), (vec![1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 0));
    assert_eq!(passed(3), (vec![0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 1));
    assert_eq!(passed(2), (vec![0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1));
    assert_eq!(passed(1), (vec![0.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1));
}
