//! What can go wrong before and beside requests.

use std::net::SocketAddr;

use bsbr_model::ModelError;

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A bound that leaves nothing to do.
    #[error("setting `{setting}` {problem}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The model cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The runtime or the thread of the engine cannot be started, or a socket failed.
    #[error("the server failed: {0}")]
    Io(#[from] std::io::Error),
}

/// Why the engine does not take a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Too many wait already.
    #[error("{waiting} texts wait already, at most {most} may: try again later")]
    Busy {
        /// Texts that wait.
        waiting: usize,
        /// Most that may.
        most: usize,
    },
    /// More texts at once than may ever wait.
    #[error("the request asks for {texts} texts, at most {most} can wait: ask for fewer at once")]
    TooMany {
        /// Texts asked for.
        texts: usize,
        /// Most that may wait.
        most: usize,
    },
    /// The text would be longer than allowed.
    #[error(
        "the prompt has {prompt} tokens and {new} new ones are asked for, this server allows {most} in all: shorten the \
         prompt or ask for fewer"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most new tokens asked for.
        new: usize,
        /// Most tokens in all.
        most: usize,
    },
    /// The text would need more memory than there is for all texts.
    #[error(
        "a cache for {tokens} tokens takes {bytes} bytes, this server has {most} for all texts: shorten the prompt or ask for \
         fewer new tokens"
    )]
    TooMuchMemory {
        /// Tokens of the text.
        tokens: usize,
        /// Bytes they take.
        bytes: usize,
        /// Bytes there are.
        most: usize,
    },
    /// The model refuses the text or the settings.
    #[error(transparent)]
    Input(#[from] ModelError),
    /// The engine takes no texts any more.
    #[error("the server is stopping")]
    Stopping,
}
