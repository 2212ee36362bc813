//! One tensor that is missing, renamed, reshaped, retyped, too many or twice there, whichever it is in whichever
//! architecture, gives the error that names it, and no output.

mod common;

use std::fs;
use std::path::PathBuf;

use bsbr_convert::{ConvertError, FormatProblem, PlanProblem, plan_checkpoint};
use common::{BOTH_STYLES, NEWER_STYLE, Tensor, VARIANTS, checkout, read_dir_tensors, refused, write_tensors};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::json;
use tempfile::TempDir;

/// A fixture whose weights are written anew for every damage.
struct Patient {
    _temp: TempDir,
    dir: PathBuf,
    fixture: &'static str,
    tensors: Vec<Tensor>,
}

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

impl Patient {
    fn new(fixture: &'static str, config: &str) -> Self {
        let (temp, dir) = checkout(fixture, config);
        // What is kept aside may be missing or of any shape.
        let aside = plan_checkpoint(&dir).expect("a fixture").plan.ignored;
        let read = |tensor: &Tensor| aside.iter().all(|ignored| ignored.tensor.name != tensor.name);
        let tensors = read_dir_tensors(&dir).into_values().filter(read).collect();
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("a file").path();
            if !path.ends_with("config.json") {
                fs::remove_file(path).expect("a file");
            }
        }
        Self { _temp: temp, dir, fixture, tensors }
    }

    fn every() -> impl Iterator<Item = Self> {
        BOTH_STYLES.into_iter().chain(NEWER_STYLE).chain(VARIANTS).map(|fixture| Self::new(fixture, "config.json"))
    }

    /// What converting one file of `tensors` refuses.
    fn refused(&self, tensors: &[Tensor]) -> ConvertError {
        self.write("model.safetensors", tensors);
        refused(&self.dir)
    }

    fn write(&self, name: &str, tensors: &[Tensor]) {
        let path = self.dir.join(name);
        // A new file: some file systems write one that is cut short and filled again to the disk at once.
        let _ = fs::remove_file(&path);
        write_tensors(&path, tensors);
    }

    /// What converting two files refuses, whose index is that of the healthy tensors, half in each.
    fn refused_shards(&self, shards: [&[Tensor]; 2]) -> ConvertError {
        let file = |n: usize| SHARDS[usize::from(n >= self.half())];
        let map: serde_json::Map<_, _> =
            self.tensors.iter().enumerate().map(|(n, tensor)| (tensor.name.clone(), json!(file(n)))).collect();
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(self.dir.join("model.safetensors.index.json"), index.to_string()).expect("room");
        for (name, tensors) in SHARDS.into_iter().zip(shards) {
            self.write(name, tensors);
        }
        refused(&self.dir)
    }

    /// How many weights a tensor becomes: three where queries, keys and values are one, two where gate and up are, as many times
    /// that as there are experts in it.
    fn weights(&self, tensor: &Tensor) -> usize {
        // What rotates of the queries and keys of latent attention, and what does not.
        let latent = self.tensors.iter().any(|tensor| tensor.name.contains(".kv_a_proj_with_mqa."));
        let recurrent = self.tensors.iter().any(|tensor| tensor.name.contains(".linear_attn."));
        let parts = [".q_proj.", ".q_b_proj.", ".kv_a_proj_with_mqa.", ".kv_b_proj."];
        let fused = ["c_attn.", "query_key_value.", "Wqkv.", "qkv_proj."];
        let experts = tensor.shape.first().copied().unwrap_or(0);
        match tensor.name.as_str() {
            name if name.ends_with("experts.gate_up_proj") || name.contains("moe.input_linear.") => 2 * experts,
            name if name.ends_with("experts.down_proj") || name.contains("moe.output_linear.") => experts,
            name if name.ends_with("experts.gate_up_proj_bias") => 2 * experts,
            name if name.ends_with("experts.down_proj_bias") => experts,
            name if name.contains("shared_mlp.input_linear.") => 2,
            name if fused.iter().any(|part| name.contains(part)) => 3,
            name if name.contains("gate_up_proj.") => 2,
            name if name.contains(".linear_attn.in_proj_qkv.") => 3,
            name if name.contains(".linear_attn.in_proj_qkvz.") => 4,
            name if name.contains(".linear_attn.in_proj_ba.") => 2,
            // Queries and their gate.
            name if recurrent && name.contains(".q_proj.") => 2,
            name if latent && parts.iter().any(|part| name.contains(part)) => 2,
            _ => 1,
        }
    }

    fn half(&self) -> usize {
        self.tensors.len() / 2
    }

    /// The tensors with one of them changed.
    fn with(&self, number: usize, change: impl FnOnce(&mut Tensor)) -> Vec<Tensor> {
        let mut tensors = self.tensors.clone();
        change(&mut tensors[number]);
        tensors
    }

    fn without(&self, number: usize) -> Vec<Tensor> {
        let mut tensors = self.tensors.clone();
        tensors.remove(number);
        tensors
    }
}

/// The one problem of a plan.
fn only(error: ConvertError, what: &str) -> PlanProblem {
    match error {
        ConvertError::Plan { mut problems, .. } if problems.len() == 1 => problems.remove(0),
        other => panic!("{what}: {other}"),
    }
}

/// Whether a tensor is the output head, whose absence has two explanations.
fn is_head(name: &str) -> bool {
    ["lm_head.weight", "language_model.lm_head.weight", "embed_out.weight"].contains(&name)
}

/// `tensor` in another shape, with as many bytes as that takes.
fn reshape(tensor: &mut Tensor, shape: Vec<usize>) {
    let size = tensor.bytes.len() / tensor.shape.iter().product::<usize>();
    let bytes = size * shape.iter().product::<usize>();
    tensor.bytes = tensor.bytes.iter().copied().cycle().take(bytes).collect();
    tensor.shape = shape;
}

/// A dtype as wide as that of `tensor` which no weight has.
fn retype(tensor: &mut Tensor) {
    tensor.dtype = if tensor.dtype == "F32" { "I32" } else { "I16" }.into();
}

/// Every index in a name, one at a time, as `index`.
fn with_other_index(name: &str, index: usize) -> Vec<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let numbers = (0..parts.len()).filter(|&at| parts[at].parse::<usize>().is_ok());
    let changed = numbers.map(|at| {
        let mut parts: Vec<String> = parts.iter().map(|&part| part.to_owned()).collect();
        parts[at] = index.to_string();
        parts.join(".")
    });
    changed.collect()
}

#[test]
fn every_kind_of_tensor_occurs() {
    let all: Vec<String> = Patient::every().flat_map(|patient| patient.tensors).map(|tensor| tensor.name).collect();
    for kind in [
        "embed",
        "wte",
        "wpe",
        "norm",
        "ln_1",
        "q_proj.weight",
        "k_proj.bias",
        "v_proj.",
        "c_attn.bias",
        "o_proj",
        "query_key_value.weight",
        "qkv_proj",
        "gate_up_proj",
        "up_proj",
        "fc1.bias",
        "q_norm",
        "norms.3",
        "project_in",
        "lm_head.weight",
        "lm_head.bias",
        "embed_out",
    ] {
        assert!(all.iter().any(|name| name.contains(kind)), "{kind}");
    }
}

#[test]
fn any_missing_tensor_is_named_with_what_it_was_needed_for() {
    for patient in Patient::every() {
        for (number, tensor) in patient.tensors.iter().enumerate() {
            let what = format!("{} without {}", patient.fixture, tensor.name);
            let error = patient.refused(&patient.without(number));
            if is_head(&tensor.name) {
                let ConvertError::HeadMissing { head, nearest, .. } = error else { panic!("{what}: {error}") };
                assert_eq!((head, nearest), (tensor.name.clone(), None), "{what}");
                continue;
            }
            let PlanProblem::MissingSource { tensor: name, targets, nearest, .. } = only(error, &what) else {
                panic!("{what}")
            };
            assert_eq!((name, targets.len(), nearest), (tensor.name.clone(), patient.weights(tensor), None), "{what}");
        }
    }
}

#[test]
fn any_renamed_tensor_is_linked_to_the_name_it_has_now() {
    for patient in Patient::every() {
        for number in 0..patient.tensors.len() {
            let old = patient.tensors[number].name.clone();
            let new = format!("{old}_0");
            let what = format!("{}: {old} as {new}", patient.fixture);
            let error = patient.refused(&patient.with(number, |tensor| tensor.name = new.clone()));
            if is_head(&old) {
                let ConvertError::HeadMissing { head, nearest, .. } = error else { panic!("{what}: {error}") };
                assert_eq!((head, nearest), (old, Some(new)), "{what}");
                continue;
            }
            let ConvertError::Plan { problems, .. } = error else { panic!("{what}: {error}") };
            let [PlanProblem::MissingSource { tensor, nearest, .. }, PlanProblem::UnusedSource { tensor: unused, .. }] =
                &problems[..]
            else {
                panic!("{what}: {problems:?}")
            };
            assert_eq!((tensor, nearest.as_ref(), unused), (&old, Some(&new), &new), "{what}");
        }
    }
}

#[test]
fn any_reshaped_tensor_is_named_with_both_shapes() {
    for patient in Patient::every() {
        for (number, tensor) in patient.tensors.iter().enumerate() {
            let shape = &tensor.shape;
            let rows = |change: &dyn Fn(usize) -> usize| {
                let mut shape = shape.clone();
                // A single number has no rows.
                if let Some(rows) = shape.first_mut() {
                    *rows = change(*rows);
                }
                shape
            };
            let transposed: Vec<usize> = shape.iter().rev().copied().collect();
            let flat = vec![shape.iter().product()];
            let deeper = [&[1], &shape[..]].concat();
            for other in [rows(&|n| n + 1), rows(&|n| n - 1), rows(&|n| 3 * n), rows(&|_| 0), transposed, flat, deeper]
            {
                if other == *shape {
                    continue;
                }
                let what = format!("{}: {} as {other:?}", patient.fixture, tensor.name);
                let error = patient.refused(&patient.with(number, |tensor| reshape(tensor, other.clone())));
                let PlanProblem::Shape { tensor: name, targets, expected, found, .. } = only(error, &what) else {
                    panic!("{what}")
                };
                assert_eq!((&name, &expected, &found), (&tensor.name, shape, &other), "{what}");
                assert_eq!(targets.len(), patient.weights(tensor), "{what}");
            }
        }
    }
}

#[test]
fn any_tensor_of_integers_is_named_with_its_dtype() {
    for patient in Patient::every() {
        for (number, tensor) in patient.tensors.iter().enumerate() {
            let what = format!("{}: {} of integers", patient.fixture, tensor.name);
            let error = patient.refused(&patient.with(number, retype));
            let PlanProblem::Dtype { tensor: name, found, expected } = only(error, &what) else { panic!("{what}") };
            assert_eq!(name, tensor.name, "{what}");
            assert!(["I32", "I16"].contains(&&*found) && expected == "F32, F16 or BF16", "{what}: {found} {expected}");
        }
    }
}

#[test]
fn any_tensor_more_than_the_model_has_is_named_with_its_shape() {
    for patient in Patient::every() {
        for tensor in &patient.tensors {
            let mut names = with_other_index(&tensor.name, patient.tensors.len());
            names.push(format!("other.{}", tensor.name));
            names.push(format!("{}.copy", tensor.name));
            for name in names {
                let what = format!("{} with {name}", patient.fixture);
                let mut tensors = patient.tensors.clone();
                tensors.push(Tensor { name: name.clone(), ..tensor.clone() });
                let PlanProblem::UnusedSource { tensor: unused, shape, .. } = only(patient.refused(&tensors), &what)
                else {
                    panic!("{what}")
                };
                assert_eq!((unused, &shape), (name, &tensor.shape), "{what}");
            }
        }
    }
}

#[test]
fn any_tensor_twice_in_a_header_is_named() {
    for patient in Patient::every() {
        for tensor in &patient.tensors {
            let mut tensors = patient.tensors.clone();
            tensors.push(tensor.clone());
            let error = patient.refused(&tensors);
            let expected = FormatProblem::Duplicate { tensor: tensor.name.clone() };
            assert!(
                matches!(&error, ConvertError::Format { problem, .. } if **problem == expected),
                "{}: {error}",
                patient.fixture
            );
        }
    }
}

#[test]
fn any_tensor_in_two_shards_in_none_or_outside_the_index_is_named_with_the_files() {
    for patient in Patient::every() {
        let (first, second) = patient.tensors.split_at(patient.half());
        let index_error = |shards: [&[Tensor]; 2], expected: &str| {
            let error = patient.refused_shards(shards);
            assert!(
                matches!(&error, ConvertError::Index { problem, .. } if problem.contains(expected)),
                "{}: {expected}\n{error}",
                patient.fixture
            );
        };
        let plus = |tensors: &[Tensor], tensor: &Tensor| [tensors, std::slice::from_ref(tensor)].concat();
        let minus = |tensors: &[Tensor], n: usize| [&tensors[..n], &tensors[n + 1..]].concat();
        for (n, tensor) in first.iter().enumerate() {
            let both = format!("tensor `{}` is in both `{}` and `{}`", tensor.name, SHARDS[0], SHARDS[1]);
            index_error([first, &plus(second, tensor)], &both);
            let absent = format!("tensor `{}` should be in `{}` and is not", tensor.name, SHARDS[0]);
            index_error([&minus(first, n), second], &absent);
            index_error([&minus(first, n), &plus(second, tensor)], &absent);
        }
        for (n, tensor) in second.iter().enumerate() {
            let both = format!("tensor `{}` is in both `{}` and `{}`", tensor.name, SHARDS[0], SHARDS[1]);
            index_error([&plus(first, tensor), second], &both);
            let absent = format!("tensor `{}` should be in `{}` and is not", tensor.name, SHARDS[1]);
            index_error([first, &minus(second, n)], &absent);
            let extra = Tensor { name: format!("{}.copy", tensor.name), ..tensor.clone() };
            let unlisted = format!("`{}` holds `{}`, which the index does not list", SHARDS[1], extra.name);
            index_error([first, &plus(second, &extra)], &unlisted);
        }
    }
}

/// Something done to one tensor. Positions are taken modulo what there is.
#[derive(Debug, Clone)]
enum Damage {
    Delete,
    Rename { at: Index, letter: char },
    Reshape { axis: Index, size: usize },
    Retype,
    Copy { at: Index, letter: char },
}

fn damages() -> impl Strategy<Value = Vec<(Index, Damage)>> {
    let damage = prop_oneof![
        Just(Damage::Delete),
        (any::<Index>(), any::<char>()).prop_map(|(at, letter)| Damage::Rename { at, letter }),
        (any::<Index>(), 0..300_usize).prop_map(|(axis, size)| Damage::Reshape { axis, size }),
        Just(Damage::Retype),
        (any::<Index>(), any::<char>()).prop_map(|(at, letter)| Damage::Copy { at, letter }),
    ];
    prop::collection::vec((any::<Index>(), damage), 1..6)
}

/// `name` with one letter more.
fn misspelt(name: &str, at: Index, letter: char) -> String {
    let mut name = name.to_owned();
    name.insert(at.index(name.len() + 1), letter);
    name
}

/// A problem without what the exhaustive tests look at alone: what it is needed for, the nearest name, settings.
fn essence(problem: &PlanProblem) -> String {
    match problem {
        PlanProblem::MissingSource { tensor, .. } => format!("missing {tensor:?}"),
        PlanProblem::UnusedSource { tensor, shape, .. } => format!("unused {tensor:?} {shape:?}"),
        PlanProblem::Shape { tensor, expected, found, .. } => format!("shape {tensor:?} {expected:?} {found:?}"),
        PlanProblem::Dtype { tensor, .. } => format!("dtype {tensor:?}"),
        other => format!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_is_damaged_together_is_all_reported_and_nothing_else(
        fixture in prop::sample::select(&BOTH_STYLES[..]), older in any::<bool>(), damages in damages(),
    ) {
        let patient = Patient::new(fixture, if older { "config_v4.json" } else { "config.json" });
        let (mut tensors, mut copies) = (Vec::new(), Vec::new());
        let (mut expected, mut head_gone) = (Vec::new(), false);
        for (number, tensor) in patient.tensors.iter().enumerate() {
            // The first damage that falls on a tensor is the one it suffers.
            let damage = damages.iter().find(|(at, _)| at.index(patient.tensors.len()) == number);
            let (name, mut tensor) = (tensor.name.clone(), tensor.clone());
            match damage.map(|(_, damage)| damage) {
                None => {}
                Some(Damage::Delete) => {
                    expected.push(format!("missing {name:?}"));
                    head_gone |= is_head(&name);
                    continue;
                }
                Some(Damage::Rename { at, letter }) => {
                    expected.push(format!("missing {name:?}"));
                    head_gone |= is_head(&name);
                    tensor.name = misspelt(&name, *at, *letter);
                    expected.push(format!("unused {:?} {:?}", tensor.name, tensor.shape));
                }
                Some(Damage::Reshape { .. }) if tensor.shape.is_empty() => {}
                Some(Damage::Reshape { axis, size }) => {
                    let mut shape = tensor.shape.clone();
                    shape[axis.index(tensor.shape.len())] = *size;
                    if shape != tensor.shape {
                        expected.push(format!("shape {name:?} {:?} {shape:?}", tensor.shape));
                        reshape(&mut tensor, shape);
                    }
                }
                Some(Damage::Retype) => {
                    expected.push(format!("dtype {name:?}"));
                    retype(&mut tensor);
                }
                Some(Damage::Copy { at, letter }) => {
                    let name = misspelt(&name, *at, *letter);
                    expected.push(format!("unused {name:?} {:?}", tensor.shape));
                    copies.push(Tensor { name, ..tensor.clone() });
                }
            }
            tensors.push(tensor);
        }
        prop_assume!(!expected.is_empty());
        tensors.extend(copies);
        match patient.refused(&tensors) {
            ConvertError::HeadMissing { head, .. } => prop_assert!(head_gone && is_head(&head)),
            ConvertError::Plan { problems, .. } => {
                prop_assert!(!head_gone);
                let mut found: Vec<String> = problems.iter().map(essence).collect();
                found.sort();
                expected.sort();
                prop_assert_eq!(found, expected);
            }
            other => prop_assert!(false, "{}", other),
        }
    }
}
