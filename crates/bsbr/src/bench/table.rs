//! A report as text: one table for each part and phase.

use burn::tensor::DType;

use super::{
    Arm, Part, Phase,
    attention::Shape,
    report::{Fit, Quantity, Report, Row},
    session::duration,
};
use crate::output::{bytes, grouped, table};

/// The whole report.
pub(crate) fn text(report: &Report) -> String {
    let mut blocks = vec![head(report)];
    for part in [Part::Attention, Part::Model] {
        for phase in [Phase::Prefill, Phase::Decode, Phase::Training] {
            let rows: Vec<&Row> = report.rows.iter().filter(|row| (row.part, row.phase) == (part, phase)).collect();
            if rows.is_empty() {
                continue;
            }
            let (header, cells) = cells(&rows);
            blocks.push(format!("{}\n\n{}", title(report, part, phase), table(&header, &cells)));
            blocks.extend(below(report, &rows));
        }
    }
    blocks.join("\n\n")
}

/// What is said below the rows of one part and phase.
pub(crate) fn below(report: &Report, rows: &[&Row]) -> Vec<String> {
    let Some(first) = rows.first() else { return Vec::new() };
    let fits = report.fits.iter().filter(|fit| (fit.part, fit.phase) == (first.part, first.phase));
    let fits: Vec<&Fit> = fits.collect();
    let kinds = [(Quantity::Time, "time"), (Quantity::Memory, "extra memory")];
    left_out(rows).into_iter().chain(kinds.into_iter().filter_map(|(of, name)| exponents(&fits, of, name))).collect()
}

/// Machine, versions and settings.
pub(crate) fn head(report: &Report) -> String {
    let (machine, versions, settings) = (&report.machine, &report.versions, &report.settings);
    let memory = machine.memory_bytes.map_or_else(String::new, |memory| format!(", {}", bytes(memory)));
    let commit = versions.commit.as_ref().map_or_else(String::new, |commit| format!(" at {commit}"));
    let mut lines = vec![
        format!("{}, {} cores{memory}, {}", machine.cpu, machine.cores, machine.os),
        format!(
            "bsbr {}{commit}, burn {} on {} with {} threads, {}",
            versions.tool, versions.burn, settings.device, settings.threads, versions.rustc
        ),
    ];
    if let Some(opponent) = &report.opponent {
        let transformers = opponent.transformers.as_ref().map_or_else(String::new, |v| format!(", transformers {v}"));
        lines.push(format!("torch {}{transformers} with {} threads", opponent.torch, opponent.threads));
    }
    if let Some(llama) = &report.llama_cpp {
        let (model, size) = (&llama.model, crate::output::bytes(llama.model_bytes));
        lines.push(format!(
            "llama.cpp {} on {} with {} threads: {model}, {size}, cache in {}",
            llama.build, llama.backends, llama.threads, llama.cache
        ));
    }
    if let Some(gemm) = &report.gemm {
        let size = gemm.size;
        let rate = gemm.gflop_per_second;
        lines.push(format!("matrix products of {size} x {size} in f32: {rate:.0} GFLOP/s (\"gemm\")"));
    }
    if !report.settings.attention_lengths.is_empty() {
        lines.push(format!("attention alone is measured {}", report.settings.data));
    }
    lines.extend(report.differences.iter().map(|difference| {
        format!(
            "outputs of {} and {} at {} tokens: largest difference {:.1e} of the largest number, root mean square {:.1e}",
            difference.arm.name(),
            difference.from.name(),
            grouped(difference.tokens as u64),
            difference.largest,
            difference.rms
        )
    }));
    lines.join("\n")
}

/// What was measured when.
pub(crate) fn title(report: &Report, part: Part, phase: Phase) -> String {
    let what = match part {
        Part::Attention => {
            let shape = &report.settings.shape;
            format!(
                "Attention alone, batch {}, {} heads on {} KV heads of {}, {}",
                shape.batch,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                name(shape.dtype)
            )
        }
        Part::Model => {
            let model = report.settings.model.clone().unwrap_or_default();
            match report.settings.shape.batch {
                1 => model,
                batch => format!("{model}, {batch} texts up to this length"),
            }
        }
    };
    let when = match phase {
        Phase::Prefill => "reading a text",
        Phase::Decode => "one token behind a text",
        Phase::Training => "reading a text and the gradients of queries, keys and values",
    };
    let Shape { dtype, stored, .. } = report.settings.shape;
    let cached = if stored == dtype { String::new() } else { format!(", caches in {}", name(stored)) };
    format!("{what}{cached}: {when}")
}

fn name(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}

/// Names of columns and a row to a row, without the columns that nothing is known for.
pub(crate) fn cells(rows: &[&Row]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    type Column = (&'static str, fn(&Row, &[&Row]) -> String);
    let columns: [Column; 19] = [
        ("arm", |row, _| row.arm.name().to_owned()),
        ("tokens", |row, _| grouped(row.tokens as u64)),
        ("median", |row, _| row.seconds.map_or_else(|| "left out".into(), |s| duration(s.median))),
        ("quartiles", |row, _| {
            let quartiles = row.seconds.filter(|_| row.samples.len() > 1);
            quartiles.map_or_else(String::new, |s| {
                format!("{} - {}", duration(s.lower_quartile), duration(s.upper_quartile))
            })
        }),
        ("min", |row, _| row.seconds.map_or_else(String::new, |s| duration(s.min))),
        ("n", |row, _| row.seconds.map_or_else(String::new, |_| row.samples.len().to_string())),
        ("tokens/s", |row, _| row.tokens_per_second.map_or_else(String::new, rate)),
        ("against dense", |row, rows| against(row, rows, Arm::Dense)),
        (
            "against burn",
            |row, rows| if row.phase == Phase::Training { against(row, rows, Arm::Burn) } else { String::new() },
        ),
        ("of gemm", |row, _| row.share_of_gemm.map_or_else(String::new, percent)),
        ("keys chosen", |row, _| row.retrieved.map_or_else(String::new, |keys| format!("{:.1}", keys.mean))),
        ("extra memory", |row, _| row.memory.map_or_else(String::new, |memory| bytes(memory.extra_bytes))),
        ("of burn's", of_burns_memory),
        ("of K and V", |row, _| row.memory.map_or_else(String::new, |memory| percent(memory.share_of_kv()))),
        ("kept", |row, _| row.kept_bytes.map_or_else(String::new, bytes)),
        ("perplexity", |row, _| row.quality.as_ref().map_or_else(String::new, |q| format!("{:.3}", q.perplexity))),
        ("change", |row, _| {
            let quality = row.quality.as_ref().filter(|quality| quality.kl.is_some());
            quality
                .map_or_else(String::new, |q| format!("{:+.2} %", 100.0 * (q.perplexity / q.original_perplexity - 1.0)))
        }),
        ("top-1, KL", |row, _| match row.quality.as_ref().map(|quality| (quality.top1, quality.kl)) {
            Some((Some(top1), Some(kl))) => format!("{:.2} %, {kl:.4}", 100.0 * top1),
            _ => String::new(),
        }),
        ("notes", |row, _| row.notes.join("; ")),
    ];
    let mut header = Vec::new();
    let mut cells: Vec<Vec<String>> = vec![Vec::new(); rows.len()];
    for (name, of) in columns {
        let column: Vec<String> = rows.iter().map(|row| of(row, rows)).collect();
        if column.iter().any(|cell| !cell.is_empty()) {
            header.push(name);
            cells.iter_mut().zip(column).for_each(|(row, cell)| row.push(cell));
        }
    }
    (header, cells)
}

/// Why rows were left out, a line for each reason.
fn left_out(rows: &[&Row]) -> Option<String> {
    // Arms with a reason in common at a length, then lengths with the same arms and reason.
    let mut points: Vec<(&str, Vec<&str>, usize)> = Vec::new();
    for row in rows {
        let Some(reason) = row.left_out.as_deref() else { continue };
        match points.iter_mut().find(|(other, _, tokens)| (*other, *tokens) == (reason, row.tokens)) {
            Some((_, arms, _)) => arms.push(row.arm.name()),
            None => points.push((reason, vec![row.arm.name()], row.tokens)),
        }
    }
    let mut lines: Vec<(&str, Vec<&str>, Vec<String>)> = Vec::new();
    for (reason, arms, tokens) in points {
        let tokens = grouped(tokens as u64);
        match lines.iter_mut().find(|(other, others, _)| (*other, others) == (reason, &arms)) {
            Some((_, _, lengths)) => lengths.push(tokens),
            None => lines.push((reason, arms, vec![tokens])),
        }
    }
    let line = |(reason, arms, lengths): (&str, Vec<&str>, Vec<String>)| {
        format!("left out: {} at {} tokens: {reason}", arms.join(", "), lengths.join("; "))
    };
    (!lines.is_empty()).then(|| lines.into_iter().map(line).collect::<Vec<_>>().join("\n"))
}

/// The row of another arm at the same length.
fn beside<'a>(row: &Row, rows: &[&'a Row], arm: Arm) -> Option<&'a Row> {
    rows.iter().copied().find(|other| other.arm == arm && other.tokens == row.tokens).filter(|_| row.arm != arm)
}

/// How many times as fast as another arm at the same length.
fn against(row: &Row, rows: &[&Row], arm: Arm) -> String {
    let medians = beside(row, rows, arm).and_then(|other| other.seconds).zip(row.seconds);
    medians.map_or_else(String::new, |(other, own)| format!("{:.2} x", other.median / own.median))
}

/// Extra memory of training as a share of that of burn's own form, whose scores are tokens x tokens.
fn of_burns_memory(row: &Row, rows: &[&Row]) -> String {
    let burn = beside(row, rows, Arm::Burn).filter(|_| row.phase == Phase::Training);
    match burn.and_then(|burn| burn.memory).zip(row.memory) {
        Some((burn, own)) => percent(own.extra_bytes as f64 / burn.extra_bytes.max(1) as f64),
        None => String::new(),
    }
}

fn exponents(fits: &[&Fit], of: Quantity, name: &str) -> Option<String> {
    let shown: Vec<String> = fits
        .iter()
        .filter(|fit| fit.of == of)
        .map(|fit| {
            let (from, to) = (grouped(fit.from as u64), grouped(fit.to as u64));
            format!("{} {:.2} ({from} to {to})", fit.arm.name(), fit.exponent)
        })
        .collect();
    (!shown.is_empty()).then(|| format!("{name} grows with the power: {}", shown.join(", ")))
}

fn percent(share: f64) -> String {
    if share < 0.0995 { format!("{:.1} %", 100.0 * share) } else { format!("{:.0} %", 100.0 * share) }
}

fn rate(rate: f64) -> String {
    if rate < 99.5 { format!("{rate:.1}") } else { grouped(rate as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(arm: Arm, seconds: f64) -> Row {
        let mut row = Row::new(Part::Attention, Phase::Prefill, arm, 32_768);
        row.measured(vec![seconds], 32_768, &[]);
        row
    }

    #[test]
    fn a_row_left_out_says_why_and_empty_columns_are_not_shown() {
        let mut left_out = Row::new(Part::Attention, Phase::Prefill, Arm::Burn, 32_768);
        left_out.left_out = Some("no time: would take about 80.0 s".into());
        let (dense, fast) = (measured(Arm::Dense, 9.0), measured(Arm::Bsbr, 1.5));
        let rows = [&fast, &dense, &left_out];
        let (header, cells) = cells(&rows);
        let shown = table(&header, &cells);
        let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
        assert_eq!(lines[0], ["", "arm", "tokens", "median", "min", "n", "tokens/s", "against dense", ""]);
        assert_eq!(lines[2], ["", "bsbr", "32,768", "1.50 s", "1.50 s", "1", "21,845", "6.00 x", ""]);
        assert_eq!(lines[3], ["", "dense", "32,768", "9.00 s", "9.00 s", "1", "3,640", "", ""]);
        assert_eq!(lines[4], ["", "burn", "32,768", "left out", "", "", "", "", ""]);
        let why = super::left_out(&rows).unwrap();
        assert_eq!(why, "left out: burn at 32,768 tokens: no time: would take about 80.0 s");
    }

    #[test]
    fn numbers_have_few_digits() {
        assert_eq!([0.0123, 0.5, 12.0].map(percent), ["1.2 %", "50 %", "1200 %"]);
        assert_eq!([3.12159, 99.6, 123_456.7].map(rate), ["3.1", "99", "123,456"]);
    }
}
