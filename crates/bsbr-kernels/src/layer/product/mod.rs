//! Linear maps of [`Panels`].

mod task;

use std::ops::Range;

use bsbr_weights::{Arithmetic, Matrix};
use task::{blocks, place, run, split};

use super::{activation::Activation, panels::Panels, weights::bf16, weights::int8};

/// `weight x + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// `[outputs, inputs]`, as it is stored.
    pub weight: Matrix<'a>,
    /// One to an output.
    pub bias: Option<&'a [f32]>,
    /// What it is multiplied in.
    pub arithmetic: Arithmetic,
}

impl<'a> Linear<'a> {
    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// Some of the outputs.
    fn part(&self, outputs: Range<usize>) -> Self {
        Self { weight: self.weight.rows(outputs.clone()), bias: self.bias.map(|bias| &bias[outputs]), ..*self }
    }

    /// What so it is multiplied in with `x`, by what the weights are, how the tokens stand and what the processor knows.
    fn form(&self, x: &Panels) -> Form {
        let rows = x.lanes() == 1;
        match self.arithmetic {
            Arithmetic::Int8 if self.weight.format().has_groups() && (rows || int8::strips::runs(x.arch)) => Form::Int8,
            Arithmetic::Bf16 if !rows && bf16::runs(x.arch) => Form::Bf16,
            Arithmetic::F32 | Arithmetic::Int8 | Arithmetic::Bf16 => Form::F32,
        }
    }

    fn check(&self, inputs: usize) {
        assert_eq!(self.weight.inputs(), inputs, "a map of {} inputs got {inputs}", self.weight.inputs());
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), self.outputs(), "biases of {} outputs", self.outputs());
        }
    }
}

/// What a product is made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    /// Codes of both.
    Int8,
    /// Pairs of numbers of both, rounded; sums in f32.
    Bf16,
}

/// What becomes of the outputs.
#[derive(Debug, Clone, Copy)]
enum Finish<'a> {
    Plain,
    Activated(Activation),
    /// `activation(gate x) * (up x)`: the map of the gate.
    Gated(Activation, Linear<'a>),
}

/// What each of `maps` makes of the same input.
///
/// # Panics
///
/// If a map has other inputs than `x` is wide, or weights or biases of another number.
pub fn project(x: &Panels, maps: &[Linear<'_>]) -> Vec<Panels> {
    let mut outputs: Vec<Panels> = maps.iter().map(|map| output(x, map)).collect();
    let mut tasks = Vec::new();
    for (map, out) in maps.iter().zip(&mut outputs) {
        tasks.extend(split(x, *map, Finish::Plain, out));
    }
    run(tasks);
    outputs
}

/// The same of maps some of which pass inputs on, with an order of the inputs: output `i` of such a map is input `order[i]`
/// and what the map makes of the inputs `order[outputs..]`.
///
/// # Panics
///
/// As [`project`], and if an order is not as long as `x` is wide, names no input or comes with a bias.
pub fn project_passing(x: &Panels, maps: &[(Linear<'_>, Option<&[u32]>)]) -> Vec<Panels> {
    let ordered: Vec<Option<Panels>> = maps.iter().map(|(_, order)| order.map(|order| x.ordered(order))).collect();
    let inputs = |ordered: &'_ Option<Panels>, map: &Linear<'_>| match ordered {
        Some(_) => x.width().saturating_sub(map.outputs()),
        None => x.width(),
    };
    let of = |((map, order), ordered): (&(Linear<'_>, Option<&[u32]>), &Option<Panels>)| {
        map.check(inputs(ordered, map));
        assert!(order.is_none() || map.bias.is_none(), "a map that passes inputs on adds no bias");
        Panels::new(x.arch, x.tokens(), map.outputs(), x.lanes())
    };
    let mut outputs: Vec<Panels> = maps.iter().zip(&ordered).map(of).collect();
    let mut tasks = Vec::new();
    for (((map, order), ordered), out) in maps.iter().zip(&ordered).zip(&mut outputs) {
        let passed = order.map_or(0, |_| map.outputs());
        let blocks = blocks(ordered.as_ref().unwrap_or(x), *map, Finish::Plain);
        tasks.extend(place(blocks.map(|task| task.passing(passed)).collect(), out));
    }
    run(tasks);
    outputs
}

/// For each of `joined` the outputs of its maps side by side, each map of an input of its own. None may be without maps.
///
/// # Panics
///
/// As [`project`], and if the inputs are of different numbers of tokens or there is none.
pub fn project_joined(joined: &[Vec<(&Panels, Linear<'_>)>]) -> Vec<Panels> {
    let of = |parts: &Vec<(&Panels, Linear<'_>)>| {
        let (first, _) = parts[0];
        for (x, map) in parts {
            map.check(x.width());
            assert_eq!((x.tokens(), x.lanes()), (first.tokens(), first.lanes()), "inputs of other numbers of tokens");
        }
        let total = parts.iter().map(|(_, map)| map.outputs()).sum();
        Panels::new(first.arch, first.tokens(), total, first.lanes())
    };
    let mut outputs: Vec<Panels> = joined.iter().map(of).collect();
    let mut tasks = Vec::new();
    for (parts, out) in joined.iter().zip(&mut outputs) {
        let blocks = parts.iter().flat_map(|(x, map)| blocks(x, *map, Finish::Plain));
        tasks.extend(place(blocks.collect(), out));
    }
    run(tasks);
    outputs
}

/// The inner numbers of an MLP: `activation(up x)`, or `activation(gate x) * (up x)`.
///
/// # Panics
///
/// As [`project`], and if `gate` and `up` have different numbers of outputs.
pub fn gated(x: &Panels, gate: Option<Linear<'_>>, up: Linear<'_>, activation: Activation) -> Panels {
    let finish = match gate {
        Some(gate) => {
            gate.check(x.width());
            assert_eq!(gate.outputs(), up.outputs(), "gate and up differ in their outputs");
            Finish::Gated(activation, gate)
        }
        None => Finish::Activated(activation),
    };
    let mut out = output(x, &up);
    run(split(x, up, finish, &mut out));
    out
}

fn output(x: &Panels, map: &Linear<'_>) -> Panels {
    map.check(x.width());
    Panels::new(x.arch, x.tokens(), map.outputs(), x.lanes())
}

#[cfg(test)]
mod tests;
