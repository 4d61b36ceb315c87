//! The protocol without I/O: no sockets, no clock, no random numbers. Bytes and time come in, bytes and verdicts go
//! out, so that all of it can be fuzzed, replayed and simulated.
//!
//! - [`messages`]: every wire message, compiled from `proto/edge_tunnel.proto`, which is their specification.
//! - [`frame`]: length-delimited messages.
//! - [`control`]: the state machine of the control stream: handshake, heartbeat and RTT, drain.
//! - [`yamux`]: the multiplexer under a link.
//! - [`ends`]: the ledger that makes the ends of a stream exact.

pub mod control;
pub mod ends;
pub mod frame;
pub mod yamux;

/// Every wire message. The comments in `tunnel-core/proto/edge_tunnel.proto` are the specification.
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/edge_tunnel.v1.rs"));
}

/// TLS application protocol of links between an edge and a gateway.
pub const ALPN_EDGE: &[u8] = b"edge-tunnel/1";

/// TLS application protocol of links between gateways.
pub const ALPN_PEER: &[u8] = b"edge-tunnel-peer/1";

/// The protocol versions this build speaks, lowest and highest.
pub const VERSIONS: (u32, u32) = (1, 1);

/// Which side of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Made the connection.
    Dialer,
    /// Took it.
    Acceptor,
}

impl Side {
    /// The number of the first stream that this side opens; the next ones follow in steps of two.
    pub fn first_number(self) -> u32 {
        match self {
            Self::Dialer => 1,
            Self::Acceptor => 2,
        }
    }

    /// Whether this side opened the stream of that number: dialers use odd numbers, acceptors even ones from 2. `None`
    /// for a number that is nobody's.
    pub fn opens(self, number: u64) -> Option<bool> {
        let by_dialer = number % 2 == 1;
        (number != 0).then_some(by_dialer == (self == Self::Dialer))
    }
}

/// Longest encoded message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Longest human text in a message, in bytes; longer texts are cut at a character boundary.
pub const MAX_TEXT: usize = 1024;

/// `text`, cut to [`MAX_TEXT`] bytes at a character boundary, and without control characters: it will be shown in
/// logs and status lines of the other side.
pub fn clean_text(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
