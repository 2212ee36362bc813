//! A token changes nothing before it, bit for bit.

use burn::tensor::Device;
use proptest::{prelude::*, sample::Index};

use crate::common::{cases, numbers, settings};

proptest! {
    #![proptest_config(settings(384))]

    #[test]
    fn a_token_changes_nothing_before_it(case in cases(), at in any::<Index>(), border in 0usize..=2, other in 1i64..13) {
        let device = Device::flex();
        let decoder = case.decoder(&device);
        let any = at.index(case.tokens);
        // The last token of a chunk and the first of the next, where there are any.
        let chunk = match case.config.family {
            bsbr_zoo::Family::Bsbr => case.config.bsbr.chunk_size,
            bsbr_zoo::Family::Window => case.config.window,
            _ => case.config.chunk_size,
        };
        let changed = match border {
            0 => any,
            1 => any / chunk * chunk,
            _ => ((any / chunk + 1) * chunk - 1).min(case.tokens - 1),
        };
        let mut ids = case.ids();
        for text in ids.chunks_mut(case.tokens) {
            text[changed] = (text[changed] + other) % 13;
        }
        let before = numbers(decoder.forward(case.input(&device)).unwrap());
        let after = numbers(decoder.forward(case.tensor(ids, &device)).unwrap());
        let texts = before.chunks(case.tokens * 13).zip(after.chunks(case.tokens * 13));
        for (before, after) in texts {
            let same = |rows: std::ops::Range<usize>| before[rows.start * 13..rows.end * 13] == after[rows.start * 13..rows.end * 13];
            prop_assert!(same(0..changed), "token {changed} changes what comes before it");
            prop_assert!(!same(changed..changed + 1), "token {changed} changes nothing at all");
        }
    }
}
