//! Running the program in a temporary directory, and checkpoints to run it on.
#![allow(dead_code, unreachable_pub)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The program.
pub fn bsbr() -> Command {
    // Of the package whose tests these are.
    let mut command = Command::new(env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))));
    command.env("NO_COLOR", "1");
    command
}

/// What a run left behind.
#[derive(Debug, PartialEq)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A temporary directory, where the program runs.
pub struct Place(TempDir);

impl Place {
    pub fn empty() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    /// With a checkpoint under `model`: one of the converter's fixtures or `builtin`, which has a tokenizer.
    pub fn with(checkpoint: &str) -> Self {
        let place = Self::empty();
        let model = place.path("model");
        fs::create_dir(&model).expect("a fresh directory");
        let wanted = ["config.json", "tokenizer.json", "expected.safetensors"];
        for (name, content) in files(&checkpoint_dir(checkpoint)) {
            if name.starts_with("model") || name.starts_with("pytorch_model") || wanted.contains(&name.as_str()) {
                fs::write(model.join(name), content).expect("room");
            }
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("room");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("a text")
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).expect("JSON")
    }

    pub fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = self.json(name);
        edit(&mut value);
        self.write(name, &value.to_string());
    }

    /// Runs the program here; arguments have no blanks.
    pub fn run(&self, arguments: &str) -> Run {
        let mut command = bsbr();
        command.current_dir(self.0.path()).args(arguments.split_whitespace());
        run(&mut command)
    }

    /// Runs what must succeed; its standard output.
    pub fn done(&self, arguments: &str) -> String {
        let run = self.run(arguments);
        assert_eq!(run.code, 0, "{arguments}\n{}", run.stderr);
        run.stdout
    }

    /// Runs what must fail with `code`, print nothing but an error with all of `words`, and leave every file as it was.
    #[track_caller]
    pub fn refused(&self, arguments: &str, code: i32, words: &[&str]) {
        let before = tree(self.0.path());
        let run = self.run(arguments);
        check_refusal(&run, code, words);
        assert!(tree(self.0.path()) == before, "files changed after: {}", run.stderr);
    }
}

/// Checks a refusal: exit code, nothing on standard output, an error that holds all of `words`.
#[track_caller]
pub fn check_refusal(run: &Run, code: i32, words: &[&str]) {
    assert_eq!((run.code, run.stdout.as_str()), (code, ""), "{}", run.stderr);
    assert!(run.stderr.starts_with("error: "), "{}", run.stderr);
    for word in words {
        assert!(run.stderr.contains(word), "no {word:?} in: {}", run.stderr);
    }
}

pub fn run(command: &mut Command) -> Run {
    let output = command.output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Run {
        code: output.status.code().expect("an exit code, not a signal"),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

pub fn checkpoint_dir(name: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    if name == "builtin" { package.join(name) } else { package.join("../bsbr-convert/tests/fixtures").join(name) }
}

/// The files of a directory with their content.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let paths = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
    let name = |path: &Path| path.file_name().expect("a name").to_str().expect("plain names").to_owned();
    paths.filter(|path| path.is_file()).map(|path| (name(&path), fs::read(path).expect("a file"))).collect()
}

/// Everything below a directory; a directory has no content.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(tree(&path));
            found.insert(path, None);
        } else {
            let content = fs::read(&path).expect("a file");
            found.insert(path, Some(content));
        }
    }
    found
}

/// A tensor by hand: any name, dtype and bytes.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(name: &str, shape: &[usize], value: f32) -> Self {
        let bytes = value.to_le_bytes().repeat(shape.iter().product());
        Self { name: name.into(), dtype: "F32".into(), shape: shape.to_vec(), bytes }
    }
}

/// Header and data of a safetensors file.
pub fn read_raw(path: &Path) -> (String, Vec<u8>) {
    let bytes = fs::read(path).expect("a file");
    let (length, rest) = bytes.split_first_chunk().expect("a header length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (String::from_utf8(header.to_vec()).expect("UTF-8"), data.to_vec())
}

/// Header and data as they are given, whether they make sense or not.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [length.as_slice(), header.as_bytes(), data].concat()).expect("room");
}

/// Rewrites a safetensors file; one that is not there starts empty.
pub fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Vec<Tensor>)) {
    let mut tensors = Vec::new();
    if path.exists() {
        let (header, data) = read_raw(path);
        let header: BTreeMap<String, Value> = serde_json::from_str(&header).expect("JSON");
        for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let (shape, dtype) = (entry["shape"].clone(), entry["dtype"].as_str().expect("a dtype").to_owned());
            let [start, end]: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).expect("offsets");
            let shape = serde_json::from_value(shape).expect("a shape");
            tensors.push(Tensor { name, dtype, shape, bytes: data[start..end].to_vec() });
        }
    }
    edit(&mut tensors);
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        entries.push(format!("{}:{entry}", json!(tensor.name)));
        data.extend(tensor.bytes);
    }
    write_raw(path, &format!("{{{}}}", entries.join(",")), &data);
}
