//! Files that stand for others: pointers of git-lfs that were never fetched, and links without a target.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::ConvertError;

/// Why a file is not the one its name promises.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placeholder {
    /// A pointer of git-lfs.
    LfsPointer,
    /// A link to something that is not there.
    DanglingLink {
        /// Where it leads.
        target: String,
    },
    /// A link that was checked out as a text, as git does where there are no links.
    WrittenLink {
        /// Where it leads.
        target: String,
    },
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LfsPointer => f.write_str(
                "is a git-lfs pointer, not the file itself: fetch the files with `git lfs pull`, or download the model \
                 again",
            ),
            Self::DanglingLink { target } => write!(
                f,
                "is a link to `{target}`, which does not exist: put the file itself in its place, or download the model \
                 again"
            ),
            Self::WrittenLink { target } => write!(
                f,
                "holds nothing but `{target}`: it is a link that was copied as a text. Put the file itself in its place, \
                 or download the model again"
            ),
        }
    }
}

/// Longest pointer or path that is looked for.
const LONGEST: u64 = 1024;

/// Checks that the file `path`, if it is there at all, is no stand-in for another.
///
/// # Errors
///
/// [`ConvertError::Placeholder`] naming the file, what it is and what to do.
pub fn check_file(path: &Path) -> Result<(), ConvertError> {
    let fail = |problem| Err(ConvertError::Placeholder { path: path.to_owned(), problem });
    if let Ok(target) = fs::read_link(path)
        && !path.exists()
    {
        return fail(Placeholder::DanglingLink { target: target.display().to_string() });
    }
    // Whatever cannot be read is told by whoever reads it.
    let short = fs::metadata(path).is_ok_and(|kind| kind.is_file() && kind.len() <= LONGEST);
    let mut content = Vec::new();
    let opened = short.then(|| File::open(path).ok()).flatten();
    if opened.and_then(|file| file.take(LONGEST).read_to_end(&mut content).ok()).is_none() {
        return Ok(());
    }
    let Ok(text) = std::str::from_utf8(&content) else { return Ok(()) };
    if is_lfs_pointer(text) {
        return fail(Placeholder::LfsPointer);
    }
    // No file that is read here is one word: JSON has its brackets, weights their binary headers.
    let word = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "/\\._-+=@~".contains(c));
    if word && text.contains(['/', '.']) && text.contains(char::is_alphabetic) {
        return fail(Placeholder::WrittenLink { target: text.to_owned() });
    }
    Ok(())
}

/// Whether a text is the content of a git-lfs pointer.
pub fn is_lfs_pointer(text: &str) -> bool {
    text.starts_with("version https://git-lfs.github.com/spec/") && text.contains("oid sha256:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(content: &[u8]) -> Option<Placeholder> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("model.safetensors");
        fs::write(&path, content).expect("a file");
        match check_file(&path) {
            Err(ConvertError::Placeholder { problem, .. }) => Some(problem),
            other => other.map(|()| None).expect("no other error"),
        }
    }

    #[test]
    fn pointers_and_written_links_are_told_from_small_files_that_are_what_they_say() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 269060280\n";
        assert_eq!(of(pointer), Some(Placeholder::LfsPointer));
        for target in ["../../blobs/0123abcd", "shared/model.safetensors", "model-fp16.safetensors"] {
            assert_eq!(of(target.as_bytes()), Some(Placeholder::WrittenLink { target: target.to_owned() }));
        }
        for content in [
            &b""[..],
            b"{}",
            b"1.5",
            br#"{"a":"b/c"}"#,
            b"GGUF",
            b"a text/with spaces",
            &[0xff; 20],
            &[8, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
        ] {
            assert_eq!(of(content), None, "{content:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed_and_one_without_a_target_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, good, dead) = (dir.path().join("file"), dir.path().join("good"), dir.path().join("dead"));
        fs::write(&file, "{}").expect("a file");
        std::os::unix::fs::symlink(&file, &good).expect("a link");
        std::os::unix::fs::symlink("../blobs/gone", &dead).expect("a link");
        assert!(check_file(&good).is_ok());
        assert!(check_file(&dir.path().join("absent")).is_ok());
        let message = check_file(&dead).expect_err("a dead link").to_string();
        assert!(message.contains("dead") && message.contains("link to `../blobs/gone`"), "{message}");
    }
}
