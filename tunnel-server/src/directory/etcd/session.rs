//! In touch with etcd, again and again. A session is one connection to one member: it takes up the lease, reads what it
//! does not know, then renews, watches and writes until something fails. Every failure has the same cure: another session,
//! after a pause, with the next member. So a watch that is too far behind, a lease that ran out and a token that does not
//! count any more need no ways of their own.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    Etcd,
    client::{
        Client, Endpoint, Failure,
        wire::{DeleteRangeRequest, PutRequest, RequestOp, request_op},
    },
    map::{Entry, OwnEntry, Snapshot},
    outbox::{Change, Outbox},
};
use crate::edges::held::News;

/// The least time between two rounds of writes: what changes meanwhile is written together.
const WRITE_PERIOD: Duration = Duration::from_millis(50);
/// Gateways that lost their leases together write everything again within this time, not at once.
const SPREAD: Duration = Duration::from_secs(2);
/// The shortest and the longest pause between two sessions.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// When one gateway lost its lease, so did others, and it may be the first to be back. For so long, what they held
/// before counts although etcd does not have it: as long as all of them need to be back.
const OTHERS_RETURN: Duration = Duration::from_secs(10);
/// A lease that was not renewed is over this long after it should be.
const SLACK: Duration = Duration::from_secs(3);
/// How long saying goodbye may take.
const LEAVE: Duration = Duration::from_secs(2);

/// What lasts from one session to the next.
pub(super) struct Session<'a> {
    etcd: &'a Etcd,
    news: News,
    outbox: Outbox,
    lease: Option<Lease>,
    /// The revision at which this gateway's entry was written. As long as it is there, etcd has the same history and the
    /// lease has not been lost.
    registered: Option<i64>,
    /// Everything up to this revision is known.
    revision: Option<i64>,
    /// Until then, what etcd does not have may be known all the same.
    strict_at: Option<Instant>,
    /// Before anything is written.
    spread: Duration,
    rival: Rival,
    health: Health,
    rng: SmallRng,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    id: i64,
    ttl: Duration,
}

/// Another process with this gateway's id.
#[derive(Debug, Default)]
struct Rival {
    /// The lease of the entry that was there first, and when it is over if that process is.
    suspect: Option<(i64, Instant)>,
    reported: bool,
}

/// How it goes, for the log and the pauses.
#[derive(Debug)]
struct Health {
    /// The member that is used, by its place among the endpoints.
    member: usize,
    failures: usize,
    lost: bool,
    began: bool,
}

/// Why a session ended.
#[derive(Debug)]
enum End {
    Lost(Failure),
    /// Nothing is wrong.
    Again(&'static str),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Lost(failure)
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(etcd: &'a Etcd, news: News) -> Self {
        let mut rng = SmallRng::seed_from_u64(etcd.seed);
        let member = rng.random_range(0..etcd.config.endpoints.len().max(1));
        Self {
            etcd,
            news,
            outbox: Outbox::default(),
            lease: None,
            registered: None,
            revision: None,
            strict_at: None,
            spread: Duration::ZERO,
            rival: Rival::default(),
            health: Health { member, failures: 0, lost: false, began: false },
            rng,
        }
    }

    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                // The end first: a session could end at once each time.
                biased;
                () = stop.cancelled() => break,
                () = self.once() => {}
            }
        }
        self.leave().await;
    }

    /// One session, and the pause after it.
    async fn once(&mut self) {
        let end = match self.begin().await {
            Ok(client) => self.go_on(&client).await,
            Err(end) => end,
        };
        let pause = self.pause(&end);
        sleep(pause).await;
    }

    async fn begin(&mut self) -> Result<Client, End> {
        let endpoint = self.endpoint().ok_or_else(|| Failure::new("no member of etcd is configured"))?;
        let client = Client::connect(&self.etcd.config, endpoint).await?;
        let lease = self.take_lease(&client).await?;
        self.register(&client, lease).await?;
        if self.revision.is_none() {
            self.read_all(&client, lease).await?;
        }
        self.etcd.set_in_touch(true);
        Ok(client)
    }

    /// The lease as it is, or another.
    async fn take_lease(&mut self, client: &Client) -> Result<Lease, Failure> {
        if let Some(lease) = self.lease {
            if !client.renew(lease.id).await?.is_zero() {
                return Ok(lease);
            }
            debug!("this gateway's lease in etcd has run out");
            self.strict_at = Some(Instant::now() + OTHERS_RETURN);
            self.spread = self.rng.random_range(Duration::ZERO..=SPREAD);
            self.lease = None;
        }
        let (id, ttl) = client.grant(self.etcd.config.lease).await?;
        Ok(*self.lease.insert(Lease { id, ttl }))
    }

    /// Writes this gateway's entry, unless it is there.
    async fn register(&mut self, client: &Client, lease: Lease) -> Result<(), Failure> {
        let key = self.etcd.map.own_key();
        if let Some(there) = client.get(&key).await? {
            if self.registered == Some(there.mod_revision) && there.lease == lease.id {
                return Ok(());
            }
            // An earlier run may have been killed, and its lease not have ended yet.
            if Entry::of(&there).is_none_or(|entry| entry.instance != self.etcd.own.instance) {
                let left = client.time_to_live(there.lease).await?;
                self.rival.suspect = Some((there.lease, Instant::now() + left + SLACK));
            }
        }
        // Whatever was known or written may be of no worth, and is read and written anew.
        self.outbox.begin_again();
        self.revision = None;
        let entry = serde_json::to_vec(&self.etcd.own).map_err(|error| Failure::new(&error.to_string()))?;
        self.registered = Some(client.write(vec![put(key, entry, lease)]).await?);
        Ok(())
    }

    async fn read_all(&mut self, client: &Client, lease: Lease) -> Result<(), Failure> {
        let map = &self.etcd.map;
        let mut snapshot = Snapshot::default();
        let revision = client.range(&self.etcd.config.prefix, |pair| map.read(&pair, &mut snapshot)).await?;
        // What an earlier run held is written over, or deleted.
        let others = snapshot.own.iter().filter(|(_, of)| *of != lease.id);
        others.for_each(|(node, _)| self.outbox.doubt(node.clone()));
        map.replace(snapshot, self.strict_at.is_some());
        self.revision = Some(revision);
        Ok(())
    }

    /// Renews, watches and writes.
    async fn go_on(&mut self, client: &Client) -> End {
        let Some(lease) = self.lease else { return End::Again("there is no lease") };
        let endpoint = self.endpoint();
        let Self { etcd, news, outbox, revision, strict_at, spread, rival, health, .. } = self;
        let rival = parking_lot::Mutex::new(rival);
        let ended = tokio::try_join!(
            keep_lease(client, lease, etcd, health, endpoint, &rival),
            follow(client, etcd, revision, strict_at, &rival),
            write(client, lease, etcd, outbox, news, spread),
        );
        match ended {
            Err(end) => end,
            Ok((never, ..)) => match never {},
        }
    }

    fn pause(&mut self, end: &End) -> Duration {
        let failure = match end {
            End::Again(why) => {
                debug!(why, "beginning again with etcd");
                return self.rng.random_range(Duration::ZERO..=SHORTEST_PAUSE);
            }
            End::Lost(failure) => failure,
        };
        self.etcd.set_in_touch(false);
        let endpoints = &self.etcd.config.endpoints;
        let endpoint = self.endpoint().map(ToString::to_string);
        debug!(endpoint, cause = %failure, "lost a member of etcd");
        self.health.failures += 1;
        // Once each of them was tried.
        if !self.health.lost && self.health.failures >= endpoints.len() {
            self.health.lost = true;
            let state = if self.health.began {
                "the others' links that are known stay so"
            } else {
                "none is known yet"
            };
            warn!(endpoint, cause = %failure, state, "etcd cannot be used; trying again. Links to this gateway are served");
        }
        self.health.member = (self.health.member + 1) % endpoints.len().max(1);
        let rounds = self.health.failures.saturating_sub(endpoints.len()).min(16);
        // A lease that can be kept must not run out for a pause.
        let longest = LONGEST_PAUSE.min(self.etcd.config.lease / 3).max(SHORTEST_PAUSE);
        self.rng.random_range(SHORTEST_PAUSE..=(SHORTEST_PAUSE * (2 << rounds)).min(longest))
    }

    fn endpoint(&self) -> Option<&'a Endpoint> {
        self.etcd.config.endpoints.get(self.health.member)
    }

    /// Ends the lease, so that this gateway vanishes at once.
    async fn leave(&mut self) {
        self.etcd.set_in_touch(false);
        let Some(lease) = self.lease else { return };
        let revoked = timeout(LEAVE, async {
            for _ in &self.etcd.config.endpoints {
                if let Some(endpoint) = self.endpoint()
                    && let Ok(client) = Client::connect(&self.etcd.config, endpoint).await
                    && client.revoke(lease.id).await.is_ok()
                {
                    return true;
                }
                self.health.member = (self.health.member + 1) % self.etcd.config.endpoints.len();
            }
            false
        });
        if !revoked.await.unwrap_or_default() {
            let within = humantime::format_duration(lease.ttl).to_string();
            warn!(
                within,
                "etcd could not be told that this gateway ends: it is forgotten when its lease runs out"
            );
        }
    }
}

async fn keep_lease(
    client: &Client,
    lease: Lease,
    etcd: &Etcd,
    health: &mut Health,
    endpoint: Option<&Endpoint>,
    rival: &parking_lot::Mutex<&mut Rival>,
) -> Result<Infallible, End> {
    loop {
        sleep(lease.ttl / 3).await;
        if client.renew(lease.id).await?.is_zero() {
            return Err(End::Again("the lease has run out"));
        }
        health.held(endpoint);
        let suspect = rival.lock().suspect;
        if let Some((id, over)) = suspect
            && over < Instant::now()
        {
            let lives = !client.time_to_live(id).await?.is_zero();
            let mut rival = rival.lock();
            rival.suspect = None;
            if lives {
                rival.report(etcd, "one whose entry was there before this one's");
            }
        }
    }
}

impl Health {
    /// A session has lasted: whatever was wrong is over.
    fn held(&mut self, endpoint: Option<&Endpoint>) {
        self.failures = 0;
        let lost = std::mem::take(&mut self.lost);
        let endpoint = endpoint.map(ToString::to_string);
        if !std::mem::replace(&mut self.began, true) {
            info!(endpoint, "the directory is kept in etcd");
        } else if lost {
            info!(endpoint, "etcd can be used again");
        }
    }
}

impl Rival {
    /// Says once that there is one.
    fn report(&mut self, etcd: &Etcd, which: &str) {
        if !std::mem::replace(&mut self.reported, true) {
            error!(
                key = etcd.map.own_key(),
                peer = which,
                "another gateway that runs has the same id, and each overwrites what the other says it holds: give each \
                    gateway a gateway_id of its own, or each cluster of gateways an etcd.prefix of its own"
            );
        }
    }
}

/// Applies what happens to the map.
async fn follow(
    client: &Client,
    etcd: &Etcd,
    revision: &mut Option<i64>,
    strict_at: &mut Option<Instant>,
    rival: &parking_lot::Mutex<&mut Rival>,
) -> Result<Infallible, End> {
    let Some(mut known) = *revision else { return Err(End::Again("not all is known")) };
    let mut answers = client.watch(&etcd.config.prefix, known + 1).await?;
    loop {
        let answer = tokio::select! {
            // First, so that a flood of events cannot hold it back.
            biased;
            () = sleep_until(strict_at.unwrap_or_else(Instant::now)), if strict_at.is_some() => {
                (*strict_at, *revision) = (None, None);
                return Err(End::Again("what etcd does not have by now is forgotten"));
            }
            answer = answers.message() => answer.map_err(|status| Failure::answered(&status))?,
        };
        let answer = answer.ok_or_else(|| Failure::new("etcd has ended the watch"))?;
        if answer.compact_revision != 0 {
            *revision = None;
            return Err(End::Again("etcd has forgotten what happened meanwhile: all is read again"));
        }
        if answer.canceled {
            return Err(Failure::new(&format!("etcd ends the watch: {}", answer.cancel_reason)).into());
        }
        for event in &answer.events {
            known = known.max(event.kv.as_ref().map_or(0, |pair| pair.mod_revision));
            match etcd.map.apply(event) {
                Some(OwnEntry::Gone) => return Err(End::Again("this gateway's entry is gone")),
                Some(OwnEntry::Written(entry)) if entry.as_ref() != Some(&etcd.own) => {
                    let peer = entry.map_or_else(|| "unknown".to_owned(), |entry| entry.peer_address);
                    rival.lock().report(etcd, &peer);
                }
                Some(OwnEntry::Written(_)) | None => {}
            }
        }
        if let Some(header) = answer.header.filter(|_| answer.events.is_empty() && !answer.created) {
            // It says that nothing has happened until then.
            known = known.max(header.revision);
        }
        *revision = Some(known);
    }
}

/// Writes what is held, and what changes.
async fn write(
    client: &Client,
    lease: Lease,
    etcd: &Etcd,
    outbox: &mut Outbox,
    news: &mut News,
    spread: &mut Duration,
) -> Result<Infallible, End> {
    sleep(*spread).await;
    *spread = Duration::ZERO;
    // First, lest what was held before be deleted that is held again.
    if let Some(news) = news.next().now_or_never() {
        outbox.hear(news);
    }
    loop {
        loop {
            let batch = outbox.batch();
            if batch.is_empty() {
                break;
            }
            client.write(batch.iter().map(|change| operation(etcd, change, lease)).collect()).await?;
            outbox.written(&batch);
        }
        sleep(WRITE_PERIOD).await;
        outbox.hear(news.next().await);
    }
}

fn operation(etcd: &Etcd, (node, generation): &Change, lease: Lease) -> RequestOp {
    let key = etcd.map.node_key(node);
    match generation {
        Some(generation) => put(key, generation.to_string().into_bytes(), lease),
        None => RequestOp {
            request: Some(request_op::Request::Delete(DeleteRangeRequest { key: Bytes::from(key) })),
        },
    }
}

fn put(key: String, value: Vec<u8>, lease: Lease) -> RequestOp {
    let put = PutRequest { key: key.into(), value: value.into(), lease: lease.id };
    RequestOp { request: Some(request_op::Request::Put(put)) }
}
