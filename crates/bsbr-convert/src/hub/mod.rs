//! Models by name: fetched from a hub into the cache that Python's `huggingface_hub` uses too.
//!
//! ```no_run
//! use bsbr_convert::hub::{HubSettings, fetch};
//!
//! let settings = HubSettings::from_env()?;
//! let fetched = fetch(&"openai-community/gpt2".parse()?, "main", &settings, &mut |_| {})?;
//! println!("{} at commit {}", fetched.path.display(), fetched.origin.commit);
//! # Ok::<(), bsbr_convert::hub::HubError>(())
//! ```
//!
//! The layout of the cache and the form of a listing are those of the crate `hf-hub`; the transfer is not. Its
//! downloader appends to whatever an earlier run left under the name of an ETag without looking at the answer's range,
//! compares no hash and not even the length in the end, does not know `Retry-After`, writes a ref after the first file,
//! and joins names from the network to paths. Here a file is in a snapshot only when it is whole and, where the hub
//! names its SHA-256, proven; names are checked before they become paths; and every refusal has its own error.
//!
//! Without the feature `hub` names are still understood and [`fetch`] says what is missing.
#![cfg_attr(not(feature = "hub"), allow(dead_code, reason = "names and settings are read, and nobody is asked"))]

mod error;
mod name;
mod settings;

#[cfg(feature = "hub")]
mod address;
#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod select;

use std::path::PathBuf;
use std::time::Duration;

pub use error::HubError;
#[cfg(feature = "hub")]
pub use fetch::fetch;
pub use name::ModelName;
pub use settings::HubSettings;

use crate::record::HubOrigin;

/// A model that is now on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The directory of the snapshot, or the one file that was asked for.
    pub path: PathBuf,
    /// Where it comes from.
    pub origin: HubOrigin,
}

/// What happens during [`fetch`].
#[derive(Debug)]
#[non_exhaustive]
pub enum HubEvent<'a> {
    /// Bytes arrived.
    Transfer {
        /// The file.
        file: &'a str,
        /// Bytes of this and the files before it that are there.
        done: u64,
        /// Bytes of the files known so far.
        total: u64,
    },
    /// A request failed and is tried again.
    Waiting {
        /// After this time.
        pause: Duration,
        /// The failure.
        why: &'a HubError,
    },
    /// Another process is fetching the same file; its end is waited for.
    Locked {
        /// The file.
        file: &'a str,
    },
}

#[cfg(feature = "hub")]
type Watch<'a> = &'a mut dyn FnMut(HubEvent<'_>);

/// Fails: this program was built without the feature `hub`.
///
/// # Errors
///
/// [`HubError::NotCompiledIn`].
#[cfg(not(feature = "hub"))]
pub fn fetch(
    model: &ModelName,
    _revision: &str,
    _settings: &HubSettings,
    _watch: &mut dyn FnMut(HubEvent<'_>),
) -> Result<Fetched, HubError> {
    Err(HubError::NotCompiledIn { repository: model.to_string() })
}
