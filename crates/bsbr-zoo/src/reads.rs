//! How much of a text tokens read as it is: counted from the settings alone.

use bsbr_attn::{BlockAttentionConfig, KeysRead};

use crate::{DecoderConfig, Family};

/// The share of the keys of a token and of those before it that it reads as themselves, over a text of `tokens` tokens;
/// `None` for families that keep no key. What a state or the mean of a block holds of the others is not counted. Of `bsbr` it
/// is the most: how many keys pass its threshold depends on the text, that they are no more than `max_keys` does not.
pub fn keys_read(config: &DecoderConfig, tokens: usize) -> Option<f64> {
    let all = KeysRead::of_text(None, None, tokens).exact;
    let read = match config.family {
        Family::Standard | Family::Hopfield => all,
        Family::Bsbr => (0..tokens).map(|token| most_of_bsbr(&config.bsbr, token)).sum(),
        Family::Window => {
            let of = |token: usize| {
                (token + 1).min(config.window) + (token + 1).saturating_sub(config.window).min(config.sinks)
            };
            (0..tokens).map(|token| of(token) as u64).sum()
        }
        Family::Gau => (0..tokens).map(|token| (token % config.chunk_size + 1) as u64).sum(),
        Family::Linear | Family::Delta => return None,
    };
    Some(read as f64 / all.max(1) as f64)
}

/// The most keys a token reads.
fn most_of_bsbr(attention: &BlockAttentionConfig, token: usize) -> u64 {
    let fixed = KeysRead::of_token(Some(attention), None, token).exact;
    let others = (token as u64 + 1).saturating_sub(fixed);
    fixed + if attention.uses_index() { others.min(attention.max_keys as u64) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_pairs_of_tokens_counted_one_by_one() {
        let base = DecoderConfig { window: 5, sinks: 2, chunk_size: 4, ..DecoderConfig::default() };
        let share = |family, reads: fn(usize, usize) -> bool| {
            let pairs = || (0..50_usize).flat_map(|t| (0..=t).map(move |i| (t, i)));
            let expected = pairs().filter(|&(t, i)| reads(t, i)).count() as f64 / pairs().count() as f64;
            let found = keys_read(&DecoderConfig { family, ..base.clone() }, 50).expect("keys");
            assert!((found - expected).abs() < 1e-12, "{family}: {found}, expected {expected}");
        };
        share(Family::Standard, |_, _| true);
        share(Family::Hopfield, |_, _| true);
        share(Family::Window, |t, i| i + 5 > t || i < 2);
        share(Family::Gau, |t, i| i / 4 == t / 4);
        assert_eq!(keys_read(&DecoderConfig { family: Family::Delta, ..base.clone() }, 50), None);
        // Chunks of 64, 4 sinks and 32 keys: 30 more than the tokens of the chunk from token 94 on.
        let pairs = |t: u64| (t % 64 + 1 + 36).min(t + 1);
        let (found, all) = ((0..256).map(pairs).sum::<u64>(), 256 * 257 / 2);
        let bsbr = keys_read(&DecoderConfig { family: Family::Bsbr, ..base }, 256).expect("keys");
        assert_eq!(bsbr, found as f64 / f64::from(all));
    }
}
