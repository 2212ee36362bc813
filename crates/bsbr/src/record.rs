//! What every result says about how it came to be.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bench::machine;

/// Version and commit of the program, the model, the hash of the text it read, and the machine.
pub(crate) fn about(model: &str, text_sha256: Option<String>) -> Value {
    json!({
        "versions": machine::versions(),
        "model": model,
        "text_sha256": text_sha256,
        "machine": machine::machine(),
    })
}

/// SHA-256 in lower-case hexadecimal.
pub(crate) fn sha256_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_named_by_its_hash() {
        let about = about("a model", Some(sha256_of(b"abc")));
        // Of FIPS 180-2, appendix B.1.
        assert_eq!(about["text_sha256"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(about["model"], "a model");
        assert!(about["machine"]["cores"].as_u64().is_some_and(|cores| cores > 0));
    }
}
