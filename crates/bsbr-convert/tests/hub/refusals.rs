//! Every way a hub can say no, and what it may say that nobody should believe.

use std::time::{Duration, Instant};

use super::server::{COMMIT, Fault, Hub, TOKEN};
use super::{MODEL, Place, check_message, files, model, paths};
use bsbr_convert::hub::{HubError, HubEvent, fetch};

fn place_and_hub() -> (Place, Hub) {
    (Place::new(), Hub::with(MODEL, model(1, 5000)))
}

#[test]
fn a_gated_repository_wants_a_token_or_a_licence() {
    let (place, hub) = place_and_hub();
    hub.state().gated.push(MODEL.into());
    let page = format!("{}/{MODEL}", hub.endpoint);
    let error = place.fetch_with(&place.settings(&hub, &[]), MODEL, "main").expect_err("no token");
    assert!(matches!(error, HubError::Unauthorised { .. }));
    check_message(
        &error,
        &["401", "no token was sent", "private or gated", "accept the licence at", &page, "HF_TOKEN"],
    );
    let error = place.fetch_with(&place.settings(&hub, &[("HF_TOKEN", "hf_wrong")]), MODEL, "main").expect_err("wrong");
    assert!(matches!(error, HubError::Forbidden { .. }));
    check_message(&error, &["403", "the token of HF_TOKEN", "Accept the licence at", &page]);
    assert!(!format!("{error} {error:?}").contains("hf_wrong"));
    place.fetched(&hub);
}

#[test]
fn what_is_not_found_is_said_apart() {
    let (place, hub) = place_and_hub();
    let error = place.refused(&hub, "test/other", &["no repository `test/other`", &hub.endpoint, "check the name"]);
    assert!(matches!(error, HubError::RepositoryNotFound { .. }));
    let error = place.fetch_with(&place.settings(&hub, &[]), MODEL, "v9").expect_err("no revision");
    assert!(matches!(error, HubError::RevisionNotFound { .. }));
    check_message(&error, &["`test/llama` has no revision `v9`", "/commits"]);
    hub.fails("HEAD", Fault::Status(404, vec![("X-Error-Code", "EntryNotFound".into())]));
    let error = place.refused(&hub, MODEL, &["`test/llama` has no file `config.json` at commit", COMMIT]);
    assert!(matches!(error, HubError::FileNotFound { .. }));
    // A mirror that gives no reason.
    hub.fails("/revision/", Fault::Status(404, vec![]));
    assert!(matches!(place.refused(&hub, MODEL, &[]), HubError::RepositoryNotFound { .. }));
}

#[test]
fn a_repository_that_is_no_model_says_so() {
    for (list, words) in [
        (&[("model.safetensors", &b"x"[..])][..], &["has no file `config.json`"][..]),
        (&[("config.json", b"{}"), ("tf_model.h5", b"x")], &["no weights that can be read", "found tf_model.h5"]),
        (&[("config.json", b"{}")], &["no weights that can be read", "found none"]),
    ] {
        let (place, hub) = (Place::new(), Hub::with(MODEL, files(list)));
        place.refused(&hub, MODEL, words);
    }
}

/// The pauses while fetching.
fn pauses(place: &Place, hub: &Hub) -> (Result<(), HubError>, Vec<Duration>) {
    let mut pauses = Vec::new();
    let settings = place.settings(hub, &[("HF_TOKEN", TOKEN)]);
    let name = MODEL.parse().expect("a name");
    let result = fetch(&name, "main", &settings, &mut |event| {
        if let HubEvent::Waiting { pause, .. } = event {
            pauses.push(pause);
        }
    });
    (result.map(drop), pauses)
}

#[test]
fn a_hub_that_asks_for_time_gets_it() {
    let (place, hub) = place_and_hub();
    hub.fails("/revision/", Fault::Status(429, vec![("Retry-After", "1".into())]));
    hub.fails("HEAD", Fault::Status(429, vec![]));
    hub.fails("?signature", Fault::Status(429, vec![("Retry-After", "0".into())]));
    let started = Instant::now();
    let (result, pauses) = pauses(&place, &hub);
    result.expect("in the end");
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(pauses, [Duration::from_secs(1), Duration::from_millis(1), Duration::ZERO]);
}

#[test]
fn patience_has_an_end() {
    let (place, hub) = place_and_hub();
    for _ in 0..20 {
        hub.fails("/revision/", Fault::Status(429, vec![("Retry-After", "0".into())]));
    }
    place.refused(&hub, MODEL, &["fewer requests", "HF_TOKEN", "tried 5 times"]);
    assert_eq!(hub.seen().len(), 5);
    hub.state().faults.clear();
    hub.fails("/revision/", Fault::Status(429, vec![("Retry-After", "86400".into())]));
    place.refused(&hub, MODEL, &["the next in 86400 s"]);
    assert_eq!(hub.seen().len(), 1);
}

#[test]
fn failures_that_pass_are_tried_again_with_growing_pauses() {
    let (place, hub) = place_and_hub();
    for fault in [Fault::Silence, Fault::Status(500, vec![]), Fault::Status(503, vec![]), Fault::Status(408, vec![])] {
        hub.fails("/revision/", fault);
    }
    hub.fails("HEAD", Fault::Status(502, vec![]));
    hub.fails("GET /test/llama/resolve", Fault::Status(504, vec![]));
    // An expired address: the next redirect brings another.
    hub.fails("?signature", Fault::Status(403, vec![]));
    let (result, pauses) = pauses(&place, &hub);
    result.expect("in the end");
    assert_eq!(pauses.iter().map(Duration::as_millis).collect::<Vec<_>>(), [1, 2, 4, 8, 1, 1, 1]);
}

#[test]
fn failures_that_stay_end() {
    let (place, hub) = place_and_hub();
    for _ in 0..20 {
        hub.fails("/revision/", Fault::Status(503, vec![("X-Error-Message", "down for repair".into())]));
    }
    place.refused(&hub, MODEL, &["/api/models/test/llama", "503", "down for repair", "tried 5 times"]);
    assert_eq!(hub.seen().len(), 5);
    hub.state().faults.clear();
    // Nothing that a second try would change.
    hub.fails("/revision/", Fault::Status(400, vec![]));
    place.refused(&hub, MODEL, &["400"]);
    assert_eq!(hub.seen().len(), 1);
    for _ in 0..20 {
        hub.fails("?signature", Fault::Status(403, vec![]));
    }
    let error = place.fetch(&hub, MODEL).expect_err("refused");
    check_message(&error, &["403", "tried 5 times"]);
}

#[test]
fn nobody_there_is_said_at_once() {
    let (place, hub) = place_and_hub();
    let settings = place.settings(&hub, &[("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_TOKEN", TOKEN)]);
    let error = place.fetch_with(&settings, MODEL, "main").expect_err("nobody there");
    // Not one that was given up after several tries.
    assert!(matches!(error, HubError::Connection { .. }), "{error:?}");
    check_message(&error, &["no answer from 127.0.0.1:9", "refused", "HTTPS_PROXY", "HF_ENDPOINT", "--offline"]);
}

#[test]
fn an_answer_that_is_not_that_of_a_hub_is_refused() {
    let (place, hub) = place_and_hub();
    for (part, fault, words) in [
        ("/revision/", Fault::Body(b"<html>".to_vec()), &["cannot be read", "is this address a hub?"][..]),
        ("/revision/", Fault::Body(br#"{"siblings": []}"#.to_vec()), &["cannot be read", "sha"]),
        ("/revision/", Fault::Status(302, vec![("Location", "ftp://x/y".into())]), &["leads nowhere"]),
        ("/revision/", Fault::Status(302, vec![]), &["leads nowhere"]),
        ("HEAD", Fault::Headers(vec![("ETag", String::new())]), &["the ETag cannot be the name of a file"]),
        ("HEAD", Fault::Status(200, vec![]), &["no ETag names the content"]),
        ("HEAD", Fault::Headers(vec![("Content-Length", "many".into())]), &[]),
    ] {
        hub.fails(part, fault.clone());
        // Some of this fails in the middle of HTTP, and is tried again.
        (0..4).for_each(|_| hub.fails(part, fault.clone()));
        let error = place.fetch(&hub, MODEL).expect_err("no hub");
        check_message(&error, words);
        hub.state().faults.clear();
    }
    for _ in 0..20 {
        hub.fails("/revision/", Fault::Status(302, vec![("Location", "/api/models/test/llama/revision/main".into())]));
    }
    place.refused(&hub, MODEL, &["too many redirects"]);
}

#[test]
fn no_name_from_the_network_leaves_the_cache() {
    let index = |shard: &str| format!(r#"{{"weight_map": {{"a": "{shard}"}}}}"#).into_bytes();
    let config = ("config.json", &b"{}"[..]);
    for shard in ["../../../../evil.safetensors", "/tmp/evil.safetensors", "a/evil.safetensors"] {
        let index = index(shard);
        let list = [config, ("model.safetensors.index.json", &index), (shard, b"evil")];
        let (place, hub) = (Place::new(), Hub::with(MODEL, files(&list)));
        let error = place.fetch(&hub, MODEL).expect_err("hostile");
        check_message(&error, &["`model.safetensors.index.json` of `test/llama`", shard, "plain name"]);
        assert!(!paths(place.0.path()).iter().any(|path| path.to_string_lossy().contains("evil")));
    }
    // Names in the list that nobody asks for do nothing.
    let list = [config, ("model.safetensors", b"x"), ("../../evil", b"x"), ("../config.json", b"x")];
    let (place, hub) = (Place::new(), Hub::with(MODEL, files(&list)));
    place.fetched(&hub);
    assert_eq!(paths(&place.repository().join("snapshots")).iter().filter(|path| path.is_file()).count(), 2);

    let (place, hub) = place_and_hub();
    let evil = br#"{"sha": "../../../../../../../../../../../../../x", "siblings": []}"#;
    hub.fails("/revision/", Fault::Body(evil.to_vec()));
    place.refused(&hub, MODEL, &["40 hexadecimal digits"]);
    for etag in ["\"../../evil\"", "\"/evil\"", "\"..\"", "\".evil\"", "\"\""] {
        hub.fails("HEAD", Fault::Headers(vec![("ETag", etag.into())]));
        place.refused(&hub, MODEL, &["the ETag cannot be the name of a file"]);
    }
}

#[test]
fn an_index_and_a_repository_that_disagree_are_told_apart() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors"}}"#;
    let list = [("config.json", &b"{}"[..]), ("model.safetensors.index.json", index)];
    let (place, hub) = (Place::new(), Hub::with(MODEL, files(&list)));
    let error = place.fetch(&hub, MODEL).expect_err("a shard is missing");
    check_message(&error, &["it names `model-1.safetensors`, which the repository does not have"]);
    assert!(!place.repository().join("refs").exists());
}

#[test]
fn a_token_that_no_header_can_hold_is_not_shown() {
    let (place, hub) = place_and_hub();
    let settings = place.settings(&hub, &[("HF_TOKEN", "hf_secret\u{7f}\u{1}")]);
    let error = place.fetch_with(&settings, MODEL, "main").expect_err("no token");
    check_message(&error, &["HF_TOKEN", "the token holds a character that no token has"]);
    assert!(hub.seen().is_empty());
}
