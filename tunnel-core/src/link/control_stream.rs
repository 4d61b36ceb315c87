//! The control stream of one link, on the wire: joins the sans-IO state machine with the multiplexed stream that it
//! speaks on. Used by the parent module alone, first for the handshake, then in the link's own task.

use std::{
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use super::{Close, FAREWELL, LinkError, LinkEvent, Shared};
use crate::{
    mux::{LastHeard, Mux, MuxError, MuxHandle, MuxStream},
    proto::{
        control::{Control, Event},
        ends::Aborted,
        frame,
        messages::{self, AbortCode},
    },
    stream::{LinkEnd, Streams},
};

/// Encoded control messages wait for the multiplexer up to about this many bytes.
const CONTROL_BUFFER: usize = 4 * 1024;

/// Whether the ends of streams have arrived is asked of the far side no more often than this: of all at once.
const CONFIRM_PERIOD: Duration = Duration::from_millis(20);

/// The control state machine and the stream it speaks on.
pub(super) struct ControlChannel {
    /// Boxed: while a link comes about, this struct stands in many a future, one within the other.
    pub(super) control: Box<Control>,
    reader: ReadHalf<MuxStream>,
    pub(super) writer: WriteHalf<MuxStream>,
    heard: Arc<LastHeard>,
    input: BytesMut,
    pub(super) out: BytesMut,
    asking: Asking,
}

/// Asks the far side whether the ends of streams have arrived: by a ping behind them.
struct Asking {
    /// The ping that has had no answer, and how many of the streams that have asked it is for.
    in_flight: Option<(u64, u64)>,
    /// The next ping is not sent before.
    next: Instant,
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
            asking: Asking { in_flight: None, next: Instant::now() },
        }
    }

    /// Encodes what is to be sent: the state machine's messages first, then those of the streams, and heartbeats, whose
    /// answers say that all before them has arrived. Whether something still waits for room.
    pub(super) fn fill(&mut self, streams: Option<&Streams>) -> bool {
        while let Some(message) = self.control.poll_transmit() {
            self.encode(&message);
        }
        let more_waits = streams.is_some_and(|streams| self.fill_ends(streams));
        while let Some(message) = self.control.poll_heartbeat() {
            self.encode(&message);
        }
        more_waits
    }

    fn encode(&mut self, message: &messages::Control) {
        if let Err(error) = frame::encode(message, &mut self.out) {
            tracing::error!(%error, "a control message is too long and was not sent");
        }
    }

    fn fill_ends(&mut self, streams: &Streams) -> bool {
        // Before the ends are taken, so that none of those that the ping is for comes behind it.
        let unconfirmed = streams.unconfirmed();
        let more_waits = streams.drain_outbox(&mut self.out, CONTROL_BUFFER);
        let now = Instant::now();
        if let Some(count) = unconfirmed
            && !more_waits
            && self.asking.in_flight.is_none()
            && now >= self.asking.next
        {
            self.asking.in_flight = Some((self.control.ping(now.into_std()), count));
            self.asking.next = now + CONFIRM_PERIOD;
        }
        more_waits
    }

    /// Hands on the far side's answer, if there is one.
    fn confirm(&mut self, streams: &Streams) {
        let answered = self.control.answered();
        if let Some((_, count)) = self.asking.in_flight.take_if(|(ping, _)| *ping <= answered) {
            streams.confirm(count);
        }
    }

    /// When there is something to be done although nothing has happened.
    fn due(&self, streams: &Streams) -> Option<Instant> {
        let due = self.control.poll_timeout().map(Instant::from_std);
        let asks = self.asking.in_flight.is_none() && streams.unconfirmed().is_some();
        due.into_iter().chain(asks.then_some(self.asking.next)).min()
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

/// Why the control stream is not served any longer.
enum End {
    /// This side wishes so.
    Here(Close),
    Lost(LinkError),
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
        match self.serve().await {
            End::Here(close) => self.close(close).await,
            End::Lost(error) => self.lose(error).await,
        }
    }

    async fn serve(&mut self) -> End {
        loop {
            match self.step().await {
                Ok(None) => {}
                Ok(Some(close)) => return End::Here(close),
                Err(error) => return End::Lost(error),
            }
        }
    }

    /// Ends the link in an orderly way: whatever can be told is told, and the far side has time to take it.
    async fn close(mut self, Close { reason, mut by }: Close) -> LinkError {
        let Self { channel, mux, shared, .. } = &mut self;
        channel.fill(Some(&shared.streams));
        let cut = Aborted::new(AbortCode::LinkLost, format!("the link was closed: {reason}"));
        shared.streams.cut_all(cut, &mut channel.out);
        let ControlChannel { control, writer, out, heard, .. } = channel;
        let mut parting = std::pin::pin!(async {
            let _ = writer.write_all_buf(out).await;
            shared.mux.close();
            let _ = mux.await;
        });
        let mut until = by.min(Instant::from_std(control.dead_at()));
        loop {
            tokio::select! {
                // What is done needs no more time; and there may be less of it now.
                biased;
                () = &mut parting => break,
                () = shared.requested.notified() => {
                    by = shared.requests.lock().close.take().map_or(by, |again| by.min(again.by));
                }
                () = tokio::time::sleep_until(until) => {}
            }
            control.heard(heard.at().into_std());
            until = by.min(Instant::from_std(control.dead_at()));
            if until <= Instant::now() {
                break;
            }
        }
        LinkError::ClosedHere(reason)
    }

    /// The link is of no more use: its streams hear of it at once, and a far side that has closed it, or that broke its
    /// rules, has some time to hear the last word.
    async fn lose(self, error: LinkError) -> LinkError {
        let mux = &self.shared.mux;
        let in_order = matches!(mux.cause(), Some(MuxError::ClosedByPeer));
        let error = mux_cause(error, mux);
        let reason = Aborted::new(AbortCode::LinkLost, format!("the link was lost: {error}"));
        self.shared.streams.end_all(LinkEnd { reason, in_order });
        part(mux, self.mux).await;
        error
    }

    /// One turn: handles what has arrived, encodes what is to go, then waits for the next thing to happen.
    async fn step(&mut self) -> Result<Option<Close>, LinkError> {
        let Self { channel, shared, .. } = self;
        while let Some(event) = channel.control.poll_event() {
            handle_event(shared, &self.events, event).await;
        }
        if channel.decode()? {
            return Ok(None);
        }
        channel.confirm(&shared.streams);
        if let Some(close) = take_requests(shared, channel) {
            return Ok(Some(close));
        }
        let more_waits = channel.fill(Some(&shared.streams));
        let due = channel.due(&shared.streams);
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
        Ok(None)
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

/// Hands the state machine what the handles asked for. How to close, if that was asked for.
fn take_requests(shared: &Shared, channel: &mut ControlChannel) -> Option<Close> {
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

/// `error`, or what is behind it if it only says that the control stream ended.
fn mux_cause(error: LinkError, mux: &MuxHandle) -> LinkError {
    match error {
        LinkError::ClosedByPeer | LinkError::Broken(_) => {
            mux.cause().map_or(LinkError::ClosedByPeer, LinkError::from)
        }
        error => error,
    }
}

/// Lets the multiplexer, if it has ended by itself, close its connection so that the last word arrives.
async fn part(mux: &MuxHandle, task: AbortOnDropHandle<Result<(), MuxError>>) {
    if mux.cause().is_some() {
        let _ = tokio::time::timeout(FAREWELL, task).await;
    }
}

/// The link does not come about: why.
pub(super) async fn give_up(error: LinkError, mux: Mux) -> LinkError {
    let error = mux_cause(error, &mux.handle);
    part(&mux.handle, mux.task).await;
    error
}
