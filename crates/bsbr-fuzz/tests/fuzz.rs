//! Runs the targets: all of them for a few seconds, or those named for as long as it is said.

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bsbr_fuzz::{Limits, TARGETS, drive, regressions};

/// Time for each target unless said otherwise.
const TIME: Duration = Duration::from_secs(4);

fn main() -> ExitCode {
    let mut limits = Limits { runs: u64::MAX, time: TIME, seed: 1, trace: false };
    let (mut names, mut arguments) = (Vec::new(), std::env::args().skip(1));
    while let Some(argument) = arguments.next() {
        let mut number = |what: &str| {
            let value = arguments.next().and_then(|value| value.parse().ok());
            value.unwrap_or_else(|| panic!("{what} takes a number"))
        };
        match argument.as_str() {
            "--runs" => (limits.runs, limits.time) = (number("--runs"), Duration::MAX),
            "--seconds" => limits.time = Duration::from_secs(number("--seconds")),
            "--seed" => limits.seed = number("--seed"),
            "--trace" => limits.trace = true,
            "--test-threads" => drop(arguments.next()),
            // What a test runner is given besides.
            flag if flag.starts_with('-') => {}
            _ => names.push(argument),
        }
    }
    // A panic is what is looked for: what it says stands in the report.
    std::panic::set_hook(Box::new(|_| {}));
    let faults = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults");
    let mut failed = false;
    for target in
        TARGETS.iter().filter(|target| names.is_empty() || names.iter().any(|name| target.name.contains(name)))
    {
        let done = regressions(target).and_then(|corpus| Ok((corpus, drive(target, limits, &faults)?)));
        match done {
            Ok((corpus, report)) => println!(
                "{}: {corpus} of the corpus and {} runs, {} answers, the longest took {:.1} ms, peak memory {} MB",
                target.name,
                report.runs,
                report.answers,
                report.longest.as_secs_f64() * 1e3,
                report.peak >> 20
            ),
            Err(fault) => {
                failed = true;
                println!("{}", fault.keep(target.name, &faults));
            }
        }
    }
    ExitCode::from(u8::from(failed))
}
