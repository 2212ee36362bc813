//! Every refusal: it names what is wrong, what was found and what was expected, and leaves the cache as it was.

mod common;

use bsbr_attn::{
    AttentionCache, AttentionError, AttentionOptions, BlockAttentionConfig, CacheConfig, FarPositions, Kernel, Meta,
    Padding, Retrieval, Selector, attend, attend_padded,
};
use burn::tensor::{DType, Device, Tensor};

const BATCH: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = 8;

/// One is enough: what is refused never gets to a device.
fn device() -> Device {
    common::cpu_devices().swap_remove(0)
}

fn base() -> BlockAttentionConfig {
    BlockAttentionConfig { chunk_size: 64, block_size: 16, exact_tokens: 0, ..Default::default() }
}

fn meta_base() -> BlockAttentionConfig {
    BlockAttentionConfig { selector: Selector::Meta, chunk_size: 8, block_size: 4, meta_blocks: 1, ..base() }
}

fn cache_config(attention: Option<BlockAttentionConfig>) -> CacheConfig {
    let options = AttentionOptions::new(WIDTH);
    CacheConfig {
        batch: BATCH,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: WIDTH,
        options,
        attention,
        dtype: DType::F32,
        stored: DType::F32,
        kernel: Kernel::default(),
    }
}

fn ones(heads: usize, tokens: usize) -> Tensor<4> {
    Tensor::ones([BATCH, heads, tokens, WIDTH], &device())
}

fn shaped(shape: [usize; 4]) -> Tensor<4> {
    Tensor::ones(shape, &device())
}

/// The error says all of `parts`.
fn assert_says(error: &AttentionError, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let set = |change: fn(&mut BlockAttentionConfig)| {
        let mut config = base();
        change(&mut config);
        config
    };
    let cases: [(BlockAttentionConfig, [&str; 3]); 23] = [
        (set(|c| c.chunk_size = 0), ["chunk_size", "is 0", "1 to 65536"]),
        (set(|c| (c.chunk_size, c.block_size) = (65540, 4)), ["chunk_size", "is 65540", "1 to 65536"]),
        (set(|c| (c.chunk_size, c.block_size) = (96, 16)), ["chunk_size", "is 96", "a multiple of 64"]),
        (set(|c| c.block_size = 0), ["block_size", "is 0", "divisor of chunk_size = 64"]),
        (set(|c| c.block_size = 3), ["block_size", "is 3", "divisor of chunk_size = 64"]),
        (set(|c| c.block_size = 128), ["block_size", "is 128", "divisor of chunk_size = 64"]),
        (set(|c| c.max_keys = 0), ["max_keys", "is 0", "at least 1"]),
        (set(|c| c.meta_blocks = 0), ["meta_blocks", "is 0", "at least 1"]),
        (set(|c| c.threshold = 1.0), ["threshold", "is 1", "below 1"]),
        (set(|c| c.threshold = -1e-9), ["threshold", "is -0.000000001", "0 or more"]),
        (set(|c| c.threshold = f64::NAN), ["threshold", "is NaN", "a probability"]),
        (set(|c| c.index_channels = Some(0)), ["index_channels", "is 0", "at least 1"]),
        (set(|c| c.far = bsbr_attn::Far::State), ["far", "is state", "none or mean with selector = index"]),
        (set(|c| c.compression_factor = 0), ["compression_factor", "is 0", "at least 1"]),
        (set(|c| (c.retrieval, c.max_chunks) = (Retrieval::State, Some(0))), ["max_chunks", "is 0", "at least 1"]),
        (set(|c| c.max_chunks = Some(3)), ["max_chunks", "is 3", "unset unless retrieval = state"]),
        (
            set(|c| (c.retrieval, c.max_chunks) = (Retrieval::None, Some(3))),
            ["max_chunks", "is 3", "unset unless retrieval = state"],
        ),
        (
            set(|c| (c.retrieval, c.max_chunks) = (Retrieval::Additive, Some(3))),
            ["max_chunks", "is 3", "unset unless retrieval = state"],
        ),
        (set(|c| c.kept_tokens = 3), ["kept_tokens", "is 3", "0 unless retrieval = state"]),
        (
            set(|c| (c.retrieval, c.selector, c.kept_tokens) = (Retrieval::State, Selector::Meta, 5)),
            ["kept_tokens", "is 5", "0 with selector = meta"],
        ),
        (set(|c| c.covariance_weight = -0.1), ["covariance_weight", "is -0.1", "0 or more"]),
        (set(|c| c.covariance_weight = f64::NAN), ["covariance_weight", "is NaN", "finite"]),
        (set(|c| c.additive_gate = f64::INFINITY), ["additive_gate", "is inf", "finite"]),
    ];
    for (config, parts) in cases {
        assert_says(&config.validate().unwrap_err(), &parts);
        // The cache and whole texts refuse alike.
        let new = AttentionCache::new(cache_config(Some(config.clone())), &device());
        assert_says(&new.unwrap_err(), &parts);
        let (query, rows) = (ones(HEADS, 3), ones(KV_HEADS, 3));
        let whole = attend(query, rows.clone(), rows, None, Some(&config), AttentionOptions::new(WIDTH));
        assert_says(&whole.unwrap_err(), &parts);
    }
}

#[test]
fn settings_that_fit_are_accepted() {
    base().validate().unwrap();
    BlockAttentionConfig::default().validate().unwrap();
    for retrieval in [Retrieval::None, Retrieval::State, Retrieval::Additive] {
        // Nothing is retrieved, so this means nothing.
        BlockAttentionConfig { retrieval, max_keys: 0, meta_blocks: 0, ..base() }.validate().unwrap();
    }
    BlockAttentionConfig { retrieval: Retrieval::State, max_chunks: Some(1), ..base() }.validate().unwrap();
    BlockAttentionConfig { retrieval: Retrieval::State, kept_tokens: 9, max_chunks: Some(0), ..base() }
        .validate()
        .unwrap();
    let chooses_all = BlockAttentionConfig { threshold: 0.0, max_sections: 0, fine_tokens: 0, ..base() };
    chooses_all.validate().unwrap();
    BlockAttentionConfig { local_chunks: 0, sink_tokens: 0, covariance_weight: 0.0, ..base() }.validate().unwrap();
}

#[test]
fn impossible_sizes_are_refused() {
    let set = |change: fn(&mut CacheConfig)| {
        let mut config = cache_config(Some(base()));
        change(&mut config);
        config
    };
    let cases: [(CacheConfig, [&str; 3]); 16] = [
        (set(|c| c.batch = 0), ["batch", "is 0", "at least 1"]),
        (set(|c| c.heads = 0), ["heads", "is 0", "at least 1"]),
        (set(|c| c.kv_heads = 0), ["kv_heads", "is 0", "at least 1"]),
        (set(|c| c.head_dim = 0), ["head_dim", "is 0", "at least 1"]),
        (set(|c| c.kv_heads = 3), ["kv_heads", "is 3", "divisor of heads = 4"]),
        (set(|c| c.options.window = Some(0)), ["window", "is 0", "at least 1"]),
        (set(|c| c.options.scale = f64::NAN), ["scale", "is NaN", "a finite number"]),
        (set(|c| c.options.scale = f64::INFINITY), ["scale", "is inf", "a finite number"]),
        (set(|c| c.options.softcap = Some(0.0)), ["softcap", "is 0", "above 0"]),
        (set(|c| c.options.softcap = Some(-5.0)), ["softcap", "is -5", "above 0"]),
        (set(|c| c.options.softcap = Some(f64::INFINITY)), ["softcap", "is inf", "a finite number"]),
        (set(|c| c.options.alibi = Some(f64::NAN)), ["alibi", "is NaN", "a finite number"]),
        (set(|c| c.options.sink_logits = Some([0.0; HEADS + 1].into())), ["sink_logits", "numbers", "one for each of"]),
        (set(|c| c.options.sink_logits = Some([f32::NAN; HEADS].into())), ["sink_logits", "is NaN", "finite numbers"]),
        (set(|c| c.stored = DType::F64), ["stored", "is F64", "f16, bf16, or the type of queries = F32"]),
        (set(|c| c.stored = DType::I8), ["stored", "is I8", "f16, bf16, or the type of queries = F32"]),
    ];
    for (config, parts) in cases {
        assert_says(&AttentionCache::new(config, &device()).unwrap_err(), &parts);
    }
}

/// A cache with some tokens in it, for settings with or without meta inputs.
fn begun(attention: Option<BlockAttentionConfig>) -> AttentionCache {
    let needs_meta = attention.as_ref().is_some_and(BlockAttentionConfig::needs_meta);
    let mut cache = AttentionCache::new(cache_config(attention), &device()).unwrap();
    let meta = needs_meta.then(|| Meta { query: Some(ones(HEADS, 1)), key: Some(ones(HEADS, 1)) });
    cache.prefill(ones(HEADS, 7), ones(KV_HEADS, 7), ones(KV_HEADS, 7), meta).unwrap();
    cache
}

/// Runs what must fail, and looks at the cache before and after.
fn assert_refuses<T: std::fmt::Debug>(
    cache: &mut AttentionCache,
    parts: &[&str],
    act: impl FnOnce(&mut AttentionCache) -> Result<T, AttentionError>,
) {
    let before = (cache.len(), cache.bytes(), cache.chunk_starts(20), cache.block_ends(20));
    assert_says(&act(cache).unwrap_err(), parts);
    assert_eq!((cache.len(), cache.bytes(), cache.chunk_starts(20), cache.block_ends(20)), before);
}

#[test]
fn wrong_shapes_are_refused_and_change_nothing() {
    let right_rows = [BATCH, KV_HEADS, 3, WIDTH];
    let right_query = [BATCH, HEADS, 3, WIDTH];
    for attention in [None, Some(base())] {
        let mut cache = begun(attention);
        for axis in 0..4 {
            let wrong = |mut shape: [usize; 4]| {
                shape[axis] += 1;
                shape
            };
            let found = format!("shape {:?}", wrong(right_query));
            assert_refuses(&mut cache, &["`query`", &found, "expected [2, 4, 3, 8]"], |cache| {
                cache.prefill(shaped(wrong(right_query)), shaped(right_rows), shaped(right_rows), None)
            });
            let found = format!("shape {:?}", wrong(right_rows));
            assert_refuses(&mut cache, &["`values`", &found, "expected [2, 2, 3, 8]"], |cache| {
                cache.prefill(shaped(right_query), shaped(right_rows), shaped(wrong(right_rows)), None)
            });
            assert_refuses(&mut cache, &["`values`", &found, "expected [2, 2, 3, 8]"], |cache| {
                cache.append(shaped(right_rows), shaped(wrong(right_rows)), None)
            });
            // The number of tokens is that of the keys: another one is the query's fault, or the values'.
            if axis != 2 {
                assert_refuses(&mut cache, &["`keys`", &found, "expected [2, 2, 3, 8]"], |cache| {
                    cache.prefill(shaped(right_query), shaped(wrong(right_rows)), shaped(right_rows), None)
                });
            }
        }
        assert_refuses(&mut cache, &["`key`", "shape [2, 2, 3, 8]", "expected [2, 2, 1, 8]"], |cache| {
            cache.decode(shaped(right_query), shaped(right_rows), shaped(right_rows), None)
        });
    }
}

#[test]
fn no_tokens_are_refused() {
    for attention in [None, Some(base())] {
        let mut cache = begun(attention);
        let parts = ["`keys`", "shape [2, 2, 0, 8]", "at least one token"];
        assert_refuses(&mut cache, &parts, |cache| {
            cache.prefill(ones(HEADS, 0), ones(KV_HEADS, 0), ones(KV_HEADS, 0), None)
        });
        assert_refuses(&mut cache, &parts, |cache| cache.append(ones(KV_HEADS, 0), ones(KV_HEADS, 0), None));
    }
}

/// Tokens 7..9 of [`begun`]: 7 ends a block, 8 begins a chunk.
#[test]
fn meta_inputs_that_do_not_fit_are_refused() {
    let run = |cache: &mut AttentionCache, meta: Option<Meta>| {
        cache.prefill(ones(HEADS, 2), ones(KV_HEADS, 2), ones(KV_HEADS, 2), meta)
    };
    let meta = |query: Option<usize>, key: Option<usize>| {
        Some(Meta { query: query.map(|n| ones(HEADS, n)), key: key.map(|n| ones(HEADS, n)) })
    };
    let mut cache = begun(Some(meta_base()));
    assert_refuses(&mut cache, &["selector = meta", "none were given"], |cache| run(cache, None));
    assert_refuses(&mut cache, &["`meta.query` is missing", "1 token"], |cache| run(cache, meta(None, Some(1))));
    assert_refuses(&mut cache, &["`meta.key` is missing", "1 token"], |cache| run(cache, meta(Some(1), None)));
    let found = ["`meta.query`", "shape [2, 4, 2, 8]", "expected [2, 4, 1, 8]"];
    assert_refuses(&mut cache, &found, |cache| run(cache, meta(Some(2), Some(1))));
    let found = ["`meta.key`", "shape [2, 4, 2, 8]", "expected [2, 4, 1, 8]"];
    assert_refuses(&mut cache, &found, |cache| run(cache, meta(Some(1), Some(2))));
    let heads = Some(Meta { query: Some(ones(KV_HEADS, 1)), key: Some(ones(HEADS, 1)) });
    let found = ["`meta.query`", "shape [2, 2, 1, 8]", "expected [2, 4, 1, 8]"];
    assert_refuses(&mut cache, &found, |cache| run(cache, heads));
    run(&mut cache, meta(Some(1), Some(1))).unwrap();

    for attention in [None, Some(base()), Some(BlockAttentionConfig { retrieval: Retrieval::None, ..meta_base() })] {
        let mut cache = begun(attention);
        let parts = ["meta inputs were given", "takes selector = meta and a retrieval"];
        assert_refuses(&mut cache, &parts, |cache| run(cache, meta(Some(1), Some(1))));
    }
}

#[test]
fn appending_is_refused_where_the_first_query_of_a_chunk_is_read() {
    for retrieval in [Retrieval::State, Retrieval::Additive] {
        let mut cache = begun(Some(BlockAttentionConfig { retrieval, ..base() }));
        assert_refuses(&mut cache, &["first query of a chunk", "use prefill"], |cache| {
            cache.append(ones(KV_HEADS, 2), ones(KV_HEADS, 2), None)
        });
    }
}

#[test]
fn appending_is_refused_until_the_index_is_founded() {
    let founding = 2 * 64;
    let mut cache = begun(Some(base()));
    let rows = |count| ones(KV_HEADS, count);
    for count in [1, founding] {
        let parts = ["first 128 tokens", "only 7", "use prefill"];
        assert_refuses(&mut cache, &parts, |cache| cache.append(rows(count), rows(count), None));
    }
    cache.prefill(ones(HEADS, founding - 7), rows(founding - 7), rows(founding - 7), None).unwrap();
    cache.append(rows(70), rows(70), None).unwrap();
    // Where nothing is ever chosen, nothing is founded.
    let mut config = cache_config(Some(base()));
    config.options.window = Some(65);
    let mut windowed = AttentionCache::new(config, &device()).unwrap();
    windowed.append(rows(300), rows(300), None).unwrap();
}

#[cfg(feature = "flex")]
#[test]
fn numbers_of_another_type_are_refused_and_change_nothing() {
    for attention in [None, Some(base())] {
        let mut cache = begun(attention);
        let wide = |heads: usize| ones(heads, 3).cast(DType::F64);
        let parts = ["`query` holds F64", "expected F32", "cast it"];
        assert_refuses(&mut cache, &parts, |cache| {
            cache.prefill(wide(HEADS), ones(KV_HEADS, 3), ones(KV_HEADS, 3), None)
        });
        assert_refuses(&mut cache, &["`query` holds F16"], |cache| {
            cache.prefill(ones(HEADS, 3).cast(DType::F16), ones(KV_HEADS, 3), ones(KV_HEADS, 3), None)
        });
        let parts = ["`keys` holds F64", "expected F32, F16 or BF16"];
        assert_refuses(&mut cache, &parts, |cache| {
            cache.prefill(ones(HEADS, 3), wide(KV_HEADS), ones(KV_HEADS, 3), None)
        });
        assert_refuses(&mut cache, &["`values` holds F64"], |cache| {
            cache.prefill(ones(HEADS, 3), ones(KV_HEADS, 3), wide(KV_HEADS), None)
        });
    }
    let mut cache = begun(Some(meta_base()));
    let meta = Meta { query: Some(ones(HEADS, 1).cast(DType::F64)), key: Some(ones(HEADS, 1)) };
    assert_refuses(&mut cache, &["`meta.query` holds F64"], |cache| {
        cache.prefill(ones(HEADS, 2), ones(KV_HEADS, 2), ones(KV_HEADS, 2), Some(meta))
    });
}

#[cfg(all(feature = "flex", feature = "ndarray"))]
#[test]
fn tensors_of_another_device_are_refused() {
    let mut cache = begun(None);
    let there = common::cpu_devices().swap_remove(1);
    let keys = Tensor::ones([BATCH, KV_HEADS, 3, WIDTH], &there);
    assert_refuses(&mut cache, &["`keys` is on", "expected"], |cache| {
        cache.prefill(ones(HEADS, 3), keys, ones(KV_HEADS, 3), None)
    });
}

#[test]
fn an_empty_batch_is_refused() {
    let none = |heads: usize| Tensor::<4>::zeros([0, heads, 3, WIDTH], &device());
    let padding = Padding::new(&[]).unwrap();
    let (query, keys, values) = (none(HEADS), none(KV_HEADS), none(KV_HEADS));
    let padded = attend_padded(query, keys, values, &padding, None, AttentionOptions::new(WIDTH));
    assert_says(&padded.unwrap_err(), &["the batch has no rows"]);
    let whole = attend(none(HEADS), none(KV_HEADS), none(KV_HEADS), None, None, AttentionOptions::new(WIDTH));
    assert_says(&whole.unwrap_err(), &["batch", "is 0"]);
}

#[test]
fn bases_that_do_not_fit_are_refused() {
    let basis = |width: usize| Tensor::<3>::ones([KV_HEADS, width, width], &device());
    let calibrated =
        BlockAttentionConfig { retrieval: Retrieval::State, calibrated_states: true, kept_tokens: 2, ..base() };
    let new = |attention: &BlockAttentionConfig| {
        AttentionCache::new(cache_config(Some(attention.clone())), &device()).unwrap()
    };
    let wrong = new(&calibrated).with_state_basis(basis(WIDTH + 1)).unwrap_err();
    assert_says(&wrong, &["`state basis`", "shape [2, 9, 9]", "expected [2, 8, 8]"]);
    let unused = new(&BlockAttentionConfig { calibrated_states: false, ..calibrated.clone() });
    assert_says(&unused.with_state_basis(basis(WIDTH)).unwrap_err(), &["no state uses a basis"]);
    let run = |cache: &mut AttentionCache| cache.prefill(ones(HEADS, 2), ones(KV_HEADS, 2), ones(KV_HEADS, 2), None);
    assert_refuses(&mut new(&calibrated), &["calibrated_states", "none was given"], run);
    let mut right = new(&calibrated).with_state_basis(basis(WIDTH)).unwrap();
    run(&mut right).unwrap();
    assert_says(&right.with_state_basis(basis(WIDTH)).unwrap_err(), &["before the first token"]);
}

#[test]
fn masks_without_sense_are_refused() {
    let uneven = Padding::new(&[vec![true; 3], vec![true; 2]]);
    assert_says(&uneven.unwrap_err(), &["mask row 1", "2 entries", "row 0 has 3"]);
    let empty = Padding::new(&[vec![true; 3], vec![false; 3]]);
    assert_says(&empty.unwrap_err(), &["mask row 1", "no real token"]);
}

#[test]
fn padded_batches_that_do_not_fit_are_refused() {
    let padding = |rows: usize, columns: usize| Padding::new(&vec![vec![true; columns]; rows]).unwrap();
    let run = |query, keys, values, padding: &Padding, attention: Option<&BlockAttentionConfig>| {
        attend_padded(query, keys, values, padding, attention, AttentionOptions::new(WIDTH)).unwrap_err()
    };
    let (query, rows) = (|| ones(HEADS, 3), || ones(KV_HEADS, 3));
    for wrong in [padding(3, 3), padding(2, 4)] {
        let mask = format!("mask is {} x {}", wrong.batch(), wrong.width());
        assert_says(&run(query(), rows(), rows(), &wrong, None), &[&mask, "batch 2 x 3"]);
    }
    let right = padding(2, 3);
    for axis in 0..4 {
        let mut shape = [BATCH, KV_HEADS, 3, WIDTH];
        shape[axis] += 1;
        let found = format!("shape {shape:?}");
        // The number of KV heads is that of the keys.
        let of_keys: [&str; 2] = if axis == 1 { ["`values`", "expected [2, 3, 3, 8]"] } else { ["`keys`", &found] };
        assert_says(&run(query(), shaped(shape), rows(), &right, None), &of_keys);
        assert_says(&run(query(), rows(), shaped(shape), &right, None), &["`values`", &found, "[2, 2, 3, 8]"]);
    }
    assert_says(&run(query(), rows(), rows(), &right, Some(&meta_base())), &["selector = meta"]);
}

#[test]
fn far_positions_that_do_not_fit_are_refused() {
    let fits = FarPositions { trained: 130, frequencies: vec![1.0, 0.1] };
    let with = |attention: Option<BlockAttentionConfig>, alibi: Option<f64>, positions: FarPositions| {
        let options = AttentionOptions { alibi, ..AttentionOptions::new(WIDTH) };
        let config = CacheConfig { options, ..cache_config(attention) };
        AttentionCache::new(config, &device()).unwrap().with_far_positions(positions)
    };
    with(Some(base()), None, fits.clone()).unwrap();
    for (attention, alibi, positions, parts) in [
        (None, None, fits.clone(), &["attention", "full", "blocks or none"][..]),
        (Some(base()), Some(1.0), fits.clone(), &["alibi"]),
        // The local region has 128 tokens.
        (Some(base()), None, FarPositions { trained: 129, ..fits.clone() }, &["chunk_size", "128", "129"]),
        (Some(base()), None, FarPositions { trained: 0, ..fits.clone() }, &["chunk_size", "128", "0"]),
        (Some(base()), None, FarPositions { frequencies: vec![], ..fits.clone() }, &["frequencies", "0", "4"]),
        (Some(base()), None, FarPositions { frequencies: vec![1.0; 5], ..fits.clone() }, &["frequencies", "5", "4"]),
        (Some(base()), None, FarPositions { frequencies: vec![f64::NAN], ..fits.clone() }, &["frequencies", "NaN"]),
        (Some(BlockAttentionConfig { retrieval: Retrieval::State, ..base() }), None, fits, &["retrieval", "state"]),
    ] {
        assert_says(&with(attention, alibi, positions).unwrap_err(), parts);
    }
}
