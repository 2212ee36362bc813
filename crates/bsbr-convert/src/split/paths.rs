//! Linear layers of the blocks as a checkpoint names them.

use std::collections::HashSet;
use std::path::Path;

use bsbr_model::{DecoderConfig, LinearPlace, LinearRole, MlpPart};
use bsbr_splitlinear::LinearShape;

use crate::ConvertError;
use crate::arch::architecture;
use crate::convert::SOURCE_CONFIG;
use crate::converted::ConvertedModel;
use crate::json::ConfigFile;
use crate::plan::Plan;
use crate::planning::plan_recorded;
use crate::source::ModelSource;
use crate::tensors::Header;

/// A linear layer of a checkpoint, and the layers of the decoder that its outputs are.
///
/// Outputs are in the order of the decoder: all queries, then all keys, then all values, heads one after the other, each
/// head with its rotating halves apart, whatever the order in the file. Factors of a weight do not depend on the order of
/// its outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointLinear {
    /// Name and sizes.
    pub shape: LinearShape,
    /// The layers of the decoder and their outputs, one after the other.
    pub targets: Vec<(LinearPlace, usize)>,
}

/// Every linear layer of the blocks of a model, in the order of the blocks.
///
/// # Errors
///
/// [`ConvertError::Rules`] when the rules make one of several tensors, or do not say where a layer of the decoder comes
/// from; errors of a converted model's record.
pub fn checkpoint_linears(source: &ModelSource) -> Result<Vec<CheckpointLinear>, ConvertError> {
    let decoder = &source.model_config().decoder;
    match source.plan() {
        Some(plan) => linears(plan, decoder),
        None => linears(&recorded_plan(source.dir())?.0, decoder),
    }
}

/// The plan that a converted model was made by, and the headers of its source.
pub(super) fn recorded_plan(dir: &Path) -> Result<(Plan, Vec<Header>), ConvertError> {
    let model = ConvertedModel::open(dir)?;
    let record = model.record();
    let path = dir.join(crate::checkpoint::RECORD);
    let format = |problem| ConvertError::Format { path: path.clone(), problem: Box::new(problem) };
    let headers: Result<Vec<Header>, _> = record.files.iter().map(|file| Header::parse(file.header.clone())).collect();
    let headers = headers.map_err(format)?;
    let config = ConfigFile::open(&dir.join(SOURCE_CONFIG))?;
    crate::export::check_version(architecture(&config)?, record, &path)?;
    Ok((plan_recorded(dir, &config, &record.prefix, record.head, &headers)?, headers))
}

fn linears(plan: &Plan, decoder: &DecoderConfig) -> Result<Vec<CheckpointLinear>, ConvertError> {
    let fail = |problem| Err(ConvertError::Rules { rules: plan.architecture.id, problem });
    let mut linears: Vec<CheckpointLinear> = Vec::new();
    for step in &plan.steps {
        let place = |name: &str| name.strip_suffix(".weight").and_then(|name| name.parse::<LinearPlace>().ok());
        let places: Vec<LinearPlace> = step.targets.iter().filter_map(|target| place(&target.name)).collect();
        if places.is_empty() {
            continue;
        }
        let [tensor] = step.sources.as_slice() else {
            return fail(format!("`{}` is made of several tensors", places[0]));
        };
        if places.len() != step.targets.len() {
            return fail(format!("`{}` becomes more than linear layers", tensor.name));
        }
        // Those of one input each: a tensor that holds all experts is as many layers as there are experts.
        let groups: Vec<&[LinearPlace]> = places.chunk_by(|a, b| a.role.input() == b.role.input()).collect();
        for (number, places) in groups.iter().enumerate() {
            let shapes = places.iter().filter_map(|place| decoder.linear_shape(*place)).collect::<Vec<_>>();
            let inputs = shapes.first().map_or(0, |[inputs, _]| *inputs);
            if shapes.len() != places.len() || shapes.iter().any(|shape| shape[0] != inputs) {
                return fail(format!("`{}` becomes more than linear layers of one input", tensor.name));
            }
            // Codes have the path of the numbers they stand for.
            let ends = [".weight", "_blocks"].into_iter();
            let path = ends.filter_map(|end| tensor.name.strip_suffix(end)).next().unwrap_or(&tensor.name);
            let path = if groups.len() > 1 { format!("{path}.{number}") } else { path.to_owned() };
            let targets: Vec<(LinearPlace, usize)> =
                places.iter().copied().zip(shapes.iter().map(|shape| shape[1])).collect();
            // All of them, or none: beside what has no letter nothing is split.
            let fused = targets.iter().map(|(place, width)| Some((letter(decoder, place.role)?, *width)));
            let fused = fused.collect::<Option<Vec<(char, usize)>>>().unwrap_or_default();
            linears.push(CheckpointLinear {
                shape: LinearShape {
                    path,
                    inputs,
                    outputs: targets.iter().map(|(_, width)| width).sum(),
                    bias: decoder.linear_bias(places[0].role),
                    fused,
                },
                targets,
            });
        }
    }
    let known: HashSet<LinearPlace> =
        linears.iter().flat_map(|linear| &linear.targets).map(|(place, _)| *place).collect();
    if let Some(place) = decoder.linear_places().into_iter().find(|place| !known.contains(place)) {
        return fail(format!("no tensor becomes `{place}`"));
    }
    linears.sort_by_key(|linear| linear.targets[0].0);
    Ok(linears)
}

/// What lies along the outputs; nothing for layers that no one splits.
fn letter(decoder: &DecoderConfig, role: LinearRole) -> Option<char> {
    match (role, role.mlp_part()) {
        // What rotates of the queries stands behind what does not: heads do not lie one after the other.
        (LinearRole::Query, _) => decoder.latent.is_none().then_some('q'),
        (LinearRole::Key, _) => Some('k'),
        (LinearRole::Value, _) => Some('v'),
        (_, Some(MlpPart::Gate)) => Some('g'),
        (_, Some(MlpPart::Up)) => Some('u'),
        (LinearRole::Output | LinearRole::AttentionGate, _) | (_, Some(MlpPart::Down) | None) => None,
    }
}
