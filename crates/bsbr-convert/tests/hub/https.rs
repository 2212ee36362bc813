//! The same over TLS. The certificate is made for these tests, for 127.0.0.1 alone, and trusted by nobody else.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use bsbr_convert::hub::HubError;

use super::server::{COMMIT, Fault, Hub};
use super::{MODEL, Place, check_message, model};

fn path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hub").join(name)
}

fn secure_hub() -> Hub {
    let certificate = CertificateDer::from_pem_file(path("certificate.pem")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(path("key.pem")).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("they belong together");
    let config = Arc::new(config);
    let hub = Hub::start_with("https", move |stream| {
        StreamOwned::new(ServerConnection::new(config.clone()).expect("a configuration"), stream)
    });
    hub.publish(MODEL, COMMIT, model(1, 100_000));
    hub
}

#[test]
fn a_model_is_fetched_over_tls() {
    let (place, hub) = (Place::new(), secure_hub());
    let certificate = path("certificate.pem");
    let settings = place.settings(&hub, &[("SSL_CERT_FILE", certificate.to_str().expect("plain paths"))]);
    hub.fails("?signature", Fault::Cut(50_000));
    let fetched = place.fetch_with(&settings, MODEL, "main").unwrap_or_else(|error| panic!("{error}"));
    assert!(
        std::fs::read(fetched.path.join("model.safetensors")).expect("a file")
            == model(1, 100_000)["model.safetensors"]
    );
}

#[test]
fn a_certificate_that_nobody_vouches_for_is_refused_at_once() {
    let (place, hub) = (Place::new(), secure_hub());
    let error = place.refused(&hub, MODEL, &["no answer from 127.0.0.1", "certificate"]);
    assert!(matches!(error, HubError::Connection { .. }), "{error:?}");
    assert!(hub.seen().is_empty());
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let (place, hub) = (Place::new(), secure_hub());
    for (file, word) in [(path("none.pem"), "cannot read"), (path("https.rs"), "no certificate in PEM form")] {
        let settings = place.settings(&hub, &[("SSL_CERT_FILE", file.to_str().expect("plain paths"))]);
        check_message(
            &place.fetch_with(&settings, MODEL, "main").expect_err("no certificates"),
            &[word, "SSL_CERT_FILE"],
        );
    }
}

#[test]
fn a_redirect_from_tls_to_plain_text_is_not_followed() {
    let (place, hub) = (Place::new(), secure_hub());
    let certificate = path("certificate.pem");
    let settings = place.settings(&hub, &[("SSL_CERT_FILE", certificate.to_str().expect("plain paths"))]);
    hub.fails("/revision/", Fault::Status(302, vec![("Location", "http://127.0.0.1:9/x".into())]));
    let error = place.fetch_with(&settings, MODEL, "main").expect_err("plain text");
    check_message(&error, &["the redirect leads from https to http"]);
}
