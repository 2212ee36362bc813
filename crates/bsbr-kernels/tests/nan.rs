//! A number that is none, as a broken checkpoint holds one, shows in what attention returns.

use bsbr_kernels::{
    Heads, Level,
    attention::{CausalOptions, causal_attention},
    limit_level,
};

const HEADS: usize = 2;
const WIDTH: usize = 20;

/// Numbers of no importance.
fn rows(count: usize) -> Vec<f32> {
    (0..HEADS * count * WIDTH).map(|n| (n as f32 * 0.37).sin()).collect()
}

/// For each head and token, whether its output has a NaN.
fn broken(rows: [&[f32]; 3], [tokens, length]: [usize; 2], options: &CausalOptions) -> Vec<bool> {
    let [query, keys, values] = rows;
    let view = |rows, count| Heads::contiguous(rows, [1, HEADS, count, WIDTH]);
    let (output, _) = causal_attention(view(query, tokens), view(keys, length), view(values, length), options);
    output.chunks(WIDTH).map(|row| row.iter().any(|x| x.is_nan())).collect()
}

#[test]
fn a_nan_in_any_row_reaches_every_token_that_reads_it_and_no_other_head() {
    // Few tokens take another way than many, and long texts come in several steps.
    for (tokens, length) in [(1, 40), (3, 40), (40, 40), (150, 700)] {
        for softcap in [None, Some(20.0)] {
            for level in [Level::Scalar, Level::Avx2, Level::Best] {
                limit_level(level);
                let options = CausalOptions { scale: 0.2, softcap, window: None, slopes: None, sink_logits: None };
                let [query, keys, values] = [tokens, length, length].map(rows);
                assert!(!broken([&query, &keys, &values], [tokens, length], &options).contains(&true));
                for at in [0, length / 2, length - 1] {
                    let shown = format!("{level:?}, {tokens} of {length} tokens, softcap {softcap:?}, NaN at {at}");
                    let place = at * WIDTH + 17;
                    let expected: Vec<bool> =
                        (0..HEADS * tokens).map(|row| row < tokens && length - tokens + row % tokens >= at).collect();
                    let mut bad = keys.clone();
                    bad[place] = f32::NAN;
                    assert_eq!(broken([&query, &bad, &values], [tokens, length], &options), expected, "key: {shown}");
                    let mut bad = values.clone();
                    bad[place] = f32::NAN;
                    // One that is hidden is multiplied by 0, which may show it too, in the same head.
                    let found = broken([&query, &keys, &bad], [tokens, length], &options);
                    let lost = found.iter().zip(&expected).any(|(found, expected)| *expected && !found);
                    assert!(!lost && !found[tokens..].contains(&true), "value: {shown}: {found:?}");
                }
                for at in [0, tokens - 1] {
                    let mut bad = query.clone();
                    bad[at * WIDTH + 3] = f32::NAN;
                    let expected: Vec<bool> = (0..HEADS * tokens).map(|row| row == at).collect();
                    assert_eq!(broken([&bad, &keys, &values], [tokens, length], &options), expected, "query at {at}");
                }
            }
        }
    }
}
