//! Attention over the keys near a token and the blocks it retrieves.

use rayon::prelude::*;

use super::{
    CausalOptions,
    block_tile::{BlockTile, Head, NearHead, Scratch},
    candidates::{Level, Means},
    tasks,
    tile::{QueryTile, load_queries},
};
use crate::{
    heads::Heads,
    level,
    stored::{Stored, StoredRows},
};

/// Numbers of the block scores of a tile: where there are many blocks a tile has fewer queries.
const SCORES: usize = 1 << 18;
/// Rows of queries in a tile where there are few blocks.
const ROWS: usize = 128;
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
    /// Blocks it retrieves; `None` reads nothing else.
    pub blocks: Option<Blocks>,
}

/// Retrieval of blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// Tokens of a block; divides the chunk size.
    pub size: usize,
    /// Blocks each token reads exactly, per KV head.
    pub top_k: usize,
    /// Tokens of chunks that end within the first `exact_tokens` read everything before them.
    pub exact_tokens: usize,
    /// Longer runs that are scored in place of blocks further back, the shorter and nearer first.
    pub coarse: Vec<Coarse>,
    /// What a token expects beyond the mean key of a block, as a share of the most that any key of it could score: see
    /// [`block_attention`].
    pub reach: f32,
    /// Whether the other blocks count by their mean key and mean value in the same softmax.
    pub far: bool,
    /// What is added to the log-mass of those; no score for the choice changes.
    pub far_shift: f32,
}

/// Runs of blocks that are scored as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coarse {
    /// Tokens of a run; a multiple of those of a shorter one.
    pub size: usize,
    /// What lies further than this before the local region is scored by these runs; not nearer than for shorter ones.
    pub beyond: usize,
    /// Of these runs, those of which each token scores the parts, per KV head.
    pub opened: usize,
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

/// What stands for runs of tokens.
#[derive(Debug, Clone, Copy)]
pub struct RunMeans<'a> {
    /// Mean keys, `[batch, kv_heads, runs, head_dim]`. (See [`block_means`](super::block_means).)
    pub keys: Heads<'a>,
    /// Mean values, likewise.
    pub values: Heads<'a>,
    /// Radii of the keys, where there is a `reach`. (See [`block_radii`](super::block_radii).)
    pub radii: Option<Heads<'a>>,
}

impl<'a> RunMeans<'a> {
    pub(super) fn head(&self, batch: usize, head: usize) -> Means<'a> {
        let of = |rows: &Heads<'a>| rows.head(batch, head);
        Means { keys: of(&self.keys), values: of(&self.values), radii: self.radii.as_ref().map(of) }
    }
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
    /// Means of the blocks and of each kind of longer runs, from the first token on: at least those that a query scores.
    /// Empty where none does.
    pub means: &'a [RunMeans<'a>],
    /// What reads the local region in place of `query` and `keys`, which are for the rest then.
    pub near: Option<Near<'a>>,
}

/// Attention over sinks, the local region, the `top_k` blocks of the highest score, and the means of the others, in one
/// softmax. Returns `[batch, heads, tokens, head_dim]`, and for each row the logarithm of the softmax's denominator,
/// `[batch, heads, tokens]`.
///
/// The mass of a block of `n` tokens is estimated by its mean key: `log n + scale q . mu`. Its score adds what its keys may
/// hold beyond their mean, `reach scale sum_c |q_c| r_c` with the radii `r`: with a reach of 1 that bounds the score of every
/// key. Heads that share a KV head share a choice: a block counts by the highest of its scores, each relative to the log-mass
/// of what the head reads exactly.
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
) -> (Vec<f32>, Vec<f32>) {
    let [batch, heads, tokens, width] = input.query.dims();
    let mut output = vec![0.0; batch * heads * tokens * width];
    let mut log_mass = vec![0.0; batch * heads * tokens];
    block_attention_into(input, settings, options, &mut output, &mut log_mass);
    (output, log_mass)
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
) {
    let [batch, heads, tokens, width] = input.query.dims();
    let [_, kv_heads, rows, _] = input.keys.dims();
    assert_eq!(input.keys.dims(), [batch, kv_heads, rows, width]);
    assert_eq!(input.values.dims(), input.keys.dims());
    assert!(heads.is_multiple_of(kv_heads) && tokens <= rows);
    if let Some(blocks) = &settings.blocks {
        let sizes = std::iter::once(blocks.size).chain(blocks.coarse.iter().map(|coarse| coarse.size));
        assert!(sizes.clone().zip(sizes.skip(1)).all(|(short, long)| long > 0 && long.is_multiple_of(short)));
    }
    assert!(settings.blocks.is_none() || input.first == 0, "blocks are read from rows that begin with the first token");
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
        let candidates = settings.blocks.as_ref().and_then(|blocks| settings.candidates(chunk, blocks, options));
        let scored = candidates.map_or(0, |levels| levels.iter().map(Level::columns).sum());
        let rows = (SCORES / scored.max(1_usize)).clamp(FEWEST_ROWS, ROWS);
        // A tile lies within one chunk.
        (from + (rows / group).max(1)).min((chunk + 1) * settings.chunk_size - begin)
    };
    let tasks = tasks::split(output, log_mass, group, tokens, width, next);
    tasks.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |scratch, mut task| {
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
            slopes: options.slopes.as_ref().map(|slopes| &slopes[group_heads]),
        };
        let head = Head {
            keys: input.keys.head(batch, kv_head),
            values: input.values.head(batch, kv_head),
            first: input.first,
            sinks: input.sinks.map(|sinks| (sinks.keys.head(batch, kv_head), sinks.values.head(batch, kv_head))),
            means: input.means.iter().map(|means| means.head(batch, kv_head)).collect(),
            near: input.near.map(|near| NearHead {
                tile: QueryTile { rows: &near_queries, ..tile },
                keys: StoredRows::F32(near.keys.head(batch, kv_head)),
                first: near.first,
            }),
        };
        level::arch().dispatch(BlockTile {
            tile: &tile,
            head: &head,
            settings,
            options,
            scratch,
            outputs: &mut task.outputs,
        });
        scratch.query = queries;
        scratch.near_query = near_queries;
    });
}
