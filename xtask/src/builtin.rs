//! The checkpoint in the repository: see `builtin/PROVENANCE.md`.

use std::path::{Path, PathBuf};

/// The checkpoint, in the Hugging Face layout.
pub(crate) fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin")
}

/// Text it never saw.
pub(crate) fn heldout() -> PathBuf {
    dir().join("heldout.txt")
}

/// Token ids and the logits another implementation computes for them.
pub(crate) fn expected() -> PathBuf {
    dir().join("expected.safetensors")
}

/// Where its conversion goes when nothing else is said.
pub(crate) fn output() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).join("target/bsbr/builtin")
}
