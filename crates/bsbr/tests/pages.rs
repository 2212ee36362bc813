//! Pages: what they hold is the report, whatever the text, and nothing else is asked for.

mod common;

use common::Place;
use roxmltree::{Document, ParsingOptions};
use serde_json::Value;

/// The report inside of a page, which has to be well-formed and to fetch nothing.
fn report(html: &str) -> Value {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let page = Document::parse_with_options(html, options).expect("a well-formed page");
    for node in page.descendants() {
        for name in ["src", "href", "srcset", "action", "data"] {
            assert_eq!(node.attribute(name), None, "{node:?}");
        }
    }
    assert!(!html.contains("url(") && !html.contains("@import"), "{html}");
    let held = page.descendants().find(|node| node.attribute("id") == Some("report")).expect("data");
    serde_json::from_str(held.text().expect("a text")).expect("JSON")
}

#[test]
fn an_evaluation_is_a_page_of_its_report() {
    let place = Place::empty();
    let table = place.done("eval --seq-len 128,256 --windows 1 --html eval.html --format json --output eval.json");
    assert!(table.contains("perplexity at"), "{table}");
    assert_eq!(report(&place.read("eval.html")), place.json("eval.json"));
    let long = "eval --suite long --seq-len 512 --windows 1 --samples 1 --tasks perplexity,passkey";
    place.done(&format!("{long} --html long.html --format json --output long.json"));
    let page = place.read("long.html");
    assert_eq!(report(&page), place.json("long.json"));
    for part in ["Numbers hidden in long texts", "control: far = none", "control: none", "Agreement with the original"]
    {
        assert!(page.contains(part), "no {part}");
    }
    // A page does not change what is printed.
    assert!(place.done("eval --seq-len 128 --windows 1 --html eval.html").contains("control: none"));
}

#[test]
fn a_bench_is_a_page_of_its_report() {
    let place = Place::empty();
    let bench = "bench --seq-len 64,128 --part attention --heads 2 --head-dim 8 --runs 1 --arms bsbr,dense";
    place.done(&format!("{bench} --html bench.html --format json --output bench.json"));
    let page = place.read("bench.html");
    assert_eq!(report(&page), place.json("bench.json"));
    for part in ["attention: time to read a text", "attention: time of one token behind a text", "against dense"] {
        assert!(page.contains(part), "no {part}");
    }
}

#[test]
fn what_tokens_read_is_a_page_of_its_report() {
    let place = Place::empty();
    let inspect = "inspect --attention --tokens 700";
    let table = place.done(&format!("{inspect} --html page.html --format json --output map.json"));
    assert!(table.contains("700 tokens in parts of 16 tokens; 64 tokens have a row"), "{table}");
    let map = place.json("map.json");
    assert_eq!(report(&place.read("page.html")), map);
    assert_eq!(map["schema"], "bsbr-inspect-attention/1");
    assert_eq!(map["map"]["layers"].as_array().map(Vec::len), Some(4));
    assert_eq!(map["pieces"].as_array().map(Vec::len), Some(44));
    let rows = place.done(&format!("{inspect} --format csv"));
    assert_eq!(rows.lines().count(), 17, "{rows}");
    assert!(rows.starts_with("apart,attention,chosen"), "{rows}");
    // Under other settings other keys are read.
    let none = place.done(&format!("{inspect} --retrieval none"));
    assert!(none.contains("none") && none != table, "{none}");
}

#[test]
fn a_text_of_markup_is_shown_and_not_obeyed() {
    let place = Place::empty();
    let hostile =
        "</script><script>document.title='taken'</script> \"'&<!-- ]]> \u{1}\u{1b}[31m\u{7f} \u{2028} \u{1f980}\r\n\t";
    place.write("text.txt", &hostile.repeat(20));
    place.done("inspect --attention text.txt --html page.html");
    let page = place.read("page.html");
    let held = report(&page);
    let text: String = held["pieces"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(text, hostile.repeat(20).replace("\r\n", "\n"));
    assert_eq!(page.matches("<script").count(), 3);
}

#[test]
fn pages_that_cannot_be_are_refused_before_anything_runs() {
    let place = Place::empty();
    for (arguments, words) in [
        ("eval --html page.txt", "--html: page.txt is no name of a page: name it like report.html"),
        ("bench --html nowhere/page.html", "--html: nowhere/page.html cannot be written"),
        ("inspect --html page.html", "--html belongs to --attention"),
        ("inspect --chunk-size 64", "settings of attention belong to --attention"),
        ("inspect --attention --tokens 0", "--tokens is 0, expected at least 1"),
        ("inspect --attention --tokens 5000", "the model has 2048 learned positions"),
        ("inspect --attention missing.txt --html page.html", "missing.txt"),
        ("inspect --attention --tensors", "cannot be used with"),
    ] {
        place.refused(arguments, 2, &[words]);
    }
}
