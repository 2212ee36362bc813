#![doc = include_str!("../README.md")]
//!
//! # The crate
//!
//! Linear layers rewritten into parts that share low-rank bases across layers.
//!
//! A linear layer `y = x W` is cut into parts (the whole, queries, keys and values, or single heads), and the same part of
//! several layers becomes one basis for all of them and coefficients for each: `y = (x basis) coefficients`, or
//! `y = (x coefficients) basis` where the side of the outputs is shared. Which directions are kept is decided by what the
//! layers read on calibration text, in closed form and without an inverse. Where the factors are pivoted ([`Form`]) the
//! basis passes some inputs on as they are, so that a rank costs fewer parameters and multiplications than two factors.
//!
//! 1. [`SplitConfig`] says which layers are meant, how they are cut and grouped, and what fraction is kept.
//! 2. [`plan()`] turns it and the shapes of a model into groups and ranks, and refuses what does not fit. It needs no
//!    weights.
//! 3. [`Moments`] gather what each layer reads; [`MomentsWriter`] keeps them for any later fraction. [`PairedMoments`] do
//!    so for a model whose earlier layers are compressed already.
//! 4. [`group_spectrum`] and [`allocate`] move parameters to the groups that need them, at the same total;
//!    [`sensitivities`] measures what an error of each group does to what a model predicts.
//! 5. [`compress_group`] gives factors and a report, one group at a time.
//!
//! The crate depends on no model, downloads nothing and prints nothing. It never guesses: a pattern that matches nothing,
//! sizes that do not divide or numbers that are not finite are errors with a name. It never trusts a decomposition that
//! does not pass its checks, never keeps a refit that text which it has not seen does not favour, and never replaces
//! weights by factors that are no smaller.
//!
//! ```
//! use bsbr_splitlinear::{Calibration, Group, LinearShape, Member, Moments, SplitConfig, compress_group, plan};
//!
//! let config = SplitConfig::from_toml(
//!     r"
//!     block_pattern = 'h\.(\d+)'
//!     keep = 0.6
//!     [weight_types.fc]
//!     pattern = '.*\.c_fc$'
//!     ",
//! )?;
//! let path = |layer: usize| format!("h.{layer}.mlp.c_fc");
//! let shape = |layer| LinearShape { path: path(layer), inputs: 4, outputs: 6, bias: false, fused: Vec::new() };
//! let plan = plan(&config, &[shape(0), shape(1)])?;
//! let group = &plan.groups[0];
//!
//! // What two layers read: tokens x inputs; and their weights: inputs x outputs.
//! let mut inputs = [Moments::new(4), Moments::new(4)];
//! for (layer, moments) in inputs.iter_mut().enumerate() {
//!     let rows: Vec<f32> = (0..400).map(|i| ((i * i + i * layer) % 13) as f32 - 6.0).collect();
//!     moments.add_rows(&path(layer), &rows)?;
//! }
//! let weights = [1, 2].map(|seed| (0..24).map(|i| ((i * i * seed) % 7) as f32 - 3.0).collect::<Vec<f32>>());
//! let names = [path(0), path(1)];
//! let members: Vec<Member<'_>> = (0..2)
//!     .map(|i| Member {
//!         name: &names[i],
//!         weight: &weights[i],
//!         calibration: Calibration::Inputs(&inputs[i]),
//!         held_out: None,
//!     })
//!     .collect();
//! let (factors, report) = compress_group(
//!     &Group {
//!         name: &group.name,
//!         share: group.share,
//!         form: group.form,
//!         inputs: group.inputs,
//!         outputs: group.outputs,
//!         rank: group.rank.expect("these factors are smaller than the weights"),
//!         members: &members,
//!     },
//!     &config.solve_settings(),
//! )?;
//! assert_eq!((factors.basis.len(), factors.coefficients.len()), (4 * factors.rank, 2));
//! assert!(report.parameters_after < report.parameters_before && report.error < 0.5);
//! # Ok::<(), bsbr_splitlinear::SplitError>(())
//! ```

mod compress;
mod config;
mod error;
mod linear;
mod moments;
mod pivots;
mod plan;
mod rank;
mod report;
mod saved;
mod solve;
mod stream;

pub use compress::{
    Calibration, Group, GroupFactors, Member, SolveSettings, Spectrum, compress_group, group_spectrum, refit_member,
};
pub use config::{
    CalibrationMode, CalibrationSettings, Form, Objective, RankAllocation, Refit, RefitSettings, Ridge, Share, Split,
    SplitConfig, WeightType, Weighting,
};
pub use error::SplitError;
pub use linear::{Factors, Pivots, Run, ShareLinear, ShareState, SplitLinear, Tap};
pub use moments::{Moments, MomentsFile, MomentsHeader, MomentsWriter, PairedMoments};
pub use pivots::checked_pivots;
pub use plan::{GroupSize, LinearShape, Plan, PlanWarning, PlannedGroup, PlannedLinear, PlannedPart, plan};
pub use rank::allocate;
pub use report::{Decomposition, GroupReport, MemberReport, RefitOutcome, RefitReport};
pub use saved::{SavedGroup, SavedMember, SavedPart, SavedSplit, SavedTarget, StoredFactors, stored_tensors};
pub use stream::{
    AnchoredSettings, BlockModel, CompressedGroup, See, Window, calibrate, choose_windows, compress_alone,
    compress_anchored, held_out_divergence, member_weight, moments_entries, read_moments, sensitivities, spectrum,
};
