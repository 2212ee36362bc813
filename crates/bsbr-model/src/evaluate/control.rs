//! What retrieval is measured against.

use bsbr_attn::{BlockAttentionConfig, Retrieval};

/// The same neighbourhood with nothing beyond it: retrieval is `none`, and what only another kind may have is reset.
pub fn without_retrieval(attention: &BlockAttentionConfig) -> BlockAttentionConfig {
    BlockAttentionConfig { retrieval: Retrieval::None, kept_tokens: 0, max_chunks: None, ..attention.clone() }
}

#[cfg(test)]
mod tests {
    use bsbr_attn::Selector;

    use super::*;

    #[test]
    fn every_kind_has_a_control_that_is_valid() {
        let default = BlockAttentionConfig::default();
        let of = |retrieval| BlockAttentionConfig { retrieval, ..default.clone() };
        let bounded = BlockAttentionConfig { kept_tokens: 608, max_chunks: Some(8), ..of(Retrieval::State) };
        let all_kept = BlockAttentionConfig { max_chunks: Some(0), ..bounded.clone() };
        let gated = BlockAttentionConfig { head_gates: true, compression_factor: 4, ..bounded.clone() };
        let meta = BlockAttentionConfig { selector: Selector::Meta, ..of(Retrieval::Blocks) };
        for attention in
            [of(Retrieval::None), of(Retrieval::Blocks), of(Retrieval::Additive), bounded, all_kept, gated, meta]
        {
            attention.validate().expect("settings to begin with");
            let control = without_retrieval(&attention);
            control.validate().unwrap_or_else(|error| panic!("{attention:?}: {error}"));
            let neighbourhood = |config: &BlockAttentionConfig| {
                (config.retrieval, config.chunk_size, config.local_chunks, config.sink_tokens)
            };
            assert_eq!(
                neighbourhood(&control),
                (Retrieval::None, attention.chunk_size, attention.local_chunks, attention.sink_tokens)
            );
        }
    }
}
