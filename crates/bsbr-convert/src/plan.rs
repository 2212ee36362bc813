//! The plan: which tensor becomes which weight. Made from names, shapes and dtypes alone, complete or refused.

use std::collections::HashMap;

use bsbr_model::{ModelConfig, WeightSpec, weight_specs};
use safetensors::Dtype;

use crate::ConvertError;
use crate::hints::Hints;
use crate::ops::{self, SizedOp};
use crate::problem::PlanProblem;
use crate::rules::{Architecture, Prefix, Rule, SourceModel, When, Wrapper, expand, is_of_part, places, target_names};
use crate::tensors::Block;
use crate::tie::HeadForm;

/// A tensor of the checkpoint as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Name.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

/// A weight of the decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetTensor {
    /// Name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
}

/// One line of the plan: sources that become targets.
#[derive(Debug, Clone)]
pub struct Step {
    /// Read; several only when they are stacked.
    pub sources: Vec<SourceTensor>,
    /// Written; several when the source is split.
    pub targets: Vec<TargetTensor>,
    /// The format of all of them.
    pub dtype: Dtype,
    /// Which rule it comes from.
    pub(crate) rule: usize,
    pub(crate) ops: Vec<SizedOp>,
}

/// A tensor that is kept aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IgnoredTensor {
    /// The tensor.
    pub tensor: SourceTensor,
    /// What it is.
    pub why: &'static str,
}

/// How a whole checkpoint becomes the weights of a decoder.
///
/// Every tensor is used exactly once or ignored by a rule that names it, every weight is filled exactly once, and
/// every shape is the one the decoder wants. Its `Display` is the mapping table.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The rules.
    pub architecture: &'static Architecture,
    /// The model around the decoder, if there is one.
    pub wrapper: Option<&'static Wrapper>,
    /// The prefix in the names of the checkpoint.
    pub prefix: Prefix,
    /// What `config.json` says, with `tied_head` as found in the file.
    pub model: SourceModel,
    /// How the head is stored.
    pub head: HeadForm,
    /// What becomes what.
    pub steps: Vec<Step>,
    /// What is kept aside.
    pub ignored: Vec<IgnoredTensor>,
    /// The copy of the embedding table that stood for the head, and the name of the table.
    pub tied_copy: Option<(SourceTensor, String)>,
    /// Where in `steps` each weight is filled, and each tensor read: there may be tens of thousands.
    pub(crate) index: PlanIndex,
}

/// Names and their places in the steps of a plan: which step, and which of its targets or sources.
#[derive(Debug, Clone, Default)]
pub(crate) struct PlanIndex {
    targets: HashMap<String, (usize, usize)>,
    sources: HashMap<String, (usize, usize)>,
}

impl PlanIndex {
    fn of(steps: &[Step]) -> Self {
        let mut index = Self::default();
        for (n, step) in steps.iter().enumerate() {
            index.targets.extend(step.targets.iter().enumerate().map(|(m, target)| (target.name.clone(), (n, m))));
            index.sources.extend(step.sources.iter().enumerate().map(|(m, source)| (source.name.clone(), (n, m))));
        }
        index
    }
}

impl Plan {
    /// Plans the conversion of `tensors`.
    ///
    /// # Errors
    ///
    /// Every problem there is, in the order of the rules, then of the tensors.
    pub(crate) fn build(
        (architecture, wrapper): (&'static Architecture, Option<&'static Wrapper>),
        prefix: Prefix,
        model: SourceModel,
        head: HeadForm,
        tensors: Vec<SourceTensor>,
        hints: &Hints<'_>,
    ) -> Result<Self, Vec<PlanProblem>> {
        let specs = weight_specs(&ModelConfig::original(model.decoder.clone()));
        let mut builder = Builder {
            prefix,
            hints,
            tensors: tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect(),
            specs: specs.iter().map(|spec| (spec.name.as_str(), (spec, false))).collect(),
            used: HashMap::new(),
            problems: Vec::new(),
        };
        let (mut steps, mut ignored, mut tied_copy) = (Vec::new(), Vec::new(), None);
        for (number, rule) in all_rules(architecture, wrapper).enumerate() {
            match *rule {
                Rule::Map { source, targets, ops, when } => {
                    // A flag nobody sets is a mistake in the table; its tensors show up as unused.
                    if when.holds(&model) != Some(true) {
                        continue;
                    }
                    let ops = match ops::resolve(ops, &model.decoder) {
                        Ok(ops) => ops,
                        Err(problem) => {
                            let target = targets.join(", ");
                            builder.problems.push(PlanProblem::TargetShape { target, problem });
                            continue;
                        }
                    };
                    for place in places(source, &model.decoder).filter(|place| when.holds_in(&model.decoder, place.0)) {
                        let targets = target_names(source, targets, &model.decoder, place);
                        steps.extend(builder.step(number, source, targets, &ops, place));
                    }
                }
                Rule::Tie { head: name, embed, target } => match head {
                    HeadForm::Own => {
                        steps.extend(builder.step(number, name, vec![target.to_owned()], &[], (0, 0)));
                    }
                    HeadForm::TiedCopy => {
                        let embed = expand(embed, prefix, (0, 0), 0);
                        tied_copy = builder.take(&expand(name, prefix, (0, 0), 0)).map(|copy| (copy.clone(), embed));
                    }
                    HeadForm::Absent => {}
                },
                Rule::Ignore { .. } | Rule::IgnoreIn { .. } => {
                    let (name, when, why) = match *rule {
                        Rule::IgnoreIn { name, when, why } => (name, when, why),
                        Rule::Ignore { name, why } => (name, When::Always, why),
                        _ => continue,
                    };
                    for place in places(name, &model.decoder).filter(|place| when.holds_in(&model.decoder, place.0)) {
                        let tensor = builder.take(&expand(name, prefix, place, 0));
                        ignored.extend(tensor.map(|tensor| IgnoredTensor { tensor: tensor.clone(), why }));
                    }
                }
                Rule::IgnorePart { start, why } => {
                    let of_part = |name: &str| is_of_part(name, start, prefix, model.layers_beyond());
                    for tensor in tensors.iter().filter(|tensor| of_part(&tensor.name)) {
                        let tensor = builder.take(&tensor.name);
                        ignored.extend(tensor.map(|tensor| IgnoredTensor { tensor: tensor.clone(), why }));
                    }
                }
            }
        }
        let problems = builder.finish(&tensors, &specs);
        if !problems.is_empty() {
            return Err(problems);
        }
        let index = PlanIndex::of(&steps);
        Ok(Self { index, architecture, wrapper, prefix, model, head, steps, ignored, tied_copy })
    }

    /// The rules, those of a model around the decoder last.
    pub(crate) fn rules(&self) -> impl Iterator<Item = &'static Rule> {
        all_rules(self.architecture, self.wrapper)
    }

    /// For each target of `step`, where its numbers come from.
    ///
    /// # Errors
    ///
    /// [`ConvertError::Rules`] when the ops do not carry the shapes of the sources to those of the targets: they were
    /// followed the other way when the plan was made, so this is a mistake in an op.
    pub(crate) fn blocks(&self, step: &Step) -> Result<Vec<Vec<Block>>, ConvertError> {
        let fail = |problem| ConvertError::Rules { rules: self.architecture.id, problem };
        let shapes: Vec<_> = step.sources.iter().map(|source| source.shape.clone()).collect();
        let blocks = ops::blocks(&step.ops, &shapes).map_err(fail)?;
        let filled = blocks.iter().map(|blocks| blocks.iter().map(Block::len).sum::<usize>());
        if !filled.eq(step.targets.iter().map(|target| target.shape.iter().product::<usize>())) {
            return Err(fail(format!("`{}` does not fill its targets", step.sources[0].name)));
        }
        Ok(blocks)
    }

    /// The step that fills weight `name`, and which of its targets that is.
    pub(crate) fn filling(&self, name: &str) -> Option<(&Step, usize)> {
        self.index.targets.get(name).map(|&(step, target)| (&self.steps[step], target))
    }

    /// The step that reads tensor `name`, and which of its sources that is.
    pub(crate) fn reading(&self, name: &str) -> Option<(&Step, usize)> {
        self.index.sources.get(name).map(|&(step, source)| (&self.steps[step], source))
    }
}

fn all_rules(
    architecture: &'static Architecture,
    wrapper: Option<&'static Wrapper>,
) -> impl Iterator<Item = &'static Rule> {
    architecture.rules.iter().chain(wrapper.into_iter().flat_map(|wrapper| wrapper.aside))
}

struct Builder<'a> {
    prefix: Prefix,
    hints: &'a Hints<'a>,
    tensors: HashMap<&'a str, &'a SourceTensor>,
    /// Weights by name, with whether one was filled.
    specs: HashMap<&'a str, (&'a WeightSpec, bool)>,
    /// How often a tensor was used.
    used: HashMap<&'a str, usize>,
    problems: Vec<PlanProblem>,
}

impl<'a> Builder<'a> {
    /// Takes a tensor if it is there.
    fn take(&mut self, name: &str) -> Option<&'a SourceTensor> {
        let tensor = *self.tensors.get(name)?;
        let count = self.used.entry(&tensor.name).or_insert(0);
        *count += 1;
        if *count == 2 {
            self.problems.push(PlanProblem::DuplicateSource { tensor: name.to_owned() });
        }
        Some(tensor)
    }

    /// Fills the weight `name` and returns its shape.
    fn fill(&mut self, name: &str) -> Option<Vec<usize>> {
        let target = name.to_owned();
        match self.specs.get_mut(name) {
            None => self.problems.push(PlanProblem::UnknownTarget { target }),
            Some((_, true)) => self.problems.push(PlanProblem::DuplicateTarget { target }),
            Some((spec, filled)) => {
                *filled = true;
                return Some(spec.shape.clone());
            }
        }
        None
    }

    /// One rule at one place. `None` after reporting a problem.
    fn step(
        &mut self,
        rule: usize,
        source: &str,
        names: Vec<String>,
        ops: &[SizedOp],
        place: (usize, usize),
    ) -> Option<Step> {
        let shapes: Vec<Option<Vec<usize>>> = names.iter().map(|name| self.fill(name)).collect();
        let shapes = shapes.into_iter().collect::<Option<Vec<_>>>()?;
        let expected = match ops::source_shapes(ops, &shapes) {
            Ok(expected) => expected,
            Err(problem) => {
                self.problems.push(PlanProblem::TargetShape { target: names.join(", "), problem });
                return None;
            }
        };
        let mut sources = Vec::new();
        for (part, expected) in expected.iter().enumerate() {
            let name = expand(source, self.prefix, place, part);
            sources.push(self.checked_source(name, &names, expected));
        }
        let sources = sources.into_iter().collect::<Option<Vec<_>>>()?;
        let dtype = sources.first()?.dtype;
        if let Some(other) = sources.iter().find(|source| source.dtype != dtype) {
            let expected = format!("{dtype} as `{}`, with which it is joined", sources[0].name);
            let (tensor, found) = (other.name.clone(), other.dtype.to_string());
            self.problems.push(PlanProblem::Dtype { tensor, found, expected });
            return None;
        }
        let targets = names.into_iter().zip(shapes).map(|(name, shape)| TargetTensor { name, shape }).collect();
        Some(Step { sources, targets, dtype, rule, ops: ops.to_vec() })
    }

    fn checked_source(&mut self, name: String, targets: &[String], expected: &[usize]) -> Option<SourceTensor> {
        let targets = targets.to_vec();
        let Some(tensor) = self.take(&name) else {
            // The nearest name is filled in at the end, when it is known what nothing uses.
            let hint = self.hints.not_needed(&name);
            self.problems.push(PlanProblem::MissingSource { tensor: name, targets, nearest: None, hint });
            return None;
        };
        let mut fits = true;
        if !crate::tensors::is_weight_dtype(tensor.dtype) {
            let expected = "F32, F16 or BF16".to_owned();
            let (tensor, found) = (name.clone(), tensor.dtype.to_string());
            self.problems.push(PlanProblem::Dtype { tensor, found, expected });
            fits = false;
        }
        if tensor.shape != expected {
            let (expected, found) = (expected.to_vec(), tensor.shape.clone());
            let hint = self.hints.fitting_shape(&name, &found);
            self.problems.push(PlanProblem::Shape { tensor: name, targets, expected, found, hint });
            fits = false;
        }
        fits.then(|| tensor.clone())
    }

    /// Adds what is left over on either side.
    fn finish(mut self, tensors: &[SourceTensor], specs: &[WeightSpec]) -> Vec<PlanProblem> {
        let unused: Vec<_> = tensors.iter().filter(|tensor| !self.used.contains_key(tensor.name.as_str())).collect();
        for problem in &mut self.problems {
            if let PlanProblem::MissingSource { tensor, nearest, .. } = problem {
                *nearest = crate::hints::nearest(tensor, unused.iter().map(|tensor| tensor.name.as_str()));
            }
        }
        for tensor in unused {
            let (tensor, shape) = (tensor.name.clone(), tensor.shape.clone());
            let hint = self.hints.using(&tensor, &shape);
            self.problems.push(PlanProblem::UnusedSource { tensor, shape, hint });
        }
        for spec in specs {
            if !self.specs[spec.name.as_str()].1 {
                self.problems.push(PlanProblem::UnfilledTarget { target: spec.name.clone() });
            }
        }
        self.problems
    }
}
