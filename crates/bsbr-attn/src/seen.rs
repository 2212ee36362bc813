//! What single tokens read, and the probability it holds: to be looked at.
//!
//! The numbers are those of attention itself. It goes through the plain form, whose parts say what their columns stand for, and
//! the softmax over them is written down for the tokens that are watched.

use std::ops::Range;

use burn::tensor::{Int, Tensor};

use crate::{
    AttentionCache, AttentionError, AttentionOptions, Kernel,
    plain::{MASKED, Tile, combine, contiguous_part},
};

/// What one token read.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenReads {
    /// Where the token stands.
    pub position: usize,
    /// One for each query head.
    pub heads: Vec<HeadReads>,
}

/// What one head of a token read: everything that went through its softmax. The probabilities, with that of the sink, add up to 1.
///
/// `retrieval = additive` adds its states outside of the softmax, and `retrieval = state` the centred states to what the blocks hold:
/// neither has a probability of its own.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadReads {
    /// Position and probability of the keys read exactly whatever the text says: sinks, the local region, and everything
    /// where everything is read. In order of position.
    pub near: Vec<(usize, f32)>,
    /// The same of the keys read exactly because they were chosen, or kept.
    pub chosen: Vec<(usize, f32)>,
    /// Runs of tokens that count through statistics, and the probability of each. It stands for the tokens of the run that are not
    /// read exactly: a run of which every token is has none.
    pub runs: Vec<(Range<usize>, f32)>,
    /// Probability of the [sink](AttentionOptions::sink_logits) of the head, of which nothing is read; 0 where there is none.
    pub sink: f32,
}

/// What the columns of a part stand for.
#[derive(Debug)]
pub(crate) enum Columns {
    /// The sink of each head.
    Sink,
    /// Keys at these positions, read whatever the text says.
    Near(Range<usize>),
    /// Keys at these positions; those not chosen are masked.
    Chosen(Range<usize>),
    /// The tokens of chosen blocks, `[batch, kv_heads, 1, count]`, of so many tokens each.
    Blocks(Tensor<4, Int>, usize),
    /// Keys at positions of each KV head, `[batch, kv_heads, columns]`.
    Kept(Tensor<3, Int>),
    /// Statistics of runs of tokens.
    Runs(Vec<Range<usize>>),
    /// Statistics that hold together whatever of these positions is not read exactly.
    Rest(Range<usize>),
}

/// Tokens that are watched, and what was seen of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    /// In order.
    positions: Vec<usize>,
    seen: Vec<TokenReads>,
}

impl Watch {
    fn new(positions: &[usize]) -> Self {
        let mut positions = positions.to_vec();
        positions.sort_unstable();
        positions.dedup();
        Self { positions, seen: Vec::new() }
    }

    /// Takes note of the tokens of a tile. `logits` and `weights` are `[1, kv_heads, group, tokens, columns]`, the columns of all
    /// parts one behind the other.
    pub(crate) fn see(&mut self, start: usize, columns: &[Columns], logits: &Tensor<5>, weights: &Tensor<5>) {
        let [_, kv_heads, group, tokens, count] = logits.dims();
        let of_tile =
            self.positions.partition_point(|&at| at < start)..self.positions.partition_point(|&at| at < start + tokens);
        if of_tile.is_empty() {
            return;
        }
        let columns: Vec<Numbered> = columns.iter().map(Numbered::new).collect();
        for &position in &self.positions[of_tile] {
            let row = |of: &Tensor<5>| host(of.clone().narrow(3, position - start, 1));
            let (logits, weights) = (row(logits), row(weights));
            let heads = (0..kv_heads * group).map(|head| {
                let of = head * count..(head + 1) * count;
                read(&columns, head / group, &logits[of.clone()], &weights[of])
            });
            self.seen.push(TokenReads { position, heads: heads.collect() });
        }
    }
}

fn host(rows: Tensor<5>) -> Vec<f32> {
    rows.detach().try_into_vec_as::<f32>().unwrap_or_else(|error| unreachable!("floats can be read as f32: {error}"))
}

/// [`Columns`] on the host.
enum Numbered<'a> {
    Sink,
    Keys {
        chosen: bool,
        positions: Range<usize>,
    },
    /// Positions by KV head, `columns` of each.
    ByHead {
        columns: usize,
        positions: Vec<usize>,
    },
    Runs(&'a [Range<usize>]),
    Rest(&'a Range<usize>),
}

impl<'a> Numbered<'a> {
    fn new(columns: &'a Columns) -> Self {
        let whole = |numbers: Vec<i64>| numbers.into_iter().map(|number| number as usize).collect::<Vec<_>>();
        let numbers = |tensor: Tensor<1, Int>| {
            let numbers = tensor.try_into_vec_as::<i64>();
            whole(numbers.unwrap_or_else(|error| unreachable!("positions are integers: {error}")))
        };
        match columns {
            Columns::Sink => Self::Sink,
            Columns::Near(positions) => Self::Keys { chosen: false, positions: positions.clone() },
            Columns::Chosen(positions) => Self::Keys { chosen: true, positions: positions.clone() },
            Columns::Blocks(choice, block) => {
                let [_, _, _, count] = choice.dims();
                let blocks = numbers(choice.clone().flatten(0, 3));
                let positions = blocks.into_iter().flat_map(|number| number * block..(number + 1) * block).collect();
                Self::ByHead { columns: count * block, positions }
            }
            Columns::Kept(positions) => {
                let [_, _, columns] = positions.dims();
                Self::ByHead { columns, positions: numbers(positions.clone().flatten(0, 2)) }
            }
            Columns::Runs(runs) => Self::Runs(runs),
            Columns::Rest(positions) => Self::Rest(positions),
        }
    }
}

/// One head's row of numbers as what it stands for.
fn read(columns: &[Numbered<'_>], kv_head: usize, logits: &[f32], weights: &[f32]) -> HeadReads {
    let shown = |at: usize| f64::from(logits[at]) > MASKED / 2.0;
    let (mut found, mut at) = (HeadReads::default(), 0);
    let mut rest: Option<(Range<usize>, f32)> = None;
    for part in columns {
        match part {
            Numbered::Sink => {
                found.sink = weights[at];
                at += 1;
            }
            Numbered::Keys { chosen, positions } => {
                let into = if *chosen { &mut found.chosen } else { &mut found.near };
                let keys = positions.clone().enumerate().filter(|(column, _)| shown(at + column));
                into.extend(keys.map(|(column, position)| (position, weights[at + column])));
                at += positions.len();
            }
            Numbered::ByHead { columns, positions } => {
                let own = &positions[kv_head * columns..(kv_head + 1) * columns];
                let keys = own.iter().enumerate().filter(|(column, _)| shown(at + column));
                found.chosen.extend(keys.map(|(column, &position)| (position, weights[at + column])));
                at += columns;
            }
            Numbered::Runs(runs) => {
                let held = runs.iter().enumerate().filter(|(column, run)| shown(at + column) && !run.is_empty());
                found.runs.extend(held.map(|(column, run)| (run.clone(), weights[at + column])));
                at += runs.len();
            }
            // The last part: as many columns as are left.
            Numbered::Rest(positions) => rest = Some(((*positions).clone(), weights[at..].iter().sum())),
        }
    }
    found.runs.extend(rest);
    found.near.sort_unstable_by_key(|key| key.0);
    found.chosen.sort_unstable_by_key(|key| key.0);
    found
}

impl AttentionCache {
    /// The empty cache, which will write down what the tokens at `positions` read: see [`AttentionCache::seen`].
    ///
    /// # Errors
    ///
    /// [`AttentionError::Config`] unless the cache is of one sequence and computes in plain tensor operations, for fused kernels
    /// have no list of what they read; [`AttentionError::Input`] if it holds tokens already.
    pub fn watching(self, positions: &[usize]) -> Result<Self, AttentionError> {
        let fail = |setting, value: String, expected: &str| {
            Err(AttentionError::Config { setting, value, expected: expected.to_owned() })
        };
        let config = self.config();
        if config.kernel != Kernel::Plain {
            let expected = "Plain where tokens are watched: fused kernels have no list of what they read";
            return fail("kernel", format!("{:?}", config.kernel), expected);
        }
        if config.batch != 1 {
            return fail("batch", config.batch.to_string(), "1 where tokens are watched");
        }
        if !self.is_empty() {
            let problem = format!("{} tokens are in already: watch tokens from the first on", self.len());
            return Err(AttentionError::Input(problem));
        }
        Ok(self.with_watch(Watch::new(positions)))
    }

    /// What the [watched](AttentionCache::watching) tokens that came so far have read, in order of position.
    pub fn seen(&self) -> &[TokenReads] {
        self.watch().map_or(&[], |watch| &watch.seen)
    }
}

/// What the tokens at `positions`, ascending, read under full causal attention, whatever their layer does: every key they see is
/// `near`. `query` is `[1, heads, tokens, head_dim]`, `keys` `[1, kv_heads, tokens, head_dim]`. The scores of one token exist at a time.
///
/// # Errors
///
/// [`AttentionError::Shape`] if the tensors do not fit each other, [`AttentionError::Config`] if sinks do not fit the heads,
/// [`AttentionError::Input`] for a position that is none of theirs.
pub fn full_reads(
    query: &Tensor<4>,
    keys: &Tensor<4>,
    positions: &[usize],
    options: &AttentionOptions,
) -> Result<Vec<TokenReads>, AttentionError> {
    let [batch, heads, tokens, width] = query.dims();
    let kv_heads = keys.dims()[1];
    if batch != 1 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || keys.dims() != [1, kv_heads, tokens, width] {
        let expected =
            format!("[1, a divisor of {heads}, {tokens}, {width}] beside queries of shape {:?}", query.dims());
        return Err(AttentionError::Shape { tensor: "keys", expected, found: keys.dims().to_vec() });
    }
    options.check_sinks(heads)?;
    let mut watch = Watch::new(positions);
    if let Some(&last) = watch.positions.last()
        && last >= tokens
    {
        return Err(AttentionError::Input(format!("the token at {last} was asked for, the text has {tokens}")));
    }
    for position in watch.positions.clone() {
        let tile = Tile::new(query.clone().narrow(2, position, 1), kv_heads, position);
        let seen = options.first_visible(position)..position + 1;
        let keys = keys.clone().narrow(2, seen.start, seen.len());
        let part = contiguous_part(&tile, keys.clone(), keys, seen, options);
        combine(vec![part], None, options, (position, Some(&mut watch)));
    }
    Ok(watch.seen)
}
