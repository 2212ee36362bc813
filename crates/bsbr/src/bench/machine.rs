//! Where and with what a measurement was made.

use std::{process::Command, thread};

use serde::Serialize;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Its name.
    pub cpu: String,
    /// Those this process may use.
    pub cores: usize,
    /// All of it.
    pub memory_bytes: Option<u64>,
    /// Kind and version.
    pub os: String,
    /// Of instructions.
    pub architecture: &'static str,
}

/// What was built of what.
#[derive(Debug, Clone, Serialize)]
pub struct Versions {
    /// Of this program.
    pub tool: &'static str,
    /// Of burn.
    pub burn: String,
    /// Of the compiler.
    pub rustc: &'static str,
    /// Commit of the sources, with `-dirty` where they were changed since; `None` outside of a repository.
    pub commit: Option<String>,
}

/// This machine.
pub fn machine() -> Machine {
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

/// This program.
pub fn versions() -> Versions {
    // A tool in its repository is asked anew, so that changes since it was built count.
    let now = crate::repository().and_then(|repository| {
        let repository = repository.display().to_string();
        command("git", &["-C", &repository, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    });
    let built = Some(env!("BSBR_COMMIT")).filter(|commit| !commit.is_empty()).map(str::to_owned);
    Versions {
        tool: env!("CARGO_PKG_VERSION"),
        burn: env!("BSBR_BURN").into(),
        rustc: env!("BSBR_RUSTC"),
        commit: now.or(built),
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
    fn the_versions_of_burn_and_the_compiler_are_those_of_the_build() {
        assert!(versions().burn.starts_with("0."), "{}", versions().burn);
        assert!(versions().rustc.starts_with("rustc "), "{}", versions().rustc);
    }
}
