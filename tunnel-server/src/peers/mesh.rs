//! This gateway's links to all others, for its own use: it dials each member, keeps the link up, listens to what the
//! far side tells, and opens streams on it for `route`. The far side of each such link is the other's [`super::door`].

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use tunnel_core::{
    ConnectError, GatewayId, InstanceId, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, ReadAhead,
    Target,
    proto::{
        ALPN_PEER, VERSIONS,
        messages::{Capability, Gateway, Hello, Holdings, RejectCode},
    },
    tls::{self, ClientTls},
};
use tunnel_edge::{
    daemon::tasks::TaskSet,
    network::{DialError, Network},
};

use super::Member;
use crate::{
    SOFTWARE,
    directory::{Directory, Untold},
    metrics::Metrics,
};

/// Waits between attempts: short, since a gateway that is back must be found soon, and there are few of them.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A link that ended sooner than this has not been a success: the next attempt waits as after a failure.
const SHORT_LIVED: Duration = Duration::from_secs(5);
/// Streams for a link that another one has replaced may be about to be opened for this long.
const RETIRE_GRACE: Duration = Duration::from_secs(1);
/// How long streams may run on over such a link.
const RETIREMENT: Duration = Duration::from_secs(30 * 24 * 3600);
/// A failure that goes on is logged again, loudly, this often.
const REMIND_PERIOD: Duration = Duration::from_secs(300);

/// What a gateway says of itself to its peers, and to edges of itself.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) gateway: GatewayId,
    /// Tells this process from one before it of the same name.
    pub(crate) instance: InstanceId,
    /// Where edges reach this very gateway, if they can.
    pub(crate) edge_address: Option<Target>,
    /// Cancelled once it is about to leave.
    pub(crate) leaving: CancellationToken,
}

impl Own {
    pub(crate) fn introduction(&self) -> Gateway {
        Gateway {
            id: self.gateway.to_string(),
            edge_address: self.edge_address.as_ref().map(ToString::to_string).unwrap_or_default(),
            draining: self.leaving.is_cancelled(),
        }
    }
}

/// The links to all other gateways.
#[derive(Debug)]
pub(crate) struct Mesh {
    own: Own,
    directory: Arc<dyn Directory>,
    config: LinkConfig,
    connect_timeout: Duration,
    links: Mutex<BTreeMap<GatewayId, PeerLink>>,
    next_number: AtomicU64,
    /// How it stands with each member, by its address; `None` before there are any.
    members: Mutex<Option<BTreeMap<String, Standing>>>,
    /// Peers that have linked to this gateway, and by how many links.
    visitors: Mutex<BTreeMap<GatewayId, usize>>,
    /// What edges are told: all gateways that are known, this one among them.
    gateways: watch::Sender<Arc<Vec<Gateway>>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct PeerLink {
    /// Unique, so that what an earlier link to the same gateway still brings is told from what this one does.
    number: u64,
    link: LinkHandle,
    /// What it says of itself, once it has.
    about: Option<Gateway>,
}

/// How it stands with a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// One of the first that were known: has neither failed nor told what it holds.
    Unheard,
    /// Nothing is missed of it.
    Heard,
    /// There is no link to it, so that it may hold what nobody here knows of.
    Unlinked,
}

/// Why there is no link to a peer.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error("cannot connect: {0}")]
    Dial(#[from] DialError),
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error(
        "TLS works, but the far side does not speak edge-tunnel-peer/1: is this a gateway's port for peers?"
    )]
    Alpn,
    #[error(transparent)]
    Link(ConnectError),
    #[error("the far side's name is not usable: {0}")]
    Name(String),
    #[error("there is a link to gateway {0} already: is it listed twice, or are there two of that name?")]
    Twice(GatewayId),
    #[error("no link within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// Not an error: a list of all gateways names this one too.
    #[error("it is this very gateway")]
    Own,
}

impl Mesh {
    pub(crate) fn new(
        own: Own,
        directory: Arc<dyn Directory>,
        config: LinkConfig,
        connect_timeout: Duration,
        metrics: Metrics,
    ) -> Arc<Self> {
        let gateways = watch::Sender::new(Arc::new(vec![own.introduction()]));
        Arc::new(Self {
            own,
            directory,
            config,
            connect_timeout,
            links: Mutex::default(),
            next_number: 1.into(),
            members: Mutex::default(),
            visitors: Mutex::default(),
            gateways,
            metrics,
        })
    }

    /// The link to a gateway, if there is one that takes streams.
    pub(crate) fn link(&self, gateway: &GatewayId) -> Option<LinkHandle> {
        let links = self.links.lock();
        let link = &links.get(gateway)?.link;
        (!link.is_closed() && !link.peer_draining()).then(|| link.clone())
    }

    /// Whether a gateway has said that it is about to leave.
    pub(crate) fn is_leaving(&self, gateway: &GatewayId) -> bool {
        self.links
            .lock()
            .get(gateway)
            .is_some_and(|peer| peer.about.as_ref().is_some_and(|about| about.draining))
    }

    /// Whether every gateway that could be asked has told what it holds, at least once.
    pub(crate) fn has_heard(&self) -> bool {
        if !self.directory.wants_holdings() {
            // Where a directory apart knows the others, there may be none.
            return self.directory.gap().is_none() && self.first(Standing::Unheard).is_none();
        }
        // A name that is looked up may stand for this very gateway alone, at first.
        let alone = self.links.lock().is_empty() && self.first(Standing::Unlinked).is_none();
        !self.is_unheard() && !alone
    }

    /// Why a node that nobody is known to hold may be held all the same, if so.
    pub(crate) fn gap(&self) -> Option<String> {
        if let Some(gap) = self.directory.gap() {
            return Some(gap.to_owned());
        }
        if self.directory.wants_holdings() && self.is_unheard() {
            return Some("the other gateways have not told yet which nodes they hold".to_owned());
        }
        if let Some(address) = self.first(Standing::Unlinked) {
            return Some(format!("there is no link to the gateway at {address}, which may hold it"));
        }
        let links = self.links.lock();
        let visitors = self.visitors.lock();
        let stranger = visitors.keys().find(|visitor| !links.contains_key(visitor))?;
        Some(format!(
            "gateway {stranger}, which may hold it, is linked to this one, but not the other way: is it in peers.gateways?"
        ))
    }

    /// Whether there are no members yet, or one of the first was not heard yet.
    fn is_unheard(&self) -> bool {
        self.members.lock().is_none() || self.first(Standing::Unheard).is_some()
    }

    /// The address of a member with which it stands so.
    fn first(&self, standing: Standing) -> Option<String> {
        let members = self.members.lock();
        let mut found = members.iter().flatten().filter(|(_, known)| **known == standing);
        found.next().map(|(address, _)| address.clone())
    }

    /// A peer has linked to this gateway, for as long as what is returned is held.
    pub(super) fn visit(self: &Arc<Self>, gateway: GatewayId) -> Visit {
        *self.visitors.lock().entry(gateway.clone()).or_default() += 1;
        Visit { mesh: self.clone(), gateway }
    }

    /// All gateways that are known, as edges are told.
    pub(crate) fn gateways(&self) -> watch::Receiver<Arc<Vec<Gateway>>> {
        self.gateways.subscribe()
    }

    /// Keeps links to all members until `stop`, then closes them.
    ///
    /// Dropping the future drops every link.
    pub(crate) async fn run(
        self: Arc<Self>,
        network: impl Network,
        mut members: watch::Receiver<Vec<Member>>,
        tls: ClientTls,
        seed: u64,
        stop: CancellationToken,
    ) {
        let network = Arc::new(network);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut keepers = TaskSet::new("the keeper of a link to a peer", &self.metrics.panics);
        // Those that have a keeper, and whether they are listed now.
        let mut kept: Vec<(Member, watch::Sender<bool>)> = Vec::new();
        let mut source_is_there = true;
        loop {
            let listed = members.borrow_and_update().clone();
            // One that is not listed any more keeps its link for as long as that holds: the list may be what is wrong.
            for (member, is_listed) in &kept {
                is_listed.send_replace(listed.contains(member));
            }
            let standing = if self.members.lock().is_none() { Standing::Unheard } else { Standing::Heard };
            for member in listed {
                if kept.iter().any(|(known, _)| *known == member) {
                    continue;
                }
                let mut members = self.members.lock();
                members.get_or_insert_default().insert(member.address.to_string(), standing);
                drop(members);
                let (sender, is_listed) = watch::channel(true);
                let keeper = Keeper {
                    mesh: self.clone(),
                    network: network.clone(),
                    member: member.clone(),
                    tls: tls.clone(),
                    rng: SmallRng::seed_from_u64(rng.random()),
                    is_listed,
                    stop: stop.clone(),
                    complaint: None,
                    retired: TaskSet::new("a replaced link to a peer", &self.metrics.panics),
                };
                keepers.spawn(keeper.run());
                kept.push((member, sender));
            }
            tokio::select! {
                // The end first; then keepers that have ended, so that they do not pile up.
                biased;
                () = stop.cancelled() => break,
                Some(()) = keepers.next_ended() => {
                    // A keeper has the other end of its channel.
                    kept.retain(|(_, is_listed)| !is_listed.is_closed());
                }
                changed = members.changed(), if source_is_there => source_is_there = changed.is_ok(),
                // Edges are told at once that this gateway is about to leave.
                () = self.own.leaving.cancelled(), if !self.told_leaving() => self.tell(),
            }
        }
        keepers.all_ended().await;
    }

    fn told_leaving(&self) -> bool {
        self.gateways
            .borrow()
            .iter()
            .any(|gateway| gateway.id == self.own.gateway.as_str() && gateway.draining)
    }

    /// Brings up to date what edges are told.
    fn tell(&self) {
        let links = self.links.lock();
        let mut gateways = vec![self.own.introduction()];
        // One that has not said where edges reach it is no place to go yet.
        gateways.extend(links.values().filter_map(|peer| peer.about.clone()));
        gateways.sort_by(|one, other| one.id.cmp(&other.id));
        self.metrics.peer_links.set(i64::try_from(links.len()).unwrap_or(i64::MAX));
        self.gateways.send_if_modified(|known| {
            let changed = **known != gateways;
            if changed {
                *known = Arc::new(gateways);
            }
            changed
        });
    }

    /// Enters a link under a number of its own, unless there is one to that gateway already that does not wear out.
    pub(crate) fn enter(&self, gateway: &GatewayId, link: &LinkHandle) -> Option<u64> {
        let mut links = self.links.lock();
        let before = links.get(gateway).filter(|known| !known.link.is_closed());
        if before.is_some_and(|before| !before.link.wears_out()) {
            return None;
        }
        let number = self.next_number.fetch_add(1, Relaxed);
        if before.is_none() {
            // What an earlier link told is gone before this one tells anything.
            self.directory.peer_silent(gateway);
        }
        // What one told that still holds is true until this one has told all.
        let about = before.and_then(|before| before.about.clone());
        links.insert(gateway.clone(), PeerLink { number, link: link.clone(), about });
        Some(number)
    }

    pub(crate) fn introduced(&self, gateway: &GatewayId, number: u64, about: Gateway) {
        if let Some(peer) = self.links.lock().get_mut(gateway).filter(|peer| peer.number == number) {
            peer.about = Some(Gateway { id: gateway.to_string(), ..about });
        }
        self.tell();
    }

    fn told(&self, gateway: &GatewayId, number: u64, holdings: Holdings) -> Result<(), Untold> {
        let links = self.links.lock();
        // Under the lock, so that no other link comes up between the look and the word.
        match links.get(gateway) {
            Some(peer) if peer.number == number => self.directory.peer_told(gateway, holdings),
            _ => Ok(()),
        }
    }

    fn leave(&self, gateway: &GatewayId, number: u64) {
        let mut links = self.links.lock();
        // Under the lock, so that a link that comes up meanwhile is not silenced.
        if links.get(gateway).is_some_and(|known| known.number == number) {
            links.remove(gateway);
            self.directory.peer_silent(gateway);
        }
        drop(links);
        self.tell();
    }
}

/// A peer's link to this gateway.
pub(super) struct Visit {
    mesh: Arc<Mesh>,
    gateway: GatewayId,
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut visitors = self.mesh.visitors.lock();
        if let Some(count) = visitors.get_mut(&self.gateway) {
            *count -= 1;
            if *count == 0 {
                visitors.remove(&self.gateway);
            }
        }
    }
}

/// Keeps the link to one member.
struct Keeper<N> {
    mesh: Arc<Mesh>,
    network: Arc<N>,
    member: Member,
    tls: ClientTls,
    rng: SmallRng,
    /// While the member is not listed, it is not dialled.
    is_listed: watch::Receiver<bool>,
    stop: CancellationToken,
    complaint: Option<(String, Instant)>,
    /// Links that others have replaced, with the streams that still run over them.
    retired: TaskSet,
}

impl<N> Drop for Keeper<N> {
    fn drop(&mut self) {
        if let Some(members) = &mut *self.mesh.members.lock() {
            members.remove(&self.member.address.to_string());
        }
    }
}

impl<N: Network> Keeper<N> {
    /// Keeps the link while the member is listed, and longer if it holds. Cancel-safe: links end with it.
    async fn run(mut self) {
        self.keep_linked().await;
        self.retired.all_ended().await;
    }

    async fn keep_linked(&mut self) {
        let stop = self.stop.clone();
        let mut pause = FIRST_PAUSE;
        while *self.is_listed.borrow() && !stop.is_cancelled() {
            let Some(attempt) = stop.run_until_cancelled(self.connect()).await else { return };
            match attempt {
                Ok((link, gateway, number)) => {
                    self.complaint = None;
                    self.is_linked();
                    let up_since = Instant::now();
                    self.hold(link, &gateway, number).await;
                    if up_since.elapsed() >= SHORT_LIVED {
                        pause = FIRST_PAUSE;
                    }
                    self.stands(Standing::Unlinked);
                }
                Err(PeerError::Own) => {
                    debug!(address = %self.member.address, "this is the address of this very gateway");
                    self.stands(Standing::Heard);
                    return self.unlisted().await;
                }
                Err(error @ PeerError::Twice(_)) => {
                    self.complain(&error);
                    self.stands(Standing::Heard);
                    if let PeerError::Twice(gateway) = error {
                        self.other_link_ended(&gateway).await;
                    }
                }
                Err(error) => {
                    self.complain(&error);
                    self.stands(Standing::Unlinked);
                }
            }
            self.pause(&mut pause).await;
        }
    }

    /// Waits before the next attempt, longer each time.
    async fn pause(&mut self, pause: &mut Duration) {
        let wait = self.rng.random_range(*pause / 2..=*pause);
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        let _ = timeout(wait, self.unlisted()).await;
    }

    /// Waits until the member is not listed any more, or the gateway stops.
    async fn unlisted(&mut self) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            _ = self.is_listed.wait_for(|is_listed| !is_listed) => {}
        }
    }

    /// Waits until the link ends that there is to this gateway by another address, or this one is not listed any more.
    async fn other_link_ended(&mut self, gateway: &GatewayId) {
        let mesh = self.mesh.clone();
        let mut changes = mesh.gateways();
        let ended = async {
            // Each link that ends is a change of what edges are told, unless it has not introduced itself yet.
            while mesh.link(gateway).is_some() {
                let _ = timeout(LONGEST_PAUSE, changes.changed()).await;
            }
        };
        tokio::select! {
            biased;
            () = self.unlisted() => {}
            () = ended => {}
        }
    }

    fn stands(&self, standing: Standing) {
        if let Some(members) = &mut *self.mesh.members.lock() {
            members.insert(self.member.address.to_string(), standing);
        }
    }

    /// Nothing more is missed of a member that was linked before; one of the first is still to tell what it holds.
    fn is_linked(&self) {
        let mut members = self.mesh.members.lock();
        let standing = members.as_mut().and_then(|members| members.get_mut(&self.member.address.to_string()));
        if let Some(standing @ Standing::Unlinked) = standing {
            *standing = Standing::Heard;
        }
    }

    async fn connect(&self) -> Result<(Link, GatewayId, u64), PeerError> {
        let limit = self.mesh.connect_timeout;
        timeout(limit, self.attempt()).await.unwrap_or(Err(PeerError::TimedOut(limit)))
    }

    async fn attempt(&self) -> Result<(Link, GatewayId, u64), PeerError> {
        let Member { address, server_name } = &self.member;
        let connection = self.network.connect(&address.host, address.port).await?;
        let mut connection = self
            .tls
            .connector()
            .connect(server_name.clone(), ReadAhead::new(connection))
            .await
            .map_err(|error| PeerError::Tls(tls::explain(&error)))?;
        if connection.get_ref().1.alpn_protocol() != Some(ALPN_PEER) {
            return Err(PeerError::Alpn);
        }
        tls::widen_for_link(connection.get_mut().1);
        let connected = Link::connect(connection, self.mesh.hello(), self.mesh.config.clone()).await;
        let (link, welcome) = match connected {
            Ok(connected) => connected,
            Err(ConnectError::Rejected(reject)) if reject.code() == RejectCode::SameGateway => {
                return Err(PeerError::Own);
            }
            Err(error) => return Err(PeerError::Link(error)),
        };
        let gateway =
            welcome.gateway_id.parse::<GatewayId>().map_err(|error| PeerError::Name(error.to_string()))?;
        match self.mesh.enter(&gateway, &link.handle()) {
            Some(number) => Ok((link, gateway, number)),
            None => Err(PeerError::Twice(gateway)),
        }
    }

    /// Holds a link to a peer, and those that replace it, until the newest ends.
    async fn hold(&mut self, mut link: Link, gateway: &GatewayId, mut number: u64) {
        while let Some((newer, its_number)) = self.listen(&mut link, gateway, number).await {
            number = its_number;
            let old = std::mem::replace(&mut link, newer);
            // Those that have ended by now are not kept.
            self.retired.reap();
            self.retired.spawn(retire(old, gateway.clone(), self.stop.clone()));
        }
    }

    /// Makes another link to a gateway, however long that takes. Cancel-safe.
    async fn succeed(&self, gateway: &GatewayId) -> (Link, u64) {
        let address = &self.member.address;
        info!(%gateway, %address, "the link to a peer has used most of its numbers of streams; another one takes over");
        let mut pause = FIRST_PAUSE;
        loop {
            match self.connect().await {
                Ok((link, to, number)) if to == *gateway => return (link, number),
                Ok((_, to, number)) => {
                    debug!(%address, %to, "the address leads to another gateway now");
                    self.mesh.leave(&to, number);
                }
                Err(error) => debug!(%address, cause = %error, "no other link to the peer yet"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Listens to a peer until its link ends, or there is another one that has taken its place.
    async fn listen(&self, link: &mut Link, gateway: &GatewayId, number: u64) -> Option<(Link, u64)> {
        let (mesh, handle, up_since) = (self.mesh.clone(), link.handle(), Instant::now());
        info!(%gateway, address = %self.member.address, "linked to a peer");
        mesh.tell();
        if !mesh.directory.wants_holdings() {
            self.stands(Standing::Heard);
        }
        let (mut told_to_close, mut incomplete, mut wears_out) = (false, false, false);
        let mut succeeding = pin!(self.succeed(gateway));
        let end: LinkError = loop {
            tokio::select! {
                // What the peer told counts, whatever this side wants; and its end goes before another beginning.
                biased;
                event = link.next() => match event {
                    LinkEvent::Closed(error) => break error,
                    LinkEvent::Holdings(_) if incomplete => {}
                    LinkEvent::Holdings(holdings) => {
                        let is_whole = !holdings.more;
                        if let Err(untold) = mesh.told(gateway, number, holdings) {
                            incomplete = true;
                            warn!(%gateway, cause = %untold, "the peer's word cannot be taken; making a new link");
                            handle.close(&untold.to_string());
                        } else if is_whole {
                            self.stands(Standing::Heard);
                        }
                    }
                    LinkEvent::Gateway(about) => mesh.introduced(gateway, number, about),
                    LinkEvent::WearsOut => wears_out = true,
                    // The handle knows it. Peers open no streams here, and updates are for edges.
                    LinkEvent::Draining(_) | LinkEvent::Stream(_) | LinkEvent::Updated(_) => {}
                },
                () = self.stop.cancelled(), if !told_to_close => {
                    told_to_close = true;
                    handle.close("the gateway stops");
                }
                newer = &mut succeeding, if wears_out && !told_to_close => return Some(newer),
            }
        };
        mesh.leave(gateway, number);
        let up_ms = up_since.elapsed().as_millis();
        if told_to_close || matches!(end, LinkError::ClosedByPeer) {
            info!(%gateway, cause = %end, up_ms, "link to a peer closed");
        } else {
            warn!(%gateway, address = %self.member.address, cause = %end, up_ms, "link to a peer lost");
        }
        None
    }

    /// Says in the log why there is no link: loudly when it is news, or has been going on for a while.
    fn complain(&mut self, error: &PeerError) {
        let (text, now) = (error.to_string(), Instant::now());
        let is_known = |(known, said): &(String, Instant)| *known == text && now - *said < REMIND_PERIOD;
        if self.complaint.as_ref().is_some_and(is_known) {
            debug!(address = %self.member.address, cause = text, "still no link to the peer");
        } else {
            warn!(address = %self.member.address, cause = text, "no link to a peer; trying on");
            self.complaint = Some((text, now));
        }
    }
}

/// Closes a link that another one has replaced, once its last stream has ended.
async fn retire(mut link: Link, gateway: GatewayId, stop: CancellationToken) {
    let handle = link.handle();
    let mut done = pin!(timeout(RETIREMENT, async {
        sleep(RETIRE_GRACE).await;
        handle.idle().await;
    }));
    let mut told_to_close = false;
    let end = loop {
        tokio::select! {
            // What happened to the link is true already; then what the gateway wants.
            biased;
            event = link.next() => if let LinkEvent::Closed(end) = event { break end },
            () = stop.cancelled(), if !told_to_close => {
                told_to_close = true;
                handle.close("the gateway stops");
            }
            _ = &mut done, if !told_to_close => {
                told_to_close = true;
                handle.close("another link has taken its place");
            }
        }
    };
    info!(%gateway, cause = %end, "a replaced link to a peer has ended");
}

impl Mesh {
    fn hello(&self) -> Hello {
        let wants = self.directory.wants_holdings().then_some(Capability::Holdings.into());
        Hello {
            min_version: VERSIONS.0,
            max_version: VERSIONS.1,
            software: SOFTWARE.to_owned(),
            instance_id: self.own.instance.as_str().to_owned(),
            capabilities: wants.into_iter().collect(),
            max_streams: u32::try_from(self.config.max_streams).unwrap_or(u32::MAX),
            gateway_id: self.own.gateway.to_string(),
            ..Hello::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{Ipv4Addr, SocketAddr},
        sync::atomic::AtomicUsize,
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, copy, split},
        net::TcpListener,
        task::JoinHandle,
    };
    use tokio_util::task::AbortOnDropHandle;
    use tunnel_core::{
        OpenRequest,
        proto::messages::{Holding, Welcome},
        tls::{Domain, Files, ServerTls},
    };
    use tunnel_edge::network::SystemNetwork;

    use super::*;
    use crate::{
        directory::peers::Peers,
        pki::{AltName, Authority, Profile, Validity},
        testing::{TestLink, metrics, node},
    };

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Credentials of a peer called `gw`, as server and as client.
    fn tls() -> (ServerTls, ClientTls) {
        let (folder, hour) = (tempfile::tempdir().unwrap(), Validity::lasting(Duration::from_secs(3600)));
        let file = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name)
        };
        let authority = Authority::new(Domain::Peer, hour).unwrap();
        let peer = Profile::Peer { name: "gw".parse().unwrap(), names: vec![AltName::Dns("gw".to_owned())] };
        let issued = authority.issue(&peer, hour).unwrap();
        let (cert, key) = (file("crt", &issued.cert_pem), file("key", &issued.key_pem));
        let files = Files { cert, key, ca: file("ca", authority.cert_pem()) };
        (ServerTls::load(Domain::Peer, files.clone()).unwrap(), ClientTls::load(Domain::Peer, files).unwrap())
    }

    /// Sends back what comes over a link's streams, until the link ends.
    async fn echo(mut link: Link) {
        let mut streams = tokio::task::JoinSet::new();
        loop {
            match link.next().await {
                LinkEvent::Stream(incoming) => streams.spawn(async move {
                    let pending = incoming.header(Instant::now() + PATIENCE).await.unwrap();
                    let (mut read, mut write) = split(pending.accept(String::new()).await.unwrap());
                    let _ = copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                }),
                LinkEvent::Closed(_) => return,
                _ => continue,
            };
        }
    }

    /// The gateway `gw-b`, which holds `edge-a`, at a port of every loopback address, and how often it was dialled.
    struct FarSide {
        port: u16,
        dialled: Arc<AtomicUsize>,
        cut: CancellationToken,
        _serving: AbortOnDropHandle<()>,
    }

    impl FarSide {
        async fn start(tls: ServerTls) -> Self {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (dialled, cut) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
            let (count, cutting) = (dialled.clone(), cut.clone());
            let serving = tokio::spawn(async move {
                let mut links = tokio::task::JoinSet::new();
                while let Ok((connection, _)) = listener.accept().await {
                    let epoch = count.fetch_add(1, Relaxed) as u64 + 1;
                    let (acceptor, cutting) = (tls.acceptor(), cutting.clone());
                    links.spawn(async move {
                        let connection = acceptor.accept(ReadAhead::new(connection)).await.unwrap();
                        let pending = Link::accept(connection, LinkConfig::default()).await.unwrap();
                        let welcome = Welcome {
                            version: 1,
                            gateway_id: "gw-b".to_owned(),
                            heartbeat_ms: 1000,
                            ..Welcome::default()
                        };
                        let link = pending.welcome(welcome).unwrap();
                        link.handle().introduce(Gateway::default());
                        let holdings = vec![Holding { node: "edge-a".to_owned(), generation: 1 }];
                        let told = Holdings { epoch, holdings, ..Holdings::default() };
                        link.handle().tell_holdings(told).await;
                        cutting.run_until_cancelled(echo(link)).await;
                    });
                }
            });
            Self { port, dialled, cut, _serving: AbortOnDropHandle::new(serving) }
        }

        fn member(&self, last: u8) -> Member {
            let address = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), self.port)).into();
            Member { address, server_name: "gw".try_into().unwrap() }
        }
    }

    /// A mesh of `gw-a` that runs with the members that the sender says.
    fn running(tls: ClientTls) -> (Arc<Mesh>, watch::Sender<Vec<Member>>, AbortOnDropHandle<()>) {
        running_with(tls, LinkConfig::default())
    }

    fn running_with(
        tls: ClientTls,
        link: LinkConfig,
    ) -> (Arc<Mesh>, watch::Sender<Vec<Member>>, AbortOnDropHandle<()>) {
        let own = Own {
            gateway: "gw-a".parse().unwrap(),
            instance: InstanceId::from_random(1),
            edge_address: None,
            leaving: CancellationToken::new(),
        };
        let mesh = Mesh::new(own, Arc::new(Peers::default()), link, PATIENCE, metrics());
        let (sender, members) = watch::channel(Vec::new());
        let task: JoinHandle<()> =
            tokio::spawn(mesh.clone().run(SystemNetwork, members, tls, 1, CancellationToken::new()));
        (mesh, sender, AbortOnDropHandle::new(task))
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let looking = async {
            while !condition() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(timeout(PATIENCE, looking).await.is_ok(), "{what}");
    }

    #[tokio::test]
    async fn a_member_that_is_not_listed_for_a_while_keeps_its_one_link() {
        let (server, client) = tls();
        let far = FarSide::start(server).await;
        let (mesh, members, _running) = running(client);
        let b: GatewayId = "gw-b".parse().unwrap();
        members.send_replace(vec![far.member(1)]);
        until("linked", || mesh.has_heard() && mesh.link(&b).is_some()).await;
        assert_eq!(mesh.gap(), None);
        for listed in [vec![], vec![far.member(1)]] {
            members.send_replace(listed);
            sleep(LONGEST_PAUSE).await;
            assert!(mesh.link(&b).is_some() && far.dialled.load(Relaxed) == 1);
        }
        // It is dialled again once that link is gone, since it is listed.
        far.cut.cancel();
        until("dialled again", || far.dialled.load(Relaxed) > 1).await;
        members.send_replace(vec![]);
        until("not missed any more", || mesh.gap().is_none()).await;
        sleep(LONGEST_PAUSE).await;
        let dialled = far.dialled.load(Relaxed);
        sleep(LONGEST_PAUSE * 2).await;
        assert_eq!(far.dialled.load(Relaxed), dialled, "it is dialled, and not listed");
    }

    #[tokio::test]
    async fn a_gateway_at_two_addresses_is_linked_once_and_missed_under_neither() {
        let (server, client) = tls();
        let far = FarSide::start(server).await;
        let (mesh, members, _running) = running(client);
        members.send_replace(vec![far.member(1), far.member(2)]);
        until("linked", || mesh.has_heard()).await;
        until("both were dialled", || far.dialled.load(Relaxed) == 2).await;
        sleep(LONGEST_PAUSE * 2).await;
        assert_eq!((far.dialled.load(Relaxed), mesh.gap()), (2, None));
    }

    #[tokio::test]
    async fn a_link_that_runs_out_of_stream_numbers_is_replaced_and_nothing_is_missed_meanwhile() {
        let (server, client) = tls();
        let far = FarSide::start(server).await;
        let used = LinkConfig { streams_before: (1 << 31) - 10, ..LinkConfig::default() };
        let (mesh, members, _running) = running_with(client, used);
        let b: GatewayId = "gw-b".parse().unwrap();
        members.send_replace(vec![far.member(1)]);
        until("linked", || mesh.has_heard() && mesh.gateways().borrow().len() == 2).await;
        let old = mesh.link(&b).unwrap();
        let (mut stream, _) = old.open(OpenRequest::default(), PATIENCE).await.unwrap();
        until("replaced", || {
            assert_eq!((mesh.gap(), mesh.gateways().borrow().len()), (None, 2));
            assert_eq!(mesh.directory.holders(&node("edge-a")).len(), 1);
            mesh.link(&b).is_some_and(|link| !link.is_same(&old))
        })
        .await;
        sleep(RETIRE_GRACE * 2).await;
        stream.write_all(b"still here").await.unwrap();
        let mut back = [0; 10];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"still here");
        assert_eq!((far.dialled.load(Relaxed), old.is_closed()), (2, false));
        drop(stream);
        until("the old link ends", || old.is_closed()).await;
        assert_eq!(mesh.directory.holders(&node("edge-a")).len(), 1);
        assert!(mesh.link(&b).is_some() && mesh.gap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_links_to_a_gateway_the_first_counts_and_a_late_end_changes_nothing() {
        let own = Own {
            gateway: "gw-a".parse().unwrap(),
            instance: InstanceId::from_random(1),
            edge_address: None,
            leaving: CancellationToken::new(),
        };
        let directory = Arc::new(Peers::default());
        let mesh =
            Mesh::new(own, directory.clone(), LinkConfig::default(), Duration::from_secs(1), metrics());
        let b: GatewayId = "gw-b".parse().unwrap();
        let told = |epoch, name: &str| Holdings {
            epoch,
            holdings: vec![Holding { node: name.to_owned(), generation: 1 }],
            ..Holdings::default()
        };
        let is_held = |name: &str| !directory.holders(&node(name)).is_empty();
        let (first, second) = (TestLink::up().await, TestLink::up().await);
        let number = mesh.enter(&b, &first.gateway).unwrap();
        assert_eq!(mesh.enter(&b, &second.gateway), None, "there is one already");
        mesh.told(&b, number, told(7, "edge-a")).unwrap();
        // Not a place to go before it has said where that is.
        assert_eq!(mesh.gateways().borrow().len(), 1);
        mesh.introduced(&b, number, Gateway { edge_address: "b:1".to_owned(), ..Gateway::default() });
        assert_eq!(mesh.gateways().borrow().len(), 2);

        first.edge.handle().close("test");
        first.closed().await;
        assert!(is_held("edge-a") && mesh.link(&b).is_none(), "its end is not noticed yet");
        let newer = mesh.enter(&b, &second.gateway).unwrap();
        assert!(!is_held("edge-a"), "what the old link told");
        mesh.told(&b, newer, told(2, "edge-b")).unwrap();
        mesh.told(&b, number, told(8, "edge-a")).unwrap();
        mesh.leave(&b, number);
        assert!(is_held("edge-b") && !is_held("edge-a") && mesh.link(&b).is_some());
        mesh.leave(&b, newer);
        assert!(!is_held("edge-b") && mesh.link(&b).is_none());
    }
}
