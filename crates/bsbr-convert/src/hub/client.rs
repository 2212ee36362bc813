//! Requests to a hub: tokens, redirects, refusals, and trying again.

use std::cell::Cell;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hf_hub::api::RepoInfo;
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::address::{Origin, escaped, followed, shown};
use super::name::is_plain_name;
use super::{HubError, HubEvent, HubSettings, Watch};

/// How often a request is tried before its failure is final.
const TRIES: u32 = 5;
/// The longest pause a hub may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
const REDIRECTS: usize = 8;
/// The longest list of files read, in bytes.
const LONGEST_LISTING: u64 = 64 << 20;

/// A client for one repository.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a HubSettings,
    endpoint: Origin,
    repository: &'a str,
    /// Whether anything was ever answered.
    reached: Cell<bool>,
}

/// What a file is, from the headers of the hub itself, not of the host it sends to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileHeaders {
    /// Names the content: the SHA-256 of a large file.
    pub etag: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
}

/// An answer that is no refusal.
pub(super) struct Answer {
    pub response: Response<Body>,
    pub headers: FileHeaders,
    /// Where the response comes from, as messages show it.
    pub url: String,
}

/// A failure and whether trying again can help.
pub(super) struct Failure {
    pub error: HubError,
    pub again: Again,
}

pub(super) enum Again {
    Never,
    /// After the usual pause.
    Soon,
    /// After the pause that was asked for.
    After(Duration),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self { error, again: Again::Never }
    }
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a HubSettings, repository: &'a str) -> Result<Self, HubError> {
        let endpoint = parsed(&settings.endpoint)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("bsbr/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are those of the file, so nothing may be compressed on the way.
            .accept_encoding("identity")
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(60)));
        if let Some(path) = &settings.certificates {
            config = config.tls_config(TlsConfig::builder().root_certs(certificates(path)?).build());
        }
        let endpoint = Origin::of(&endpoint).ok_or_else(|| not_an_address(&settings.endpoint))?;
        Ok(Self { agent: config.build().new_agent(), settings, endpoint, repository, reached: Cell::new(false) })
    }

    /// The files of a revision and the commit it stands for.
    pub(super) fn listing(&self, revision: &str, watch: Watch<'_>) -> Result<RepoInfo, HubError> {
        let url =
            format!("{}/api/models/{}/revision/{}", self.settings.endpoint, self.repository, escaped(revision, '-'));
        self.retrying(watch, |_, _| {
            let mut answer = self.send(&Method::GET, &url, None, &Wanted::Listing(revision))?;
            let body = answer.response.body_mut().with_config().limit(LONGEST_LISTING).read_to_vec();
            let body = body.map_err(|error| self.unread(&answer.url, error))?;
            serde_json::from_slice(&body).map_err(|error| {
                let problem = format!("the list of files of `{}` cannot be read: {error}", self.repository);
                HubError::Answer { url: answer.url, problem }.into()
            })
        })
    }

    /// What `file` at `commit` is, without its content.
    pub(super) fn headers(&self, commit: &str, file: &str, watch: Watch<'_>) -> Result<(String, u64), HubError> {
        let url = self.file_url(commit, file);
        let answer =
            self.retrying(watch, |_, _| self.send(&Method::HEAD, &url, None, &Wanted::File { commit, file }))?;
        let fail = |problem: &str| HubError::Answer { url: answer.url.clone(), problem: problem.to_owned() };
        let etag = answer.headers.etag.ok_or_else(|| fail("no ETag names the content"))?;
        // It becomes the name of a file.
        if !is_plain_name(&etag) || etag.starts_with('.') || etag.len() > 200 {
            return Err(fail("the ETag cannot be the name of a file"));
        }
        let size =
            answer.headers.size.ok_or_else(|| fail("neither Content-Length nor X-Linked-Size says how long it is"))?;
        Ok((etag, size))
    }

    /// The content of `file` at `commit`, from byte `start`.
    pub(super) fn content(&self, commit: &str, file: &str, start: u64) -> Result<Answer, Failure> {
        let range = (start > 0).then_some(start);
        self.send(&Method::GET, &self.file_url(commit, file), range, &Wanted::File { commit, file })
    }

    fn file_url(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.repository, escaped(file, '/'))
    }

    /// Repeats `attempt` until it succeeds, fails for good, or fails [`TRIES`] times without having got any further: it
    /// says how far it is through the number it is given.
    pub(super) fn retrying<T>(
        &self,
        watch: Watch<'_>,
        mut attempt: impl FnMut(Watch<'_>, &mut u64) -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        let (mut tries, mut reached, mut furthest) = (0, 0, 0);
        loop {
            let Failure { error, again } = match attempt(watch, &mut reached) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if reached > furthest {
                (furthest, tries) = (reached, 0);
            }
            tries += 1;
            let pause = match again {
                Again::Never => return Err(error),
                Again::Soon => self.settings.first_pause * 2_u32.pow(tries - 1),
                Again::After(pause) => pause,
            };
            if pause > LONGEST_PAUSE {
                return Err(error);
            }
            if tries == TRIES {
                return Err(HubError::GaveUp { tries, last: Box::new(error) });
            }
            watch(HubEvent::Waiting { pause, why: &error });
            std::thread::sleep(pause);
        }
    }

    /// One request and the redirects it leads to. The token goes to the hub alone, never to the hosts it sends to.
    fn send(&self, method: &Method, url: &str, start: Option<u64>, wanted: &Wanted<'_>) -> Result<Answer, Failure> {
        let mut url = parsed(url)?;
        let mut headers = FileHeaders { etag: None, size: None };
        for _ in 0..REDIRECTS {
            let from = Origin::of(&url);
            let is_hub = from.as_ref() == Some(&self.endpoint);
            let mut request = Request::builder().method(method).uri(&url);
            if let (true, Some(token)) = (is_hub, self.settings.token()) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(start) = start {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            let request = request.body(()).map_err(|_| HubError::Environment {
                variable: "HF_TOKEN",
                why: "the token holds a character that no token has".to_owned(),
            })?;
            // No proxy knows what is on this machine.
            let local = from.as_ref().is_some_and(Origin::is_local);
            let request = if local { self.agent.configure_request(request).proxy(None).build() } else { request };
            let response = self.agent.run(request).map_err(|error| self.transport(&url, error))?;
            self.reached.set(true);
            let status = response.status();
            if is_hub {
                headers = file_headers(&response);
            }
            if !status.is_redirection() {
                // The caller knows best what to do about a part that does not exist.
                if status.is_success() || (status == StatusCode::RANGE_NOT_SATISFIABLE && start.is_some()) {
                    return Ok(Answer { response, headers, url: shown(&url) });
                }
                // Elsewhere an address may have expired, and the next redirect brings a fresh one.
                return Err(match status {
                    _ if is_hub => self.refusal(&url, &response, wanted),
                    StatusCode::FORBIDDEN => Failure { again: Again::Soon, ..passing_refusal(&url, &response) },
                    _ => passing_refusal(&url, &response),
                });
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| followed(&url, location));
            let to = next.as_ref().and_then(Origin::of);
            let (Some(from), Some(next), Some(to)) = (from, next, to) else {
                return Err(bad_answer(&url, "the redirect leads nowhere").into());
            };
            if !from.may_lead_to(&to) {
                return Err(bad_answer(&url, "the redirect leads from https to http").into());
            }
            // What the file is was said by the hub; where its bytes are is of no interest yet.
            if method == Method::HEAD && to != self.endpoint && headers.etag.is_some() {
                return Ok(Answer { response, headers, url: shown(&url) });
            }
            url = next;
        }
        Err(bad_answer(&url, "too many redirects").into())
    }

    /// What a status of 400 or more from the hub means.
    fn refusal(&self, url: &Uri, response: &Response<Body>, wanted: &Wanted<'_>) -> Failure {
        let (repository, endpoint) = (self.repository.to_owned(), self.settings.endpoint.clone());
        let (status, said) = (response.status(), said(response));
        let (token, page) = (self.settings.token_sent(), format!("{endpoint}/{repository}"));
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        let error = match (status.as_u16(), code) {
            (401, _) => HubError::Unauthorised { repository, said, token, page },
            (403, _) => HubError::Forbidden { repository, said, token, page },
            (404, "RevisionNotFound") => {
                let revision = match wanted {
                    Wanted::Listing(revision) => *revision,
                    Wanted::File { commit, .. } => commit,
                };
                HubError::RevisionNotFound {
                    repository,
                    revision: revision.to_owned(),
                    page: format!("{page}/commits"),
                }
            }
            (404, "RepoNotFound") => HubError::RepositoryNotFound { repository, endpoint },
            (404, _) => match wanted {
                Wanted::Listing(_) => HubError::RepositoryNotFound { repository, endpoint },
                Wanted::File { commit, file } => {
                    let (file, commit) = ((*file).to_owned(), (*commit).to_owned());
                    HubError::FileNotFound { repository, file, commit, others: String::new() }
                }
            },
            _ => return passing_refusal(url, response),
        };
        error.into()
    }

    /// A request that got no answer.
    fn transport(&self, url: &Uri, error: ureq::Error) -> Failure {
        // Whoever was never reached is more likely absent than disturbed: a name, a port or a network that is wrong.
        let reached = self.reached.get();
        let again = match &error {
            ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => Again::Soon,
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed if reached => Again::Soon,
            // A certificate that is not trusted stays so.
            ureq::Error::Io(error) if error.kind() == ErrorKind::InvalidData => Again::Never,
            ureq::Error::Io(error) if reached || was_connected(error.kind()) => Again::Soon,
            _ => Again::Never,
        };
        let host = url.authority().map_or_else(String::new, |authority| authority.as_str().to_owned());
        let host = host.rsplit('@').next().unwrap_or_default().to_owned();
        Failure { error: HubError::Connection { host, why: error.to_string() }, again }
    }

    /// An answer that broke off while it was read.
    pub(super) fn unread(&self, url: &str, error: ureq::Error) -> Failure {
        match parsed(url) {
            Ok(url) => self.transport(&url, error),
            Err(error) => error.into(),
        }
    }
}

/// What a request is for: a refusal means different things.
enum Wanted<'a> {
    /// The files of this revision.
    Listing(&'a str),
    File {
        commit: &'a str,
        file: &'a str,
    },
}

/// Whether a failure of this kind is that of a connection that was there.
fn was_connected(kind: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut | UnexpectedEof)
}

fn parsed(url: &str) -> Result<Uri, HubError> {
    url.parse().map_err(|_| not_an_address(url))
}

fn not_an_address(url: &str) -> HubError {
    HubError::Answer { url: url.to_owned(), problem: "not an address".to_owned() }
}

fn bad_answer(url: &Uri, problem: &str) -> HubError {
    HubError::Answer { url: shown(url), problem: problem.to_owned() }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn file_headers(response: &Response<Body>) -> FileHeaders {
    let headers = response.headers();
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
    // The length of a redirect is not that of the file.
    let length = if response.status() == StatusCode::OK { text(headers, "content-length") } else { None };
    FileHeaders {
        etag: etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned()),
        size: text(headers, "x-linked-size").or(length).and_then(|size| size.trim().parse().ok()),
    }
}

/// Status and reason, as far as the reason can be shown.
fn said(response: &Response<Body>) -> String {
    let message = text(response.headers(), "x-error-message").unwrap_or_default();
    let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    match message.as_str() {
        "" => response.status().to_string(),
        message => format!("{}: {message}", response.status()),
    }
}

/// A refusal that has nothing to do with what was asked for, and may pass.
fn passing_refusal(url: &Uri, response: &Response<Body>) -> Failure {
    let status = response.status();
    let seconds = text(response.headers(), "retry-after").and_then(|value| value.trim().parse().ok());
    let asked = seconds.map_or(Again::Soon, |seconds| Again::After(Duration::from_secs(seconds)));
    if status == StatusCode::TOO_MANY_REQUESTS {
        return Failure { error: HubError::RateLimited { seconds }, again: asked };
    }
    let again = if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT { asked } else { Again::Never };
    Failure { error: HubError::Status { url: shown(url), said: said(response) }, again }
}

/// The certificates in a PEM file.
fn certificates(path: &Path) -> Result<RootCerts, HubError> {
    let pem = std::fs::read(path).map_err(HubError::io("read the certificates of SSL_CERT_FILE in", path))?;
    let items = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<Certificate<'static>> = items.collect();
    if certificates.is_empty() {
        let why = format!("{} holds no certificate in PEM form", path.display());
        return Err(HubError::Environment { variable: "SSL_CERT_FILE", why });
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}
