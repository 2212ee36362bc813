//! Addresses: what they are made of, where a redirect leads, what of them may be shown.

use std::fmt::Write as _;
use std::net::IpAddr;

use ureq::http::Uri;

/// `text` with everything escaped that has a meaning in an address; `keep` stays too.
pub(super) fn escaped(text: &str, keep: char) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || c == keep {
            escaped.push(c);
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// Scheme, host and port: who gets to see what is sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Origin {
    secure: bool,
    host: String,
    port: u16,
}

impl Origin {
    /// Of a whole `http` or `https` address; `None` for any other.
    pub(super) fn of(url: &Uri) -> Option<Self> {
        let secure = match url.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Some(Self { secure, host: url.host()?.to_ascii_lowercase(), port })
    }

    /// Whether it is this machine.
    pub(super) fn is_local(&self) -> bool {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Whether what follows from here may be asked of `next`: never without TLS what began with it.
    pub(super) fn may_lead_to(&self, next: &Self) -> bool {
        next.secure || !self.secure
    }
}

/// Where the `Location` of an answer from `base` leads.
pub(super) fn followed(base: &Uri, location: &str) -> Option<Uri> {
    let text = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{}:{location}", base.scheme_str()?)
    } else {
        let path = match location.strip_prefix('/') {
            Some(_) => location.to_owned(),
            None => format!("{}/{location}", base.path().rsplit_once('/')?.0),
        };
        format!("{}://{}{path}", base.scheme_str()?, base.authority()?)
    };
    text.parse().ok().filter(|url| Origin::of(url).is_some())
}

/// An address as messages show it: without the query, where signatures are, and without a user.
pub(super) fn shown(url: &Uri) -> String {
    let port = url.port_u16().map_or_else(String::new, |port| format!(":{port}"));
    format!("{}://{}{port}{}", url.scheme_str().unwrap_or("http"), url.host().unwrap_or_default(), url.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().expect("an address")
    }

    #[test]
    fn what_has_a_meaning_is_escaped() {
        assert_eq!(escaped("refs/pr/1", '-'), "refs%2Fpr%2F1");
        assert_eq!(escaped("a b/c#d%?.gguf", '/'), "a%20b/c%23d%25%3F.gguf");
        assert_eq!(escaped("ü", '/'), "%C3%BC");
    }

    #[test]
    fn redirects_lead_where_the_standard_says() {
        let base = uri("https://hub.co:8443/a/b/resolve/main/x?y=z");
        for (location, expected) in [
            ("https://cdn.co/x?sign=1", "https://cdn.co/x?sign=1"),
            ("//cdn.co/x", "https://cdn.co/x"),
            ("/c/d?e", "https://hub.co:8443/c/d?e"),
            ("y", "https://hub.co:8443/a/b/resolve/main/y"),
        ] {
            assert_eq!(followed(&base, location), Some(uri(expected)), "{location}");
        }
        for location in ["ftp://x/y", "file:///etc/passwd", "/a b", "https://"] {
            assert_eq!(followed(&base, location), None, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |text| Origin::of(&uri(text)).expect("an origin");
        assert_eq!(origin("https://Hub.co/x"), origin("https://hub.co:443/y?z"));
        for other in ["http://hub.co", "https://hub.co:8443", "https://hub.co.evil.org", "https://cdn.hub.co"] {
            assert_ne!(origin("https://hub.co"), origin(other));
        }
        assert!(["http://localhost:1", "http://127.0.0.1", "https://[::1]:2"].iter().all(|url| origin(url).is_local()));
        assert!(["http://localhost.co", "http://10.0.0.1"].iter().all(|url| !origin(url).is_local()));
        assert!(origin("http://a").may_lead_to(&origin("https://b")));
        assert!(!origin("https://a").may_lead_to(&origin("http://b")));
    }

    #[test]
    fn what_is_shown_holds_no_secret() {
        assert_eq!(shown(&uri("https://u:p@cdn.co:1/x/y?signature=secret")), "https://cdn.co:1/x/y");
    }
}
