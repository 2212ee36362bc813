//! Names of models and revisions.

use std::fmt;
use std::str::FromStr;

use super::HubError;

/// A model on a hub: a repository, or one GGUF file of it.
///
/// ```
/// use bsbr_convert::hub::ModelName;
///
/// let whole: ModelName = "openai-community/gpt2".parse()?;
/// assert_eq!((whole.repository(), whole.file()), ("openai-community/gpt2", None));
/// let file: ModelName = "someone/gpt2-GGUF/gpt2.Q8_0.gguf".parse()?;
/// assert_eq!((file.repository(), file.file()), ("someone/gpt2-GGUF", Some("gpt2.Q8_0.gguf")));
/// assert!("../gpt2".parse::<ModelName>().is_err());
/// # Ok::<(), bsbr_convert::hub::HubError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    repository: String,
    file: Option<String>,
}

impl ModelName {
    /// The repository, as `organisation/model`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The one file that is meant, if not the checkpoint as a whole.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }
}

impl FromStr for ModelName {
    type Err = HubError;

    fn from_str(name: &str) -> Result<Self, HubError> {
        let fail = |why| Err(HubError::Name { name: name.to_owned(), why });
        let mut parts = name.splitn(3, '/');
        let (organisation, model, file) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
        let Some(model) = model else {
            return fail("it has no organisation before a slash");
        };
        for part in [organisation, model] {
            if part.is_empty() {
                return fail("a part is empty");
            }
            if part.len() > 96 {
                return fail("a part has more than 96 characters");
            }
            if !part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
                return fail("a part holds something else than letters, digits, `-`, `_` and `.`");
            }
            if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) || part.contains("..") || part.contains("--")
            {
                return fail("a part begins or ends with `-` or `.`, or holds two of them together");
            }
        }
        if model.ends_with(".git") {
            return fail("it ends with `.git`");
        }
        if let Some(file) = file {
            if !file.ends_with(".gguf") {
                return fail("after the model only a file whose name ends with `.gguf` may follow");
            }
            if !is_plain_path(file) {
                return fail("the path of the file is empty somewhere, or leaves the repository");
            }
        }
        Ok(Self { repository: format!("{organisation}/{model}"), file: file.map(str::to_owned) })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

/// Whether `path` names a file below the directory it is appended to, on every system.
pub(super) fn is_plain_path(path: &str) -> bool {
    path.split('/').all(is_plain_name)
}

/// Whether `name` names a file in the directory it is appended to, on every system.
pub(super) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0']) && !name.contains(char::is_control)
}

/// Checks what may go into an address and become the name of a file.
pub(super) fn check_revision(revision: &str) -> Result<(), HubError> {
    let fail = |why| Err(HubError::Revision { revision: revision.to_owned(), why });
    if revision.is_empty() {
        return fail("it is empty");
    }
    if !is_plain_path(revision) || revision.contains("..") {
        return fail("it holds an empty part, `..`, `:`, a backslash or a control character");
    }
    if revision.contains([' ', '~', '^', '?', '*', '[']) {
        return fail("git allows no blank and none of ~^?*[ in it");
    }
    Ok(())
}

/// Whether this is the full name of a commit.
pub(super) fn is_commit(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_python_takes_are_taken() {
        for name in
            ["openai-community/gpt2", "a/b", "Qwen/Qwen2.5-0.5B", "01-ai/Yi-1.5_6B", "a/b/c.gguf", "a/b/Q4/c-1 x.gguf"]
        {
            assert_eq!(name.parse::<ModelName>().map(|parsed| parsed.to_string()).ok().as_deref(), Some(name));
        }
    }

    #[test]
    fn names_that_are_none_are_refused_with_the_reason() {
        let long = format!("a/{}", "b".repeat(97));
        for (name, word) in [
            ("", "no organisation"),
            ("gpt2", "no organisation"),
            ("/gpt2", "empty"),
            ("a/", "empty"),
            ("a//c.gguf", "empty"),
            ("a/b/c/d", "`.gguf`"),
            ("a/b/", "`.gguf`"),
            ("a/b/../c.gguf", "leaves"),
            ("a/b//c.gguf", "empty somewhere"),
            ("a/b/c\\d.gguf", "leaves"),
            ("../x", "begins or ends"),
            ("./x", "begins or ends"),
            ("a/..", "begins or ends"),
            ("a/b--c", "two of them"),
            ("a/b..c", "two of them"),
            ("-a/b", "begins"),
            ("a/b.", "ends"),
            ("a/b.git", ".git"),
            ("a/b c", "something else"),
            ("a/b?c=d", "something else"),
            ("a/ü", "something else"),
            (&long, "96"),
        ] {
            let error = name.parse::<ModelName>().expect_err(name).to_string();
            assert!(error.contains(word), "{name}: {error}");
        }
    }

    #[test]
    fn revisions_are_branches_tags_and_commits() {
        for revision in ["main", "v1.0", "refs/pr/1", "feature#1", "607a30d783dfa663caf39e06633721c8d4cfcd7e"] {
            assert!(check_revision(revision).is_ok(), "{revision}");
        }
        for revision in ["", "..", "a/../b", "/a", "a/", "a//b", "a b", "a\nb", "a\\b", "a:b", "a..b", "a?b"] {
            assert!(check_revision(revision).is_err(), "{revision:?}");
        }
        assert!(is_commit("607a30d783dfa663caf39e06633721c8d4cfcd7e"));
        assert!(!is_commit("607a30d"));
        assert!(!is_commit("../../../../../../../../../../../../../x"));
    }
}
