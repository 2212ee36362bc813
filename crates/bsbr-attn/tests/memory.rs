//! What the process really allocates: linear in the text, never tokens by tokens, and what the cache says it holds.
#![allow(unsafe_code)] // An allocator that counts.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bsbr_attn::{AttentionOptions, BlockAttentionConfig, Far, Retrieval, Selector};

use common::{Case, Inputs, Runner, devices};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counting;

fn grown(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call goes to `System` unchanged; counting touches nothing but atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same for `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Tests of this file count what the whole process allocates: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A text of `tokens` tokens for each kind of retrieval; chunks of 64, blocks of 16.
fn kinds(tokens: usize) -> Vec<Case> {
    let base =
        BlockAttentionConfig { chunk_size: 64, block_size: 16, meta_blocks: 4, exact_tokens: 0, ..Default::default() };
    let blocks = |far, selector| BlockAttentionConfig { far, selector, ..base.clone() };
    let kind = |retrieval, selector| BlockAttentionConfig { retrieval, selector, ..base.clone() };
    let configs = [
        blocks(Far::None, Selector::Index),
        blocks(Far::Mean, Selector::Index),
        BlockAttentionConfig { fine_tokens: 128, max_sections: 2, ..blocks(Far::Mean, Selector::Index) },
        blocks(Far::State, Selector::Meta),
        blocks(Far::Mean, Selector::Meta),
        kind(Retrieval::None, Selector::Index),
        kind(Retrieval::State, Selector::Index),
        kind(Retrieval::State, Selector::Meta),
        BlockAttentionConfig { max_chunks: Some(4), ..kind(Retrieval::State, Selector::Meta) },
        kind(Retrieval::Additive, Selector::Index),
        kind(Retrieval::Additive, Selector::Meta),
    ];
    let case = |config| Case {
        batch: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        tokens,
        config,
        options: AttentionOptions::new(16),
        seed: 3,
        far: None,
        stored: burn::tensor::DType::F32,
    };
    configs.into_iter().map(case).collect()
}

/// Most bytes that attention of the whole text needed at once, inputs included.
fn peak(case: &Case, inputs: &Inputs, device: &Runner) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    drop(case.attend(inputs, device));
    PEAK.load(Relaxed) - before
}

#[test]
fn the_memory_of_a_prefill_is_linear_in_the_text() {
    let _guard = alone();
    for device in devices() {
        for (short, long) in kinds(1024).into_iter().zip(kinds(4096)) {
            // Once to start thread pools and the like.
            let inputs = short.inputs();
            peak(&short, &inputs, &device);
            let of_short = peak(&short, &inputs, &device);
            let of_long = peak(&long, &long.inputs(), &device);
            let growth = of_long as f64 / of_short as f64;
            assert!(growth < 6.0, "4 times the text takes {growth} times the memory: {:?}", long.config);
            // One tensor of tokens by tokens for one head.
            assert!(of_long < 4096 * 4096 * size_of::<f32>(), "{of_long} bytes: {:?}", long.config);
        }
    }
}

#[test]
fn a_cache_holds_the_bytes_it_says() {
    let _guard = alone();
    for device in devices() {
        for case in kinds(3 * 1024 + 24) {
            let inputs = case.inputs();
            case.attend(&inputs, &device); // Starts thread pools and the like.
            // Two ways to the same state: at once, and in pieces.
            for step in [case.tokens, 40] {
                let look = || {
                    let before = LIVE.load(Relaxed);
                    let mut cache = case.cache(&device);
                    for start in (0..case.tokens).step_by(step) {
                        case.feed(&mut cache, &inputs, start..(start + step).min(case.tokens), &device);
                    }
                    (LIVE.load(Relaxed).saturating_sub(before), cache.bytes())
                };
                // Shapes, lists of positions and the like come on top; and once for each thread its working memory, which
                // a later look no longer sees.
                let right = |(held, said): (usize, usize)| (said..said + said / 50 + 4096).contains(&held);
                let mut looks = vec![look()];
                while looks.len() < 8 && !looks.last().is_some_and(|&look| right(look)) {
                    looks.push(look());
                }
                assert!(
                    looks.last().is_some_and(|&look| right(look)),
                    "held and said: {looks:?}, steps of {step}: {:?}",
                    case.config
                );
            }
        }
    }
}

/// Training of full attention and of a local region, against the plain graph of softmax attention.
#[cfg(feature = "flex")]
#[test]
fn the_memory_of_a_backward_pass_is_a_tenth_of_that_of_plain_operations() {
    use burn::tensor::{Device, Tensor, activation::softmax};

    let _guard = alone();
    let device = Device::flex().autodiff();
    let mut case = kinds(2048).swap_remove(1);
    case.config.retrieval = Retrieval::None;
    let inputs = case.inputs();
    let peak_of = |forward: &dyn Fn([Tensor<4>; 3]) -> Tensor<4>| {
        let leaves = [&inputs.query, &inputs.keys, &inputs.values].map(|rows| rows.tensor(&device).require_grad());
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let gradients = forward(leaves.clone()).sum().backward();
        assert!(leaves.iter().all(|leaf| leaf.grad(&gradients).is_some()));
        PEAK.load(Relaxed) - before
    };
    let plain = peak_of(&|[query, keys, values]| {
        let [batch, heads, tokens, width] = query.dims();
        let shared = |rows: Tensor<4>| rows.expand([batch, heads, tokens, width]);
        let future: Tensor<4> = Tensor::full([1, 1, tokens, tokens], -1e30, &device).triu(1);
        let scores = query.matmul(shared(keys).swap_dims(2, 3)) * case.options.scale + future;
        softmax(scores, 3).matmul(shared(values))
    });
    for attention in [None, Some(&case.config)] {
        let fused = peak_of(&|[query, keys, values]| {
            bsbr_attn::attend(query, keys, values, None, attention, case.options.clone()).unwrap()
        });
        assert!(10 * fused < plain, "{fused} bytes, {plain} for the plain graph: {attention:?}");
    }
}
