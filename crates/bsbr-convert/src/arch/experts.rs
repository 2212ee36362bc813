//! Mixtures of experts: the layouts they have in files, and the keys that describe them.

use bsbr_model::{ExpertsConfig, RouterConfig, RouterKind, SharedExpert};

use super::keys;
use super::names::{copy_if, map_if};
use crate::ConvertError;
use crate::json::ConfigFile;
use crate::rules::Dim::{ExpertSize, Experts, Hidden, Mul, N, SharedSize};
use crate::rules::Op::{Split, Transpose, Unstack};
use crate::rules::When::{self, All, Flag, Not};
use crate::rules::{Layout, Op, Rule, SourceModel};

/// The flag of files that hold each matrix of all experts of a layer in one tensor, as transformers has them in memory.
pub(super) const FUSED: &str = "fused_experts";

/// Where its tensors are, in whichever way the architecture names them in the other layout.
pub(super) const LAYOUTS: &[Layout] = &[FUSED_LAYOUT];
const FUSED_LAYOUT: Layout = Layout { flag: FUSED, tensor: GATE_UP_PROJ, shape: None };
const GATE_UP_PROJ: &str = "{p}layers.{i}.mlp.experts.gate_up_proj";
const DOWN_PROJ: &str = "{p}layers.{i}.mlp.experts.down_proj";

/// The flag of such files whose matrices are `[in, out]`; only shapes tell them from others.
const TRANSPOSED: &str = "transposed_experts";
pub(super) const LAYOUTS_OF_EITHER_ORDER: &[Layout] = &[
    FUSED_LAYOUT,
    Layout { flag: TRANSPOSED, tensor: GATE_UP_PROJ, shape: Some(&[Experts, Hidden, Mul(&N(2), &ExpertSize)]) },
];

pub(super) const EACH: When = All(&[When::Experts, Not(FUSED)]);
pub(super) const TOGETHER: When = All(&[When::Experts, Flag(FUSED)]);

pub(super) const GATE: &str = "layers.{i}.mlp.experts.{e}.gate.weight";
pub(super) const UP: &str = "layers.{i}.mlp.experts.{e}.up.weight";
pub(super) const DOWN: &str = "layers.{i}.mlp.experts.{e}.down.weight";
const ROUTER: &str = "layers.{i}.mlp.router.weight";
pub(super) const CORRECTION: &str = "layers.{i}.mlp.router.correction";

pub(super) const UNSTACK: Op = Unstack { count: Experts };
/// `[experts, gate and up, hidden]`, the rows of the gate first.
pub(super) const GATE_UP: Op = Split { groups: N(1), parts: &[ExpertSize, ExpertSize] };

/// An entry of a list that holds one.
pub(super) const ONLY: Op = Unstack { count: N(1) };

/// `[experts, gate and up, hidden]` and `[experts, hidden, inner]` under the names that transformers has in memory.
const STACKED: [Rule; 2] = [
    map_if(GATE_UP_PROJ, &[GATE, UP], &[UNSTACK, GATE_UP], TOGETHER),
    map_if(DOWN_PROJ, &[DOWN], &[UNSTACK], TOGETHER),
];

/// The experts of Qwen and of those after it.
pub(super) const EXPERTS: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.experts.{e}.gate_proj.weight", &[GATE], EACH),
    copy_if("{p}layers.{i}.mlp.experts.{e}.up_proj.weight", &[UP], EACH),
    copy_if("{p}layers.{i}.mlp.experts.{e}.down_proj.weight", &[DOWN], EACH),
    STACKED[0],
    STACKED[1],
];

/// Those of Qwen3-VL, of either order, in one tensor always.
pub(super) const EXPERTS_OF_EITHER_ORDER: &[Rule] = &[
    map_if(GATE_UP_PROJ, &[GATE, UP], &[UNSTACK, GATE_UP], All(&[When::Experts, Not(TRANSPOSED)])),
    map_if(DOWN_PROJ, &[DOWN], &[UNSTACK], All(&[When::Experts, Not(TRANSPOSED)])),
    map_if(GATE_UP_PROJ, &[GATE, UP], &[Transpose, UNSTACK, GATE_UP], All(&[When::Experts, Flag(TRANSPOSED)])),
    map_if(DOWN_PROJ, &[DOWN], &[Transpose, UNSTACK], All(&[When::Experts, Flag(TRANSPOSED)])),
];

/// Their router.
pub(super) const MLP_GATE: &[Rule] = &[copy_if("{p}layers.{i}.mlp.gate.weight", &[ROUTER], When::Experts)];

/// The same with a wrapper of its own.
pub(super) const MLP_GATE_WG: &[Rule] = &[copy_if("{p}layers.{i}.mlp.gate.wg.weight", &[ROUTER], When::Experts)];

/// The experts of Mixtral and their router.
pub(super) const MIXTRAL_EXPERTS: &[Rule] = &[
    copy_if("{p}layers.{i}.block_sparse_moe.gate.weight", &[ROUTER], EACH),
    copy_if("{p}layers.{i}.block_sparse_moe.experts.{e}.w1.weight", &[GATE], EACH),
    copy_if("{p}layers.{i}.block_sparse_moe.experts.{e}.w3.weight", &[UP], EACH),
    copy_if("{p}layers.{i}.block_sparse_moe.experts.{e}.w2.weight", &[DOWN], EACH),
    STACKED[0],
    STACKED[1],
];

/// Their router in memory; Phi's has another name.
pub(super) const MIXTRAL_GATE: &[Rule] = &[copy_if("{p}layers.{i}.mlp.gate.weight", &[ROUTER], TOGETHER)];
pub(super) const PHI_GATE: &[Rule] = &[copy_if("{p}layers.{i}.mlp.router.weight", &[ROUTER], TOGETHER)];

/// What MiniMax adds for the choice.
pub(super) const MIXTRAL_CORRECTION: &[Rule] = &[
    copy_if("{p}layers.{i}.block_sparse_moe.e_score_correction_bias", &[CORRECTION], EACH),
    copy_if("{p}layers.{i}.mlp.e_score_correction_bias", &[CORRECTION], TOGETHER),
];

/// The experts of Granite, always in one tensor, and their router.
pub(super) const GRANITE_EXPERTS: &[Rule] = &[
    copy_if("{p}layers.{i}.block_sparse_moe.router.layer.weight", &[ROUTER], When::Experts),
    map_if("{p}layers.{i}.block_sparse_moe.input_linear.weight", &[GATE, UP], &[UNSTACK, GATE_UP], When::Experts),
    map_if("{p}layers.{i}.block_sparse_moe.output_linear.weight", &[DOWN], &[UNSTACK], When::Experts),
];

/// Granite's shared expert, beside the others.
pub(super) const GRANITE_SHARED: &[Rule] = &[
    map_if(
        "{p}layers.{i}.shared_mlp.input_linear.weight",
        &["layers.{i}.mlp.shared.gate.weight", "layers.{i}.mlp.shared.up.weight"],
        &[Split { groups: N(1), parts: &[SharedSize, SharedSize] }],
        SHARED,
    ),
    copy_if("{p}layers.{i}.shared_mlp.output_linear.weight", &["layers.{i}.mlp.shared.down.weight"], SHARED),
];

/// The flag of models with a shared expert.
pub(super) const SHARED_EXPERT: &str = "shared_expert";
const SHARED: When = All(&[When::Experts, Flag(SHARED_EXPERT)]);

/// A shared expert under some name.
macro_rules! shared_expert {
    ($name:literal) => {
        &[
            copy_if(
                concat!("{p}layers.{i}.mlp.", $name, ".gate_proj.weight"),
                &["layers.{i}.mlp.shared.gate.weight"],
                SHARED,
            ),
            copy_if(
                concat!("{p}layers.{i}.mlp.", $name, ".up_proj.weight"),
                &["layers.{i}.mlp.shared.up.weight"],
                SHARED,
            ),
            copy_if(
                concat!("{p}layers.{i}.mlp.", $name, ".down_proj.weight"),
                &["layers.{i}.mlp.shared.down.weight"],
                SHARED,
            ),
        ]
    };
}

pub(super) const QWEN_SHARED: &[Rule] = shared_expert!("shared_expert");
pub(super) const DEEPSEEK_SHARED: &[Rule] = shared_expert!("shared_experts");
pub(super) const HUNYUAN_SHARED: &[Rule] = shared_expert!("shared_mlp");

pub(super) const QWEN_SHARED_GATE: &[Rule] =
    &[copy_if("{p}layers.{i}.mlp.shared_expert_gate.weight", &["layers.{i}.mlp.shared_gate.weight"], SHARED)];

/// The MLP of layers without experts.
pub(super) const DENSE_MLP: &[Rule] = &[
    copy_if("{p}layers.{i}.mlp.gate_proj.weight", &["layers.{i}.mlp.gate.weight"], When::Dense),
    copy_if("{p}layers.{i}.mlp.up_proj.weight", &["layers.{i}.mlp.up.weight"], When::Dense),
    copy_if("{p}layers.{i}.mlp.down_proj.weight", &["layers.{i}.mlp.down.weight"], When::Dense),
];

/// Keys, the first of them the usual one, and the default of the class; `None` where the key is needed.
pub(super) type SizeKey = (&'static [&'static str], Option<usize>);

/// Where an architecture says how many experts there are, how many a token goes through, and how wide they are.
pub(super) struct ExpertKeys {
    pub(super) count: SizeKey,
    pub(super) chosen: SizeKey,
    pub(super) size: SizeKey,
}

/// Softmax over all; the weights of those chosen are normalised.
pub(super) const NORMALISED_SOFTMAX: RouterConfig = RouterConfig {
    kind: RouterKind::Softmax,
    bias: false,
    correction: false,
    groups: None,
    normalised: Some(LEAST),
    scale: None,
    expert_scale: false,
    own_norm: false,
};

/// Less than the sum of the weights of any choice that means something.
pub(super) const LEAST: f64 = 1e-20;

/// Experts in every layer of `model`.
pub(super) fn read(
    config: &ConfigFile,
    model: &mut SourceModel,
    keys: &ExpertKeys,
    router: RouterConfig,
) -> Result<(), ConvertError> {
    let size = |(names, default): SizeKey| match default {
        Some(default) => Ok(keys::optional_usize_of(config, names)?.unwrap_or(default)),
        None => keys::usize_of(config, names),
    };
    let (count, chosen, intermediate_size) = (size(keys.count)?, size(keys.chosen)?, size(keys.size)?);
    let (shared, dense_layers) = (None, Vec::new());
    let experts = ExpertsConfig {
        count,
        chosen,
        intermediate_size,
        router,
        bias: false,
        shared,
        beside_mlp: false,
        dense_layers,
    };
    model.decoder.experts = Some(experts);
    model.flags.insert(SHARED_EXPERT, false);
    Ok(())
}

/// Gives every layer with experts one more, that every token goes through.
pub(super) fn share(model: &mut SourceModel, intermediate_size: usize, gate: bool) {
    if let Some(experts) = model.decoder.experts.as_mut().filter(|_| intermediate_size > 0) {
        experts.shared = Some(SharedExpert { intermediate_size, gate });
        model.flags.insert(SHARED_EXPERT, true);
    }
}

/// Leaves experts to the layers that `has` says.
pub(super) fn keep_in(model: &mut SourceModel, has: impl Fn(usize) -> bool) {
    let dense: Vec<usize> = (0..model.decoder.layers).filter(|&layer| !has(layer)).collect();
    if dense.len() == model.decoder.layers {
        model.decoder.experts = None;
    } else if let Some(experts) = &mut model.decoder.experts {
        experts.dense_layers = dense;
    }
}

/// `norm_topk_prob`: whether weights are normalised.
pub(super) fn read_normalised(config: &ConfigFile, default: bool) -> Result<Option<f64>, ConvertError> {
    Ok(config.bool_or("norm_topk_prob", default)?.then_some(LEAST))
}
