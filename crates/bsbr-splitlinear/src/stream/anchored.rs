//! Compression front to back: each layer is fitted to what the compressed layers before it give, so that the outputs come
//! close to those of the original model all the same.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

use super::{BlockModel, Window, first_states, member_weight, numbers};
use crate::{
    Calibration, Group, GroupFactors, GroupReport, Member, PairedMoments, RefitReport, SavedGroup, SolveSettings,
    SplitError, compress_group, refit_member,
};

/// How to compress front to back.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AnchoredSettings {
    /// How groups are solved.
    pub solve: SolveSettings,
    /// Whether the coefficients of a block are fitted again once the blocks before it are compressed, where the block is
    /// not the first of its groups.
    pub refit_blocks: bool,
}

/// A group with its factors, and what was done.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressedGroup {
    /// The group.
    pub saved: SavedGroup,
    /// Its factors.
    pub factors: GroupFactors,
    /// How they were found.
    pub report: GroupReport,
    /// What fitting coefficients again did to each member, by the name of the part.
    pub refits: Vec<(String, RefitReport)>,
}

/// Moments of an input over calibration windows and over held-out ones.
type Pair = [PairedMoments; 2];

/// Compresses `groups` of a model, block after block. `original` stays as it is, `compressed` begins as the same model,
/// divided into the parts of the groups, and is compressed at the end.
///
/// Groups that reach over several blocks are solved when the inputs of all of them are known, those of the compressed
/// model as far as it is compressed. `each` hears of every group, and how many blocks of how many are done.
///
/// # Errors
///
/// Those of the models and of the solvers.
pub fn compress_anchored<M: BlockModel>(
    original: &M,
    compressed: &mut M,
    groups: &[SavedGroup],
    (tokens, windows): (&[u32], &[Window]),
    settings: &AnchoredSettings,
    each: &mut dyn FnMut(&CompressedGroup, usize, usize),
) -> Result<Vec<CompressedGroup>, M::Error> {
    let mut states = [first_states(original, tokens, windows)?, first_states(compressed, tokens, windows)?];
    let mut done = Vec::new();
    let blocks = original.blocks();
    for unit in units(original, groups)? {
        let mut ahead = states.clone();
        let mut moments = BTreeMap::new();
        for block in unit.blocks.clone() {
            moments.extend(run(original, compressed, block, windows, &mut ahead)?);
        }
        let mut solved = Vec::new();
        for &number in &unit.groups {
            let group = &groups[number];
            let (factors, report) = solve(original, group, &moments, &settings.solve)?;
            compressed.install(group, &factors)?;
            solved.push(CompressedGroup { saved: group.clone(), factors, report, refits: Vec::new() });
        }
        drop((moments, ahead));
        for block in unit.blocks.clone() {
            let first = block == unit.blocks.start;
            if settings.refit_blocks && !first {
                let mut ahead = states.clone();
                let moments = run(original, compressed, block, windows, &mut ahead)?;
                refit(original, compressed, block, &mut solved, &moments, &settings.solve)?;
            }
            advance(original, block, &mut states[0])?;
            advance(compressed, block, &mut states[1])?;
        }
        solved.iter().for_each(|group| each(group, unit.blocks.end, blocks));
        done.extend(solved);
    }
    Ok(done)
}

/// Blocks that groups hold together.
struct Unit {
    blocks: std::ops::Range<usize>,
    groups: Vec<usize>,
}

/// The blocks in order, as few together as the groups allow.
fn units<M: BlockModel>(model: &M, groups: &[SavedGroup]) -> Result<Vec<Unit>, M::Error> {
    let mut spans = Vec::new();
    for (number, group) in groups.iter().enumerate() {
        let mut blocks = BTreeSet::new();
        for target in group.members.iter().flat_map(|member| &member.targets) {
            blocks.insert(block_of(model, &target.linear)?.0);
        }
        if let (Some(&first), Some(&last)) = (blocks.first(), blocks.last()) {
            spans.push((first, last, number));
        }
    }
    spans.sort_unstable();
    let mut units: Vec<Unit> = Vec::new();
    for (first, last, number) in spans {
        match units.last_mut() {
            Some(unit) if first < unit.blocks.end => {
                unit.blocks.end = unit.blocks.end.max(last + 1);
                unit.groups.push(number);
            }
            previous => {
                // Blocks without a group are passed through.
                let start = previous.map_or(0, |unit| unit.blocks.end);
                units.extend((start..first).map(|block| Unit { blocks: block..block + 1, groups: Vec::new() }));
                units.push(Unit { blocks: first..last + 1, groups: vec![number] });
            }
        }
    }
    Ok(units)
}

pub(super) fn block_of<M: BlockModel>(model: &M, linear: &str) -> Result<(usize, String), M::Error> {
    let found = model.input_of(linear);
    Ok(found.ok_or_else(|| SplitError::shape(linear, "a linear layer of the model", "none"))?)
}

/// Runs a block of both models over all windows; returns the moments of its inputs.
fn run<M: BlockModel>(
    original: &M,
    compressed: &M,
    block: usize,
    windows: &[Window],
    states: &mut [Vec<Tensor<2>>; 2],
) -> Result<BTreeMap<String, Pair>, M::Error> {
    let inputs = original.inputs(block).into_iter();
    let mut moments: BTreeMap<String, Pair> =
        inputs.map(|(name, width)| (name, [PairedMoments::new(width), PairedMoments::new(width)])).collect();
    let [of_original, of_compressed] = states;
    for ((window, x), y) in windows.iter().zip(of_original).zip(of_compressed) {
        let mut seen = BTreeMap::new();
        let next = original.run_block(block, x.clone(), &mut |name, x| {
            seen.insert(name.to_owned(), numbers(name, x)?);
            Ok(())
        })?;
        *x = next;
        let next = compressed.run_block(block, y.clone(), &mut |name, y| {
            if let (Some(pair), Some(x)) = (moments.get_mut(name), seen.remove(name)) {
                pair[usize::from(window.held_out)].add_rows(name, &x, &numbers(name, y)?)?;
            }
            Ok(())
        })?;
        *y = next;
    }
    Ok(moments)
}

fn advance<M: BlockModel>(model: &M, block: usize, states: &mut [Tensor<2>]) -> Result<(), M::Error> {
    for states in states {
        *states = model.run_block(block, states.clone(), &mut |_, _| Ok(()))?;
    }
    Ok(())
}

/// A member of a group, ready to be solved for.
struct Solved<'a> {
    name: &'a str,
    weight: Vec<f32>,
    pair: &'a Pair,
}

impl Solved<'_> {
    fn view(&self) -> Member<'_> {
        let [calibration, held_out] = self.pair;
        let held_out = (held_out.original().tokens() > 0).then_some(Calibration::Paired(held_out));
        Member { name: self.name, weight: &self.weight, calibration: Calibration::Paired(calibration), held_out }
    }
}

fn member<'a, M: BlockModel>(
    model: &M,
    group: &'a SavedGroup,
    number: usize,
    moments: &'a BTreeMap<String, Pair>,
) -> Result<Solved<'a>, M::Error> {
    let member = &group.members[number];
    let linear = member.targets.first().map_or("", |target| target.linear.as_str());
    let (_, input) = block_of(model, linear)?;
    let pair = moments.get(&input);
    let pair = pair.ok_or_else(|| SplitError::shape(linear, "moments of its inputs", "none"))?;
    Ok(Solved { name: &member.part, weight: member_weight(model, group, member)?, pair })
}

fn solve<M: BlockModel>(
    model: &M,
    group: &SavedGroup,
    moments: &BTreeMap<String, Pair>,
    settings: &SolveSettings,
) -> Result<(GroupFactors, GroupReport), M::Error> {
    let members: Result<Vec<_>, _> =
        (0..group.members.len()).map(|number| member(model, group, number, moments)).collect();
    let members = members?;
    let members: Vec<Member<'_>> = members.iter().map(Solved::view).collect();
    let SavedGroup { name, share, form, inputs, outputs, rank, .. } = group;
    let group =
        Group { name, share: *share, form: *form, inputs: *inputs, outputs: *outputs, rank: *rank, members: &members };
    Ok(compress_group(&group, settings)?)
}

/// Fits the coefficients of the members in `block` again.
fn refit<M: BlockModel>(
    original: &M,
    compressed: &mut M,
    block: usize,
    groups: &mut [CompressedGroup],
    moments: &BTreeMap<String, Pair>,
    settings: &SolveSettings,
) -> Result<(), M::Error> {
    for group in groups {
        let mut changed = false;
        for number in 0..group.saved.members.len() {
            let Some(target) = group.saved.members[number].targets.first() else { continue };
            if block_of(original, &target.linear)?.0 != block {
                continue;
            }
            let member = member(original, &group.saved, number, moments)?;
            let report = refit_member(&mut group.factors, number, &member.view(), settings)?;
            group.refits.push((member.name.to_owned(), report));
            changed = true;
        }
        if changed {
            compressed.install(&group.saved, &group.factors)?;
        }
    }
    Ok(())
}
