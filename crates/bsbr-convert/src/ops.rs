//! Ops with their sizes: shapes through them, backwards and forwards, and the moves of numbers they amount to.

use std::fmt;

use bsbr_model::DecoderConfig;

use crate::rules::{Dim, Op};
use crate::tensors::{Block, Pattern};

/// An [`Op`] with numbers in place of expressions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SizedOp {
    Transpose,
    Unstack { count: usize },
    Split { groups: usize, parts: Vec<usize> },
    RopePermute { heads: usize, head_dim: usize, rotary: usize },
    SwapHalves { heads: usize, head_dim: usize },
    Each(Vec<Vec<SizedOp>>),
    Stack { count: usize },
}

impl fmt::Display for SizedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transpose => f.write_str("transpose"),
            Self::Unstack { count } => write!(f, "unstack {count}"),
            Self::Split { groups, parts } => write!(f, "split {groups} x {parts:?}"),
            Self::RopePermute { heads, head_dim, rotary } => {
                write!(f, "rope-permute {heads} x {head_dim} (first {rotary})")
            }
            Self::SwapHalves { heads, head_dim } => write!(f, "swap-halves {heads} x {head_dim}"),
            Self::Each(lists) => {
                let lists = lists.iter().map(|ops| ops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
                write!(f, "each [{}]", lists.collect::<Vec<_>>().join(" | "))
            }
            Self::Stack { count } => write!(f, "stack {count}"),
        }
    }
}

/// Fills in the sizes.
///
/// # Errors
///
/// A text naming the expression that has no value for this decoder.
pub(crate) fn resolve(ops: &[Op], decoder: &DecoderConfig) -> Result<Vec<SizedOp>, String> {
    let size = |dim: &Dim| dim.resolve(decoder).ok_or_else(|| format!("`{dim}` is not a whole number here"));
    ops.iter()
        .map(|op| {
            Ok(match op {
                Op::Transpose => SizedOp::Transpose,
                Op::Unstack { count } => SizedOp::Unstack { count: size(count)? },
                Op::Split { groups, parts } => SizedOp::Split {
                    groups: size(groups)?,
                    parts: parts.iter().map(size).collect::<Result<_, String>>()?,
                },
                Op::RopePermute { heads, head_dim, rotary } => {
                    SizedOp::RopePermute { heads: size(heads)?, head_dim: size(head_dim)?, rotary: size(rotary)? }
                }
                Op::SwapHalves { heads, head_dim } => {
                    SizedOp::SwapHalves { heads: size(heads)?, head_dim: size(head_dim)? }
                }
                Op::Each(lists) => {
                    SizedOp::Each(lists.iter().map(|ops| resolve(ops, decoder)).collect::<Result<_, String>>()?)
                }
                Op::Stack { count } => SizedOp::Stack { count: size(count)? },
            })
        })
        .collect()
}

/// Shapes of the sources whose numbers give targets of these shapes.
///
/// # Errors
///
/// A text saying which target an op cannot give.
pub(crate) fn source_shapes(ops: &[SizedOp], targets: &[Vec<usize>]) -> Result<Vec<Vec<usize>>, String> {
    let mut shapes = targets.to_vec();
    for op in ops.iter().rev() {
        shapes = match (op, shapes.as_slice()) {
            (SizedOp::Transpose, shapes) => shapes
                .iter()
                .map(|shape| match shape[..] {
                    [a, b] => Ok(vec![b, a]),
                    [n, a, b] => Ok(vec![n, b, a]),
                    _ => Err(format!("has shape {shape:?}, `transpose` gives two axes, or a stack of them")),
                })
                .collect::<Result<_, String>>()?,
            (SizedOp::Unstack { count }, [first, others @ ..]) if 1 + others.len() == *count => {
                if let Some(other) = others.iter().find(|other| *other != first) {
                    return Err(format!("has shape {other:?}, `{op}` gives {count} times {first:?}"));
                }
                vec![[&[*count], &first[..]].concat()]
            }
            (SizedOp::Split { groups, parts }, shapes)
                if !parts.is_empty() && !shapes.is_empty() && shapes.len() % parts.len() == 0 =>
            {
                let whole = |shapes: &[Vec<usize>]| {
                    for (part, shape) in parts.iter().zip(shapes) {
                        if shape.first() != Some(&(groups * part)) || shape[1..] != shapes[0][1..] {
                            let rows = groups * part;
                            return Err(format!("has shape {shape:?}, `{op}` gives {rows} rows of equal width"));
                        }
                    }
                    let mut shape = shapes[0].clone();
                    shape[0] = groups * parts.iter().sum::<usize>();
                    Ok(shape)
                };
                shapes.chunks(parts.len()).map(whole).collect::<Result<_, String>>()?
            }
            (SizedOp::RopePermute { heads, head_dim, rotary }, [shape])
                if shape.first() == Some(&(heads * head_dim)) && rotary <= head_dim && rotary % 2 == 0 =>
            {
                vec![shape.clone()]
            }
            (SizedOp::SwapHalves { heads, head_dim }, [shape])
                if shape.first() == Some(&(heads * head_dim)) && head_dim % 2 == 0 =>
            {
                vec![shape.clone()]
            }
            (SizedOp::Each(lists), shapes) if shapes.len() == lists.len() => {
                let of = |(ops, shape): (&Vec<SizedOp>, &Vec<usize>)| {
                    let mut shapes = source_shapes(ops, std::slice::from_ref(shape))?;
                    shapes
                        .pop()
                        .filter(|_| shapes.is_empty())
                        .ok_or_else(|| format!("`{op}` takes one tensor for each"))
                };
                lists.iter().zip(shapes).map(of).collect::<Result<_, String>>()?
            }
            (SizedOp::Stack { count }, [shape]) if shape.first() == Some(count) => vec![shape[1..].to_vec(); *count],
            (op, shapes) => return Err(format!("has shape {shapes:?}, which `{op}` cannot give")),
        };
    }
    Ok(shapes)
}

/// For each target, where its numbers come from.
///
/// # Errors
///
/// A text naming the op that does not fit the shapes. After [`source_shapes`] gave the same shapes there is none.
pub(crate) fn blocks(ops: &[SizedOp], sources: &[Vec<usize>]) -> Result<Vec<Vec<Block>>, String> {
    let transposed = ops.first() == Some(&SizedOp::Transpose);
    let mut tensors: Vec<Moved> = sources.iter().enumerate().map(|(n, shape)| Moved::whole(n, shape)).collect();
    for op in ops {
        tensors = apply(op, tensors)?;
    }
    tensors.iter().map(|tensor| tensor.lower(transposed.then_some(sources))).collect()
}

/// Numbers `start..start + len` of source `source`, counted after its transposition if there is one.
#[derive(Debug, Clone, Copy)]
struct Run {
    source: usize,
    start: usize,
    len: usize,
}

/// A tensor between two ops: a shape, and where its numbers come from in order.
#[derive(Debug, Clone)]
struct Moved {
    shape: Vec<usize>,
    runs: Vec<Run>,
}

impl Moved {
    fn whole(source: usize, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), runs: vec![Run { source, start: 0, len: shape.iter().product() }] }
    }

    /// The rows `rows` (start and count) of axis 0, in that order.
    fn select(&self, rows: impl Iterator<Item = (usize, usize)>) -> Self {
        let width: usize = self.shape[1..].iter().product();
        let mut runs: Vec<Run> = Vec::new();
        let mut count = 0;
        for (row, height) in rows {
            count += height;
            let (mut skip, mut take) = (row * width, height * width);
            for run in &self.runs {
                let from = skip.min(run.len);
                let len = take.min(run.len - from);
                skip -= from;
                take -= len;
                push(&mut runs, Run { source: run.source, start: run.start + from, len });
            }
        }
        let mut shape = self.shape.clone();
        shape[0] = count;
        Self { shape, runs }
    }

    fn lower(&self, transposed: Option<&[Vec<usize>]>) -> Result<Vec<Block>, String> {
        let mut to = 0;
        self.runs
            .iter()
            .map(|&Run { source, start, len }| {
                let block = match transposed.map(|sources| &sources[source][..]) {
                    None => Block { source, from: start, to, copy: Pattern::Run { len } },
                    Some(&[height, width] | &[_, height, width]) => {
                        // Height is the width of a row after the transposition: runs are whole rows, of one matrix.
                        let matrix = (height * width).max(1);
                        let (first, start) = (start / matrix * matrix, start % matrix);
                        if height == 0 || start % height != 0 || len % height != 0 || start + len > matrix {
                            return Err("moves parts of transposed rows, or rows of several matrices".into());
                        }
                        let copy = Pattern::Transpose {
                            rows: len / height,
                            cols: height,
                            from_stride: width,
                            to_stride: height,
                        };
                        Block { source, from: first + start / height, to, copy }
                    }
                    Some(shape) => return Err(format!("cannot transpose {shape:?}")),
                };
                to += len;
                Ok(block)
            })
            .collect()
    }
}

fn push(runs: &mut Vec<Run>, run: Run) {
    if run.len == 0 {
        return;
    }
    if let Some(last) = runs.last_mut()
        && last.source == run.source
        && last.start + last.len == run.start
    {
        last.len += run.len;
    } else {
        runs.push(run);
    }
}

fn apply(op: &SizedOp, tensors: Vec<Moved>) -> Result<Vec<Moved>, String> {
    let misfit = |tensor: &Moved| format!("`{op}` does not fit shape {:?}", tensor.shape);
    match (op, &tensors[..]) {
        (SizedOp::Transpose, _) => tensors
            .into_iter()
            .map(|tensor| match tensor.shape[..] {
                [a, b] => Ok(Moved { shape: vec![b, a], runs: tensor.runs }),
                [n, a, b] => Ok(Moved { shape: vec![n, b, a], runs: tensor.runs }),
                _ => Err(misfit(&tensor)),
            })
            .collect(),
        (SizedOp::Unstack { count }, [tensor]) => {
            if tensor.shape.first() != Some(count) {
                return Err(misfit(tensor));
            }
            let one = |entry| {
                let Moved { shape, runs } = tensor.select(std::iter::once((entry, 1)));
                Moved { shape: shape[1..].to_vec(), runs }
            };
            Ok((0..*count).map(one).collect())
        }
        (SizedOp::Split { groups, parts }, tensors) => {
            let group: usize = parts.iter().sum();
            if let Some(tensor) = tensors.iter().find(|tensor| tensor.shape.first() != Some(&(groups * group))) {
                return Err(misfit(tensor));
            }
            let split = |tensor: &Moved| {
                let mut offset = 0;
                let part = |&part: &usize| {
                    let rows = (0..*groups).map(|g| (g * group + offset, part));
                    let selected = tensor.select(rows);
                    offset += part;
                    selected
                };
                parts.iter().map(part).collect::<Vec<_>>()
            };
            Ok(tensors.iter().flat_map(split).collect())
        }
        (SizedOp::RopePermute { heads, head_dim, rotary }, [tensor]) => {
            if tensor.shape.first() != Some(&(heads * head_dim)) || rotary > head_dim || rotary % 2 != 0 {
                return Err(misfit(tensor));
            }
            let rows = (0..*heads).flat_map(|head| {
                let first = head * head_dim;
                let pairs = (0..2).flat_map(move |half| (0..rotary / 2).map(move |n| (first + 2 * n + half, 1)));
                pairs.chain(std::iter::once((first + rotary, head_dim - rotary)))
            });
            Ok(vec![tensor.select(rows)])
        }
        (SizedOp::SwapHalves { heads, head_dim }, [tensor]) => {
            if tensor.shape.first() != Some(&(heads * head_dim)) || head_dim % 2 != 0 {
                return Err(misfit(tensor));
            }
            let half = head_dim / 2;
            Ok(vec![tensor.select((0..2 * heads).map(|n| ((n ^ 1) * half, half)))])
        }
        (SizedOp::Each(lists), tensors) if tensors.len() == lists.len() => {
            let of = |(ops, tensor): (&Vec<SizedOp>, &Moved)| {
                let moved = ops.iter().try_fold(vec![tensor.clone()], |tensors, op| apply(op, tensors))?;
                <[Moved; 1]>::try_from(moved).map_err(|_| format!("`{op}` gives one tensor for each"))
            };
            let moved = lists.iter().zip(tensors).map(of).collect::<Result<Vec<_>, String>>()?;
            Ok(moved.into_iter().flatten().collect())
        }
        (SizedOp::Stack { count }, [first, ..]) if tensors.len() == *count => {
            if let Some(other) = tensors.iter().find(|tensor| tensor.shape != first.shape) {
                return Err(misfit(other));
            }
            let shape = [&[*count], &first.shape[..]].concat();
            Ok(vec![Moved { shape, runs: tensors.into_iter().flat_map(|tensor| tensor.runs).collect() }])
        }
        _ => Err(format!("`{op}` does not take {} tensors", tensors.len())),
    }
}

#[cfg(test)]
mod tests;
