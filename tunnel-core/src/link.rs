//! One link: a byte stream made into a place where streams can be opened, with a heartbeat.
//!
//! [`Link::connect`] and [`Link::accept`] shake hands; then one task per link runs the control stream, beside the
//! multiplexer's. [`Link`] owns both tasks and tells its owner what happens; [`LinkHandle`] is cheap to clone and opens
//! streams. When the link ends, for whatever reason, all its streams are aborted at once.

mod control_stream;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::AsyncWriteExt,
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use self::control_stream::{ControlChannel, ControlTask, give_up};
use crate::{
    mux::{Carrier, Inbound, LastHeard, Mux, MuxConfig, MuxError, MuxHandle, MuxStream, OpenFailed},
    proto::{
        Side, clean_text,
        control::{Control, ControlError, Event, Rtt},
        ends::Aborted,
        frame::FrameError,
        messages::{
            AbortCode, Drain, Gateway, Hello, Holdings, Ingress, Open, RefusalCode, Reject, RejectCode,
            Update, Welcome,
        },
        yamux::WindowPool,
    },
    stream::{self, HeaderError, Incoming, LinkEnd, OpenStreamError, Streams, TunnelStream, refuse_unread},
};

/// Things that happened to a link may wait for its owner up to this many. More are dropped, but for what a peer tells of
/// itself and its nodes, which waits: an owner that does not listen must not stop the heartbeat, unless it deals with
/// peers.
const EVENTS_WAITING: usize = 8;
/// An orderly close may take this long before the connection is dropped, unless its owner has more time.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// The far side of a link that it has closed itself, or that it may not have, has this long to hear the last word.
const FAREWELL: Duration = Duration::from_secs(1);

/// A side that can open no more streams than these wants another link. Enough for the time that it takes to make one.
const STREAMS_IN_RESERVE: u32 = 1 << 20;
/// How long the streams of a link may run on whose numbers are used up, if the far side does not do better.
const USED_UP_DEADLINE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Limits of one link.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Hello and Welcome must be exchanged within this time.
    pub handshake_timeout: Duration,
    /// Longest heartbeat period that a dialer accepts from its gateway.
    pub max_heartbeat: Duration,
    /// Streams at once; more are refused one by one.
    pub max_streams: usize,
    /// Of those that this side opens, how many are only for requests that say [`OpenRequest::reserved`]. Not more than a
    /// quarter is.
    pub reserved_streams: usize,
    /// Bytes by which all receive windows of the link together may grow beyond 256 KiB a stream.
    pub window_budget: usize,
    /// By how much the receive windows of all links together may grow that have a part in this pool.
    pub window_pool: Option<Arc<WindowPool>>,
    /// When a stream's bytes have ended, how long its confirmation on the control stream may take. After that the
    /// stream counts as aborted.
    pub end_timeout: Duration,
    /// Whether the far side may open streams. If not, each is refused.
    pub accept_streams: bool,
    /// As if this side had opened so many streams before, of the 2^31 that it can open on one link. For tests: to open so
    /// many takes weeks.
    pub streams_before: u32,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            max_heartbeat: Duration::from_secs(60),
            max_streams: 1024,
            reserved_streams: 0,
            window_budget: 16 << 20,
            window_pool: None,
            end_timeout: Duration::from_secs(10),
            accept_streams: true,
            streams_before: 0,
        }
    }
}

impl LinkConfig {
    /// Most bytes that one link's receive buffers can hold.
    pub fn worst_case_memory(&self) -> usize {
        self.max_streams * crate::mux::STREAM_WINDOW + self.window_budget
    }

    fn mux(&self) -> MuxConfig {
        let Self { max_streams, window_budget, streams_before, .. } = *self;
        MuxConfig { max_streams, window_budget, window_pool: self.window_pool.clone(), streams_before }
    }
}

/// Why a link ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// The far side closed it in an orderly way.
    #[error("the far side closed the link")]
    ClosedByPeer,
    /// This side closed it.
    #[error("closed here: {0}")]
    ClosedHere(String),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The far side's TLS refused this side. In TLS 1.3 a client learns only so that its certificate is no good.
    #[error("the connection broke: {0}")]
    TlsRefused(String),
    /// The control stream's rules were broken, or it fell silent.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Bytes that are not this protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Bytes that are not even the multiplexer's.
    #[error("not the link protocol: {0}")]
    Protocol(String),
}

impl LinkError {
    /// A short name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ClosedByPeer => "closed_by_peer",
            Self::ClosedHere(_) => "closed_here",
            Self::Broken(_) => "broken",
            Self::TlsRefused(_) => "refused_by_peer",
            Self::Control(ControlError::Silent { .. }) => "silent",
            Self::Control(ControlError::HandshakeTimeout) => "handshake_timeout",
            Self::Control(_) | Self::Frame(_) | Self::Protocol(_) => "protocol",
        }
    }
}

impl From<MuxError> for LinkError {
    fn from(error: MuxError) -> Self {
        match error {
            MuxError::ClosedByPeer | MuxError::HungUp => Self::ClosedByPeer,
            MuxError::Io(error) if crate::tls::is_refusal(&error) => {
                Self::TlsRefused(crate::tls::explain(&error))
            }
            MuxError::Io(error) => Self::Broken(crate::tls::explain(&error)),
            MuxError::Protocol(error) => Self::Protocol(error.to_string()),
        }
    }
}

/// Why a dialer got no link.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The gateway said no.
    #[error("the gateway rejected the link: {}", .0.text)]
    Rejected(Reject),
    /// The link ended before it was up.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Why a stream could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// The far side said no.
    #[error("{text}")]
    Refused {
        /// Its reason, by kind.
        code: RefusalCode,
        /// Its reason, for people.
        text: String,
    },
    /// All streams of the link that this one could be are in use.
    #[error("the link carries as many streams as it may ({max}{})", Reserved(*.reserved))]
    Overloaded {
        /// The maximum.
        max: usize,
        /// How many of them it could not be, since they are reserved for others.
        reserved: usize,
    },
    /// The far side is about to leave, or all numbers of streams were used: another link is needed.
    #[error("the far side is draining")]
    Draining,
    /// No answer in time.
    #[error("the far side did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The link, or this stream of it, went away.
    #[error("{0}")]
    LinkLost(String),
    /// The far side broke the protocol.
    #[error("the far side's answer was unusable: {0}")]
    Protocol(String),
}

/// Says how many streams are reserved, if any.
struct Reserved(usize);

impl fmt::Display for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, ", {count} of them reserved"),
        }
    }
}

/// What is asked of the far side for one stream.
#[derive(Clone, Debug, Default)]
pub struct OpenRequest {
    /// `host:port` to dial, as the ingress was asked for it.
    pub target: String,
    /// Names the request in the logs of every process on its way.
    pub request_id: String,
    /// W3C trace context, empty if there is none.
    pub traceparent: String,
    /// Which ingress took it.
    pub ingress: Ingress,
    /// Who asked.
    pub caller: String,
    /// Peer links only: whose edge shall dial.
    pub node: String,
    /// It may be one of the link's [`LinkConfig::reserved_streams`].
    pub reserved: bool,
}

/// What happens to a link.
#[derive(Debug)]
pub enum LinkEvent {
    /// The far side opens a stream.
    Stream(Incoming),
    /// The far side takes no new streams.
    Draining(Drain),
    /// Either side has used most of the numbers that streams can have: the dialer should make another link soon. Comes once.
    WearsOut,
    /// Grants or hints have changed.
    Updated(Update),
    /// Peer links: what the far side holds. None is left out; the owner that asked for them must take them soon.
    Holdings(Holdings),
    /// Peer links: what the far side says of itself. None is left out, as with holdings.
    Gateway(Gateway),
    /// The end; nothing follows.
    Closed(LinkError),
}

/// Opens streams on a link and asks about it. Outlives the link harmlessly: everything fails once it has ended.
#[derive(Clone)]
pub struct LinkHandle {
    shared: Arc<Shared>,
}

struct Shared {
    mux: MuxHandle,
    streams: Arc<Streams>,
    max_streams: usize,
    next_number: AtomicU64,
    peer_draining: AtomicBool,
    wears_out: AtomicBool,
    /// It was noticed that the link wears out.
    worn: Notify,
    requests: Mutex<Requests>,
    requested: Notify,
    holdings_taken: Notify,
    rtt: watch::Sender<Option<Rtt>>,
    heard: Arc<LastHeard>,
}

impl Shared {
    fn note_numbers(&self, stream: &MuxStream) {
        if stream.numbers_left() < STREAMS_IN_RESERVE && !self.wears_out.swap(true, Relaxed) {
            self.worn.notify_one();
        }
    }
}

/// What the handles want of the control task. One of each is enough.
#[derive(Default)]
struct Requests {
    drain: Option<Drain>,
    update: Option<Update>,
    gateway: Option<Gateway>,
    holdings: Option<Holdings>,
    close: Option<Close>,
}

/// How a link shall be closed.
#[derive(Debug)]
struct Close {
    reason: String,
    /// The far side has until then to take what it was told, and to say the same.
    by: Instant,
}

impl fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkHandle").field("active_streams", &self.active_streams()).finish_non_exhaustive()
    }
}

impl LinkHandle {
    /// Opens a stream: returns it and the address that was dialled once the far side has connected the target.
    ///
    /// Cancel-safe: dropping the future tells the far side to give up, at whatever step it is.
    pub async fn open(
        &self,
        request: OpenRequest,
        timeout: Duration,
    ) -> Result<(TunnelStream, String), OpenError> {
        let shared = &self.shared;
        if shared.peer_draining.load(Relaxed) {
            return Err(OpenError::Draining);
        }
        let kept_from_it = if request.reserved { 0 } else { shared.streams.reserved() };
        let overloaded = || OpenError::Overloaded { max: shared.max_streams, reserved: kept_from_it };
        let permit = shared.streams.permit(request.reserved).ok_or_else(overloaded)?;
        let exchange = async {
            let mux = shared.mux.open().await.map_err(|failed| match failed {
                OpenFailed::Ended => OpenError::LinkLost(self.end_reason()),
                OpenFailed::TooMany => overloaded(),
                OpenFailed::NoNumbers => {
                    self.used_up();
                    OpenError::Draining
                }
            })?;
            shared.note_numbers(&mux);
            let open = Open {
                stream: shared.next_number.fetch_add(2, Relaxed),
                target: request.target,
                request_id: request.request_id,
                traceparent: request.traceparent,
                ingress: request.ingress.into(),
                caller: clean_text(&request.caller),
                node: request.node,
                timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            };
            let opened = stream::open(mux, shared.streams.clone(), permit, &open).await;
            opened.map(|(stream, opened)| (stream, opened.address)).map_err(|error| self.open_error(error))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(OpenError::TimedOut(timeout)))
    }

    /// The numbers of streams are used up. Those that run go on. A dialer that has not made another link has to do so now.
    fn used_up(&self) {
        if !self.shared.peer_draining.swap(true, Relaxed) {
            self.drain(USED_UP_DEADLINE, "the link has no numbers for more streams");
        }
    }

    fn open_error(&self, error: OpenStreamError) -> OpenError {
        match error {
            OpenStreamError::Refused(refused) => match refused.code() {
                RefusalCode::Draining => OpenError::Draining,
                code => OpenError::Refused { code, text: clean_text(&refused.text) },
            },
            OpenStreamError::Header(HeaderError::Io(_) | HeaderError::Truncated) => {
                OpenError::LinkLost(self.end_reason())
            }
            OpenStreamError::Header(error) => OpenError::Protocol(error.to_string()),
        }
    }

    fn end_reason(&self) -> String {
        let ended = self.shared.streams.ended();
        ended.map_or_else(
            || "the far side dropped the stream before it answered".to_owned(),
            ToString::to_string,
        )
    }

    /// Tells the far side to send no new streams; running ones have until `deadline` from now.
    pub fn drain(&self, deadline: Duration, reason: &str) {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        self.shared.requests.lock().drain = Some(Drain { deadline_ms, reason: reason.to_owned() });
        self.shared.requested.notify_one();
    }

    /// Tells the edge its new grants or cluster hints.
    pub fn update(&self, update: Update) {
        self.shared.requests.lock().update = Some(update);
        self.shared.requested.notify_one();
    }

    /// Tells a peer about this gateway. Of several in quick succession, the last one counts.
    pub fn introduce(&self, gateway: Gateway) {
        self.shared.requests.lock().gateway = Some(gateway);
        self.shared.requested.notify_one();
    }

    /// Tells a peer what this gateway holds; returns when there is room for more. For one task at a time.
    ///
    /// Cancel-safe: what was not taken over was not sent. Waits for ever once the link has ended.
    pub async fn tell_holdings(&self, holdings: Holdings) {
        let mut holdings = Some(holdings);
        loop {
            let room = self.shared.holdings_taken.notified();
            {
                let mut requests = self.shared.requests.lock();
                if requests.holdings.is_none() {
                    requests.holdings = holdings.take();
                    break;
                }
            }
            room.await;
        }
        self.shared.requested.notify_one();
    }

    /// Ends the link in an orderly way, within a few seconds. Streams that still run are aborted.
    pub fn close(&self, reason: &str) {
        self.close_by(reason, Instant::now() + CLOSE_TIMEOUT);
    }

    /// Ends the link in an orderly way. Streams that still run are aborted. The far side has until `by` to take what it was
    /// told, however slow the way is, but no longer than it is alive. Of several times, the first counts.
    pub fn close_by(&self, reason: &str, by: Instant) {
        self.shared.requests.lock().close = Some(Close { reason: reason.to_owned(), by });
        self.shared.requested.notify_one();
    }

    /// Whether both are handles of the same link.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Whether either side has used most of the numbers that streams can have.
    pub fn wears_out(&self) -> bool {
        self.shared.wears_out.load(Relaxed)
    }

    /// Waits until no stream is left. Cancel-safe.
    pub async fn idle(&self) {
        self.shared.streams.idle().await;
    }

    /// Whether no more streams can be opened: the far side has asked for none, or there are no numbers for them.
    pub fn peer_draining(&self) -> bool {
        self.shared.peer_draining.load(Relaxed)
    }

    /// Streams that have not ended.
    pub fn active_streams(&self) -> usize {
        self.shared.streams.active()
    }

    /// Whether the link has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.streams.ended().is_some()
    }

    /// When bytes last came from the far side.
    pub fn last_heard(&self) -> Instant {
        self.shared.heard.at()
    }

    /// Round-trip times, once a heartbeat has come back.
    pub fn rtt(&self) -> Option<Rtt> {
        *self.shared.rtt.borrow()
    }
}

/// A running link. Dropping it ends the link at once and aborts its streams.
#[derive(Debug)]
pub struct Link {
    handle: LinkHandle,
    inbound: Inbound,
    events: mpsc::Receiver<LinkEvent>,
    control: AbortOnDropHandle<LinkError>,
    accept_streams: bool,
}

impl Drop for Link {
    fn drop(&mut self) {
        let reason = Aborted::new(AbortCode::LinkLost, "the link was dropped");
        self.handle.shared.streams.end_all(LinkEnd { reason, in_order: false });
    }
}

impl Link {
    /// Makes a link of a connection that this side dialled: sends `hello` and waits for the gateway's answer.
    ///
    /// Cancel-safe: dropping the future drops the connection.
    pub async fn connect(
        io: impl Carrier,
        hello: Hello,
        config: LinkConfig,
    ) -> Result<(Self, Welcome), ConnectError> {
        let now = Instant::now().into_std();
        let control = Control::dialer(hello, now, config.handshake_timeout, config.max_heartbeat);
        let mux = Mux::start(io, Side::Dialer, config.mux());
        let Ok(stream) = mux.handle.open().await else {
            return Err(give_up(LinkError::ClosedByPeer, mux).await.into());
        };
        let mut channel = ControlChannel::new(control, stream, mux.heard.clone());
        match channel.next_event().await {
            Ok(Event::Established(welcome)) => {
                Ok((Self::start(Side::Dialer, mux, channel, &config), welcome))
            }
            Ok(Event::Rejected(reject)) => Err(ConnectError::Rejected(reject)),
            Ok(_) => Err(LinkError::Protocol("an event before the welcome".to_owned()).into()),
            Err(error) => Err(give_up(error, mux).await.into()),
        }
    }

    /// Takes a connection that an edge or a peer dialled, as far as its `Hello`.
    ///
    /// Cancel-safe: dropping the future drops the connection.
    pub async fn accept(io: impl Carrier, config: LinkConfig) -> Result<PendingLink, LinkError> {
        let now = Instant::now();
        let control = Control::acceptor(now.into_std(), config.handshake_timeout);
        let mut mux = Mux::start(io, Side::Acceptor, config.mux());
        let first = tokio::time::timeout_at(now + config.handshake_timeout, mux.inbound.next()).await;
        let stream = match first {
            Ok(Some(stream)) => stream,
            Ok(None) => return Err(give_up(LinkError::ClosedByPeer, mux).await),
            Err(_) => return Err(ControlError::HandshakeTimeout.into()),
        };
        let mut channel = ControlChannel::new(control, stream, mux.heard.clone());
        match channel.next_event().await {
            Ok(Event::Hello(hello)) => Ok(PendingLink { hello, mux, channel, config }),
            Ok(_) => Err(LinkError::Protocol("an event before the hello".to_owned())),
            Err(error @ (LinkError::Control(_) | LinkError::Frame(_))) => {
                // The multiplexer works: the far side can be told.
                let reject = Reject::new(RejectCode::Malformed, error.to_string(), Duration::ZERO);
                PendingLink { hello: Hello::default(), mux, channel, config }.reject(reject).await;
                Err(error)
            }
            Err(error) => Err(give_up(error, mux).await),
        }
    }

    fn start(side: Side, mux: Mux, channel: ControlChannel, config: &LinkConfig) -> Self {
        let streams = Arc::new(Streams::new(side, config));
        let handle = LinkHandle {
            shared: Arc::new(Shared {
                mux: mux.handle,
                streams,
                max_streams: config.max_streams,
                next_number: AtomicU64::new(side.first_number().into()),
                peer_draining: AtomicBool::new(false),
                wears_out: AtomicBool::new(false),
                worn: Notify::new(),
                requests: Mutex::default(),
                requested: Notify::new(),
                holdings_taken: Notify::new(),
                rtt: watch::Sender::new(None),
                heard: mux.heard,
            }),
        };
        let (events, received) = mpsc::channel(EVENTS_WAITING);
        let task = ControlTask { channel, mux: mux.task, shared: handle.shared.clone(), events };
        #[allow(clippy::disallowed_methods, reason = "the link owns it, waits for it, and ends with it")]
        let control = AbortOnDropHandle::new(tokio::spawn(task.run()));
        let accept_streams = config.accept_streams;
        Self { handle, inbound: mux.inbound, events: received, control, accept_streams }
    }

    /// A handle to open streams with.
    pub fn handle(&self) -> LinkHandle {
        self.handle.clone()
    }

    /// What happens next. Cancel-safe. After [`LinkEvent::Closed`] it must not be called again.
    pub async fn next(&mut self) -> LinkEvent {
        loop {
            // Events first: a drain counts for the streams behind it.
            let mut stream = tokio::select! {
                biased;
                Some(event) = self.events.recv() => return event,
                () = self.handle.shared.worn.notified() => return LinkEvent::WearsOut,
                Some(stream) = self.inbound.next() => stream,
                end = &mut self.control => {
                    let panicked = |_| LinkError::Broken("the link's task was stopped".to_owned());
                    return LinkEvent::Closed(end.unwrap_or_else(panicked));
                }
            };
            self.handle.shared.note_numbers(&stream);
            if !self.accept_streams {
                refuse_unread(&mut stream, RefusalCode::Unsupported, "this side takes no streams");
                continue;
            }
            let streams = self.handle.shared.streams.clone();
            // Which of them are reserved is for the far side to say, which opens them.
            match streams.permit(true) {
                Some(permit) => return LinkEvent::Stream(Incoming::new(stream, streams, permit)),
                None => refuse_unread(&mut stream, RefusalCode::Overloaded, "too many streams on this link"),
            }
        }
    }
}

/// A connection whose edge has said hello and waits to be welcomed or rejected.
pub struct PendingLink {
    hello: Hello,
    mux: Mux,
    channel: ControlChannel,
    config: LinkConfig,
}

impl fmt::Debug for PendingLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingLink").field("hello", &self.hello).finish_non_exhaustive()
    }
}

impl PendingLink {
    /// What the edge said. Its claims are not yet to be believed.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Takes the link. The welcome's heartbeat period holds for both sides.
    pub fn welcome(mut self, welcome: Welcome) -> Result<Link, LinkError> {
        // An edge that takes fewer streams than this side would open is believed.
        let edge_max = usize::try_from(self.hello.max_streams).unwrap_or(usize::MAX);
        let max_streams =
            if edge_max == 0 { self.config.max_streams } else { self.config.max_streams.min(edge_max) };
        self.channel.control.welcome(Instant::now().into_std(), welcome)?;
        let config = LinkConfig { max_streams, ..self.config };
        Ok(Link::start(Side::Acceptor, self.mux, self.channel, &config))
    }

    /// Declines the link, tells the edge why and closes the connection.
    pub async fn reject(mut self, reject: Reject) {
        self.channel.control.reject(reject);
        self.channel.fill(None);
        let farewell = async {
            let _ = self.channel.writer.write_all_buf(&mut self.channel.out).await;
            self.mux.handle.close();
            let _ = (&mut self.mux.task).await;
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}
