//! Linear layers rewritten into parts that share low-rank bases across layers.

mod compress;
mod config;
mod error;
mod moments;
mod plan;
mod rank;
mod report;
mod solve;

pub use compress::{
    Calibration, Group, GroupFactors, Member, SolveSettings, Spectrum, compress_group, group_spectrum, refit_member,
};
pub use config::{
    CalibrationMode, CalibrationSettings, Objective, RankAllocation, Refit, RefitSettings, Ridge, Share, Split,
    SplitConfig, WeightType, Weighting,
};
pub use error::SplitError;
pub use moments::{Moments, MomentsFile, MomentsHeader, MomentsWriter, PairedMoments};
pub use plan::{LinearShape, Plan, PlanWarning, PlannedGroup, PlannedLinear, PlannedPart, plan};
pub use rank::{allocate, rank_for};
pub use report::{Decomposition, GroupReport, MemberReport, RefitOutcome, RefitReport};
