//! Linear layers rewritten into parts that share low-rank bases across layers.

mod compress;
mod config;
mod error;
mod linear;
mod moments;
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
    CalibrationMode, CalibrationSettings, Objective, RankAllocation, Refit, RefitSettings, Ridge, Share, Split,
    SplitConfig, WeightType, Weighting,
};
pub use error::SplitError;
pub use linear::{Factors, Run, ShareLinear, ShareState, SplitLinear, Tap};
pub use moments::{Moments, MomentsFile, MomentsHeader, MomentsWriter, PairedMoments};
pub use plan::{LinearShape, Plan, PlanWarning, PlannedGroup, PlannedLinear, PlannedPart, plan};
pub use rank::{allocate, rank_for};
pub use report::{Decomposition, GroupReport, MemberReport, RefitOutcome, RefitReport};
pub use saved::{SavedGroup, SavedMember, SavedPart, SavedSplit, SavedTarget, dense_of_stored, stored_tensors};
pub use stream::{
    AnchoredSettings, BlockModel, CompressedGroup, Window, calibrate, choose_windows, compress_alone,
    compress_anchored, member_weight, moments_entries, read_moments, spectrum,
};
