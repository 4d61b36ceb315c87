//! Bytes on their way to the connection. A frame is written where its body was collected, behind room for its header;
//! many leave in one write, and short ones share a buffer, so that they fill the records of TLS.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, BufMut, buf::Limit};

use super::{
    CHUNK_BODY, FRAME_BODY, SMALL,
    frame::{HEADER, Header},
};

/// Longest frame that is copied to share a buffer with the one before.
const SHORT: usize = FRAME_BODY / 4;

/// Bytes to be sent, behind room for a header: what is collected in one leaves as a frame without being copied.
#[derive(Debug)]
pub struct Chunk {
    bytes: Vec<u8>,
    /// Where the body begins. As a frame, or several short ones, where the first header does.
    start: usize,
}

impl Chunk {
    /// An empty one, with room for as many bytes as leave at once: somewhat less than 64 KiB.
    pub fn new() -> Self {
        Self::with_capacity(HEADER + CHUNK_BODY)
    }

    /// One for a body of so many bytes, of which it takes no more than fit one record.
    pub(super) fn with_room_for(body: usize) -> Self {
        Self::with_capacity((HEADER + body).clamp(SMALL, HEADER + FRAME_BODY))
    }

    fn with_capacity(bytes: usize) -> Self {
        let mut bytes = Vec::with_capacity(bytes);
        bytes.resize(HEADER, 0);
        Self { bytes, start: HEADER }
    }

    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// How many bytes those are.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that can follow without moving those that are there.
    pub fn room(&self) -> usize {
        self.bytes.capacity() - self.bytes.len()
    }

    /// That room, to be read into.
    pub fn spare(&mut self) -> Limit<&mut Vec<u8>> {
        let room = self.room();
        (&mut self.bytes).limit(room)
    }

    /// The first bytes are no longer needed.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len(), "cannot advance beyond what there is");
        self.start += bytes;
    }

    /// Nothing in it is needed any more.
    pub fn clear(&mut self) {
        self.bytes.truncate(HEADER);
        self.start = HEADER;
    }

    /// Takes what fits of a frame's body; the rest is returned.
    pub(super) fn append<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let room = self.room().min(FRAME_BODY.saturating_sub(self.len()));
        let (fits, rest) = bytes.split_at(bytes.len().min(room));
        self.bytes.extend_from_slice(fits);
        rest
    }

    /// The first bytes as a body of their own. For a window that is nearly used up, or others that wait.
    pub(super) fn split_to(&mut self, body: usize) -> Self {
        let mut first = Self::with_room_for(body);
        first.bytes.extend_from_slice(&self.bytes[self.start..self.start + body]);
        self.start += body;
        first
    }

    pub(super) fn set_header(&mut self, header: &Header) {
        self.start -= HEADER;
        self.bytes[self.start..self.start + HEADER].copy_from_slice(&header.encode());
    }
}

impl Default for Chunk {
    fn default() -> Self {
        Self::new()
    }
}

/// Encoded frames, in their order.
#[derive(Debug, Default)]
pub struct Batch {
    frames: VecDeque<Chunk>,
    bytes: usize,
}

impl Batch {
    pub(super) fn push(&mut self, frame: Chunk) {
        if !self.join(frame.filled()) {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    pub(super) fn push_header(&mut self, header: &Header) {
        if !self.join(&header.encode()) {
            let mut frame = Chunk::with_room_for(0);
            frame.set_header(header);
            self.push(frame);
        }
    }

    /// Puts a short frame into the last one's buffer, if that has room.
    fn join(&mut self, written: &[u8]) -> bool {
        if written.len() > SHORT {
            return false;
        }
        let Some(last) = self.frames.back_mut().filter(|last| written.len() <= last.room()) else {
            return false;
        };
        last.bytes.extend_from_slice(written);
        self.bytes += written.len();
        true
    }
}

impl Buf for Batch {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.frames.front().map_or(&[], Chunk::filled)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let count = self.frames.len().min(slices.len());
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame.filled());
        }
        count
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes, "cannot advance beyond what there is");
        self.bytes -= count;
        while let Some(first) = self.frames.front_mut().filter(|_| count > 0) {
            let taken = count.min(first.len());
            first.start += taken;
            count -= taken;
            if first.is_empty() {
                self.frames.pop_front();
            }
        }
    }
}
