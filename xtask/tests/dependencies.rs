//! What is compiled for the repository's own program.

use std::process::Command;

/// Packages under `xtask`, as cargo would build them for it alone.
fn packages(edges: &str) -> Vec<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.args(["tree", "--offline", "-p", "xtask", "--prefix", "none", "-e", edges]).output();
    let output = output.expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn nothing_of_the_server_is_compiled_for_it() {
    let packages = packages("normal,build");
    assert!(packages.iter().any(|name| name == "bsbr"), "{packages:?}");
    let of_server = ["bsbr-serve", "tokio", "axum", "axum-core", "hyper", "hyper-util", "tower", "futures-util"];
    for name in of_server {
        assert!(packages.iter().all(|found| found != name), "{name} is compiled for xtask");
    }
}
