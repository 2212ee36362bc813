//! Connections.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

use super::{App, Model, router};
use crate::{Engine, EngineConfig, HttpConfig, ServeError};

/// Before listening goes on where connections cannot be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// A model behind an address. It runs in a runtime of tokio.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    stop: watch::Sender<bool>,
}

/// Asks a server to stop, from anywhere.
#[derive(Debug, Clone)]
pub struct StopHandle(watch::Sender<bool>);

impl StopHandle {
    /// No connection is accepted any more, running answers come to their end.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Server {
    /// Listens, and starts the engine; nothing is answered yet.
    ///
    /// # Errors
    ///
    /// [`ServeError::Listen`] if the address is taken or not there, and those of [`Engine::start`].
    pub async fn bind(model: Model, engine: EngineConfig, config: HttpConfig) -> Result<Self, ServeError> {
        let address = config.address;
        let listener = TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })?;
        let address = listener.local_addr()?;
        let engine = Engine::start(model.decoder.clone(), engine)?;
        let app = Arc::new(App::new(model, engine, config));
        Ok(Self { listener, address, app, stop: watch::Sender::new(false) })
    }

    /// Where it listens: the port is the true one, where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stops it.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.stop.clone())
    }

    /// Most tokens of a text.
    pub fn most_tokens(&self) -> usize {
        self.app.engine.most_tokens()
    }

    /// Answers until it is asked to stop, and then for as long as running answers may take.
    ///
    /// # Errors
    ///
    /// None: what fails with a connection ends that connection.
    pub async fn run(self) -> Result<(), ServeError> {
        let Self { listener, app, stop, .. } = self;
        let config = &app.config;
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(config.connections));
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(config.patience)
            .max_headers(config.headers)
            .max_buf_size(config.header_bytes.max(8 << 10));
        let router = router(Arc::clone(&app));
        let mut asked = stop.subscribe();
        loop {
            let accepted = async {
                // Never closed.
                let place = Arc::clone(&places).acquire_owned().await;
                (listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                // The sender is here.
                _ = asked.wait_for(|&stop| stop) => break,
                accepted = accepted => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            // Small pieces of a stream shall not wait for more; where that cannot be had they do.
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(router.clone());
            let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
            tokio::spawn(async move {
                let _place = place;
                // A connection that breaks is its client's business.
                let _ = connection.await;
            });
        }
        drop(listener);
        app.engine.stop();
        until(graceful.shutdown(), config.stop_after).await;
        Ok(())
    }
}

/// Serves a model in a runtime of its own, until it is asked to stop; `ready` sees the server before it answers.
///
/// # Errors
///
/// As [`Server::bind`], and [`ServeError::Io`] if there can be no runtime.
pub fn serve(
    model: Model,
    engine: EngineConfig,
    config: HttpConfig,
    ready: impl FnOnce(&Server),
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let server = Server::bind(model, engine, config).await?;
        ready(&server);
        server.run().await
    })
}

/// Waits for something, no longer than this.
async fn until(done: impl Future<Output = ()>, most: Duration) {
    // What is not done by then is given up.
    let _ = tokio::time::timeout(most, done).await;
}
