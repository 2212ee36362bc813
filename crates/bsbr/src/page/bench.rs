//! `bsbr bench` as a page: time and memory by length, where one overtakes the other, and every row.

use serde_json::Value;

use super::{Page, cards, figure, section};
use crate::bench::{
    Part, Phase,
    plot::{headline, panels},
    report::Report,
    table,
};

/// The page of a report; `data` is its JSON.
pub(crate) fn page(report: &Report, data: &Value) -> String {
    let panels = panels(&report.rows);
    let mut body = section(
        "By length",
        "Both axes are logarithmic: a straight line of twice the slope grows with the square. Bars reach from the lower to the upper \
         quartile of the samples. A break-even is the length from which on bsbr takes less time than full attention (dense); \
         between two lengths it is read off straight lines. Memory below 100 kB is drawn as that.",
        &cards(&panels.iter().map(figure).collect::<Vec<_>>()),
    );
    for part in [Part::Attention, Part::Model] {
        for phase in [Phase::Prefill, Phase::Decode, Phase::Training] {
            let rows: Vec<_> = report.rows.iter().filter(|row| (row.part, row.phase) == (part, phase)).collect();
            if rows.is_empty() {
                continue;
            }
            let title = table::title(report, part, phase);
            let (header, cells) = table::cells(&rows);
            let mut content = super::table(&title, &header, &cells);
            for line in table::below(report, &rows) {
                content.push_str(&format!("<p>{}</p>\n", crate::markup::escaped(&line)));
            }
            body.push_str(&section(&title, "", &content));
        }
    }
    let lead = std::iter::once(headline(report)).chain(table::head(report).lines().map(str::to_owned)).collect();
    Page { title: "Time and memory by length", lead, body, data, style: "", script: "" }.html()
}
