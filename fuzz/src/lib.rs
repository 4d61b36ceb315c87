//! What the fuzz targets do with their input. Each function takes any bytes and panics only if a promise is broken.
//! `cargo fuzz run --features libfuzzer NAME` searches; `cargo test` replays the committed corpus.

#![allow(clippy::missing_panics_doc, reason = "panicking is how a fuzz target says that a promise is broken")]

use std::{
    str,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tunnel_core::{
    Target, identity,
    proto::{
        MAX_MESSAGE,
        control::{Control, Event},
        ends::{Aborted, Ends, Verdict},
        frame,
        messages::{self, AbortCode, Hello, Open, OpenReply, Welcome},
    },
};

/// A fuzz target: any bytes are good.
pub type FuzzTarget = fn(&[u8]);

/// Every target by name, for the replay of the corpus.
pub const TARGETS: [(&str, FuzzTarget); 4] =
    [("messages", messages), ("target", target), ("certificate", certificate), ("control", control)];

/// Length-delimited messages: whatever decodes encodes to something that decodes to the same, and the decoder never
/// asks for more than the longest message.
pub fn messages(input: &[u8]) {
    fn each<M: prost::Message + Default + PartialEq + std::fmt::Debug>(input: &[u8]) {
        let mut buffer = BytesMut::from(input);
        while let Ok(Some(message)) = frame::decode::<M>(&mut buffer) {
            let mut again = BytesMut::new();
            if frame::encode(&message, &mut again).is_ok() {
                assert_eq!(frame::decode::<M>(&mut again), Ok(Some(message)));
            }
        }
        if let Ok(None) = frame::decode::<M>(&mut buffer) {
            assert!(buffer.len() < MAX_MESSAGE + 3, "a whole message was not recognized");
        }
    }
    each::<messages::Control>(input);
    each::<Open>(input);
    each::<OpenReply>(input);
}

/// Targets: whatever parses prints as something that parses to the same.
pub fn target(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string().parse(), Ok(target));
    }
}

/// Certificates: no bytes panic, and a node's name is always a valid one.
pub fn certificate(input: &[u8]) {
    if let Ok(node) = identity::node_from_certificate(input) {
        assert_eq!(node.as_str().parse(), Ok(node));
    }
    let _ = identity::names_in_certificate(input);
}

/// Operations: the control stream's state machine and a stream's ledger under any order of calls.
pub fn control(input: &[u8]) {
    let [side, operations @ ..] = input else { return };
    let start = Instant::now();
    let mut now = start;
    let hello = || Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let mut control = if side % 2 == 0 {
        Control::dialer(hello(), now, Duration::from_secs(5), Duration::from_secs(60))
    } else {
        Control::acceptor(now, Duration::from_secs(5))
    };
    let mut ends = Ends::default();
    let mut aborted = false;
    for chunk in operations.chunks(4) {
        let [operation, rest @ ..] = chunk else { continue };
        let mut buffer = BytesMut::from(rest);
        let value = rest.iter().fold(0u64, |sum, byte| sum * 256 + u64::from(*byte));
        let outcome = match operation % 6 {
            0 => frame::decode::<messages::Control>(&mut buffer)
                .ok()
                .flatten()
                .map_or(Ok(()), |message| control.handle_message(now, message)),
            1 => {
                now += Duration::from_millis(value);
                control.handle_timeout(now)
            }
            2 => control.welcome(now, Welcome { version: 1, heartbeat_ms: 1000, ..Welcome::default() }),
            3 => {
                ends.handle_end(value);
                Ok(())
            }
            4 => {
                ends.received(usize::from(*operation));
                Ok(())
            }
            _ => {
                ends.abort(Aborted::new(AbortCode::Reset, "fuzz"));
                aborted = true;
                Ok(())
            }
        };
        while let Some(event) = control.poll_event() {
            if let Event::End(end) = event {
                ends.handle_end(end.total_bytes);
            }
        }
        let sent = std::iter::from_fn(|| control.poll_transmit()).count();
        assert!(sent <= 4, "{sent} messages came of one step");
        if outcome.is_err() {
            break;
        }
    }
    let verdict = ends.eof();
    assert!(!aborted || matches!(verdict, Verdict::Aborted(_)), "an abort was forgotten");
}
