//! Transfers that break off, lie, or meet what an earlier one left.

use std::fs;

use super::server::{COMMIT, Fault, Hub, Seen, etag};
use super::{MODEL, Place, check_message, model, paths};
use bsbr_convert::hub::HubError;

const SIZE: usize = 400_000;
const CONTENT: &str = "?signature";

fn weights(seed: u8) -> Vec<u8> {
    model(seed, SIZE)["model.safetensors"].clone()
}

fn start(seed: u8) -> (Place, Hub) {
    (Place::new(), Hub::with(MODEL, model(seed, SIZE)))
}

/// What was asked of the content network.
fn ranges(seen: Vec<Seen>) -> Vec<Option<String>> {
    seen.into_iter().filter(|seen| !seen.hub).map(|seen| seen.range).collect()
}

fn check_weights(place: &Place, hub: &Hub, seed: u8) {
    let path = place.fetched(hub).path.join("model.safetensors");
    assert!(fs::read(path).expect("a file") == weights(seed));
    assert!(!paths(&place.repository()).iter().any(|path| path.to_string_lossy().contains("incomplete")));
}

fn partial(place: &Place, seed: u8) -> std::path::PathBuf {
    place.blob(&format!("{}.incomplete", etag("model.safetensors", &weights(seed))))
}

/// Leaves `bytes` as an earlier transfer would have.
fn leave(place: &Place, seed: u8, bytes: &[u8]) {
    let path = partial(place, seed);
    fs::create_dir_all(path.parent().expect("a directory")).expect("room");
    fs::write(path, bytes).expect("room");
}

#[test]
fn a_cut_connection_is_continued_where_it_broke() {
    let (place, hub) = start(1);
    for cut in [150_000, 100_000] {
        hub.fails(CONTENT, Fault::Cut(cut));
    }
    check_weights(&place, &hub, 1);
    let expected = [None, Some("bytes=150000-".to_owned()), Some("bytes=250000-".to_owned())];
    assert_eq!(ranges(hub.seen()), expected);
}

#[test]
fn many_cuts_are_no_failure_as_long_as_more_arrives() {
    let (place, hub) = start(1);
    (0..20).for_each(|_| hub.fails(CONTENT, Fault::Cut(10_000)));
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()).len(), 21);
}

#[test]
fn an_interrupted_transfer_is_continued_by_the_next() {
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::Cut(150_000));
    (0..5).for_each(|_| hub.fails(CONTENT, Fault::Silence));
    let error = place.fetch(&hub, MODEL).expect_err("cut off");
    check_message(&error, &["no answer from 127.0.0.1", "tried 5 times"]);
    assert_eq!(fs::read(partial(&place, 1)).expect("a part"), weights(1)[..150_000]);
    assert!(!place.repository().join("refs").exists());
    hub.state().faults.clear();
    hub.seen();
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()), [Some("bytes=150000-".to_owned())]);
}

#[test]
fn a_whole_file_that_only_lacks_its_name_is_not_fetched_again() {
    let (place, hub) = start(1);
    leave(&place, 1, &weights(1));
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()), []);
}

#[test]
fn a_host_without_ranges_sends_everything_again() {
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::Cut(150_000));
    hub.fails(CONTENT, Fault::Whole);
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()).len(), 2);
}

#[test]
fn another_part_than_the_one_asked_for_is_not_glued_on() {
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::Cut(150_000));
    hub.fails(CONTENT, Fault::OtherPart);
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()), [None, Some("bytes=150000-".to_owned()), None]);
    // Nor is a part taken for the whole.
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::OtherPart);
    check_weights(&place, &hub, 1);
}

#[test]
fn a_part_that_does_not_exist_starts_over() {
    let (place, hub) = start(1);
    leave(&place, 1, &weights(1)[..150_000]);
    hub.fails(CONTENT, Fault::Status(416, vec![]));
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()), [Some("bytes=150000-".to_owned()), None]);
}

#[test]
fn a_part_of_an_older_file_of_the_same_size_is_not_used() {
    let (place, hub) = start(1);
    leave(&place, 1, &weights(1)[..150_000]);
    hub.publish(MODEL, COMMIT, model(2, SIZE));
    let path = place.fetched(&hub).path.join("model.safetensors");
    assert!(fs::read(path).expect("a file") == weights(2));
    assert_eq!(ranges(hub.seen()), [None]);
}

#[test]
fn a_damaged_part_is_found_out_and_everything_fetched_again() {
    for left in [vec![7; 150_000], vec![7; SIZE], vec![7; SIZE + 5]] {
        let (place, hub) = start(1);
        leave(&place, 1, &left);
        check_weights(&place, &hub, 1);
        assert_eq!(ranges(hub.seen()).last(), Some(&None), "{}", left.len());
    }
}

#[test]
fn a_content_that_was_cut_by_an_accident_is_replaced() {
    let (place, hub) = start(1);
    let blob = place.blob(&etag("model.safetensors", &weights(1)));
    fs::create_dir_all(blob.parent().expect("a directory")).expect("room");
    fs::write(&blob, b"cut").expect("room");
    check_weights(&place, &hub, 1);
}

/// After a failure: nothing but the configuration is there, and the next try succeeds.
fn check_nothing_kept(place: &Place, hub: &Hub) {
    let blobs = paths(&place.repository().join("blobs"));
    assert!(
        !blobs.iter().any(|path| path.to_string_lossy().contains(&etag("model.safetensors", &weights(1)))),
        "{blobs:?}"
    );
    assert!(!place.repository().join("snapshots").join(COMMIT).join("model.safetensors").exists());
    hub.state().faults.clear();
    check_weights(place, hub, 1);
}

#[test]
fn bytes_with_another_hash_are_not_kept() {
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::Body(weights(2)));
    let error = place.fetch(&hub, MODEL).expect_err("damaged");
    assert!(matches!(error, HubError::Hash { .. }), "{error:?}");
    let (expected, found) = (etag("model.safetensors", &weights(1)), etag("model.safetensors", &weights(2)));
    check_message(&error, &["`model.safetensors` of `test/llama`", "SHA-256", &expected, &found, "Nothing was kept"]);
    check_nothing_kept(&place, &hub);
}

#[test]
fn two_versions_are_never_glued_together() {
    let (place, hub) = start(1);
    // The first half of one, the second of another: found out, and the third answer is whole and right.
    hub.fails(CONTENT, Fault::Cut(150_000));
    hub.fails(CONTENT, Fault::Body(weights(2)));
    check_weights(&place, &hub, 1);
    assert_eq!(ranges(hub.seen()), [None, Some("bytes=150000-".to_owned()), None]);
}

#[test]
fn a_host_that_never_gets_it_right_is_given_up() {
    let (place, hub) = start(1);
    for _ in 0..10 {
        hub.fails(CONTENT, Fault::Cut(150_000));
        hub.fails(CONTENT, Fault::Body(weights(2)));
    }
    let error = place.fetch(&hub, MODEL).expect_err("damaged");
    assert!(matches!(error, HubError::Hash { .. }), "{error:?}");
    assert_eq!(ranges(hub.seen()).len(), 4);
    check_nothing_kept(&place, &hub);
}

#[test]
fn sizes_that_disagree_are_an_error() {
    let (place, hub) = start(1);
    hub.fails(CONTENT, Fault::Body(vec![1; SIZE + 1]));
    let error = place.fetch(&hub, MODEL).expect_err("too long");
    assert!(matches!(error, HubError::Size { .. }), "{error:?}");
    check_message(&error, &["`model.safetensors` of `test/llama` should have 400000 bytes", "arrived"]);
    check_nothing_kept(&place, &hub);

    // Too few, from a host that thinks it is done.
    let (place, hub) = start(1);
    (0..6).for_each(|_| {
        hub.fails(
            "GET /test/llama/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/config.json",
            Fault::Body(b"{".to_vec()),
        )
    });
    let error = place.refused(&hub, MODEL, &["`config.json`", "should have 2 bytes, 1 arrived", "tried 5 times"]);
    assert!(matches!(error, HubError::GaveUp { .. }), "{error:?}");
    check_nothing_kept(&place, &hub);
}

#[test]
fn a_file_that_changes_between_two_requests_is_refused() {
    let (place, hub) = start(1);
    hub.fails("GET /test/llama/resolve", Fault::Headers(vec![("ETag", "\"another\"".into())]));
    place.refused(&hub, MODEL, &["`config.json` changed while it was fetched", "try again"]);
    check_weights(&place, &hub, 1);
}

#[test]
fn a_small_file_is_never_continued() {
    let (place, hub) = start(1);
    let name = "GET /test/llama/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/config.json";
    hub.fails(name, Fault::Cut(1));
    check_weights(&place, &hub, 1);
    assert!(hub.seen().iter().filter(|seen| seen.path.ends_with("config.json")).all(|seen| seen.range.is_none()));
}

#[test]
fn an_empty_file_is_a_file() {
    let place = Place::new();
    let mut files = model(1, SIZE);
    files.insert("merges.txt".into(), Vec::new());
    let hub = Hub::with(MODEL, files);
    assert_eq!(fs::read(place.fetched(&hub).path.join("merges.txt")).expect("a file"), b"");
}
