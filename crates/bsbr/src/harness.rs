//! What other measuring programs of the repository share with this one: arms run in turn, budgets of time, memory by processes of
//! their own, tables and pictures. No promise is made beyond that.

pub use crate::{
    bench::{
        DECODE_TOKENS, Phase, Subject,
        budget::{Budget, Cost, History, Rounds, divide},
        machine::{Machine, Versions, machine, versions},
        measure::{Contender, Samples, interleaved},
        memory::{Peak, measure as measure_memory, peak_of},
        session::duration,
        statistics::{LARGEST_EXPONENT_SPREAD, Summary, exponent, exponent_spread, upper_half},
        sweep::Lengths,
        sync,
    },
    builtin::or_heldout,
    commands::bench::write,
    device::DeviceArgs,
    output::{bytes, grouped, note, result, table},
    plot::{Axis, Color, Line, Panel, caption, picture, thousands, trimmed},
    report::{Forms, ReportArgs, Rows, drawable, writable},
    running::sha256,
};
