//! Leaves in the program of what it was built: `bsbr --version` and every report name it.

use std::{env, fs, path::Path, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let package = Path::new(&package);
    let rustc = env::var_os("RUSTC").and_then(|rustc| first_line(Command::new(rustc).arg("--version")));
    println!("cargo::rustc-env=BSBR_RUSTC={}", rustc.unwrap_or_else(|| "unknown".into()));
    println!("cargo::rustc-env=BSBR_BURN={}", burn(package).unwrap_or_else(|| "unknown".into()));
    println!("cargo::rustc-env=BSBR_COMMIT={}", commit(package).unwrap_or_default());
}

/// The version of burn in the lock file of this package, or of the workspace it is part of.
fn burn(package: &Path) -> Option<String> {
    let lock = package.ancestors().take(3).map(|dir| dir.join("Cargo.lock")).find(|path| path.is_file())?;
    println!("cargo::rerun-if-changed={}", lock.display());
    let text = fs::read_to_string(lock).ok()?;
    let (_, rest) = text.split_once("name = \"burn\"\nversion = \"")?;
    Some(rest.split('"').next()?.to_owned())
}

/// The commit of the sources, with `-dirty` where they were changed since; none outside of their repository.
fn commit(package: &Path) -> Option<String> {
    let git = |arguments: &[&str]| first_line(Command::new("git").arg("-C").arg(package).args(arguments));
    // Not that of a repository in which someone unpacked this package.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={path}");
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
}

/// First line of the output of a program that succeeds.
fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let line = String::from_utf8(output.stdout).ok()?.lines().next()?.trim().to_owned();
    (!line.is_empty()).then_some(line)
}
