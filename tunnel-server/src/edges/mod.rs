//! The public door: makes a link of each connection that an edge dials, and holds it until it ends.
//!
//! A node's identity is what its certificate says. What the edge claims in its `Hello` is only compared with it, so
//! that an edge with the wrong credential hears so instead of serving another node.

pub(crate) mod held;
pub(crate) mod registry;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval_at, sleep},
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tunnel_core::{
    GatewayId, InstanceId, Leg, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, NodeId, PendingLink,
    identity::{IdentityError, node_from_certificate, validity_of_certificate},
    proto::{
        control::choose_version,
        messages::{Gateway, Hello, Reject, RejectCode, Update, Welcome},
    },
    tls::{Domain, ServerTls},
};

use self::registry::{Place, Registration, Registry};
use crate::{
    SOFTWARE,
    callers::FOR_KUBELET,
    directory::Generation,
    grants::{Grants, SharedGrants},
    listener::{Guest, PeerAddr, handshake},
    metrics::Metrics,
};

/// When a rejected edge should try again, at the earliest, where trying sooner is of no use.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// The same address may lead to another gateway the next time.
const RETRY_AFTER_DRAINING: Duration = Duration::from_millis(250);
/// An edge whose credential is wrong needs a person.
const RETRY_AFTER_REPAIR: Duration = Duration::from_secs(60);
/// How often the time of day is read at least. Timers do not follow it when it is set, and some stand still while the
/// machine sleeps.
const LONGEST_TIMER: Duration = Duration::from_secs(3600);
/// How much of a message what an edge is told that it serves may take, in bytes. Less than fits, for what else is in it.
const MAX_TOLD: usize = 32 * 1024;
/// How much of the same message the cluster's gateways may take.
const MAX_GATEWAYS_TOLD: usize = 24 * 1024;
/// What the wire format needs for a gateway beside its texts.
const GATEWAY_OVERHEAD: usize = 12;
/// What the wire format needs for a text beside its bytes.
const TEXT_OVERHEAD: usize = 4;

/// What the door needs to know.
#[derive(Clone, Debug)]
pub(crate) struct EdgeSettings {
    pub(crate) gateway_id: GatewayId,
    pub(crate) heartbeat: Duration,
    /// For TLS, and again for the hello.
    pub(crate) handshake_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) link: LinkConfig,
}

/// The door of the edges.
#[derive(Debug)]
pub(crate) struct EdgeDoor {
    tls: ServerTls,
    settings: EdgeSettings,
    registry: Arc<Registry>,
    grants: SharedGrants,
    /// What edges are told of the cluster's gateways.
    gateways: watch::Receiver<Arc<Vec<Gateway>>>,
    metrics: Metrics,
    /// No new links; those that are up tell their edges to go elsewhere.
    draining: CancellationToken,
    /// Links that are still up are closed.
    stopping: CancellationToken,
    /// Names each link in the logs of both sides.
    sessions: AtomicU64,
}

/// An edge that has said hello, who it is by its certificate, and until when.
type Introduced = (PendingLink, Result<NodeId, IdentityError>, Expiry);

/// An edge that may have a link.
struct Admitted {
    node: NodeId,
    instance: InstanceId,
    generation: Generation,
    version: u32,
    place: Place,
}

/// A link that is up, and what its log lines say.
struct Session {
    link: Link,
    node: NodeId,
    instance: InstanceId,
    peer: PeerAddr,
    id: String,
    /// What the edge was told that it serves.
    told: Vec<String>,
    /// That it was not told all has been logged.
    said_left_out: bool,
    grants: watch::Receiver<Arc<Grants>>,
    gateways: watch::Receiver<Arc<Vec<Gateway>>>,
    expiry: Expiry,
}

/// The end of the certificate that an edge proved itself by.
#[derive(Clone, Copy, Debug)]
struct Expiry {
    /// As the certificate has it.
    not_after: SystemTime,
    /// The time of day.
    clock: fn() -> SystemTime,
}

impl EdgeDoor {
    #[allow(clippy::too_many_arguments, reason = "called once")]
    pub(crate) fn new(
        tls: ServerTls,
        settings: EdgeSettings,
        registry: Arc<Registry>,
        grants: SharedGrants,
        gateways: watch::Receiver<Arc<Vec<Gateway>>>,
        metrics: Metrics,
        draining: CancellationToken,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        let link = LinkConfig {
            handshake_timeout: settings.handshake_timeout,
            accept_streams: false,
            reserved_streams: FOR_KUBELET,
            ..settings.link
        };
        let settings = EdgeSettings { link, ..settings };
        let sessions = AtomicU64::new(1);
        Arc::new(Self { tls, settings, registry, grants, gateways, metrics, draining, stopping, sessions })
    }

    /// Serves one connection until its link ends.
    pub(crate) async fn serve<C: Leg + 'static>(self: Arc<Self>, conn: C, peer: PeerAddr, mut guest: Guest) {
        let introduced = Box::pin(self.introduce(conn, peer, &mut guest)).await;
        let Some((pending, identity, expiry)) = introduced else { return };
        match self.admit(identity, pending.hello()) {
            Ok(admitted) => self.hold(pending, admitted, expiry, peer).await,
            // Boxed: an edge that is not rejected needs no room for it.
            Err(reject) => Box::pin(self.reject(pending, reject, peer)).await,
        }
    }

    /// From a connection to an edge's hello. What goes wrong is told, logged and counted.
    async fn introduce<C: Leg + 'static>(
        &self,
        conn: C,
        peer: PeerAddr,
        guest: &mut Guest,
    ) -> Option<Introduced> {
        let limit = self.settings.handshake_timeout;
        let conn = handshake(&self.tls, Domain::Edge, conn, peer, guest, limit, &self.metrics).await?;
        let (identity, expiry) = (identity(&conn), expiry(&conn));
        match Link::accept(conn, self.settings.link.clone()).await {
            Ok(pending) => Some((pending, identity, expiry)),
            Err(error) => {
                self.metrics.handshake_failed(Domain::Edge, error.label());
                if self.metrics.lines.admit("edge_not_introduced", peer.source()) {
                    warn!(%peer, node = identity_text(&identity), cause = %error, "no link: the edge did not introduce itself");
                }
                None
            }
        }
    }

    async fn reject(&self, pending: PendingLink, reject: Reject, peer: PeerAddr) {
        self.metrics.rejected(reject_label(reject.code()));
        if self.metrics.lines.admit("edge_rejected", peer.source()) {
            warn!(%peer, software = pending.hello().software, cause = reject.text, "edge rejected");
        }
        pending.reject(reject).await;
    }

    /// Decides by the credential; the hello's claims must agree with it.
    fn admit(&self, identity: Result<NodeId, IdentityError>, hello: &Hello) -> Result<Admitted, Reject> {
        if self.draining.is_cancelled() {
            let text = format!("gateway {} is about to leave: use another", self.settings.gateway_id);
            return Err(Reject::new(RejectCode::Draining, text, RETRY_AFTER_DRAINING));
        }
        let version = choose_version(hello)?;
        let node = identity
            .map_err(|error| Reject::new(RejectCode::Identity, error.to_string(), RETRY_AFTER_REPAIR))?;
        if !hello.node_claim.is_empty() && hello.node_claim != node.as_str() {
            let claim: String = hello.node_claim.chars().take(253).collect();
            let text = format!(
                "the edge says it is node {claim:?}, but its certificate is node {:?}'s: \
                 set the edge's node name to that, or give it a certificate of its own",
                node.as_str()
            );
            return Err(Reject::new(RejectCode::Identity, text, RETRY_AFTER_REPAIR));
        }
        let instance = hello.instance_id.parse().map_err(|error| {
            Reject::new(RejectCode::Malformed, format!("in the hello, {error}"), RETRY_AFTER_REPAIR)
        })?;
        let place = self
            .registry
            .place(&node)
            .map_err(|full| Reject::new(RejectCode::Overloaded, full.to_string(), RETRY_AFTER))?;
        let generation = if hello.generation == 0 { now_in_millis() } else { hello.generation };
        Ok(Admitted { node, instance, generation, version, place })
    }

    /// Welcomes the edge, registers its link, and holds it until it ends.
    async fn hold(&self, pending: PendingLink, admitted: Admitted, expiry: Expiry, peer: PeerAddr) {
        let Admitted { node, instance, generation, version, place } = admitted;
        let software = pending.hello().software.clone();
        let id = self.session_id();
        let mut grants = self.grants.subscribe();
        let (told, left_out) = granted(&grants.borrow_and_update(), &node);
        let mut gateways = self.gateways.clone();
        let hints = gateways.borrow_and_update().clone();
        let link = match pending.welcome(self.welcome(told.clone(), &hints, version, &id)) {
            Ok(link) => link,
            Err(error) => {
                self.metrics.handshake_failed(Domain::Edge, error.label());
                if self.metrics.lines.admit_known("link_not_up", &node) {
                    warn!(%peer, %node, cause = %error, "the link ended before it was up");
                }
                return;
            }
        };
        let registration = self.registry.register(place, instance.clone(), generation, link.handle());
        if self.metrics.lines.admit_known("link_up", &node) {
            info!(%node, %instance, %peer, session = id, software, "link up");
        }
        let up_since = Instant::now();
        let mut session =
            Session { link, node, instance, peer, id, told, said_left_out: false, grants, gateways, expiry };
        session.say_left_out(left_out);
        let end = self.until_closed(&mut session, &registration).await;
        drop(registration);
        self.metrics.link_closed(end.label());
        let Session { node, instance, peer, id, .. } = session;
        if self.metrics.lines.admit_known("link_down", &node) {
            info!(%node, %instance, %peer, session = id, cause = %end, up_ms = up_since.elapsed().as_millis(), "link down");
        }
    }

    fn session_id(&self) -> String {
        format!("{}-{}", self.settings.gateway_id, self.sessions.fetch_add(1, Relaxed))
    }

    fn welcome(&self, granted: Vec<String>, gateways: &[Gateway], version: u32, session_id: &str) -> Welcome {
        Welcome {
            version,
            gateway_id: self.settings.gateway_id.to_string(),
            session_id: session_id.to_owned(),
            heartbeat_ms: u32::try_from(self.settings.heartbeat.as_millis()).unwrap_or(u32::MAX),
            granted,
            max_streams: u32::try_from(self.settings.link.max_streams).unwrap_or(u32::MAX),
            software: SOFTWARE.to_owned(),
            gateways: told_gateways(gateways),
            ..Welcome::default()
        }
    }

    async fn until_closed(&self, session: &mut Session, registration: &Registration) -> LinkError {
        let handle = session.link.handle();
        let mut sample = interval_at(Instant::now() + self.settings.heartbeat, self.settings.heartbeat);
        sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut told_to_drain, mut told_to_close, mut said_draining) = (false, false, false);
        // The certificate is over, but the node has a link with a newer one, which says that it may go on.
        let mut succeeded = false;
        loop {
            tokio::select! {
                // What happened to the link is true already; then what the gateway wants, its ends first; measuring can
                // wait.
                biased;
                event = session.link.next() => match event {
                    LinkEvent::Closed(error) => return error,
                    // An edge may say it as often as it likes, but not fill the log with it.
                    LinkEvent::Draining(_) if said_draining => {}
                    LinkEvent::Draining(drain) => {
                        said_draining = true;
                        registration.drains();
                        if self.metrics.lines.admit_known("edge_drains", &session.node) {
                            info!(node = %session.node, session = session.id, reason = drain.reason, "the edge drains");
                        }
                    }
                    LinkEvent::WearsOut => {
                        info!(node = %session.node, session = session.id, "the link has used most of the numbers that its \
                              streams can have; its edge makes another one");
                    }
                    // Edges may not open streams yet, and only gateways send the others.
                    LinkEvent::Stream(_)
                    | LinkEvent::Updated(_)
                    | LinkEvent::Holdings(_)
                    | LinkEvent::Gateway(_) => {}
                },
                () = self.stopping.cancelled(), if !told_to_close => {
                    told_to_close = true;
                    handle.close("the gateway stops");
                }
                () = self.draining.cancelled(), if !told_to_drain => {
                    told_to_drain = true;
                    handle.drain(self.settings.drain_timeout, "the gateway is about to leave");
                }
                () = sleep(session.expiry.timer()), if !told_to_close && !succeeded => if session.expiry.is_over() {
                    succeeded = registration.has_successor();
                    if !succeeded {
                        told_to_close = true;
                        session.expire(&handle);
                    }
                },
                Ok(()) = session.grants.changed() => session.tell_grants(&handle),
                Ok(()) = session.gateways.changed() => session.update(&handle),
                _ = sample.tick() => {
                    succeeded = succeeded && registration.has_successor();
                    if let Some(rtt) = handle.rtt() {
                        self.metrics.round_trip(rtt.last);
                    }
                }
            }
        }
    }
}

impl Session {
    /// The edge's certificate is over, and its node has not shown a newer one: the link ends with what it was let in by.
    fn expire(&self, handle: &LinkHandle) {
        let text = format!(
            "the certificate of node {} expired at {}; the agent must connect with a new one",
            self.node,
            humantime::format_rfc3339_seconds(self.expiry.not_after)
        );
        warn!(node = %self.node, session = self.id, "{text}");
        // The drain carries the words to the edge; a close has none.
        handle.drain(Duration::ZERO, &text);
        handle.close(&text);
    }

    /// Tells the edge what it serves, if that has changed.
    fn tell_grants(&mut self, handle: &LinkHandle) {
        let (granted, left_out) = granted(&self.grants.borrow_and_update(), &self.node);
        if granted != self.told {
            self.told = granted;
            self.update(handle);
        }
        self.say_left_out(left_out);
    }

    /// Tells the edge what it serves and which gateways there are.
    fn update(&mut self, handle: &LinkHandle) {
        let gateways = told_gateways(&self.gateways.borrow_and_update());
        handle.update(Update { granted: self.told.clone(), gateways });
    }

    /// Says once that the edge is not told all that its node serves.
    fn say_left_out(&mut self, left_out: usize) {
        if left_out > 0 && !self.said_left_out {
            self.said_left_out = true;
            warn!(node = %self.node, session = self.id, told = self.told.len(), left_out,
                  "the node is granted more than fits in a message to its edge: requests for what is left out reach the \
                   edge, but it does not know that they are for its own node");
        }
    }
}

impl Expiry {
    /// How long to wait before looking again whether it is over.
    fn timer(self) -> Duration {
        self.left().min(LONGEST_TIMER)
    }

    fn is_over(self) -> bool {
        self.left().is_zero()
    }

    fn left(self) -> Duration {
        // That second is still within, so that whoever ends with it is not let in once more.
        let end = self.not_after.checked_add(Duration::from_secs(1)).unwrap_or(self.not_after);
        end.duration_since((self.clock)()).unwrap_or(Duration::ZERO)
    }
}

/// The cluster's gateways, as an edge is told: as many as fit.
fn told_gateways(gateways: &[Gateway]) -> Vec<Gateway> {
    let mut size = 0;
    let fits = |gateway: &&Gateway| {
        size += gateway.id.len() + gateway.edge_address.len() + GATEWAY_OVERHEAD;
        size <= MAX_GATEWAYS_TOLD
    };
    gateways.iter().take_while(fits).cloned().collect()
}

/// For an edge that does not number its links.
fn now_in_millis() -> Generation {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Generation::try_from(since_1970.as_millis()).unwrap_or(Generation::MAX).max(1)
}

/// What a node serves, as its edge is told: as much as fits, and how many are left out.
fn granted(grants: &Grants, node: &NodeId) -> (Vec<String>, usize) {
    let own_name = std::iter::once(node.to_string());
    let mut size = 0;
    let told: Vec<String> = own_name
        .chain(grants.of(node).map(ToString::to_string))
        .take_while(|name| {
            size += name.len() + TEXT_OVERHEAD;
            size <= MAX_TOLD
        })
        .collect();
    let left_out = 1 + grants.of(node).count() - told.len();
    (told, left_out)
}

/// When the certificate of a verified client ends. One that cannot be read names no node, and is refused for that.
fn expiry<C>(conn: &TlsStream<C>) -> Expiry {
    let certificate = conn.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let validity = certificate.and_then(|certificate| validity_of_certificate(certificate).ok());
    Expiry {
        not_after: validity.map_or(SystemTime::UNIX_EPOCH, |validity| validity.not_after),
        clock: SystemTime::now,
    }
}

fn identity<C>(conn: &TlsStream<C>) -> Result<NodeId, IdentityError> {
    let certificate = conn.get_ref().1.peer_certificates().and_then(<[_]>::first);
    node_from_certificate(certificate.ok_or(IdentityError::Malformed)?)
}

fn identity_text(identity: &Result<NodeId, IdentityError>) -> &str {
    identity.as_ref().map_or("unknown", NodeId::as_str)
}

fn reject_label(code: RejectCode) -> &'static str {
    match code {
        RejectCode::Unspecified => "unspecified",
        RejectCode::Version => "version",
        RejectCode::Identity => "identity",
        RejectCode::NotAllowed => "not_allowed",
        RejectCode::Overloaded => "overloaded",
        RejectCode::Draining => "draining",
        RejectCode::Malformed => "malformed",
        RejectCode::SameGateway => "same_gateway",
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, fs, net::SocketAddr};

    use tokio::{
        io::{BufReader, duplex},
        task::JoinHandle,
        time::{sleep_until, timeout},
    };
    use tracing::Level;
    use tunnel_core::tls::Files;

    use super::*;
    use crate::{
        edges::registry::LinkLimits,
        grants::Identifier,
        pki::{AltName, Authority, Profile, Validity},
        testing::{Log, metrics, node},
    };

    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(86_400);

    thread_local! {
        /// What is added to the clock of timers, which stands in for the time of day.
        static SET_BY: Cell<Duration> = const { Cell::new(Duration::ZERO) };
        static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
    }

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)
    }

    fn clock() -> SystemTime {
        let begun = BEGUN.get().unwrap_or_else(Instant::now);
        BEGUN.set(Some(begun));
        start() + begun.elapsed() + SET_BY.get()
    }

    fn ends(not_after: SystemTime) -> Expiry {
        Expiry { not_after, clock }
    }

    fn tls() -> ServerTls {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name)
        };
        let authority = Authority::new(Domain::Edge, Validity::lasting(HOUR)).unwrap();
        let names = vec![AltName::Dns("localhost".to_owned())];
        let gateway = Profile::Gateway { name: "gw-1".parse().unwrap(), names };
        let issued = authority.issue(&gateway, Validity::lasting(HOUR)).unwrap();
        let (cert, key) = (file("crt", &issued.cert_pem), file("key", &issued.key_pem));
        ServerTls::load(Domain::Edge, Files { cert, key, ca: file("ca", authority.cert_pem()) }).unwrap()
    }

    /// A door behind its TLS, with one link to `edge-a` whose edge is the test.
    struct Held {
        edge: Link,
        welcome: Welcome,
        grants: SharedGrants,
        served: JoinHandle<()>,
    }

    impl Held {
        async fn up(expiry: Expiry, grants: Grants) -> Self {
            let settings = EdgeSettings {
                gateway_id: "gw-1".parse().unwrap(),
                heartbeat: Duration::from_secs(10),
                handshake_timeout: Duration::from_secs(10),
                drain_timeout: Duration::from_secs(10),
                link: LinkConfig::default(),
            };
            let registry = Registry::new(LinkLimits { total: 4, per_node: 4 }, metrics());
            let grants = SharedGrants::new(grants);
            let (draining, stopping) = (CancellationToken::new(), CancellationToken::new());
            let door = EdgeDoor::new(
                tls(),
                settings,
                registry.clone(),
                grants.clone(),
                watch::channel(Arc::default()).1,
                metrics(),
                draining,
                stopping,
            );
            let (near, far) = duplex(64 * 1024);
            let peer = PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 40_000)));
            let served = tokio::spawn(async move {
                let pending = Link::accept(BufReader::new(far), door.settings.link.clone()).await.unwrap();
                let identity = Ok(node("edge-a"));
                let admitted = door.admit(identity, pending.hello()).unwrap_or_else(|no| panic!("{no:?}"));
                door.hold(pending, admitted, expiry, peer).await;
            });
            let instance_id = InstanceId::from_random(1).to_string();
            let hello = Hello { min_version: 1, max_version: 1, instance_id, ..Hello::default() };
            let (edge, welcome) =
                Link::connect(BufReader::new(near), hello, LinkConfig::default()).await.unwrap();
            Self { edge, welcome, grants, served }
        }

        /// The edge's next update.
        async fn updated(&mut self) -> Vec<String> {
            match timeout(HOUR, self.edge.next()).await {
                Ok(LinkEvent::Updated(update)) => update.granted,
                other => panic!("no update: {other:?}"),
            }
        }

        async fn end(self) {
            self.edge.handle().close("test");
            self.served.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_certificate_is_looked_at_hourly_by_the_time_of_day() {
        let (begun, end) = (Instant::now(), ends(start() + 3 * HOUR / 2));
        assert_eq!((end.timer(), end.is_over()), (HOUR, false));
        sleep(end.timer()).await;
        assert_eq!((end.timer(), end.is_over()), (HOUR / 2 + Duration::from_secs(1), false));
        // That very second is still within.
        sleep_until(begun + 3 * HOUR / 2 + Duration::from_millis(500)).await;
        assert!(!end.is_over());
        sleep(end.timer()).await;
        assert!(end.is_over());
        // The clock was wrong: what it said before counts no more.
        let later = ends(start() + 10 * DAY);
        SET_BY.set(11 * DAY);
        assert!(later.is_over());
        SET_BY.set(5 * DAY);
        assert_eq!((later.timer(), later.is_over()), (HOUR, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_ends_with_its_certificate_when_the_clock_was_set() {
        let (log, mut held) = (Log::start(), Held::up(ends(start() + 30 * DAY), Grants::default()).await);
        assert!(timeout(2 * HOUR, held.edge.next()).await.is_err(), "something happened");
        SET_BY.set(31 * DAY);
        timeout(HOUR, held.served).await.unwrap().unwrap();
        assert_eq!(log.lines(Level::WARN, "the certificate of node edge-a expired at ").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_edge_that_drains_again_and_again_is_logged_once() {
        let log = Log::start();
        let held = Held::up(ends(start() + DAY), Grants::default()).await;
        for number in 0..5 {
            held.edge.handle().drain(Duration::from_secs(30), &format!("for the {number}th time"));
            sleep(Duration::from_secs(1)).await;
        }
        held.end().await;
        let lines = log.lines(Level::INFO, "the edge drains");
        assert!(lines.len() == 1 && lines[0].contains("for the 0th time"), "{lines:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_edge_is_told_as_much_as_fits_and_the_rest_is_logged_once() {
        let log = Log::start();
        let grants = |count: u32| -> Grants {
            let address =
                |number: u32| Identifier::Host(format!("name-{number:030}.example").parse().unwrap());
            (0..count).map(|number| (node("edge-a"), address(number))).collect()
        };
        let mut held = Held::up(ends(start() + DAY), grants(10)).await;
        assert_eq!(held.welcome.granted.len(), 11);
        held.grants.replace(grants(20));
        assert_eq!(held.updated().await.len(), 21);
        assert!(log.lines(Level::WARN, "").is_empty());
        // More than a message may hold.
        held.grants.replace(grants(5_000));
        let told = held.updated().await;
        let size: usize = told.iter().map(String::len).sum();
        assert!((MAX_TOLD * 4 / 5..=MAX_TOLD).contains(&size), "{size}");
        assert_eq!(told[0], "edge-a");
        // What is left out changes, what is told does not; then again what fits.
        held.grants.replace(grants(5_001));
        sleep(Duration::from_secs(1)).await;
        held.grants.replace(grants(1));
        assert_eq!(held.updated().await.len(), 2);
        held.grants.replace(grants(5_000));
        assert_eq!(held.updated().await, told);
        let lines = log.lines(Level::WARN, "");
        assert!(lines.len() == 1 && lines[0].contains("node=edge-a "), "{lines:?}");
        assert!(lines[0].contains(&format!("left_out={} ", 5_001 - told.len())), "{lines:?}");
        held.end().await;

        let held = Held::up(ends(start() + DAY), grants(5_000)).await;
        assert_eq!(held.welcome.granted, told);
        assert_eq!(log.lines(Level::WARN, "").len(), 2, "another link");
        held.end().await;
    }
}
