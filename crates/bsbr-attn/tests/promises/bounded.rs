//! Bounded when asked: the bytes of a cache do not depend on the length of the text.

use bsbr_attn::{BlockAttentionConfig, Retrieval};
use proptest::prelude::*;

use crate::common::{Case, cases, devices, settings};

const CHUNKS: usize = 60;

/// Bytes of the cache after each token of `CHUNKS` chunks.
fn bytes(case: &Case, device: &crate::common::Runner) -> Vec<usize> {
    let inputs = case.inputs();
    let mut cache = case.cache(device);
    (0..case.tokens)
        .map(|t| {
            case.feed(&mut cache, &inputs, t..t + 1, device);
            cache.bytes()
        })
        .collect()
}

fn long(case: Case, config: BlockAttentionConfig) -> Case {
    Case { batch: 1, tokens: CHUNKS * config.chunk_size, config, far: None, ..case }
}

proptest! {
    #![proptest_config(settings(12))]

    #[test]
    fn a_bounded_state_and_no_retrieval_have_constant_bytes(case in cases(), limit in 1usize..=4) {
        let chunk = case.config.chunk_size;
        for (retrieval, max_chunks) in [(Retrieval::State, Some(limit)), (Retrieval::None, None)] {
            let config = BlockAttentionConfig { retrieval, max_chunks, ..case.config.clone() };
            let case = long(case.clone(), config);
            for device in devices() {
                let bytes = bytes(&case, &device);
                // By the tenth chunk the sinks lie behind the local region and blocks have begun to merge.
                let (warm, later) = bytes[9 * chunk..].split_at(chunk);
                for (at, chunk) in later.chunks(chunk).enumerate() {
                    prop_assert_eq!(chunk, warm, "{:?}, chunk {}", retrieval, 10 + at);
                }
            }
        }
    }

    #[test]
    fn other_kinds_grow_with_the_text_and_no_faster(case in cases()) {
        for retrieval in [Retrieval::Blocks, Retrieval::State, Retrieval::Additive] {
            let config = BlockAttentionConfig { retrieval, max_chunks: None, ..case.config.clone() };
            let case = long(case.clone(), config);
            for device in devices() {
                let bytes = bytes(&case, &device);
                let at = |share: usize| bytes[bytes.len() / share - 1] as f64;
                // Room doubles when it runs out, so four times the text is two to eight times the bytes.
                let growth = at(1) / at(4);
                prop_assert!((2.0..=8.0).contains(&growth), "{retrieval:?} grows by {growth}");
            }
        }
    }
}
