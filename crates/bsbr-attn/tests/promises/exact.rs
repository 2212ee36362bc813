//! Exact when short: where every key a token may see is in its exact set, attention is that of the original model.

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Retrieval, Selector, attend};
use proptest::{prelude::*, sample::Index};

use crate::common::{Case, Rows, cases, devices, difference, settings};

fn assert_full(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs();
    for device in devices() {
        let error = difference(case.attend(&inputs, &device), case.full(&inputs, &device));
        prop_assert!(error <= 1e-5, "differs from full attention by {error}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(settings(256))]

    #[test]
    fn a_text_inside_the_local_region_gets_full_attention(case in cases(), length in any::<Index>()) {
        let region = (case.config.local_chunks + 1) * case.config.chunk_size;
        assert_full(&Case { tokens: length.index(region) + 1, ..case })?;
    }

    #[test]
    fn retrieving_everything_is_full_attention(mut case in cases()) {
        case.far = None;
        let last_chunk = (case.tokens - 1) / case.config.chunk_size;
        case.config.retrieval = Retrieval::Blocks;
        (case.config.max_chunks, case.config.kept_tokens) = (None, 0);
        if case.config.chunk_size < 64 {
            case.config.selector = Selector::Meta;
            case.config.meta_blocks = (case.config.local_start(last_chunk) / case.config.block_size).max(1);
        }
        (case.config.threshold, case.config.max_keys, case.config.max_sections) = (0.0, 1024, 1024);
        assert_full(&case)?;
    }

    #[test]
    fn keeping_every_token_is_full_attention(mut case in cases()) {
        case.far = None;
        (case.config.retrieval, case.config.selector) = (Retrieval::State, Selector::Index);
        case.config.kept_tokens = case.tokens;
        assert_full(&case)?;
    }

    #[test]
    fn a_window_inside_the_local_region_is_windowed_full_attention(mut case in cases(), window in any::<Index>()) {
        // The first token of a chunk has the shortest local region: itself and `local_chunks` chunks.
        case.far = None;
        case.options.window = Some(window.index(case.config.local_chunks * case.config.chunk_size + 1) + 1);
        assert_full(&case)?;
    }
}

#[test]
fn a_short_text_gets_full_attention_with_the_default_sizes() {
    for device in devices() {
        for retrieval in [Retrieval::None, Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            let config = BlockAttentionConfig { retrieval, ..Default::default() };
            for tokens in [1, 127, 128, 129, 256] {
                let rows = |heads, seed| Rows::random([1, heads, tokens, 16], seed).tensor(&device);
                let (query, keys, values) = (rows(4, 1), rows(2, 2), rows(2, 3));
                let run = |config: Option<&BlockAttentionConfig>| {
                    let options = AttentionOptions::new(16);
                    attend(query.clone(), keys.clone(), values.clone(), None, config, options).unwrap()
                };
                let error = difference(run(Some(&config)), run(None));
                assert!(error <= 1e-6, "{retrieval:?}, {tokens} tokens: {error}");
            }
        }
    }
}
