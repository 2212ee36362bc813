//! Attention over the keys near a token and the keys it retrieves.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    CausalOptions,
    block_tile::{BlockTile, Head, NearHead, Scratch},
    tasks,
    tile::{QueryTile, load_queries},
};
use crate::{
    heads::Heads,
    index::{KeyIndex, SECTION},
    level,
    stored::{Stored, StoredRows},
    team::share_with,
};

/// Numbers of the block scores of a tile: where there are many blocks a tile has fewer queries.
const SCORES: usize = 1 << 18;
/// Rows of queries in a tile that reads everything, as many as dense attention has.
const ALL_ROWS: usize = 128;
/// Rows of queries in a tile that chooses keys among few blocks: fewer, so that it masks less of the local region.
const ROWS: usize = 64;
/// The fewest rows that are worth a matrix product.
const FEWEST_ROWS: usize = 32;

/// What is read how, in tokens counted from the first of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockOptions {
    /// Tokens of a chunk: a token reads its own up to itself.
    pub chunk_size: usize,
    /// Chunks before it that it reads exactly.
    pub local_chunks: usize,
    /// First tokens of the sequence that it reads exactly.
    pub sink_tokens: usize,
    /// Keys it retrieves; `None` reads nothing else.
    pub index: Option<IndexOptions>,
}

/// Retrieval of keys by an index of them.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexOptions {
    /// Chunks of which every token sees at most so many tokens, up to the last of the chunk, read everything.
    pub exact_tokens: usize,
    /// Logarithm of the estimated probability from which on a key is read.
    pub log_threshold: f32,
    /// Most keys a token reads, per KV head: where more pass, its threshold is doubled until they do not.
    pub max_keys: usize,
    /// What lies further than this before the local region is scored by sections first.
    pub fine_tokens: usize,
    /// Most of those sections of which a token scores the keys, per KV head.
    pub max_sections: usize,
    /// Whether what is not read counts by mean keys and mean values in the same softmax.
    pub far: bool,
    /// What is added to the log-mass of that; it changes no choice.
    pub far_shift: f32,
}

/// What the tokens of a call retrieved, summed over batch entries and KV heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retrieved {
    /// Tokens that chose.
    pub tokens: u64,
    /// Keys they read by choice.
    pub keys: u64,
    /// Tokens for which more keys passed than they may read.
    pub capped: u64,
}

impl std::ops::AddAssign for Retrieved {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.keys += other.keys;
        self.capped += other.capped;
    }
}

impl BlockOptions {
    /// The first token of the local region of the chunk `chunk`.
    pub(super) fn local_start(&self, chunk: usize) -> usize {
        chunk.saturating_sub(self.local_chunks) * self.chunk_size
    }
}

/// Keys and values of the first tokens, `[batch, kv_heads, sinks, head_dim]`, where the rows no longer hold them.
#[derive(Debug, Clone, Copy)]
pub struct Sinks<'a> {
    /// Keys.
    pub keys: Stored<'a>,
    /// Values.
    pub values: Stored<'a>,
}

/// Queries and keys of the local region where they stand at other positions than for the rest.
#[derive(Debug, Clone, Copy)]
pub struct Near<'a> {
    /// Like the query of the call.
    pub query: Heads<'a>,
    /// `[batch, kv_heads, rows, head_dim]`, at least those of the local regions of all queries; the last row belongs to the
    /// last query.
    pub keys: Heads<'a>,
    /// Position of the first row of the keys.
    pub first: usize,
}

/// Rows that a call reads.
#[derive(Debug, Clone, Copy)]
pub struct BlockInput<'a> {
    /// `[batch, heads, tokens, head_dim]`; query head `h` reads the KV head `h / (heads / kv_heads)`.
    pub query: Heads<'a>,
    /// `[batch, kv_heads, rows, head_dim]`; the last row belongs to the last query.
    pub keys: Stored<'a>,
    /// Like the keys.
    pub values: Stored<'a>,
    /// Position of the first row of keys and values.
    pub first: usize,
    /// The first tokens where `first` lies behind them.
    pub sinks: Option<Sinks<'a>>,
    /// The index of the keys, from the first token on: at least of the sections before the local region of the last query,
    /// where any are retrieved.
    pub index: Option<&'a KeyIndex>,
    /// What reads the local region in place of `query` and `keys`, which are for the rest then.
    pub near: Option<Near<'a>>,
}

/// Attention over sinks, the local region, the keys that pass the threshold, and the means of the rest, in one softmax.
/// Returns `[batch, heads, tokens, head_dim]`, for each row the logarithm of the softmax's denominator, `[batch, heads, tokens]`,
/// and what was retrieved.
///
/// The score of a key is estimated by the [index](KeyIndex), what a token reads in all by its exact keys and the mean keys of
/// all blocks: a key is read where the score passes the logarithm of that sum by `log_threshold`, for any of the heads that
/// share its KV head. What is left of a block counts as so many keys of its mean, with the mean value of its section. Sections
/// far back count by their own mean, unless the bound on the score of their keys, mean and half a radius, passes too.
///
/// No more than one tile of queries has scores at a time.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn block_attention(
    input: &BlockInput<'_>,
    settings: &BlockOptions,
    options: &CausalOptions,
) -> (Vec<f32>, Vec<f32>, Retrieved) {
    let [batch, heads, tokens, width] = input.query.dims();
    let mut output = vec![0.0; batch * heads * tokens * width];
    let mut log_mass = vec![0.0; batch * heads * tokens];
    let retrieved = block_attention_into(input, settings, options, &mut output, &mut log_mass);
    (output, log_mass, retrieved)
}

/// [`block_attention`] into memory that is there: `[batch, heads, tokens, head_dim]` and `[batch, heads, tokens]`.
///
/// # Panics
///
/// If the shapes do not fit.
pub fn block_attention_into(
    input: &BlockInput<'_>,
    settings: &BlockOptions,
    options: &CausalOptions,
    output: &mut [f32],
    log_mass: &mut [f32],
) -> Retrieved {
    let [batch, heads, tokens, width] = input.query.dims();
    let [_, kv_heads, rows, _] = input.keys.dims();
    assert_eq!(input.keys.dims(), [batch, kv_heads, rows, width]);
    assert_eq!(input.values.dims(), input.keys.dims());
    assert!(heads.is_multiple_of(kv_heads) && tokens <= rows);
    if let Some(index) = &settings.index {
        assert!(settings.chunk_size.is_multiple_of(SECTION), "chunks are whole sections");
        assert_eq!(input.first, 0, "keys are retrieved from rows that begin with the first token");
        let last = (rows.max(1) - 1) / settings.chunk_size;
        let needed = settings.candidates(last, index, options).map_or(0, |candidates| candidates.all_sections().end);
        let there = input.index.map_or(0, KeyIndex::sections);
        assert!(there >= needed, "an index of {needed} sections is needed, not of {there}");
        assert!(input.index.is_none_or(|index| index.dims() == [batch, kv_heads, width]));
    }
    let group = heads / kv_heads;
    if let Some(near) = &input.near {
        let [near_batch, near_heads, near_rows, near_width] = near.keys.dims();
        assert_eq!(near.query.dims(), input.query.dims());
        assert_eq!([near_batch, near_heads, near_width], [batch, kv_heads, width]);
        assert_eq!(near.first + near_rows, input.first + rows);
    }
    let begin = input.first + rows - tokens;
    assert_eq!(output.len(), batch * heads * tokens * width);
    assert_eq!(log_mass.len(), batch * heads * tokens);
    let next = |from: usize| {
        let chunk = (begin + from) / settings.chunk_size;
        let candidates = settings.index.as_ref().and_then(|index| settings.candidates(chunk, index, options));
        let rows = candidates.map_or(ALL_ROWS, |candidates| {
            let scored = candidates.blocks.len() + candidates.sections.len();
            (SCORES / scored.max(1_usize)).clamp(FEWEST_ROWS, ROWS)
        });
        // A tile lies within one chunk.
        (from + (rows / group).max(1)).min((chunk + 1) * settings.chunk_size - begin)
    };
    let tasks = tasks::split(output, log_mass, group, tokens, width, next);
    let sums = [const { AtomicU64::new(0) }; 3];
    share_with(tasks, Scratch::default, |scratch, mut task| {
        let (batch, kv_head) = (task.pair / kv_heads, task.pair % kv_heads);
        let group_heads = kv_head * group..(kv_head + 1) * group;
        let mut queries = std::mem::take(&mut scratch.query);
        load_queries(&input.query, batch, group_heads.clone(), task.tokens.clone(), options.scale, &mut queries);
        let mut near_queries = std::mem::take(&mut scratch.near_query);
        if let Some(near) = &input.near {
            let (heads, tokens) = (group_heads.clone(), task.tokens.clone());
            load_queries(&near.query, batch, heads, tokens, options.scale, &mut near_queries);
        }
        let tile = QueryTile {
            rows: &queries,
            group,
            tokens: task.tokens.len(),
            start: begin + task.tokens.start,
            slopes: options.slopes.as_ref().map(|slopes| &slopes[group_heads.clone()]),
            sink_logits: options.sink_logits.as_ref().map(|sinks| &sinks[group_heads]),
        };
        let head = Head {
            keys: input.keys.head(batch, kv_head),
            values: input.values.head(batch, kv_head),
            first: input.first,
            sinks: input.sinks.map(|sinks| (sinks.keys.head(batch, kv_head), sinks.values.head(batch, kv_head))),
            index: input.index.map(|index| index.head(batch, kv_head)),
            near: input.near.map(|near| NearHead {
                tile: QueryTile { rows: &near_queries, ..tile },
                keys: StoredRows::F32(near.keys.head(batch, kv_head)),
                first: near.first,
            }),
        };
        let retrieved = level::arch().dispatch(BlockTile {
            tile: &tile,
            head: &head,
            settings,
            options,
            scratch,
            outputs: &mut task.outputs,
        });
        for (sum, count) in sums.iter().zip([retrieved.tokens, retrieved.keys, retrieved.capped]) {
            sum.fetch_add(count, Ordering::Relaxed);
        }
        scratch.query = queries;
        scratch.near_query = near_queries;
    });
    let [tokens, keys, capped] = sums.map(AtomicU64::into_inner);
    Retrieved { tokens, keys, capped }
}
