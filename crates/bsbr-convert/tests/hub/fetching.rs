//! What is fetched, where it is put, and what is used of it the next time.

use std::fs;
use std::path::Path;

use super::server::{COMMIT, Hub, Seen, TOKEN, etag};
use super::{MODEL, Place, check_message, files, fixture, model, paths};

fn requests(seen: &[Seen]) -> Vec<String> {
    seen.iter().map(|seen| format!("{} {}", seen.method, seen.path.rsplit('/').next().expect("a path"))).collect()
}

#[test]
fn a_model_lies_in_the_cache_as_python_puts_it() {
    let mut all = fixture("llama");
    all.insert("tokenizer.json".into(), b"{}".to_vec());
    let (hub, place) = (Hub::with(MODEL, all.clone()), Place::new());
    let fetched = place.fetched(&hub);
    assert_eq!((fetched.origin.commit.as_str(), fetched.origin.revision.as_str()), (COMMIT, "main"));
    let repository = place.repository();
    assert_eq!(fetched.path, repository.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repository.join("refs/main")).expect("a ref"), COMMIT);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let etag = etag(name, &all[name]);
        assert!(fs::read(place.blob(&etag)).expect("a blob") == all[name]);
        #[cfg(unix)]
        assert_eq!(fs::read_link(fetched.path.join(name)).expect("a link"), Path::new("../../blobs").join(&etag));
        let lock = repository.join("../.locks/models--test--llama").join(format!("{etag}.lock"));
        assert!(lock.is_file(), "{}", lock.display());
    }
    // Locks apart, that is all.
    assert_eq!(paths(&repository).iter().filter(|path| path.is_file()).count(), 3 + 3 + 1);
    bsbr_convert::plan_checkpoint(&fetched.path).expect("a sound checkpoint");
}

#[test]
fn only_what_is_needed_is_asked_for() {
    let mut all = fixture("llama");
    for name in ["README.md", "pytorch_model.bin", "model-q4.gguf", "onnx/model.onnx", "config_v4.json", "vocab.json"] {
        all.insert(name.into(), b"x".to_vec());
    }
    let (hub, place) = (Hub::with(MODEL, all), Place::new());
    place.fetched(&hub);
    let seen = requests(&hub.seen());
    assert!(seen[0] == "GET main" && seen.contains(&"HEAD config.json".to_owned()), "{seen:?}");
    assert!(seen.iter().any(|line| line.starts_with("GET model.safetensors")), "{seen:?}");
    for name in ["README", ".bin", ".gguf", "onnx", "_v4"] {
        assert!(!seen.iter().any(|line| line.contains(name)), "{seen:?}");
    }
}

#[test]
fn the_second_time_only_the_revision_is_asked_for() {
    let (hub, place) = (Hub::with(MODEL, fixture("llama")), Place::new());
    let first = place.fetched(&hub);
    hub.seen();
    assert_eq!(place.fetched(&hub), first);
    assert_eq!(requests(&hub.seen()), ["GET main"]);
}

#[test]
fn shards_are_those_of_the_index() {
    let mut all = fixture("gpt2_sharded");
    all.insert("model-00007-of-00006.safetensors".into(), b"a stray".to_vec());
    let (hub, place) = (Hub::with(MODEL, all), Place::new());
    let fetched = place.fetched(&hub);
    bsbr_convert::plan_checkpoint(&fetched.path).expect("a sound checkpoint");
    assert!(!fetched.path.join("model-00007-of-00006.safetensors").exists());
}

#[test]
fn a_pickle_is_fetched_where_there_is_nothing_better() {
    let pickle: &[(&str, &[u8])] = &[("config.json", b"{}"), ("pytorch_model.bin", b"pickle"), ("tf_model.h5", b"x")];
    let (hub, place) = (Hub::with(MODEL, files(pickle)), Place::new());
    assert_eq!(fs::read(place.fetched(&hub).path.join("pytorch_model.bin")).expect("a file"), b"pickle");
    let map = br#"{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}"#;
    let shards: &[(&str, &[u8])] = &[
        ("config.json", b"{}"),
        ("pytorch_model.bin.index.json", map),
        ("pytorch_model-00001-of-00002.bin", b"one"),
        ("pytorch_model-00002-of-00002.bin", b"two"),
    ];
    let (hub, place) = (Hub::with(MODEL, files(shards)), Place::new());
    assert_eq!(fs::read(place.fetched(&hub).path.join("pytorch_model-00002-of-00002.bin")).expect("a file"), b"two");
}

#[test]
fn a_gguf_file_is_fetched_alone_and_only_by_name() {
    let list: &[(&str, &[u8])] =
        &[("config.json", b"{}"), ("Q4/a b#1.gguf", b"quantised"), ("x.gguf", b"x"), ("README.md", b"#")];
    let (hub, place) = (Hub::with(MODEL, files(list)), Place::new());
    place.refused(&hub, MODEL, &["no weights that can be read", "Q4/a b#1.gguf, x.gguf", "`test/llama/file.gguf`"]);
    place.refused(&hub, "test/llama/y.gguf", &["no file `y.gguf` at commit", COMMIT, "it has Q4/a b#1.gguf, x.gguf"]);
    let fetched = place.fetch(&hub, "test/llama/Q4/a b#1.gguf").expect("a file");
    assert_eq!(fetched.path, place.repository().join("snapshots").join(COMMIT).join("Q4/a b#1.gguf"));
    assert_eq!(fs::read(&fetched.path).expect("a file"), b"quantised");
    assert_eq!(paths(&place.repository().join("blobs")).len(), 1);
    let offline = place.settings(&hub, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(place.fetch_with(&offline, "test/llama/Q4/a b#1.gguf", "main").expect("cached"), fetched);
    let error = place.fetch_with(&offline, "test/llama/x.gguf", "main").expect_err("not cached");
    check_message(&error, &["`x.gguf` of `test/llama`"]);
}

#[test]
fn a_revision_is_a_branch_a_tag_or_a_commit() {
    let (hub, place) = (Hub::with(MODEL, model(1, 10)), Place::new());
    let newer = "f".repeat(40);
    hub.publish(MODEL, &newer, model(2, 10));
    hub.state().refs.insert("refs/pr/1".into(), COMMIT.into());
    let settings = place.settings(&hub, &[]);
    for (revision, commit, seed) in [("refs/pr/1", COMMIT, 1), ("main", &newer, 2), (COMMIT, COMMIT, 1)] {
        let fetched = place.fetch_with(&settings, MODEL, revision).expect("a model");
        assert_eq!((fetched.origin.revision.as_str(), fetched.origin.commit.as_str()), (revision, commit));
        let weights = fs::read(fetched.path.join("model.safetensors")).expect("a file");
        assert!(weights == model(seed, 10)["model.safetensors"], "{revision}");
    }
    let refs = place.repository().join("refs");
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).expect("a ref"), COMMIT);
    assert_eq!(fs::read_to_string(refs.join("main")).expect("a ref"), newer);
    assert!(!refs.join(COMMIT).exists());
}

#[test]
fn a_file_of_the_same_size_that_changed_is_fetched_and_the_old_one_stays() {
    let (hub, place) = (Hub::with(MODEL, model(1, 5000)), Place::new());
    let old = place.fetched(&hub).path;
    hub.seen();
    hub.publish(MODEL, &"a".repeat(40), model(2, 5000));
    let new = place.fetched(&hub).path;
    let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).expect("a file");
    assert!(weights(&old) == model(1, 5000)["model.safetensors"]);
    assert!(weights(&new) == model(2, 5000)["model.safetensors"]);
    // The configuration did not change: its content is not fetched again.
    assert!(!requests(&hub.seen()).contains(&"GET config.json".to_owned()));
}

#[test]
fn offline_the_cache_is_enough_or_the_missing_file_is_named() {
    let (hub, place) = (Hub::with(MODEL, fixture("gpt2_sharded")), Place::new());
    place.offline_lacks(&hub, "main", "config.json");
    let fetched = place.fetched(&hub);
    hub.seen();
    let offline = place.settings(&hub, &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(place.fetch_with(&offline, MODEL, "main").expect("in the cache"), fetched);
    assert_eq!(place.fetch_with(&offline, MODEL, COMMIT).expect("in the cache").path, fetched.path);
    place.offline_lacks(&hub, "v2", "config.json");
    // A link that points nowhere is no file.
    let shard = fetched.path.join("model-00004-of-00006.safetensors");
    fs::remove_file(fs::canonicalize(shard).expect("a blob")).expect("a file");
    place.offline_lacks(&hub, "main", "model-00004-of-00006.safetensors");
    fs::remove_file(fetched.path.join("model.safetensors.index.json")).expect("a file");
    place.offline_lacks(&hub, "main", "model.safetensors");
    // With a network what is missing is fetched.
    place.fetched(&hub);
    bsbr_convert::plan_checkpoint(&fetched.path).expect("whole again");
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (hub, place) = (Hub::with(MODEL, model(1, 100)), Place::new());
    hub.state().gated.push(MODEL.into());
    place.fetched(&hub);
    let (asked, sent_to): (Vec<Seen>, Vec<Seen>) = hub.seen().into_iter().partition(|seen| seen.hub);
    assert!(asked.iter().all(|seen| seen.token.as_deref() == Some(TOKEN)), "{asked:?}");
    assert_eq!(sent_to.len(), 1);
    assert_eq!(sent_to[0].token, None);
}

#[test]
fn several_at_once_fetch_a_file_once() {
    let (hub, place) = (Hub::with(MODEL, model(1, 3_000_000)), Place::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| place.fetched(&hub));
        }
    });
    assert_eq!(hub.seen().iter().filter(|seen| !seen.hub).count(), 1);
    let weights = place.repository().join("snapshots").join(COMMIT).join("model.safetensors");
    assert!(fs::read(weights).expect("a file") == model(1, 3_000_000)["model.safetensors"]);
    assert_eq!(paths(&place.repository().join("blobs")).len(), 2);
}

#[test]
fn a_hub_may_live_below_a_path() {
    let (hub, place) = (Hub::with(MODEL, model(1, 10)), Place::new());
    let settings = place.settings(&hub, &[("HF_ENDPOINT", &format!("{}/mirror/", hub.endpoint)), ("HF_TOKEN", TOKEN)]);
    place.fetch_with(&settings, MODEL, "main").expect("a model");
    let (asked, sent_to): (Vec<Seen>, Vec<Seen>) = hub.seen().into_iter().partition(|seen| seen.hub);
    assert!(asked.iter().all(|seen| seen.path.starts_with("/mirror/") && seen.token.is_some()), "{asked:?}");
    assert_eq!(sent_to.len(), 1);
}
