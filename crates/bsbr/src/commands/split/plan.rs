//! `bsbr split plan`.

use anyhow::Result;
use bsbr_splitlinear::{Form, Plan, PlannedGroup, RankAllocation};

use super::setup::SplitArgs;
use crate::{
    output::{self, grouped},
    record,
    report::{Forms, ReportArgs},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// Print the configuration made for the model as TOML instead
    #[arg(long, conflicts_with_all = ["json", "format", "output"])]
    print_config: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    args.report.check()?;
    let setup = args.split.resolve()?;
    if args.print_config {
        return output::result(toml::to_string(&setup.config)?.trim_end());
    }
    let (before, after) = (setup.plan.parameters_before(), setup.plan.parameters_after());
    let (all, _) = setup.source.parameter_counts();
    let warnings: Vec<String> = setup.plan.warnings().iter().map(ToString::to_string).collect();
    let mut lines = vec![setup.source.description(), String::new(), table(&setup.plan), String::new()];
    let share = |after: usize, before: usize| 100.0 * after as f64 / before.max(1) as f64;
    lines.push(format!(
        "linear layers: {} parameters, {} compressed ({:.2} % kept, {:.2} % removed)",
        grouped(before as u64),
        grouped(after as u64),
        share(after, before),
        100.0 - share(after, before)
    ));
    let whole = all - before + after;
    lines.push(format!(
        "whole model: {} parameters, {} compressed ({:.2} % kept)",
        grouped(all as u64),
        grouped(whole as u64),
        share(whole, all)
    ));
    lines.push(format!("multiplications: {:.2} times those of the dense layers", setup.plan.flop_ratio()));
    if setup.config.rank != RankAllocation::Uniform {
        lines.push("ranks are those of the same fraction kept of every group: compressing gives parameters to where they do most".to_owned());
    }
    lines.extend(setup.plan.excluded.iter().map(|name| format!("left as it is: {name}")));
    lines.extend(warnings.iter().map(|warning| format!("warning: {warning}")));
    args.report.emit(&Forms {
        table: &|| Ok(lines.join("\n")),
        json: &|| {
            Ok(serde_json::json!({
                "schema": "bsbr-split-plan/1",
                "about": record::about(&setup.source.description(), None),
                "model": setup.source.description(),
                "parameters": {
                    "model_before": all, "model_after": all - before + after, "before": before, "after": after,
                },
                "flop_ratio": setup.plan.flop_ratio(),
                "groups": setup.plan.groups,
                "warnings": warnings,
            }))
        },
        rows: Some(&|report| report["groups"].as_array().cloned().unwrap_or_default()),
    })
}

/// A line for the groups of a part that are alike.
fn table(plan: &Plan) -> String {
    let alike = |a: &PlannedGroup, b: &PlannedGroup| {
        (a.part(), a.members.len(), a.rank, a.outputs) == (b.part(), b.members.len(), b.rank, b.outputs)
    };
    let row = |groups: &[PlannedGroup]| {
        let group = &groups[0];
        let sum = |of: fn(&PlannedGroup) -> usize| grouped(groups.iter().map(of).sum::<usize>() as u64);
        vec![
            group.part().to_owned(),
            format!("{:?}", group.share).to_lowercase(),
            if group.form == Form::Pivoted { "pivoted" } else { "two-factor" }.to_owned(),
            group.inputs.to_string(),
            group.outputs.to_string(),
            groups.len().to_string(),
            group.members.len().to_string(),
            group.rank.map_or_else(|| "dense".to_owned(), |rank| rank.to_string()),
            sum(PlannedGroup::parameters_before),
            sum(PlannedGroup::parameters_after),
            format!("{:.2}", group.flop_ratio()),
        ]
    };
    let rows: Vec<Vec<String>> = plan.groups.chunk_by(alike).map(row).collect();
    let header =
        ["part", "shared", "form", "in", "out", "groups", "layers", "rank", "parameters", "compressed", "cost"];
    output::table(&header, &rows)
}
