//! `bsbr inspect --attention` as a page: for a text, layer by layer and head by head, what each token reads.

use bsbr_model::{AttentionMap, HeadMap, LayerMap, SHARE};
use serde_json::Value;

use super::{
    Page, details,
    heat::{self, Cell},
    percent, section, table,
};
use crate::{markup::escaped, output::grouped};

/// A number of a head that the overview can show: its name in the page, what it is, and the number of each row.
type Measure = (&'static str, &'static str, fn(&HeadMap) -> &[u16]);

/// In the order they are offered.
const MEASURES: [Measure; 6] = [
    ("covered", "of full attention, held by the keys that are read exactly", |head| &head.covered),
    ("chosen", "held by keys that were chosen", |head| &head.chosen),
    ("statistics", "held by what counts through statistics", |head| &head.statistics),
    ("near", "held by what is read whatever the text says", |head| &head.near),
    ("sink", "held by the sink, a number of the head that stands beside the keys", |head| &head.sink),
    ("apart", "by which parts differ from full attention", |head| &head.apart),
];

/// Those that the heads of a map have.
fn measures(map: &AttentionMap) -> impl Iterator<Item = &'static Measure> + Clone {
    let sinks = map.layers.iter().flat_map(|layer| &layer.heads).any(|head| !head.sink.is_empty());
    MEASURES.iter().filter(move |(name, _, _)| sinks || *name != "sink")
}

/// The page of a map; `data` is the JSON of the report, with the text.
pub(crate) fn page(model: &str, map: &AttentionMap, data: &Value) -> String {
    let body = [overview(map), one_head(), by_layer(map)].concat();
    let mut lead = vec![model.to_owned(), said(map)];
    if let Some(cut) = data["text"]["tokens"].as_u64().filter(|all| *all > map.tokens as u64) {
        lead.push(format!(
            "The text has {} tokens; what lies behind the first {} is left out.",
            grouped(cut),
            grouped(map.tokens as u64)
        ));
    }
    Page {
        title: "What each token reads",
        lead,
        body,
        data,
        style: include_str!("attention.css"),
        script: include_str!("attention.js"),
    }
    .html()
}

/// How much of the text is shown.
pub(crate) fn said(map: &AttentionMap) -> String {
    let (tokens, rows) = (map.tokens, map.rows.len());
    let part = if map.part == 1 { "single tokens".to_owned() } else { format!("parts of {} tokens", map.part) };
    let left = match tokens - rows {
        0 => "every token has a row".to_owned(),
        left => format!(
            "{} tokens have a row, at even distances; {} are left out",
            grouped(rows as u64),
            grouped(left as u64)
        ),
    };
    format!("{} tokens in {part}; {left}.", grouped(tokens as u64))
}

/// The mean of shares, from 0 to 1.
pub(crate) fn mean(shares: &[u16]) -> f64 {
    shares.iter().map(|&share| f64::from(share)).sum::<f64>() / (SHARE * shares.len().max(1) as f64)
}

fn overview(map: &AttentionMap) -> String {
    let heads = map.layers.iter().map(|layer| layer.heads.len()).max().unwrap_or_default();
    let columns: Vec<String> = (0..heads).map(|head| head.to_string()).collect();
    let options = measures(map).map(|(name, what, _)| format!("<option value=\"{name}\">{}</option>", escaped(what)));
    let maps = measures(map).enumerate().map(|(at, (name, what, of))| {
        let row = |layer: &LayerMap| {
            let cell = |(head, map): (usize, &HeadMap)| {
                let share = mean(of(map));
                let told = format!("layer {}, head {head}: {} {what}", layer.layer, percent(share));
                Some(Cell { share, text: format!("{:.0}", 100.0 * share), told })
            };
            (layer.layer.to_string(), layer.heads.iter().enumerate().map(cell).collect())
        };
        let rows: Vec<_> = map.layers.iter().map(row).collect();
        let figure = heat::map(&format!("Probability {what}, in percent"), "layer", &columns, &rows, heat::Range::Own);
        let hidden = if at == 0 { "" } else { " hidden=\"\"" };
        figure.replacen("<figure>", &format!("<figure data-of=\"{name}\"{hidden}>"), 1).replacen(
            "class=\"heat\"",
            "class=\"heat heads\"",
            1,
        )
    });
    let controls = format!(
        "<div class=\"controls\"><label>Show the probability <select id=\"of\">{}</select></label></div>\n",
        options.collect::<String>()
    );
    section(
        "Layers and heads",
        "The mean over the tokens that have a row: a layer to a row, a head to a column. The arrow keys go from head to head; the head \
         that is chosen is shown below.",
        &format!("{controls}{}", maps.collect::<String>()),
    )
}

fn one_head() -> String {
    let swatch = |name: &str, what: &str| {
        format!("<span><span class=\"swatch\" style=\"background:rgb(var(--{name}))\"></span>{what}</span>")
    };
    let choice = |value: &str, what: &str, chosen: bool| {
        let checked = if chosen { " checked=\"\"" } else { "" };
        format!("<label><input type=\"radio\" name=\"kind\" value=\"{value}\"{checked}/> {what}</label>")
    };
    let content = format!(
        "<fieldset class=\"controls\"><legend>Show</legend>{}{}{}</fieldset>\n\
         <p class=\"controls\">{}{}{}</p>\n\
         <div class=\"two\">\n<figure>\n<figcaption id=\"which\"></figcaption>\n\
         <canvas id=\"map\" width=\"720\" height=\"400\" tabindex=\"0\" role=\"application\" aria-label=\"Tokens down, parts of the text across; \
         arrow keys move\" aria-describedby=\"told\"></canvas>\n\
         <p class=\"readout faint\" id=\"told\" aria-live=\"polite\"></p>\n\
         <div class=\"controls\"><label>Token <select id=\"row\"></select></label></div>\n<p id=\"sums\"></p>\n</figure>\n\
         <figure>\n<figcaption>The text as this token reads it</figcaption>\n<div id=\"text\" tabindex=\"0\" role=\"region\" \
         aria-label=\"The text\"></div>\n</figure>\n</div>\n\
         <details open=\"\">\n<summary>The numbers of this token</summary>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" \
         aria-label=\"Parts that the token reads\">\n<table>\n<thead><tr><th scope=\"col\">tokens</th><th scope=\"col\">keys read exactly</th>\
         <th scope=\"col\">they hold</th><th scope=\"col\">statistics hold</th><th scope=\"col\">full attention</th>\
         <th scope=\"col\" class=\"words\">text</th></tr></thead>\n<tbody id=\"parts\"></tbody>\n</table>\n</div>\n</details>\n\
         <noscript><p>The map of a head is drawn by a script in this page.</p></noscript>\n",
        choice("read", "what is read", true),
        choice("full", "what full attention would read", false),
        choice("apart", "the difference (more: blue, less: orange)", false),
        swatch("exact", "read exactly"),
        swatch("far", "through statistics"),
        swatch("full", "full attention"),
    );
    section(
        "One head",
        "A token to a row, a part of the text to a column. The colour is as strong as the square root of the probability; the faintest blue is \
         read and holds next to nothing, what is empty is not read, what is grey comes later. Where a part is read both ways, the upper half \
         is what is read exactly. Statistics of a block are shared out over its tokens that are not read exactly. Full attention is a \
         softmax over the same queries and keys.",
        &content,
    )
}

fn by_layer(map: &AttentionMap) -> String {
    let (header, rows) = layers(map);
    let table = table("Layers", &header, &rows);
    section("By layer", "Means over the heads of a layer and the tokens that have a row.", &details(&table))
}

/// Names of columns, and a row to a layer.
pub(crate) fn layers(map: &AttentionMap) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let row = |layer: &LayerMap| {
        let heads = layer.heads.len().max(1) as f64;
        let over = |of: &dyn Fn(&HeadMap) -> f64| layer.heads.iter().map(of).sum::<f64>() / heads;
        let count = |of: fn(&HeadMap) -> &[u32]| {
            over(&|head| of(head).iter().map(|&x| f64::from(x)).sum::<f64>() / of(head).len().max(1) as f64)
        };
        let mut cells = vec![layer.layer.to_string(), kind(layer)];
        cells.extend(measures(map).map(|(_, _, of)| percent(over(&|head| mean(of(head))))));
        cells.extend(
            [count(|head| &head.near_keys), count(|head| &head.chosen_keys), count(|head| &head.runs)]
                .map(|x| format!("{x:.1}")),
        );
        cells
    };
    let rows: Vec<Vec<String>> = map.layers.iter().map(row).collect();
    let header = ["layer", "attention"].into_iter().chain(measures(map).map(|(name, _, _)| *name)).chain([
        "keys read anyway",
        "keys chosen",
        "statistics read",
    ]);
    (header.collect(), rows)
}

/// How a layer reads, in words.
pub(crate) fn kind(layer: &LayerMap) -> String {
    let kind = layer.retrieval.map_or_else(|| "original".to_owned(), |kind| format!("{kind:?}").to_lowercase());
    match layer.window {
        Some(window) => format!("{kind}, window {}", grouped(window as u64)),
        None => kind,
    }
}
