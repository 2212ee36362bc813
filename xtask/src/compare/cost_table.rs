//! The comparison by cost as text.

use bsbr_zoo::{Family, Positions};

use super::report::{About, Cost, Quantity, Report, Row};
use bsbr::harness::{Phase, bytes, duration, grouped, table};

/// Machine, versions, and how the families were configured.
pub(crate) fn head(report: &Report) -> String {
    let (machine, versions) = (&report.machine, &report.versions);
    let memory = machine.memory_bytes.map_or_else(String::new, |memory| format!(", {}", bytes(memory)));
    let commit = versions.commit.as_ref().map_or_else(String::new, |commit| format!(" at {commit}"));
    format!(
        "{}, {} cores{memory}, {}\nbsbr {}{commit}, burn {} on {}, {}",
        machine.cpu, machine.cores, machine.os, versions.tool, versions.burn, report.device, versions.rustc
    )
}

/// How the families were made comparable.
pub(crate) fn families(report: &Report) -> String {
    let Some(first) = report.families.first() else { return String::new() };
    let state = format!("state at {} tokens", grouped(first.state_tokens as u64));
    let rows: Vec<Vec<String>> = report.families.iter().map(family).collect();
    let names = ["family", "parameters", "of standard", &state, "keys read exactly, at most", "reads"];
    let originals: Vec<Vec<String>> = report.families.iter().filter_map(beside_original).collect();
    let beside = match originals.as_slice() {
        [] => String::new(),
        _ => format!(
            "\n\n{}",
            table(&["family", "causal in the Python original", "otherwise there", "here"], &originals)
        ),
    };
    let config = &first.decoder;
    format!(
        "Width {}, {} layers, {} heads, convolution of {}, perceptron of {} x {}, positions {}. Matched are parameters, not states: \
         what a family looks back on is what is compared.\n\n{}{beside}",
        config.width,
        config.layers,
        config.heads,
        config.short_convolution,
        config.mlp_factor,
        config.width,
        if config.positions == Positions::None { "none" } else { "rotary where a family rotates" },
        table(&names, &rows)
    )
}

fn beside_original(about: &About) -> Option<Vec<String>> {
    let original = about.original?;
    let causal = if original.causal { "yes" } else { "no" };
    Some(vec![about.family.to_string(), causal.into(), original.there.into(), original.here.into()])
}

fn family(about: &About) -> Vec<String> {
    vec![
        about.family.to_string(),
        grouped(about.parameters as u64),
        format!("{:+.1} %", 100.0 * (about.parameters_of_standard - 1.0)),
        bytes(about.state_bytes),
        about.keys_read.map_or_else(|| "-".into(), |share| format!("{:.0} %", 100.0 * share)),
        reads(about),
    ]
}

/// What a token of this family looks back on.
fn reads(about: &About) -> String {
    let config = &about.decoder;
    match about.family {
        Family::Standard => "all tokens".into(),
        Family::Bsbr => {
            let a = &config.bsbr;
            format!(
                "own chunk of {} and {} before, {} sinks, at most {} keys by an index",
                a.chunk_size, a.local_chunks, a.sink_tokens, a.max_keys
            )
        }
        Family::Linear | Family::Delta => {
            format!("{} matrices of {} x {} a layer", config.heads, config.head_dim(), config.head_dim())
        }
        Family::Window => format!("the last {} tokens and {} sinks", config.window, config.sinks),
        Family::Hopfield => format!("all tokens, in {} steps", config.hopfield_steps),
        Family::Gau => {
            let (shared, inner) = (config.shared_width(), config.gau_width());
            format!("own chunk of {}, a matrix of {shared} x {inner} a layer", config.chunk_size)
        }
    }
}

/// Medians by length, a table for each quantity, then growth and what was left out.
pub(crate) fn text(cost: &Cost, families: &[Family]) -> String {
    type Of = fn(&Row) -> Option<String>;
    let prefill: Of = |row| median(row, Phase::Prefill);
    let decode: Of = |row| median(row, Phase::Decode);
    let memory: Of = |row| row.extra_bytes().map(bytes);
    let resident: Of = |row| row.memory.map(|memory| bytes(memory.peak));
    let state: Of = |row| row.state_bytes.map(bytes);
    let blocks = [
        ("Reading a text: median time", Phase::Prefill, prefill, Some(Quantity::Prefill)),
        ("One more token behind a text: median time", Phase::Decode, decode, Some(Quantity::Decode)),
        ("Resident memory of a process that reads a text, at its worst moment", Phase::Prefill, resident, None),
        ("Of it, what reading added", Phase::Prefill, memory, Some(Quantity::Memory)),
        ("State: bytes kept for the next token, room for growth included", Phase::Decode, state, Some(Quantity::State)),
    ];
    let mut text: Vec<String> = Vec::new();
    for (title, phase, of, quantity) in blocks {
        let mut header = vec!["tokens".to_owned()];
        header.extend(cost.lengths.iter().map(|&tokens| grouped(tokens as u64)));
        header.extend(quantity.map(|_| "grows with".to_owned()));
        let mut cells = Vec::new();
        for &family in families {
            let mut row = vec![family.to_string()];
            for &tokens in &cost.lengths {
                let found = cost.rows.iter().find(|row| (row.family, row.tokens, row.phase) == (family, tokens, phase));
                row.push(found.map_or_else(String::new, |row| match (&row.left_out, of(row)) {
                    (Some(_), _) => "left out".into(),
                    (None, value) => value.unwrap_or_else(|| "-".into()),
                }));
            }
            if let Some(quantity) = quantity {
                let fit = cost.fits.iter().find(|fit| (fit.family, fit.of) == (family, quantity));
                row.push(fit.map_or_else(|| "-".into(), |fit| format!("{:.2}", fit.exponent)));
            }
            cells.push(row);
        }
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        text.push(format!("{title}\n\n{}", table(&header, &cells)));
    }
    let mut notes = vec![format!(
        "Medians of up to {} runs after {} untimed, the families in turn, {} threads; \"grows with\" is the power of the length, \
         fitted over the longer half of the lengths.",
        cost.runs, cost.warmup, cost.threads
    )];
    let noisy: Vec<String> = cost
        .rows
        .iter()
        .filter(|row| !row.notes.is_empty())
        .map(|row| format!("{} {} at {}: {}", row.family, row.phase.name(), row.tokens, row.notes.join("; ")))
        .collect();
    if !noisy.is_empty() {
        notes.push(format!("Interquartile ranges above 15 % of the median, and other notes: {}.", noisy.join(", ")));
    }
    for row in &cost.rows {
        if let Some(reason) = &row.left_out {
            notes.push(format!("left out: {} {} at {} tokens: {reason}", row.family, row.phase.name(), row.tokens));
        }
    }
    text.push(notes.join("\n"));
    text.join("\n\n")
}

fn median(row: &Row, phase: Phase) -> Option<String> {
    row.seconds.filter(|_| row.phase == phase).map(|seconds| duration(seconds.median))
}
