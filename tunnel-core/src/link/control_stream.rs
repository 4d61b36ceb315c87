//! The control stream of one link, on the wire: joins the sans-IO state machine with the multiplexed stream that it
//! speaks on. Used by the parent module alone, first for the handshake, then in the link's own task.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use super::{CLOSE_TIMEOUT, LinkError, LinkEvent, Shared};
use crate::{
    mux::{LastHeard, MuxError, MuxStream},
    proto::{
        control::{Control, Event},
        ends::Aborted,
        frame,
        messages::AbortCode,
    },
    stream::Streams,
};

/// Encoded control messages wait for the multiplexer up to about this many bytes.
const CONTROL_BUFFER: usize = 4 * 1024;

/// The control state machine and the stream it speaks on.
pub(super) struct ControlChannel {
    /// Boxed: while a link comes about, this struct stands in many a future, one within the other.
    pub(super) control: Box<Control>,
    reader: ReadHalf<MuxStream>,
    pub(super) writer: WriteHalf<MuxStream>,
    heard: Arc<LastHeard>,
    input: BytesMut,
    pub(super) out: BytesMut,
}

impl ControlChannel {
    pub(super) fn new(control: Control, stream: MuxStream, heard: Arc<LastHeard>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            control: Box::new(control),
            reader,
            writer,
            heard,
            input: BytesMut::new(),
            out: BytesMut::new(),
        }
    }

    /// Encodes what is to be sent: the state machine's messages first, then those of the streams.
    /// Whether something still waits for room.
    pub(super) fn fill(&mut self, streams: Option<&Streams>) -> bool {
        while let Some(message) = self.control.poll_transmit() {
            if let Err(error) = frame::encode(&message, &mut self.out) {
                tracing::error!(%error, "a control message is too long and was not sent");
            }
        }
        streams.is_some_and(|streams| streams.drain_outbox(&mut self.out, CONTROL_BUFFER))
    }

    /// Decodes one whole message that has arrived already, if there is one.
    fn decode(&mut self) -> Result<bool, LinkError> {
        let Some(message) = frame::decode(&mut self.input)? else { return Ok(false) };
        self.control.handle_message(Instant::now().into_std(), message)?;
        Ok(true)
    }

    /// Before the link is up: exchanges messages until something happens.
    pub(super) async fn next_event(&mut self) -> Result<Event, LinkError> {
        loop {
            if let Some(event) = self.control.poll_event() {
                return Ok(event);
            }
            if self.decode()? {
                continue;
            }
            self.fill(None);
            let due = self.control.poll_timeout().map(Instant::from_std);
            tokio::select! {
                biased;
                read = self.reader.read_buf(&mut self.input) => check_read(read)?,
                written = self.writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    written.map_err(broken)?;
                }
                () = sleep_until(due) => self.control.handle_timeout(Instant::now().into_std())?,
            }
        }
    }
}

fn check_read(read: io::Result<usize>) -> Result<(), LinkError> {
    match read {
        Ok(0) => Err(LinkError::ClosedByPeer),
        Ok(_) => Ok(()),
        Err(error) => Err(broken(error)),
    }
}

/// Runs the control stream of an established link until the link ends.
pub(super) struct ControlTask {
    pub(super) channel: ControlChannel,
    pub(super) mux: AbortOnDropHandle<Result<(), MuxError>>,
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::Sender<LinkEvent>,
}

impl ControlTask {
    pub(super) async fn run(mut self) -> LinkError {
        let error = self.serve().await;
        let error = match error {
            LinkError::ClosedHere(reason) => {
                let abort = Aborted::new(AbortCode::LinkLost, format!("the link was closed: {reason}"));
                self.shared.streams.end_all(abort);
                self.shared.mux.close();
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, &mut self.mux).await;
                LinkError::ClosedHere(reason)
            }
            error => mux_cause(error, self.mux).await,
        };
        let abort = Aborted::new(AbortCode::LinkLost, format!("the link was lost: {error}"));
        self.shared.streams.end_all(abort);
        error
    }

    async fn serve(&mut self) -> LinkError {
        loop {
            match self.step().await {
                Ok(()) => {}
                Err(error) => return error,
            }
        }
    }

    /// One turn: handles what has arrived, encodes what is to go, then waits for the next thing to happen.
    async fn step(&mut self) -> Result<(), LinkError> {
        let Self { channel, shared, .. } = self;
        while let Some(event) = channel.control.poll_event() {
            handle_event(shared, &self.events, event).await;
        }
        if channel.decode()? {
            return Ok(());
        }
        // Whatever can be told is told before the link closes.
        let closing = take_requests(shared, channel);
        let more_waits = channel.fill(Some(&shared.streams));
        if let Some(reason) = closing {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, channel.writer.write_all_buf(&mut channel.out)).await;
            return Err(LinkError::ClosedHere(reason));
        }
        let due = channel.control.poll_timeout().map(Instant::from_std);
        // Writing first: what is ready to go should not wait behind what comes.
        tokio::select! {
            biased;
            written = channel.writer.write_buf(&mut channel.out), if !channel.out.is_empty() => {
                written.map_err(broken)?;
            }
            read = channel.reader.read_buf(&mut channel.input) => check_read(read)?,
            () = shared.streams.outbox_filled(), if !more_waits => {}
            () = shared.requested.notified() => {}
            () = sleep_until(due) => {
                channel.control.heard(channel.heard.at().into_std());
                channel.control.handle_timeout(Instant::now().into_std())?;
            }
        }
        shared
            .rtt
            .send_if_modified(|rtt| std::mem::replace(rtt, channel.control.rtt()) != channel.control.rtt());
        Ok(())
    }
}

async fn handle_event(shared: &Shared, events: &mpsc::Sender<LinkEvent>, event: Event) {
    let event = match event {
        Event::End(end) => return shared.streams.handle_end(&end),
        Event::Abort(abort) => return shared.streams.handle_abort(&abort),
        Event::Draining(drain) => {
            shared.peer_draining.store(true, Relaxed);
            LinkEvent::Draining(drain)
        }
        Event::Updated(update) => LinkEvent::Updated(update),
        // One that is missing would make all that follow wrong, or is not said again. An owner that is gone needs none.
        Event::Holdings(holdings) => {
            let _ = events.send(LinkEvent::Holdings(holdings)).await;
            return;
        }
        Event::Gateway(gateway) => {
            let _ = events.send(LinkEvent::Gateway(gateway)).await;
            return;
        }
        // The state machine gives these only during the handshake.
        Event::Hello(_) | Event::Established(_) | Event::Rejected(_) => return,
    };
    // Bounded: an owner that does not listen must not stop the heartbeat.
    let _ = events.try_send(event);
}

/// Hands the state machine what the handles asked for. The reason to close, if one was given.
fn take_requests(shared: &Shared, channel: &mut ControlChannel) -> Option<String> {
    let mut requests = shared.requests.lock();
    // They are long: the next ones wait until these have left.
    let holdings = if channel.out.is_empty() { requests.holdings.take() } else { None };
    let (drain, update, gateway) = (requests.drain.take(), requests.update.take(), requests.gateway.take());
    let close = requests.close.take();
    drop(requests);
    let control = &mut channel.control;
    if let Some(drain) = drain {
        control.drain(drain);
    }
    if let Some(update) = update {
        control.update(update);
    }
    if let Some(gateway) = gateway {
        control.gateway(gateway);
    }
    if let Some(holdings) = holdings {
        control.holdings(holdings);
        shared.holdings_taken.notify_one();
    }
    close
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn broken(error: io::Error) -> LinkError {
    LinkError::Broken(error.to_string())
}

/// Why the multiplexer ended, which says more than that the control stream did.
pub(super) async fn mux_end(task: AbortOnDropHandle<Result<(), MuxError>>) -> LinkError {
    match tokio::time::timeout(CLOSE_TIMEOUT, task).await {
        Ok(Ok(Err(error))) => error.into(),
        _ => LinkError::ClosedByPeer,
    }
}

/// `error`, or what is behind it if it only says that the control stream ended.
pub(super) async fn mux_cause(error: LinkError, task: AbortOnDropHandle<Result<(), MuxError>>) -> LinkError {
    match error {
        LinkError::ClosedByPeer | LinkError::Broken(_) => mux_end(task).await,
        error => error,
    }
}
