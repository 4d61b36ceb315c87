//! What a session keeps of one stream: bytes that have arrived, bytes that wait to be sent, and both windows.

use std::{
    collections::VecDeque,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use super::{
    CHUNK_BODY, FRAME_BODY, SEND_BUFFER, SMALL,
    batch::Chunk,
    frame::{Flags, Header, Kind},
    window::{Budget, INITIAL, ReceiveWindow, UpdateDue},
};

/// Most bytes that go before those of streams that have many.
const SPARSE: usize = FRAME_BODY / 4;

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    pub(super) receiving: Receiving,
    pub(super) sending: Sending,
    /// Whoever neither reads nor writes, and waits for a reset.
    pub(super) watcher: Option<Waker>,
    /// Nobody holds the stream any more: what arrives is of no use, and it is forgotten once all was said.
    pub(super) dropped: bool,
    /// In one of the session's queues of streams that have something to send.
    pub(super) queued: bool,
    /// This side opened it, and the far side has not answered by any frame.
    pub(super) unacknowledged: bool,
}

/// The direction towards this side.
#[derive(Debug)]
pub(super) struct Receiving {
    pub(super) window: ReceiveWindow,
    segments: VecDeque<Vec<u8>>,
    /// Bytes in the segments, and those of a frame whose body has not arrived as a whole.
    unread: usize,
    /// Bytes that the reader took last. It is done with them when it asks for more.
    held: usize,
    /// No more will come: a FIN, or a reset.
    pub(super) ended: bool,
    pub(super) reader: Option<Waker>,
    /// What the sender is still to be told that it may send.
    update: u32,
}

/// The direction to the far side.
#[derive(Debug)]
pub(super) struct Sending {
    segments: VecDeque<Chunk>,
    /// Bytes in the segments.
    waiting: usize,
    /// What the far side takes.
    window: u32,
    /// Said with the next frame.
    first: Flags,
    /// There shall be a next frame, if only to say that.
    answers: bool,
    state: SendState,
    /// The end has left behind all bytes, and the far side has not reset the stream since.
    end_left: bool,
    /// Bytes of the far side were lost, which it has to hear once this side has finished.
    reset_behind: bool,
    pub(super) writer: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    Open,
    /// A FIN follows the last byte.
    Finishing,
    Finished,
    /// A reset is the next and last thing that is sent.
    Resetting,
    /// Nothing may be sent.
    Reset,
}

impl Stream {
    pub(super) fn new(id: u32, opened_here: bool, now: Instant) -> Self {
        let first = if opened_here { Flags::SYN } else { Flags::ACK };
        Self {
            id,
            receiving: Receiving {
                window: ReceiveWindow::new(now),
                segments: VecDeque::new(),
                unread: 0,
                held: 0,
                ended: false,
                reader: None,
                update: 0,
            },
            sending: Sending {
                segments: VecDeque::new(),
                waiting: 0,
                window: INITIAL,
                first,
                answers: false,
                state: SendState::Open,
                end_left: false,
                reset_behind: false,
                writer: None,
            },
            watcher: None,
            dropped: false,
            queued: false,
            unacknowledged: opened_here,
        }
    }

    /// The far side has ended both directions. What has arrived can still be read.
    pub(super) fn reset_by_peer(&mut self) {
        self.receiving.ended = true;
        self.sending.stop(SendState::Reset);
        self.sending.end_left = false;
    }

    /// Bytes have come that nobody will read, which must not look as if they had been read.
    pub(super) fn bounce(&mut self) {
        match self.sending.state {
            SendState::Finishing => self.sending.reset_behind = true,
            SendState::Open | SendState::Finished => self.sending.stop(SendState::Resetting),
            SendState::Resetting | SendState::Reset => {}
        }
    }

    /// Nobody will use the stream any more.
    pub(super) fn let_go(&mut self) {
        self.dropped = true;
        let unread = self.receiving.discard();
        self.receiving.reader = None;
        self.sending.writer = None;
        self.watcher = None;
        match self.sending.state {
            // Unread or unsent bytes are lost, which must not look like an end.
            SendState::Open if self.sending.first.has(Flags::SYN) => self.sending.stop(SendState::Reset),
            SendState::Open => self.sending.stop(SendState::Resetting),
            // The sender may have used its window up: nothing else would ever tell it. What was said before the end is
            // said all the same, as far as it is taken.
            SendState::Finishing if unread > 0 => self.sending.reset_behind = true,
            SendState::Finished if unread > 0 => self.sending.stop(SendState::Resetting),
            SendState::Finishing | SendState::Finished | SendState::Resetting | SendState::Reset => {}
        }
    }

    /// Answers the far side's first frame, if that was not done.
    pub(super) fn answer(&mut self) {
        self.sending.answers = true;
    }

    /// The connection is gone: nothing more is sent, and nothing has to be kept for it.
    pub(super) fn cut(&mut self) {
        self.sending.stop(SendState::Reset);
    }

    /// Whoever waits for anything of the stream.
    pub(super) fn take_wakers(&mut self) -> impl Iterator<Item = Waker> {
        [self.receiving.reader.take(), self.sending.writer.take(), self.watcher.take()].into_iter().flatten()
    }

    /// Whether nothing more will be said of it by either side, so that it may be forgotten.
    pub(super) fn is_over(&self) -> bool {
        match self.sending.state {
            SendState::Reset => self.dropped,
            SendState::Finished => self.dropped && self.receiving.ended,
            SendState::Open | SendState::Finishing | SendState::Resetting => false,
        }
    }

    pub(super) fn has_output(&self) -> bool {
        let sending = &self.sending;
        match sending.state {
            SendState::Open => self.has_header() || (sending.waiting > 0 && sending.window > 0),
            SendState::Finishing => {
                self.has_header() || sending.waiting == 0 || sending.window > 0 || sending.reset_behind
            }
            SendState::Finished => self.has_header(),
            SendState::Resetting => true,
            SendState::Reset => false,
        }
    }

    fn has_header(&self) -> bool {
        self.receiving.update > 0 || (self.sending.answers && self.sending.first.has(Flags::ACK))
    }

    /// Whether it takes little of the connection's time to say all it has.
    pub(super) fn is_sparse(&self) -> bool {
        self.sending.waiting <= SPARSE
    }

    /// What is to be said without a body: a reset, or that there is room for more.
    pub(super) fn next_header(&mut self) -> Option<Header> {
        let has_header = self.has_header();
        let (stream, update) = (self.id, std::mem::take(&mut self.receiving.update));
        let sending = &mut self.sending;
        if sending.is_stuck() {
            sending.stop(SendState::Resetting);
        }
        if sending.state == SendState::Resetting {
            sending.state = SendState::Reset;
            return Some(Header { kind: Kind::WindowUpdate, flags: Flags::RST, stream, length: 0 });
        }
        (has_header && sending.state != SendState::Reset).then(|| {
            let flags = std::mem::take(&mut sending.first);
            Header { kind: Kind::WindowUpdate, flags, stream, length: update }
        })
    }

    /// How many bytes the next frame has, if it may be sent whole. None if the window cuts it: a part fits anywhere.
    pub(super) fn next_length(&self) -> usize {
        let length = self.sending.segments.front().map_or(0, Chunk::len);
        if u32::try_from(length).is_ok_and(|length| length <= self.sending.window) { length } else { 0 }
    }

    /// The next bytes, no more than `most` of them.
    pub(super) fn next_data(&mut self, most: usize) -> Option<Chunk> {
        let mut frame = self.sending.next_body(most)?;
        let flags = std::mem::take(&mut self.sending.first);
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        frame.set_header(&Header { kind: Kind::Data, flags, stream: self.id, length });
        Some(frame)
    }

    /// The word that no more bytes come, behind the last of them. Not in one frame with them: hashicorp/yamux heeds the
    /// flags first, and its reader may then find an end where the bytes are not yet.
    pub(super) fn next_end(&mut self) -> Option<Header> {
        let sending = &mut self.sending;
        if sending.state != SendState::Finishing || sending.waiting > 0 {
            return None;
        }
        sending.state = if sending.reset_behind { SendState::Resetting } else { SendState::Finished };
        sending.end_left = !sending.reset_behind;
        let flags = std::mem::take(&mut sending.first).and(Flags::FIN);
        Some(Header { kind: Kind::Data, flags, stream: self.id, length: 0 })
    }
}

impl Receiving {
    /// A frame of so many bytes begins. `false` if the sender had no right to it.
    pub(super) fn announce(&mut self, bytes: u32) -> bool {
        self.unread += bytes as usize;
        self.window.take(bytes)
    }

    /// Keeps bytes that have arrived, of those that were announced. `more` bytes of the same frame are to follow, and
    /// have room beside them.
    pub(super) fn append(&mut self, mut bytes: &[u8], more: usize) {
        if let Some(last) = self.segments.back_mut() {
            let (fits, rest) = bytes.split_at(bytes.len().min(last.capacity() - last.len()));
            last.extend_from_slice(fits);
            bytes = rest;
        }
        if !bytes.is_empty() {
            let room = (bytes.len() + more).min(CHUNK_BODY).max(bytes.len());
            let mut segment = Vec::with_capacity(room.max(SMALL));
            segment.extend_from_slice(bytes);
            self.segments.push_back(segment);
        }
    }

    /// Moves what has arrived first, up to `limit` bytes, but not less than a segment. Whether there was anything.
    pub(super) fn take(&mut self, segments: &mut VecDeque<Vec<u8>>, limit: usize) -> bool {
        let mut taken = 0;
        while let Some(next) = self.segments.front()
            && (taken == 0 || taken + next.len() <= limit)
            && let Some(segment) = self.segments.pop_front()
        {
            taken += segment.len();
            segments.push_back(segment);
        }
        self.unread -= taken;
        self.held = taken;
        taken > 0
    }

    /// Whether the sender shall be told that it may send more.
    pub(super) fn update_due(&self) -> UpdateDue {
        if self.ended { UpdateDue::No } else { self.window.update_due(self.unread + self.held) }
    }

    /// Lets the sender send more: it is told so by the next header.
    pub(super) fn make_room(&mut self, now: Instant, rtt: Option<Duration>, budget: &mut Budget) {
        // A far side that reads nothing can go on all the same, and is never told.
        let more = self.window.update(self.unread + self.held, now, rtt, budget);
        self.update = self.update.saturating_add(more);
    }

    /// How many bytes were lost by it. A window that was to be opened still is: a sender that has bytes left shall
    /// send them, and be told that nobody reads them.
    fn discard(&mut self) -> usize {
        self.segments = VecDeque::new();
        std::mem::take(&mut self.unread)
    }
}

impl Sending {
    /// How many bytes may wait, where so many of this stream leave in one batch. What the far side does not take yet would
    /// only be kept here instead of where it comes from.
    fn most_waiting(&self, share: usize) -> usize {
        let allowed = usize::try_from(self.window).unwrap_or(usize::MAX);
        share.min(allowed).max(SEND_BUFFER)
    }

    /// Whether bytes are taken, now or later.
    pub(super) fn is_open(&self) -> bool {
        self.state == SendState::Open
    }

    /// Whether nothing may be sent any more: the far side has said so, if the connection lasts.
    pub(super) fn is_reset(&self) -> bool {
        self.state == SendState::Reset
    }

    /// Whether the end has left, behind all bytes; not ready while it may yet do so.
    pub(super) fn outcome(&self) -> Poll<bool> {
        match self.state {
            _ if self.end_left => Poll::Ready(true),
            SendState::Open | SendState::Finishing | SendState::Finished => Poll::Pending,
            SendState::Resetting | SendState::Reset => Poll::Ready(false),
        }
    }

    /// How many bytes more are taken now, while it is open.
    pub(super) fn room(&self, share: usize) -> usize {
        self.most_waiting(share).saturating_sub(self.waiting)
    }

    /// Takes bytes to send, for which there is room.
    pub(super) fn append(&mut self, mut bytes: &[u8]) {
        self.waiting += bytes.len();
        if let Some(last) = self.segments.back_mut() {
            bytes = last.append(bytes);
        }
        while !bytes.is_empty() {
            // The rest of many bytes: more will follow, and find room.
            let room = if self.segments.is_empty() { bytes.len() } else { FRAME_BODY };
            let mut frame = Chunk::with_room_for(room);
            bytes = frame.append(bytes);
            self.segments.push_back(frame);
        }
    }

    /// Takes all of a chunk, if there is room.
    pub(super) fn give(&mut self, chunk: &mut Option<Chunk>, share: usize) -> Option<usize> {
        let has_room = |chunk: &mut Chunk| {
            self.waiting <= SEND_BUFFER / 2 || self.waiting + chunk.len() <= self.most_waiting(share)
        };
        let chunk = chunk.take_if(has_room)?;
        let bytes = chunk.len();
        self.waiting += bytes;
        // An empty frame would only be a word for nothing.
        if bytes > 0 {
            self.segments.push_back(chunk);
        }
        Some(bytes)
    }

    /// A far side that takes nothing may be waiting in the same way for this side, which takes nothing more either.
    fn is_stuck(&self) -> bool {
        self.state == SendState::Finishing && self.reset_behind && self.waiting > 0 && self.window == 0
    }

    /// Nothing more will be given.
    pub(super) fn finish(&mut self) {
        if self.is_open() {
            self.state = SendState::Finishing;
        }
    }

    /// The far side takes more. `false` if it cannot mean that.
    pub(super) fn open_window(&mut self, bytes: u32) -> bool {
        let opened = self.window.checked_add(bytes);
        self.window = opened.unwrap_or(self.window);
        opened.is_some()
    }

    /// Whoever waits for room, once there is enough for it to be worth waking up.
    pub(super) fn take_writer(&mut self, share: usize) -> Option<Waker> {
        if self.waiting <= self.most_waiting(share) / 2 { self.writer.take() } else { None }
    }

    /// The next bytes that the far side takes, as a frame that lacks its header.
    fn next_body(&mut self, most: usize) -> Option<Chunk> {
        let allowed = usize::try_from(self.window).unwrap_or(usize::MAX).min(most);
        if allowed == 0 {
            return None;
        }
        let first = self.segments.front_mut()?;
        let frame = if first.len() <= allowed {
            self.segments.pop_front()?
        } else {
            first.split_to(allowed.min(FRAME_BODY))
        };
        self.waiting -= frame.len();
        self.window -= u32::try_from(frame.len()).unwrap_or(0);
        Some(frame)
    }

    fn stop(&mut self, state: SendState) {
        self.segments = VecDeque::new();
        self.waiting = 0;
        self.state = state;
    }
}
