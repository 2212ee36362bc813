//! Closed-form solutions.

use crate::{Group, GroupFactors, GroupReport, Member, RefitReport, SolveSettings, Spectrum, SplitError};

pub(crate) fn compress(_: &Group<'_>, _: &SolveSettings) -> Result<(GroupFactors, GroupReport), SplitError> {
    Err(SplitError::setting("x", "x", "x"))
}
pub(crate) fn spectrum(_: &Group<'_>, _: &SolveSettings) -> Result<Spectrum, SplitError> {
    Err(SplitError::setting("x", "x", "x"))
}
pub(crate) fn refit_member(
    _: &mut GroupFactors,
    _: usize,
    _: &Member<'_>,
    _: &SolveSettings,
) -> Result<RefitReport, SplitError> {
    Err(SplitError::setting("x", "x", "x"))
}
