//! What becomes of an output that changes while it is written, and of every state in which a run can be interrupted.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bsbr_attn::BlockAttentionConfig;
use bsbr_convert::{ConvertError, ConvertOptions, ModelSource, OutputKind, ScratchDir, convert, prepare_output};
use common::{checkout, convert_plain, snapshot};
use tempfile::TempDir;

/// A checkpoint, and a place for an output beside it.
struct Case {
    temp: TempDir,
    model: PathBuf,
    output: PathBuf,
}

impl Case {
    fn new() -> Self {
        let (temp, model) = checkout("llama", "config.json");
        let output = temp.path().join("out");
        Self { temp, model, output }
    }

    fn beside(&self, what: &str) -> PathBuf {
        self.temp.path().join(format!(".out.bsbr-{what}"))
    }

    fn within(&self, what: &str) -> PathBuf {
        self.output.join(format!(".bsbr-{what}"))
    }

    /// Everything beside the checkpoint.
    fn names(&self) -> Vec<String> {
        let names =
            fs::read_dir(self.temp.path()).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.retain(|name| name != "model");
        names.sort();
        names
    }

    /// Converts, and does something when the first weights are written.
    fn convert_meanwhile(&self, force: bool, mut meanwhile: impl FnMut()) -> Result<(), ConvertError> {
        let options = ConvertOptions { force, ..Default::default() };
        let mut done = false;
        let mut watch = |progress: bsbr_convert::Progress<'_>| {
            if progress.stage == "writing" && !std::mem::replace(&mut done, true) {
                meanwhile();
            }
        };
        convert(&self.model, &self.output, &options, &mut watch).map(drop)
    }

    /// The files of two conversions: with other settings, and with a file the other one lacks.
    fn models(&self) -> [BTreeMap<String, Vec<u8>>; 2] {
        let (first, second) = (self.temp.path().join("first"), self.temp.path().join("second"));
        fs::write(self.model.join("merges.txt"), "a b").expect("room");
        convert_plain(&self.model, &first).expect("sound");
        fs::remove_file(self.model.join("merges.txt")).expect("it was there");
        let attention = Some(BlockAttentionConfig { chunk_size: 64, ..Default::default() });
        convert(&self.model, &second, &ConvertOptions { attention, ..Default::default() }, &mut |_| {}).expect("sound");
        let found = [&first, &second].map(|dir| snapshot(dir));
        [first, second].iter().for_each(|dir| fs::remove_dir_all(dir).expect("it was there"));
        found
    }
}

/// What is told of an output that is to be replaced.
fn prepared(output: &Path) -> Result<Vec<String>, ConvertError> {
    let mut told = Vec::new();
    prepare_output(output, OutputKind::Model, true, &mut |line| told.push(line.to_owned()))?;
    Ok(told)
}

fn write_all<'a>(dir: &Path, files: impl IntoIterator<Item = (&'a String, &'a Vec<u8>)>) {
    fs::create_dir_all(dir).expect("room");
    for (name, content) in files {
        fs::write(dir.join(name), content).expect("room");
    }
}

#[test]
fn what_appears_at_a_free_place_meanwhile_stays() {
    let case = Case::new();
    for force in [false, true] {
        let put = || {
            fs::create_dir(&case.output).expect("it was free");
            fs::write(case.output.join("notes.txt"), "mine").expect("room");
        };
        let error = case.convert_meanwhile(force, put).expect_err("somebody was faster");
        assert!(matches!(error, ConvertError::OutputExists { .. } | ConvertError::OutputForeign { .. }), "{error}");
        assert_eq!(snapshot(&case.output).len(), 1);
        assert_eq!(case.names(), ["out"]);
        fs::remove_dir_all(&case.output).expect("it is there");
    }
    // A file, a link to nothing; an empty directory is filled.
    let error = case.convert_meanwhile(true, || fs::write(&case.output, "mine").expect("room"));
    assert!(matches!(error, Err(ConvertError::OutputForeign { .. })), "{error:?}");
    fs::remove_file(&case.output).expect("it is there");
    case.convert_meanwhile(false, || fs::create_dir(&case.output).expect("it was free")).expect("filled");
    ModelSource::open(&case.output).expect("a whole model");
    assert_eq!(case.names(), ["out"]);
}

#[test]
fn files_put_into_an_output_meanwhile_stay() {
    let case = Case::new();
    for earlier in [false, true] {
        if earlier {
            convert_plain(&case.model, &case.output).expect("sound");
        } else {
            fs::create_dir(&case.output).expect("room");
        }
        let before = snapshot(&case.output).len();
        let notes = case.output.join("notes.txt");
        let error = case.convert_meanwhile(earlier, || fs::write(&notes, "mine").expect("room"));
        let error = error.expect_err("something was put there");
        assert!(matches!(error, ConvertError::OutputExists { .. } | ConvertError::OutputForeign { .. }), "{error}");
        assert_eq!(fs::read_to_string(&notes).expect("it stays"), "mine");
        assert_eq!(snapshot(&case.output).len(), before + 1);
        assert_eq!(case.names(), ["out"]);
        fs::remove_dir_all(&case.output).expect("it is there");
    }
}

#[cfg(unix)]
#[test]
fn an_output_is_written_by_one_at_a_time() {
    let case = Case::new();
    for there in [false, true, true] {
        assert_eq!(case.output.exists(), there);
        let mut met = None;
        let other = || {
            let error =
                convert(&case.model, &case.output, &ConvertOptions { force: true, ..Default::default() }, &mut |_| {});
            let early = prepared(&case.output);
            met = Some((error.map(drop), early));
        };
        case.convert_meanwhile(true, other).expect("the first one ends");
        let (error, early) = met.expect("weights were written");
        assert!(matches!(error, Err(ConvertError::OutputBusy { .. })), "{error:?}");
        assert!(matches!(early, Err(ConvertError::OutputBusy { .. })), "{early:?}");
        ModelSource::open(&case.output).expect("a whole model");
        assert_eq!(case.names(), ["out"]);
    }
}

#[test]
fn only_files_of_a_conversion_are_replaced() {
    let case = Case::new();
    convert_plain(&case.model, &case.output).expect("sound");
    for stranger in ["notes.txt", "config.json.bak", "adapter.safetensors"] {
        fs::write(case.output.join(stranger), "mine").expect("room");
        let before = snapshot(&case.output);
        for error in [
            case.convert_meanwhile(true, || {}).expect_err("a file of somebody else"),
            prepared(&case.output).expect_err("a file of somebody else"),
        ] {
            assert!(error.to_string().contains(&format!("`{stranger}`")), "{error}");
        }
        assert_eq!(snapshot(&case.output), before);
        fs::remove_file(case.output.join(stranger)).expect("it is there");
    }
    fs::create_dir(case.output.join("README.md.d")).expect("room");
    assert!(case.convert_meanwhile(true, || {}).is_err());
    fs::remove_dir(case.output.join("README.md.d")).expect("it is there");
    case.convert_meanwhile(true, || {}).expect("nothing else is there");
}

#[cfg(unix)]
#[test]
fn links_stay_and_what_they_lead_to_is_written() {
    let case = Case::new();
    let far = case.temp.path().join("far");
    std::os::unix::fs::symlink(&far, &case.output).expect("room");
    let error = convert_plain(&case.model, &case.output).expect_err("a link to nothing");
    assert!(error.to_string().contains("a link to nothing"), "{error}");
    fs::create_dir(&far).expect("room");
    let place = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).expect("it is there"));
    let before = place(&far);
    convert_plain(&case.model, &case.output).expect("an empty directory");
    assert_eq!(place(&far), before, "an empty directory is filled, not replaced");
    case.convert_meanwhile(true, || {}).expect("an earlier conversion");
    assert!(fs::symlink_metadata(&case.output).expect("it is there").is_symlink());
    ModelSource::open(&far).expect("a whole model");
    assert_eq!(case.names(), ["far", "out"]);
}

#[test]
fn whatever_was_interrupted_while_files_moved_is_finished() {
    let case = Case::new();
    let [old, new] = case.models();
    assert!(old.contains_key("merges.txt") && !new.contains_key("merges.txt"));
    let moving: Vec<_> = new.iter().filter(|(name, _)| *name != "conversion.json").collect();
    let deleted: Vec<_> = old.iter().filter(|(name, _)| *name != "conversion.json").collect();
    // The old record goes first, then the rest; the new record comes last.
    for step in 0..=deleted.len() + moving.len() {
        let left = &deleted[step.min(deleted.len())..];
        let moved = &moving[..step.saturating_sub(deleted.len())];
        let still = moving[moved.len()..].iter().copied().chain(new.get_key_value("conversion.json"));
        write_all(&case.output, left.iter().chain(moved).copied());
        if step <= deleted.len() {
            write_all(&case.within("complete"), &new);
        } else {
            write_all(&case.within("moving"), still);
        }
        let error = ModelSource::open(&case.output).expect_err("it is not whole");
        assert!(matches!(error, ConvertError::OutputUnfinished { .. }), "step {step}: {error}");
        let found = prepared(&case.output).expect("it can be finished");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(&case.output.canonicalize().expect("there").display().to_string()), "{found:?}");
        assert!(snapshot(&case.output) == new, "step {step}");
        fs::remove_dir_all(&case.output).expect("it is there");
    }
}

#[test]
fn what_was_interrupted_before_it_was_complete_is_deleted_and_named() {
    let case = Case::new();
    let [old, new] = case.models();
    write_all(&case.output, &old);
    for partial in [case.within("partial"), case.beside("partial"), case.beside("scratch")] {
        write_all(&partial, new.iter().take(2));
        write_all(&partial.join("base"), &new);
        let found = prepared(&case.output).expect("it can be deleted");
        let name = partial.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(matches!(&found[..], [line] if line.contains(&name)), "{found:?}");
        assert!(snapshot(&case.output) == old);
        assert_eq!(case.names(), ["out"]);
    }
    // Whoever writes does the same without being asked.
    write_all(&case.beside("partial"), &new);
    case.convert_meanwhile(true, || {}).expect("sound");
    assert_eq!(case.names(), ["out"]);
}

#[test]
fn what_was_interrupted_between_two_renames_is_put_back() {
    let case = Case::new();
    let [old, new] = case.models();
    write_all(&case.beside("old"), &old);
    write_all(&case.beside("partial"), &new);
    let found = prepared(&case.output).expect("it can be put back");
    assert!(found.iter().any(|line| line.contains("put back")), "{found:?}");
    assert!(snapshot(&case.output) == old);
    assert_eq!(case.names(), ["out"]);
    // After both of them the old one is what has to go.
    write_all(&case.beside("old"), &new);
    prepared(&case.output).expect("it can be deleted");
    assert!(snapshot(&case.output) == old);
    assert_eq!(case.names(), ["out"]);
}

#[test]
fn a_file_is_published_only_where_there_is_none_or_it_may_be_replaced() {
    let case = Case::new();
    let publish = |force: bool| {
        let scratch = ScratchDir::beside(&case.output).expect("room");
        fs::write(scratch.path().join("file"), "new").expect("room");
        fs::write(&case.output, "meanwhile").expect("room");
        scratch.publish_file("file", force)
    };
    assert!(matches!(publish(false), Err(ConvertError::OutputExists { .. })));
    assert_eq!(fs::read_to_string(&case.output).expect("it stays"), "meanwhile");
    publish(true).expect("it may be replaced");
    assert_eq!(fs::read_to_string(&case.output).expect("it is there"), "new");
    assert_eq!(case.names(), ["out"]);
}

#[cfg(unix)]
#[test]
fn a_process_that_is_being_started_does_not_hold_an_output() {
    let case = Case::new();
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Between its start and its own program a process has the files of this one open.
        scope.spawn(|| {
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                std::process::Command::new("true").status().expect("it starts");
            }
        });
        let all = (0..40).try_for_each(|_| case.convert_meanwhile(true, || {}));
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        all.expect("nobody else writes it");
    });
}
