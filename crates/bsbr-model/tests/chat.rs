//! Chat templates of well-known models render as transformers renders them.
#![cfg(feature = "text")]

use std::{collections::BTreeMap, fs, path::Path};

use bsbr_model::{ChatTemplate, Message};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Made {
    seconds: i64,
    special: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    name: String,
    messages: Vec<Message>,
    answering: bool,
    more: BTreeMap<String, Value>,
    /// `None` where the template refuses the messages.
    text: Option<String>,
}

#[test]
fn every_template_renders_as_in_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat");
    let made: Made = serde_json::from_str(&fs::read_to_string(dir.join("cases.json")).unwrap()).unwrap();
    let (mut wrong, mut rendered, mut families) = (Vec::new(), 0, BTreeMap::new());
    for case in &made.cases {
        let source = fs::read_to_string(dir.join(format!("templates/{}.jinja", case.template))).unwrap();
        let template = ChatTemplate::new(&source, made.special.clone()).unwrap().at_time(made.seconds);
        let found = template.render(&case.messages, case.answering, &case.more);
        match (&case.text, found) {
            (Some(expected), Ok(found)) if *expected == found => {
                rendered += 1;
                *families.entry(&case.template).or_insert(0) += 1;
            }
            (None, Err(_)) => {}
            (expected, found) => {
                wrong.push(format!("{}, {}:\nexpected {expected:?}\nfound    {found:?}", case.template, case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), made.cases.len(), wrong.join("\n\n"));
    assert!(rendered > 150 && families.len() >= 18, "{rendered} texts of {} templates", families.len());
}
