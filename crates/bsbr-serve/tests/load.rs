//! Many clients for some seconds: the short form of `examples/load`.

mod common;

#[path = "../examples/load/clients.rs"]
#[allow(dead_code, unreachable_pub)]
mod clients;

use std::time::{Duration, Instant};

use bsbr_serve::{EngineConfig, HttpConfig};
use clients::{Load, run};
use common::{Running, heldout};

#[test]
fn many_clients_some_of_them_rude_get_answers_or_reasons() {
    let engine = EngineConfig { max_texts: 16, max_waiting: 24, cache_bytes: 64 << 20, ..Default::default() };
    let server = Running::new(engine, HttpConfig::default());
    let load = Load {
        clients: 48,
        time: Duration::from_secs(6),
        text: heldout(),
        characters: (20, 5000),
        new_tokens: (4, 40),
        broken: 10,
        rubbish: 10,
        seed: 1,
    };
    let outcome = run(server.address, &load);
    assert_eq!((outcome.of_hundred(5), outcome.cut), (0, 0), "{outcome:?}");
    assert!(outcome.of_hundred(2) > 20 && outcome.pieces > 300 && outcome.broken > 0, "{outcome:?}");
    // Two kinds of rubbish may get no answer: bytes that are no request, and a body whose sender hears of no end.
    let refused = outcome.of_hundred(4);
    assert!(refused > 0, "{outcome:?}");
    // Whatever was left is gone soon after.
    let began = Instant::now();
    let zero = |text: &str| ["bsbr_texts_running 0\n", "bsbr_texts_waiting 0\n"].iter().all(|line| text.contains(line));
    while !zero(&server.get("/metrics").body) {
        assert!(began.elapsed() < Duration::from_secs(30), "{}", server.get("/metrics").body);
        std::thread::sleep(Duration::from_millis(20));
    }
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("bsbr_texts_total{how=\"failed\"} 0\n"), "{metrics}");
    assert_eq!(server.get("/health").status, 200);
}
