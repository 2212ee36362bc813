//! Where and with what a measurement was made.

use std::{path::Path, process::Command, thread};

use serde::Serialize;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) os: String,
    pub(crate) architecture: &'static str,
}

/// What was built of what.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Versions {
    pub(crate) tool: &'static str,
    pub(crate) burn: String,
    pub(crate) rustc: &'static str,
    /// Commit of the sources, with `-dirty` where they were changed since; `None` outside of a repository.
    pub(crate) commit: Option<String>,
}

pub(crate) fn machine() -> Machine {
    let (cpu, memory) = (file("/proc/cpuinfo"), file("/proc/meminfo"));
    let asked = || command("sysctl", &["-n", "machdep.cpu.brand_string"]);
    let kilobytes = field(&memory, "MemTotal").and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    Machine {
        cpu: field(&cpu, "model name").or_else(asked).unwrap_or_else(|| "unknown".into()),
        cores: thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: kilobytes.map(|kilobytes| kilobytes * 1024),
        os: system(),
        architecture: std::env::consts::ARCH,
    }
}

/// Kind and version of the operating system.
fn system() -> String {
    let kernel = command("uname", &["-sr"]).unwrap_or_else(|| std::env::consts::OS.into());
    let name = file("/etc/os-release").lines().find_map(|line| line.strip_prefix("PRETTY_NAME=").map(str::to_owned));
    match name {
        Some(name) => format!("{} ({kernel})", name.trim_matches('"')),
        None => kernel,
    }
}

pub(crate) fn versions() -> Versions {
    // The lock file of the build.
    let lock = include_str!("../../../Cargo.lock");
    let burn = lock.split_once("name = \"burn\"\nversion = \"").and_then(|(_, rest)| rest.split('"').next());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).display().to_string();
    let commit = command("git", &["-C", &root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    Versions {
        tool: env!("CARGO_PKG_VERSION"),
        burn: burn.unwrap_or("unknown").into(),
        rustc: env!("BSBR_RUSTC"),
        commit,
    }
}

fn file(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value of the first line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// First line of the output of a program that succeeds.
fn command(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    let line = String::from_utf8(output.stdout).ok()?.lines().next()?.trim().to_owned();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: another\n";
        assert_eq!(field(text, "model name").as_deref(), Some("Some CPU @ 3 GHz"));
        assert_eq!(field(text, "flags"), None);
    }

    #[test]
    fn the_version_of_burn_is_read_from_the_lock_file() {
        assert!(versions().burn.starts_with("0."), "{}", versions().burn);
        assert!(versions().rustc.starts_with("rustc "), "{}", versions().rustc);
    }
}
