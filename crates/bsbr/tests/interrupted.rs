//! Output directories in real use: ended by signals at any moment, written by two processes at once, links, mount points and
//! the directory a shell stands in.
#![cfg(unix)]
#![allow(clippy::print_stderr)] // what a failure belongs to, and what was not tested

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{Place, Tensor, checkpoint_dir, edit_tensors, files};

/// A checkpoint under `model` whose embedding and head are as large as `words` asks for.
fn place(words: usize) -> Place {
    let place = Place::with("llama");
    edit_tensors(&place.path("model/model.safetensors"), |tensors| {
        for tensor in tensors.iter_mut().filter(|tensor| tensor.shape.first() == Some(&97)) {
            *tensor = Tensor::f32(&tensor.name, &[words, 48], 0.5);
        }
    });
    place.edit_json("model/config.json", |config| config["vocab_size"] = words.into());
    place
}

fn start(place: &Place, arguments: &str) -> Child {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("bsbr"));
    command.current_dir(place.path("")).args(arguments.split_whitespace());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().expect("`kill`");
    assert!(sent.success());
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_conversion_that_is_asked_to_end_leaves_nothing_behind() {
    let place = place(200_000);
    for (name, number) in [("-INT", 2), ("-TERM", 15)] {
        let child = start(&place, "convert -m model -o new/deep/out");
        wait_for(&place.path("new/deep/.out.bsbr-partial/model.safetensors"));
        signal(&child, name);
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.signal(), Some(number), "{}", text(&output));
        assert!(text(&output).contains("interrupted: ") && !text(&output).contains("error"), "{}", text(&output));
        assert_eq!(names(&place.path("")), ["model"]);
    }
    // In a directory that is there, and in place of an earlier conversion.
    fs::create_dir(place.path("out")).expect("room");
    let child = start(&place, "convert -m model -o out");
    wait_for(&place.path("out/.bsbr-partial/model.safetensors"));
    signal(&child, "-TERM");
    assert_eq!(child.wait_with_output().expect("it ends").status.signal(), Some(15));
    assert_eq!(names(&place.path("out")), Vec::<String>::new());
    place.done("convert -m model -o out --chunk-size 64");
    let before = files(&place.path("out"));
    let child = start(&place, "convert -m model -o out --chunk-size 128 --force");
    wait_for(&place.path(".out.bsbr-partial/model.safetensors"));
    signal(&child, "-INT");
    assert_eq!(child.wait_with_output().expect("it ends").status.signal(), Some(2));
    assert!(files(&place.path("out")) == before);
    assert_eq!(names(&place.path("")), ["model", "out"]);
}

/// The files of a conversion with these settings.
fn conversion(place: &Place, settings: &str) -> BTreeMap<String, Vec<u8>> {
    place.done(&format!("convert -m model -o finished {settings}"));
    let found = files(&place.path("finished"));
    fs::remove_dir_all(place.path("finished")).expect("it was there");
    found
}

#[test]
fn a_process_killed_at_any_moment_leaves_the_old_model_or_the_new_one() {
    const KILLS: u32 = 100;
    let place = place(20_000);
    let settings = ["--chunk-size 64", "--chunk-size 128"];
    let models = settings.map(|settings| conversion(&place, settings));
    let started = Instant::now();
    let mut present = 0;
    place.done(&format!("convert -m model -o out {}", settings[present]));
    let mut whole = started.elapsed();
    let (mut random, mut ended_early, mut changed) = (7_u32, 0, 0);
    for kill in 0..KILLS {
        let next = 1 - present;
        let mut child = start(&place, &format!("convert -m model -o out --force {}", settings[next]));
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(whole.mul_f64(1.2 * f64::from(random >> 8) / f64::from(1 << 24)));
        child.kill().expect("it may have ended, which is no error");
        let status = child.wait().expect("it ends");
        assert!(status.signal() == Some(9) || status.success(), "{status}");
        ended_early += u32::from(status.signal() == Some(9));
        // On a busy machine no run takes what the one before it took: two of three are to be killed.
        whole = whole.mul_f64(if status.success() { 0.9 } else { 1.06 });
        let found = files(&place.path("out"));
        let now = models.iter().position(|model| *model == found);
        let now = now.unwrap_or_else(|| panic!("kill {kill}: neither, but {:?}", found.keys()));
        assert!(status.signal().is_some() || now == next, "it ended and published nothing");
        changed += u32::from(now != present);
        present = now;
    }
    assert!(ended_early >= KILLS / 2, "only {ended_early} of {KILLS} were killed");
    assert!(changed > 0, "none came to an end");
    // What the last one left is found, named and gone.
    place.done(&format!("convert -m model -o out --force {}", settings[0]));
    assert_eq!(names(&place.path("")), ["model", "out"]);
    assert!(files(&place.path("out")) == models[0]);
}

#[test]
fn a_process_killed_while_it_fills_a_directory_leaves_what_the_next_run_makes_right() {
    let place = place(20_000);
    let model = conversion(&place, "");
    let started = Instant::now();
    place.done("convert -m model -o other");
    let whole = started.elapsed();
    fs::create_dir(place.path("out")).expect("room");
    for kill in 0..20 {
        let mut child = start(&place, "convert -m model -o out");
        std::thread::sleep(whole.mul_f64(f64::from(kill) / 18.0));
        child.kill().expect("it may have ended, which is no error");
        child.wait().expect("it ends");
        let found = files(&place.path("out"));
        // What makes it a model comes last.
        assert!(found == model || !found.contains_key("conversion.json"), "kill {kill}: {:?}", found.keys());
        let run = place.run("convert -m model -o out");
        assert!(run.code == 0 || run.code == 2, "{}", run.stderr);
        assert!(files(&place.path("out")) == model, "kill {kill}: {}", run.stderr);
        assert_eq!(files(&place.path("out")).len(), names(&place.path("out")).len(), "something else is left");
        for name in names(&place.path("out")) {
            fs::remove_file(place.path("out").join(name)).expect("a file");
        }
    }
}

#[test]
fn leftovers_of_an_interrupted_run_are_named() {
    let place = Place::with("llama");
    fs::create_dir_all(place.path(".out.bsbr-partial/base")).expect("room");
    place.write(".out.bsbr-partial/model.safetensors", "half of it");
    let run = place.run("convert -m model -o out");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stderr.contains("an interrupted run left") && run.stderr.contains(".out.bsbr-partial"),
        "{}",
        run.stderr
    );
    assert_eq!(names(&place.path("")), ["model", "out"]);
    // Between two renames, where there is no other way.
    fs::rename(place.path("out"), place.path(".out.bsbr-old")).expect("it is there");
    let run = place.run("convert -m model -o out");
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("put back") && run.stderr.contains("exists and is not empty"), "{}", run.stderr);
    place.done("inspect -m out");
}

#[test]
fn of_two_processes_that_write_one_output_one_is_refused() {
    let place = place(20_000);
    for forced in [false, true] {
        let flag = if forced { "--force" } else { "" };
        for _ in 0..5 {
            if forced {
                // There already.
                place.run("convert -m model -o out");
            } else if place.path("out").exists() {
                fs::remove_dir_all(place.path("out")).expect("a directory");
            }
            let both =
                [128, 64].map(|size| start(&place, &format!("convert -m model -o out --chunk-size {size} {flag}")));
            let ends = both.map(|child| child.wait_with_output().expect("it ends"));
            let done = ends.iter().filter(|output| output.status.success()).count();
            let errors = ends.each_ref().map(text).concat();
            assert!(done == 1 || (forced && done == 2), "{done}: {errors}");
            if done == 1 {
                let refused = ["being written by another process", "exists and is not empty"];
                assert!(refused.iter().any(|words| errors.contains(words)), "{errors}");
            }
            assert_eq!(names(&place.path("")), ["model", "out"], "{errors}");
            place.done("inspect -m out");
        }
    }
}

#[test]
fn the_current_directory_and_what_a_link_leads_to_are_filled() {
    let place = Place::with("llama");
    fs::create_dir_all(place.path("here")).expect("room");
    fs::create_dir_all(place.path("far")).expect("room");
    std::os::unix::fs::symlink("far", place.path("link")).expect("room");
    let shell = |script: &str| {
        let bsbr = assert_cmd::cargo::cargo_bin!("bsbr");
        let mut command = Command::new("sh");
        command.current_dir(place.path("")).args(["-ec", script]).env("X", bsbr).output().expect("a shell")
    };
    // The shell still stands in the directory with the files, each time.
    let output = shell(
        "cd here; for force in '' --force --force; do $X convert -m ../model -o . $force; test -f config.json; done; ls -A .",
    );
    assert!(output.status.success(), "{}", text(&output));
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("conversion.json") && !listed.contains("bsbr-"), "{listed}");
    let output = shell(
        "$X convert -m model -o link; $X convert -m model -o link --force; test -L link; test -f far/config.json",
    );
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(names(&place.path("")), ["far", "here", "link", "model"]);
    // A link to nothing is told before anything is written.
    fs::remove_dir_all(place.path("far")).expect("a directory");
    common::check_refusal(&place.run("convert -m model -o link"), 2, &["link", "a link to nothing"]);
    fs::remove_file(place.path("link")).expect("a link");
    // So are files of somebody else.
    place.write("here/notes.txt", "mine");
    place.refused("convert -m model -o here --force", 2, &["here", "`notes.txt`"]);
    place.refused("calibrate -m here --text model/config.json", 2, &["here", "`notes.txt`"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_filled() {
    let place = Place::with("llama");
    fs::create_dir(place.path("volume")).expect("room");
    // A file system of its own, in a namespace of its own, which needs no privileges where the kernel is set up so.
    let script = "mount -t tmpfs -o size=20m tmpfs volume || exit 77; mkdir volume/lost+found
        for force in '' --force --force; do $X convert -m model -o volume $force || exit 1; done
        $X inspect -m volume >inspected && ls -A volume >listed";
    let mut command = Command::new("unshare");
    let output = command
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .current_dir(place.path(""))
        .env("X", assert_cmd::cargo::cargo_bin!("bsbr"))
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let listed = place.read("listed");
            assert!(listed.contains("conversion.json") && !listed.contains("bsbr-"), "{listed}");
            assert!(place.read("inspected").contains("[attention]"));
            assert_eq!(names(&place.path("")), ["inspected", "listed", "model", "volume"]);
        }
        Ok(output) if text(&output).contains("unshare") || output.status.code() == Some(77) => {
            eprintln!("no file system can be mounted here: not tested");
        }
        Ok(output) => panic!("{}", text(&output)),
        Err(_) => eprintln!("there is no `unshare`: not tested"),
    }
}

#[test]
fn an_interrupted_calibration_of_layers_leaves_no_moments() {
    let place = Place::with("builtin");
    fs::copy(checkpoint_dir("builtin").join("heldout.txt"), place.path("text.txt")).expect("room");
    let child = start(&place, "split calibrate -m model --text text.txt -o moments.safetensors");
    wait_for(&place.path(".moments.safetensors.bsbr-scratch"));
    signal(&child, "-TERM");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.signal(), Some(15), "{}", text(&output));
    assert_eq!(names(&place.path("")), ["model", "text.txt"]);
}
