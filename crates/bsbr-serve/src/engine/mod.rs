//! Many texts through one decoder: a thread of its own runs the model, texts reach it through a bounded queue and hear of their
//! tokens through channels.

mod batch;
mod counts;
mod known;
mod request;
mod running;
mod scores;

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use batch::Batch;
use bsbr_model::{Decoder, DecoderCache, ModelError, PREFILL_PIECE, PositionPolicy, Sampler};
use counts::Counters;
pub use counts::Counts;
pub use request::{Ended, Ending, Event, Request, ScoreBias, TokenScore};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{EngineConfig, Refusal, ServeError};

/// A decoder and the thread that runs it.
///
/// In every step each text that is being written gets its next token, and texts that are being read get a piece of their prompt
/// read, those first that came first. Texts join and leave between steps. What a text gives does not depend on the others, bit
/// for bit.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    decoder: Decoder,
    config: EngineConfig,
    /// Most tokens of a text.
    most_tokens: usize,
    /// A cache of no texts.
    empty: DecoderCache,
    queue: Mutex<Queue>,
    changed: Condvar,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// No more texts are taken; the thread ends with the last one.
    stopping: bool,
    /// The thread ends at once.
    ending: bool,
}

/// A text that has no place yet.
#[derive(Debug)]
struct Waiting {
    request: Request,
    sampler: Sampler,
    events: UnboundedSender<Event>,
    /// Of its cache.
    bytes: usize,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // What it holds is whole at any time.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// [`ServeError::Config`] for bounds that leave nothing to do, [`ServeError::Model`] for a decoder that has no caches,
    /// [`ServeError::Io`] if there can be no thread.
    pub fn start(decoder: Decoder, config: EngineConfig) -> Result<Self, ServeError> {
        config.validate()?;
        let model = decoder.config();
        let trained = model.decoder.max_positions;
        let ends = decoder.position.is_some() && model.position_policy == PositionPolicy::Error;
        let most_tokens = match config.max_tokens {
            Some(most) if ends => most.min(trained),
            Some(most) => most,
            None => trained,
        };
        let empty = decoder.new_cache(&[])?;
        let (queue, changed, counters) = (Mutex::default(), Condvar::new(), Counters::default());
        let shared = Arc::new(Shared { decoder, config, most_tokens, empty, queue, changed, counters });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || run(&own))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.shared.decoder
    }

    /// Most tokens of a text, prompt and continuation together.
    pub fn most_tokens(&self) -> usize {
        self.shared.most_tokens
    }

    /// Puts texts behind those that wait, all of them or none; each hears through its channel, and leaves once nobody holds the
    /// other end.
    ///
    /// # Errors
    ///
    /// [`Refusal`].
    pub fn submit(&self, requests: Vec<Request>) -> Result<Vec<UnboundedReceiver<Event>>, Refusal> {
        let most = self.shared.config.max_waiting;
        if requests.len() > most {
            return Err(Refusal::TooMany { texts: requests.len(), most });
        }
        let (mut texts, mut receivers) = (Vec::with_capacity(requests.len()), Vec::with_capacity(requests.len()));
        for request in requests {
            let bytes = self.check(&request)?;
            let sampler = Sampler::new(request.sampling.clone())?;
            let (events, receiver) = unbounded_channel();
            texts.push(Waiting { request, sampler, events, bytes });
            receivers.push(receiver);
        }
        let mut queue = self.shared.queue();
        if queue.stopping {
            return Err(Refusal::Stopping);
        }
        queue.waiting.retain(|waiting| !waiting.events.is_closed());
        let waiting = queue.waiting.len();
        if waiting + texts.len() > most {
            return Err(Refusal::Busy { waiting, most });
        }
        queue.waiting.extend(texts);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(receivers)
    }

    /// Bytes of the cache of a text that can run.
    fn check(&self, request: &Request) -> Result<usize, Refusal> {
        let Shared { decoder, config, most_tokens, .. } = &*self.shared;
        let (prompt, new) = (request.prompt.len(), request.max_new_tokens);
        if prompt == 0 {
            return Err(ModelError::EmptyInput.into());
        }
        let tokens = prompt.saturating_add(new);
        if tokens > *most_tokens {
            return Err(Refusal::TooLong { prompt, new, most: *most_tokens });
        }
        let vocab_size = decoder.config().decoder.vocab_size;
        if let Some(position) = request.prompt.iter().position(|&token| token as usize >= vocab_size) {
            let token = i64::from(request.prompt[position]);
            return Err(ModelError::TokenOutOfRange { token, position, vocab_size }.into());
        }
        // States of recurrent layers are kept twice once whole pieces of the prompt are read.
        let marked = if prompt >= PREFILL_PIECE { 4 * decoder.config().decoder.state_width() } else { 0 };
        let bytes = decoder.expected_cache_bytes(tokens)?.saturating_add(marked);
        if bytes > config.cache_bytes {
            return Err(Refusal::TooMuchMemory { tokens, bytes, most: config.cache_bytes });
        }
        Ok(bytes)
    }

    /// What it has done and holds.
    pub fn counts(&self) -> Counts {
        let waiting = self.shared.queue().waiting.len();
        self.shared.counters.counts(waiting)
    }

    /// Whether the thread runs.
    pub fn is_running(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more texts; those that wait or run come to their end.
    pub fn stop(&self) {
        self.shared.queue().stopping = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Engine {
    /// Ends after the current step.
    fn drop(&mut self) {
        {
            let mut queue = self.shared.queue();
            (queue.stopping, queue.ending) = (true, true);
        }
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Whatever it met, there is nobody left to hear of it.
            let _ = thread.join();
        }
    }
}

/// The thread: places for texts, then a step, again and again.
fn run(shared: &Shared) {
    let mut batch = Batch::new(shared);
    loop {
        let mut queue = shared.queue();
        queue.waiting.retain(|waiting| !waiting.events.is_closed());
        while let Some(next) = queue.waiting.front() {
            if !batch.has_room(next) {
                break;
            }
            if let Some(next) = queue.waiting.pop_front() {
                batch.begin(next);
            }
        }
        if queue.ending || (queue.stopping && batch.is_empty() && queue.waiting.is_empty()) {
            return;
        }
        if batch.is_empty() {
            // Nothing waits either: an empty batch has room for everything that was let in.
            drop(shared.changed.wait(queue));
            continue;
        }
        drop(queue);
        batch.step();
    }
}
