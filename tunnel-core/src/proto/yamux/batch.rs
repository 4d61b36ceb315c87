//! Frames on their way to the connection. A frame is written where its body was collected, behind room for its header;
//! many leave in one write, and short ones share a buffer, so that they fill the records of TLS.

use std::{collections::VecDeque, io::IoSlice};

use bytes::Buf;

use super::{
    FRAME_BODY, SMALL,
    frame::{HEADER, Header},
};

/// One frame, or several short ones.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    /// Where the body begins; the header stands right before it.
    start: usize,
}

impl Frame {
    pub(super) fn with_room_for(body: usize) -> Self {
        let mut bytes = Vec::with_capacity((HEADER + body).clamp(SMALL, HEADER + FRAME_BODY));
        bytes.resize(HEADER, 0);
        Self { bytes, start: HEADER }
    }

    /// Bytes of its body; of all of it, once it has its header.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Takes what fits of a body; the rest is returned.
    pub(super) fn append<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let room = self.room().min(FRAME_BODY - self.len());
        let (fits, rest) = bytes.split_at(bytes.len().min(room));
        self.bytes.extend_from_slice(fits);
        rest
    }

    /// Bytes that can follow without moving those that are there.
    fn room(&self) -> usize {
        self.bytes.capacity() - self.bytes.len()
    }

    /// The first bytes of the body as a frame of their own. For a window that is nearly used up.
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

    fn written(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// Encoded frames, in their order.
#[derive(Debug, Default)]
pub struct Batch {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Batch {
    pub(super) fn push(&mut self, frame: Frame) {
        if !self.join(frame.written()) {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    pub(super) fn push_header(&mut self, header: &Header) {
        if !self.join(&header.encode()) {
            let mut frame = Frame::with_room_for(0);
            frame.set_header(header);
            self.push(frame);
        }
    }

    /// Puts a short frame into the last one's buffer, if that has room.
    fn join(&mut self, written: &[u8]) -> bool {
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
        self.frames.front().map_or(&[], Frame::written)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let count = self.frames.len().min(slices.len());
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame.written());
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
            if first.len() == 0 {
                self.frames.pop_front();
            }
        }
    }
}
