//! What the environment says about the hub, with the variables and the precedence of Python's `huggingface_hub`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Which hub to ask, as whom, and where its files are kept.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// The directory with the repositories, the one Python's `huggingface_hub` uses.
    pub cache: PathBuf,
    /// Use what the cache has and ask nobody.
    pub offline: bool,
    /// File of the certificates to trust in the place of Mozilla's.
    pub certificates: Option<PathBuf>,
    /// Pause before the second try of a request that failed; it doubles with every further one.
    pub first_pause: Duration,
    token: Option<Token>,
}

/// A token and where it was found. Its `Debug` does not show it.
#[derive(Clone)]
struct Token {
    secret: String,
    found: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.found)
    }
}

impl HubSettings {
    /// From the variables of this process.
    ///
    /// # Errors
    ///
    /// As [`HubSettings::resolve`]; [`HubError::Io`] for a token file that is there and cannot be read.
    pub fn from_env() -> Result<Self, HubError> {
        let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::resolve(variable, |path| match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(HubError::io("read the token in", path)),
        })
    }

    /// From `variable`, which gives the value of an environment variable, and `read`, which gives the content of a file
    /// that exists. A variable that is empty counts as absent.
    ///
    /// | what | first of |
    /// |---|---|
    /// | endpoint | `HF_ENDPOINT`, `https://huggingface.co` |
    /// | home | `HF_HOME`, `XDG_CACHE_HOME/huggingface`, `~/.cache/huggingface` |
    /// | cache | `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, home`/hub` |
    /// | token | `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the file `HF_TOKEN_PATH`, the file home`/token` |
    /// | offline | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`: 1, ON, YES or TRUE |
    /// | certificates | `SSL_CERT_FILE`, Mozilla's |
    ///
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN` keeps every token at home. `~` and `$NAME` in a path are replaced.
    ///
    /// # Errors
    ///
    /// [`HubError::Environment`] for an endpoint that is no address, and when no variable says where the home is;
    /// what `read` returns.
    pub fn resolve(
        variable: impl Fn(&str) -> Option<String>,
        read: impl FnOnce(&Path) -> Result<Option<String>, HubError>,
    ) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let truth = |name: &str| variable(name).map(|value| is_true(&value));
        let path = |name: &str| variable(name).map(|value| expanded(&value, &variable));

        let home = || -> Result<PathBuf, HubError> {
            let in_cache = |dir: PathBuf| dir.join("huggingface");
            let user =
                || variable("HOME").or_else(|| variable("USERPROFILE")).map(|dir| Path::new(&dir).join(".cache"));
            let xdg = || path("XDG_CACHE_HOME");
            path("HF_HOME").or_else(|| xdg().or_else(user).map(in_cache)).ok_or_else(|| HubError::Environment {
                variable: "HF_HOME",
                why: "it is not set, nor is HOME: set it to the directory where models may be kept".to_owned(),
            })
        };
        let cache = match path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")) {
            Some(cache) => cache,
            None => home()?.join("hub"),
        };
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        check_endpoint(&endpoint)?;
        let named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
            .into_iter()
            .find_map(|name| Some(Token { secret: clean(&variable(name)?)?, found: name.to_owned() }));
        let token = if truth("HF_HUB_DISABLE_IMPLICIT_TOKEN").unwrap_or_default() {
            None
        } else if named.is_some() {
            named
        } else if let Some(file) = path("HF_TOKEN_PATH").or_else(|| home().ok().map(|home| home.join("token"))) {
            let secret = read(&file)?.as_deref().and_then(clean);
            secret.map(|secret| Token { secret, found: file.display().to_string() })
        } else {
            None
        };
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            offline: truth("HF_HUB_OFFLINE").or_else(|| truth("TRANSFORMERS_OFFLINE")).unwrap_or_default(),
            certificates: path("SSL_CERT_FILE"),
            first_pause: Duration::from_secs(1),
            token,
        })
    }

    /// The token for the hub, if there is one.
    pub(super) fn token(&self) -> Option<&str> {
        self.token.as_ref().map(|token| token.secret.as_str())
    }

    /// What token is sent, in words.
    pub(super) fn token_sent(&self) -> String {
        self.token
            .as_ref()
            .map_or_else(|| "no token was sent".to_owned(), |token| format!("sent was the token of {}", token.found))
    }
}

fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

/// A token as it is stored, without the line ends and blanks around it.
fn clean(token: &str) -> Option<String> {
    let token: String = token.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn check_endpoint(endpoint: &str) -> Result<(), HubError> {
    let fail = |why: &str| Err(HubError::Environment { variable: "HF_ENDPOINT", why: why.to_owned() });
    let Some((_, rest)) = endpoint.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https")) else {
        return fail("an address begins with `https://` or `http://`");
    };
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() {
        return fail("it names no host");
    }
    if host.contains('@') {
        return fail("it holds a user or a password: set HF_TOKEN instead");
    }
    if rest.contains(['?', '#']) || rest.contains(char::is_whitespace) {
        return fail("it holds a blank, `?` or `#`");
    }
    Ok(())
}

/// A path with `~`, `$NAME` and `${NAME}` replaced; a name that is not set stays as it is.
fn expanded(path: &str, variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut text = path.to_owned();
    if let (true, Some(home)) = (path == "~" || path.starts_with("~/"), variable("HOME")) {
        text.replace_range(..1, &home);
    }
    let mut parts = text.split('$');
    let mut done = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = match part.strip_prefix('{').and_then(|part| part.split_once('}')) {
            Some(inner) => inner,
            None => part.split_at(part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len())),
        };
        match variable(name) {
            Some(value) => done.extend([value.as_str(), rest]),
            None => done.extend(["$", part]),
        }
    }
    done.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings under these variables and nothing else; the files are `path=content`.
    fn settings(variables: &[(&str, &str)], files: &[(&str, &str)]) -> Result<HubSettings, HubError> {
        let find = |list: &[(&str, &str)], name: &str| {
            list.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        HubSettings::resolve(|name| find(variables, name), |path| Ok(find(files, path.to_str().expect("plain paths"))))
    }

    fn token(variables: &[(&str, &str)], files: &[(&str, &str)]) -> Option<(String, String)> {
        let token = settings(variables, files).expect("settings").token;
        token.map(|token| (token.secret, token.found))
    }

    const HOME: (&str, &str) = ("HOME", "/home/u");

    #[test]
    fn the_cache_is_where_python_looks_for_it() {
        for (variables, cache) in [
            (&[][..], "/home/u/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/xdg")], "/xdg/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/xdg"), ("HF_HOME", "/hf")], "/hf/hub"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
            (&[("HF_HUB_CACHE", ""), ("HF_HOME", "/hf")], "/hf/hub"),
            (&[("HF_HOME", "~/hf")], "/home/u/hf/hub"),
            (&[("HF_HOME", "$DISK/hf"), ("DISK", "/disk")], "/disk/hf/hub"),
            (&[("HF_HUB_CACHE", "/a${DISK}b/$NO-x$"), ("DISK", "/disk")], "/a/diskb/$NO-x$"),
        ] {
            let found = settings(&[&[HOME], variables].concat(), &[]).expect("settings").cache;
            assert_eq!(found, Path::new(cache), "{variables:?}");
        }
        let error = settings(&[], &[]).expect_err("no home").to_string();
        assert!(error.contains("HF_HOME") && error.contains("HOME"), "{error}");
        assert_eq!(settings(&[("HF_HUB_CACHE", "/c")], &[]).expect("no home needed").cache, Path::new("/c"));
    }

    #[test]
    fn the_token_is_the_one_python_takes() {
        let files = [("/home/u/.cache/huggingface/token", "file\n"), ("/other", " other \r\n"), ("/blank", "\n")];
        for (variables, expected) in [
            (&[][..], Some(("file", "/home/u/.cache/huggingface/token"))),
            (&[("HF_TOKEN_PATH", "/other")], Some(("other", "/other"))),
            (&[("HF_TOKEN_PATH", "/blank")], None),
            (&[("HF_TOKEN_PATH", "/none")], None),
            (&[("HF_HOME", "/hf")], None),
            (&[("HUGGING_FACE_HUB_TOKEN", "old")], Some(("old", "HUGGING_FACE_HUB_TOKEN"))),
            (&[("HUGGING_FACE_HUB_TOKEN", "old"), ("HF_TOKEN", "new\n")], Some(("new", "HF_TOKEN"))),
            (&[("HF_TOKEN", "")], Some(("file", "/home/u/.cache/huggingface/token"))),
            (&[("HF_TOKEN", "new"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
            (&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "yes")], None),
        ] {
            let expected = expected.map(|(secret, found)| (secret.to_owned(), found.to_owned()));
            assert_eq!(token(&[&[HOME], variables].concat(), &files), expected, "{variables:?}");
        }
    }

    #[test]
    fn no_debug_output_shows_a_token() {
        let settings = settings(&[HOME, ("HF_TOKEN", "hf_secret")], &[]).expect("settings");
        let text = format!("{settings:?}");
        assert!(text.contains("Token(HF_TOKEN)") && !text.contains("hf_secret"), "{text}");
    }

    #[test]
    fn offline_is_what_python_calls_true() {
        for (variables, expected) in [
            (&[][..], false),
            (&[("HF_HUB_OFFLINE", "1")], true),
            (&[("HF_HUB_OFFLINE", "true")], true),
            (&[("HF_HUB_OFFLINE", "On")], true),
            (&[("HF_HUB_OFFLINE", "0")], false),
            (&[("HF_HUB_OFFLINE", "nonsense")], false),
            (&[("TRANSFORMERS_OFFLINE", "yes")], true),
            (&[("TRANSFORMERS_OFFLINE", "yes"), ("HF_HUB_OFFLINE", "0")], false),
        ] {
            assert_eq!(
                settings(&[&[HOME], variables].concat(), &[]).expect("settings").offline,
                expected,
                "{variables:?}"
            );
        }
    }

    #[test]
    fn an_endpoint_is_an_address_without_secrets() {
        let endpoint = |value| settings(&[HOME, ("HF_ENDPOINT", value)], &[]).map(|settings| settings.endpoint);
        assert_eq!(endpoint("").expect("the default"), "https://huggingface.co");
        assert_eq!(endpoint("http://localhost:80/hub//").expect("an address"), "http://localhost:80/hub");
        for value in [
            "huggingface.co",
            "ftp://x",
            "https://",
            "https:///x",
            "https://user:hunter2@x",
            "https://x?y",
            "https://x y",
        ] {
            let error = endpoint(value).expect_err(value).to_string();
            assert!(error.contains("HF_ENDPOINT") && !error.contains("hunter2"), "{error}");
        }
    }
}
