//! Pages as their readers take them apart.

use bsbr_model::{AttentionMap, HeadMap, LayerMap, PartShare};
use roxmltree::{Document, ParsingOptions};
use serde_json::json;

use super::*;

/// Everything that is true of every page: well-formed, its data is the report, and it asks for nothing else.
fn check(html: &str, data: &Value) {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let page = Document::parse_with_options(html, options).unwrap_or_else(|error| panic!("{error}: {html}"));
    let held = page.descendants().find(|node| node.attribute("id") == Some("report")).expect("data");
    let held: Value = serde_json::from_str(held.text().expect("a text")).expect("JSON");
    assert_eq!(&held, data);
    let mut ids = std::collections::BTreeSet::new();
    for node in page.descendants().filter(roxmltree::Node::is_element) {
        for attribute in node.attributes() {
            let fetches = ["src", "href", "srcset", "action", "data", "poster"].contains(&attribute.name());
            assert!(!fetches && !attribute.name().starts_with("on"), "{node:?}");
            assert!(!attribute.value().contains("url("), "{node:?}");
            if attribute.name() == "id" {
                assert!(ids.insert(attribute.value().to_owned()), "{} stands for two", attribute.value());
            }
        }
        let name = node.tag_name().name();
        assert!(!["link", "img", "iframe", "object", "embed", "base"].contains(&name), "{node:?}");
        if name == "style" {
            assert!(!node.text().unwrap_or_default().contains("url("));
        }
        // What can be reached says what it is.
        if node.attribute("tabindex").is_some() {
            assert!(node.attribute("aria-label").is_some(), "{node:?}");
        }
        if name == "th" {
            assert!(node.attribute("scope").is_some(), "{node:?}");
        }
    }
    assert_eq!(html.matches("</script>").count(), html.matches("<script").count());
    assert!(page.descendants().any(|node| node.tag_name().name() == "h1" && node.text().is_some()));
}

const HOSTILE: &str = "</script><script>alert('1')</script> ]]> \"quotes\" & <!-- \u{0}\u{1b}\u{7f}\u{2028}";

fn map() -> AttentionMap {
    let head = HeadMap {
        near: vec![10_000, 9_000],
        chosen: vec![0, 600],
        statistics: vec![0, 400],
        sink: vec![],
        covered: vec![10_000, 9_700],
        apart: vec![0, 120],
        near_keys: vec![1, 3],
        chosen_keys: vec![0, 1],
        runs: vec![0, 1],
        parts: vec![
            vec![PartShare(0, 1, 10_000, 0, 10_000)],
            vec![PartShare(0, 1, 600, 400, 1_120), PartShare(1, 3, 9_000, 0, 8_880)],
        ],
    };
    let layer =
        |layer, retrieval, window| LayerMap { layer, retrieval, window, group: 1, heads: vec![head.clone(); 2] };
    AttentionMap {
        tokens: 5,
        part: 4,
        rows: vec![0, 4],
        layers: vec![layer(0, Some(bsbr_attn::Retrieval::Blocks), None), layer(1, None, Some(512))],
    }
}

fn attention_data(piece: &str) -> Value {
    json!({
        "schema": "bsbr-inspect-attention/1", "text": {"tokens": 9}, "map": map(),
        "pieces": [format!("four tokens {piece}"), "one"], "row_pieces": ["four", piece],
    })
}

#[test]
fn a_page_of_a_hostile_text_shows_it_and_runs_nothing_of_it() {
    let data = attention_data(HOSTILE);
    let html = attention::page(HOSTILE, &map(), &data);
    check(&html, &data);
    // Its own script, that of every page, and the data: a text is none.
    assert_eq!(html.matches("<script").count(), 3, "{html}");
}

#[test]
fn a_page_says_what_is_left_out() {
    let html = attention::page("a model", &map(), &attention_data("x"));
    let expected = "5 tokens in parts of 4 tokens; 2 tokens have a row, at even distances; 3 are left out.";
    assert!(html.contains(expected), "{html}");
    assert!(html.contains("The text has 9 tokens; what lies behind the first 5 is left out."), "{html}");
}

#[test]
fn the_markup_of_a_small_page() {
    let panel = Panel {
        title: "Time & <memory>".into(),
        across: plot::Axis::log("tokens", plot::thousands),
        up: plot::Axis::log("", |value| format!("{value} s")),
        lines: vec![plot::Line::new("dense", plot::Color(213, 94, 0), vec![(512.0, 1.0), (1024.0, 4.0)])],
        marks: vec![(700.0, "break-even 700".into())],
    };
    let cell = heat::Cell { share: 0.25, text: "25".into(), told: "a \"quarter\"".into() };
    let rows = [("0 %".into(), vec![Some(cell)]), ("50 %".into(), vec![None])];
    let heat = heat::map("A map", "depth", &["1k".into()], &rows, heat::Range::Own);
    let body = section("By length", "What it says.", &format!("{}{heat}", cards(&[figure(&panel)])));
    let data = json!({"a": "<b>"});
    let page = Page { title: "A & B", lead: vec!["one < two".into()], body, data: &data, style: "", script: "" };
    let html = page.html();
    check(&html, &data);
    // Style and script are read where they are written.
    let markup =
        html.replace(include_str!("style.css"), "").replace(plot::STYLE, "").replace(include_str!("keys.js"), "");
    insta::assert_snapshot!(markup);
}

#[test]
fn evaluations_of_one_length_and_of_many_with_hidden_numbers_are_pages() {
    let perplexity = |all: f64, agreement: bool| {
        let agreement =
            agreement.then(|| json!({"top1": 0.9, "top5": 0.95, "top10": 0.96, "kl": 0.01, "cosine": 0.99}));
        let buckets =
            json!([{"start": 0, "end": 10, "perplexity": all + 1.0}, {"start": 10, "end": 20, "perplexity": all}]);
        json!({
            "all": all, "later": all, "last_quarter": all, "by_position": buckets, "agreement": agreement,
            "agreement_last_quarter": agreement,
        })
    };
    let variant = |name: &str, all: f64, agreement: bool| {
        let by_depth = [0.0, 0.25, 0.5, 0.75, 1.0].map(|depth| json!({"depth": depth, "digits": 0.5, "exact": 0.0}));
        json!({
            "name": name, "keys_share": 0.5, "summaries_share": 0.1, "capped_share": 0.0, "cache_bytes": 1000, "cache_share": 1.1,
            "perplexity": perplexity(all, agreement),
            "recall": [{"task": "passkey", "questions": 5, "digits": 0.5, "exact": 0.0, "nll": 1.0, "by_depth": by_depth}],
        })
    };
    let length = |length: usize| {
        let variants =
            [variant("original", 20.0, false), variant("converted", 20.5, true), variant(HOSTILE, 30.0, true)];
        json!({"length": length, "windows": 2, "skip": 4, "variants": variants})
    };
    for lengths in [vec![length(1024)], vec![length(1024), length(2048)], vec![]] {
        let data = json!({"about": {"text_sha256": "ab", "machine": {"cpu": HOSTILE}}, "lengths": lengths});
        let lengths: Vec<bsbr_model::LengthReport> = serde_json::from_value(data["lengths"].clone()).unwrap();
        let html = eval::page("a model", &lengths, &data);
        check(&html, &data);
        if !lengths.is_empty() {
            let told =
                format!("converted, {} tokens, 25 % into the text: 50 % of the digits, 0 % of whole numbers", "1,024");
            assert!(html.contains(&told), "{html}");
        }
    }
}
