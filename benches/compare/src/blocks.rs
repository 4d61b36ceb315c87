//! What bulk bytes look like on a stream, either way: blocks, so that their sender can say in between when the measured
//! time begins and ends, and at the end how many there were. An end without that is a broken stream, whoever closed it: not
//! every tunnel can tell. Sans-IO but for [`Receiver::step`]; used by both ends, `bulk` and `target`.

use std::io;

use clap::ValueEnum;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a block of bulk bytes, of which the first is its mark.
pub(crate) const BLOCK: usize = 64 * 1024;
/// Read at once.
const BUFFER: usize = 256 * 1024;

/// The first byte of a block of bulk bytes.
const BULK: u8 = b'd';
/// All of the block that begins the measured time.
pub(crate) const BEGIN: u8 = b'b';
/// All of the block that ends it.
pub(crate) const FINISH: u8 = b'f';
/// The first byte of the last block; behind it comes the number of bulk bytes, big-endian.
const END: u8 = b'z';

/// Which way bulk bytes go, seen from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    Up,
    Down,
}

/// A block of bulk bytes. That they are all the same helps nobody: no system that is compared compresses.
pub(crate) fn bulk() -> Box<[u8]> {
    let mut block = vec![b'.'; BLOCK].into_boxed_slice();
    block[0] = BULK;
    block
}

/// The last block.
pub(crate) fn end(sent: u64) -> [u8; 9] {
    let mut block = [END; 9];
    block[1..].copy_from_slice(&sent.to_be_bytes());
    block
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// So many bulk bytes.
    Bulk(u64),
    Begin,
    Finish,
    /// So many bulk bytes were sent.
    End(u64),
}

/// Where in a block the stream is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Between,
    /// So many bytes are still to come.
    Bulk(usize),
    /// So many digits of this number are still to come.
    End(usize, u64),
    Over,
}

/// Reads blocks.
pub(crate) struct Receiver {
    place: Place,
    received: u64,
    buffer: Box<[u8]>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self { place: Place::Between, received: 0, buffer: vec![0; BUFFER].into_boxed_slice() }
    }

    /// Reads once. The number of all bulk bytes once the last block has come, and it is right. Cancel safe: nothing is lost.
    pub(crate) async fn step(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        mut each: impl FnMut(Item),
    ) -> io::Result<Option<u64>> {
        let read = from.read(&mut self.buffer).await?;
        if read == 0 {
            let text = format!("it ended after {} bytes, without a last word", self.received);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        let mut at = 0;
        while at < read {
            let (taken, item) = self.place.take(&self.buffer[at..read])?;
            at += taken;
            match item {
                Some(Item::Bulk(bytes)) => self.received += bytes,
                Some(Item::End(sent)) if sent != self.received => {
                    let text = format!("{sent} bytes were sent, but {} received", self.received);
                    return Err(invalid(&text));
                }
                _ => {}
            }
            item.into_iter().for_each(&mut each);
        }
        Ok(matches!(self.place, Place::Over).then_some(self.received))
    }
}

impl Place {
    /// Takes from bytes, of which there is at least one: how many, and what they are.
    fn take(&mut self, bytes: &[u8]) -> io::Result<(usize, Option<Item>)> {
        let (next, taken, item) = match (*self, bytes[0]) {
            (Self::Between, BULK) => (Self::Bulk(BLOCK), 0, None),
            (Self::Between, BEGIN) => (Self::Between, 1, Some(Item::Begin)),
            (Self::Between, FINISH) => (Self::Between, 1, Some(Item::Finish)),
            (Self::Between, END) => (Self::End(8, 0), 1, None),
            (Self::Between, mark) => return Err(invalid(&format!("a block begins with the byte {mark}"))),
            (Self::Bulk(left), _) => {
                let taken = left.min(bytes.len());
                let next = if taken == left { Self::Between } else { Self::Bulk(left - taken) };
                (next, taken, Some(Item::Bulk(taken as u64)))
            }
            (Self::End(left, number), digit) => {
                let number = number << 8 | u64::from(digit);
                match left {
                    1 => (Self::Over, 1, Some(Item::End(number))),
                    _ => (Self::End(left - 1, number), 1, None),
                }
            }
            (Self::Over, _) => return Err(invalid("bytes come behind the last block")),
        };
        *self = next;
        Ok((taken, item))
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
