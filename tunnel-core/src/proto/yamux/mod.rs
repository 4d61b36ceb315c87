//! yamux, the multiplexer of a link: its frames, and the state of one connection.
//!
//! Wire-compatible with hashicorp/yamux (its `spec.md` is the source of the rules here) and with the crate of that
//! name. A [`Session`] has no I/O and no clock: what came from the far side goes in by [`Session::receive`], and
//! [`Session::transmit`] says what is to be sent. The users of streams call the methods that take a stream's number.
//! `crate::mux` puts a lock around it, and a connection beneath.

mod batch;
pub mod frame;
mod session;
mod stream;
mod window;

pub use batch::{Batch, Chunk};
pub use session::{Config, Error, OpenFailed, Place, Session, StreamEnded, numbers_left};
pub use window::{INITIAL, WindowPool};

use frame::HEADER;

/// Most plaintext that fits one TLS record (RFC 8446, section 5.1).
const TLS_RECORD: usize = 16 * 1024;
/// Largest body of a frame that is put together from what is written: with its header it fills one TLS record.
const FRAME_BODY: usize = TLS_RECORD - HEADER;
/// Largest body of a frame that is sent: a [`Chunk`] fills four records, and leaves room for some headers beside it.
const CHUNK_BODY: usize = 4 * TLS_RECORD - 8 * HEADER;
/// Bytes of headers that may follow what a batch is limited to: they need no write of their own then.
pub const HEADERS_BEYOND: usize = 16 * HEADER;
/// Smallest buffer: a handful of short frames fits one.
const SMALL: usize = 512;
/// Bytes of one stream that may wait to be sent: whole frames. More only if they leave in one batch.
const SEND_BUFFER: usize = 4 * FRAME_BODY;
