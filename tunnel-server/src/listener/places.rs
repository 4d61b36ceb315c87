//! Who may be at a door at one time. Each door has places of its own, and a connection takes one only when it is known who
//! it is: until then it has a seat in the door's waiting room, which it may have to give up to others like it, but never
//! takes anything from those that are in. Used by the accept loop and by the handshake.

use std::{
    future::poll_fn,
    net::{IpAddr, Ipv4Addr},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{AbortHandle, yield_now},
    time::{Instant, timeout_at},
};
use tunnel_core::tls::Domain;
use tunnel_edge::daemon::waiting::{Seat, WaitingRoom};

use super::PeerAddr;
use crate::metrics::Metrics;

/// Connections of one door whose handshakes may be ready to be worked on before anything else is done. Each takes some tenths
/// of a millisecond of a processor, for which all streams of the gateway wait.
const TURNS: usize = 32;

/// The places of one door.
#[derive(Debug)]
pub(crate) struct Places {
    admitted: Arc<Semaphore>,
    /// `None` where it is known of whoever connects who it is.
    waiting: Option<Arc<WaitingRoom>>,
    /// For the work on a client's first message.
    first_turns: Semaphore,
    /// For that on its others. They have turns of their own, so that a handshake which has begun ends soon, however many
    /// have not begun.
    later_turns: Semaphore,
}

/// A connection at a door.
#[derive(Debug)]
pub(crate) struct Guest {
    places: Arc<Places>,
    seat: Option<Seat>,
    place: Option<OwnedSemaphorePermit>,
    since: Instant,
}

impl Places {
    /// For a door where nobody is asked who it is.
    pub(crate) fn open(count: usize) -> Arc<Self> {
        Arc::new(Self::new(count, None))
    }

    /// For a door where each shows a certificate. At most `waiting` connections have not done so yet.
    pub(crate) fn guarded(count: usize, waiting: usize, domain: Domain, metrics: &Metrics) -> Arc<Self> {
        let room = WaitingRoom::new(waiting, metrics.waiting(domain), metrics.displaced(domain));
        Arc::new(Self::new(count, Some(room)))
    }

    fn new(count: usize, waiting: Option<Arc<WaitingRoom>>) -> Self {
        let admitted = Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)));
        Self { admitted, waiting, first_turns: Semaphore::new(TURNS), later_turns: Semaphore::new(TURNS) }
    }

    /// Waits until one more connection may be accepted. At an open door it has its place then. Cancel-safe.
    pub(super) async fn free(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed. Those that are known already stand before this one in line.
        let place = self.admitted.clone().acquire_owned().await.ok();
        let Some(room) = &self.waiting else { return place };
        drop(place);
        room.open().await;
        None
    }

    /// Has `serve` begin with a connection, for which one was [`Self::free`].
    pub(super) fn enter(
        self: &Arc<Self>,
        peer: PeerAddr,
        place: Option<OwnedSemaphorePermit>,
        serve: impl FnOnce(Guest) -> AbortHandle,
    ) {
        let (places, since) = (self.clone(), Instant::now());
        match &self.waiting {
            Some(room) => {
                room.enter(source(peer), |seat| {
                    serve(Guest { places, seat: Some(seat), place: None, since })
                });
            }
            None => drop(serve(Guest { places, seat: None, place, since })),
        }
    }

    /// Lets go of a connection of which nothing is known yet, since there are no descriptors left.
    pub(super) fn displace(&self) {
        if let Some(room) = &self.waiting {
            room.displace();
        }
    }
}

fn source(peer: PeerAddr) -> IpAddr {
    match peer {
        PeerAddr::Ip(address) => address.ip(),
        PeerAddr::Unix { .. } => Ipv4Addr::UNSPECIFIED.into(),
    }
}

impl Guest {
    /// For tests of what is behind the doors: one that nobody asks.
    #[cfg(test)]
    pub(crate) fn at_an_open_door() -> Self {
        Self { places: Places::open(1), seat: None, place: None, since: Instant::now() }
    }

    /// When all that shows who it is must have come, if that may take so long.
    pub(super) fn deadline(&self, limit: Duration) -> Instant {
        self.since + limit
    }

    /// It is known who it is: it gets a place, if there is one before `deadline`, until it is dropped.
    pub(super) async fn admit(&mut self, deadline: Instant) -> bool {
        let Some(seat) = &self.seat else { return true };
        seat.speaks();
        // The semaphore is never closed.
        let Ok(Ok(place)) = timeout_at(deadline, self.places.admitted.clone().acquire_owned()).await else {
            return false;
        };
        (self.seat, self.place) = (None, Some(place));
        true
    }

    /// Nothing more is done for it but to hear whether it has gone.
    pub(super) fn falls_silent(&self) {
        if let Some(seat) = &self.seat {
            seat.falls_silent();
        }
    }

    fn speaks(&self) {
        if let Some(seat) = &self.seat {
            seat.speaks();
        }
    }

    /// Does `work`, for which the far side's first message has come. It gets its first turn and, each time that the far side
    /// has let it wait, another: so that nobody waits for a far side that is silent.
    ///
    /// Where all edges of a gateway that is gone come at one moment, handshakes that were all worked on at once would all be
    /// too late. So some are in time, and then the next, and in between everything else that there is to do.
    pub(super) async fn in_turn<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let mut turns = &self.places.first_turns;
        loop {
            self.speaks();
            let turn = turns.acquire().await;
            // Everything that is ready goes first, once.
            yield_now().await;
            let polled = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
            drop(turn);
            if let Poll::Ready(done) = polled {
                return done;
            }
            self.falls_silent();
            turns = &self.places.later_turns;
            woken().await;
        }
    }
}

/// Waits until the task is woken: by what was polled before it, which has to be polled again then.
async fn woken() {
    let mut polled = false;
    poll_fn(|_| if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }).await;
}

#[cfg(test)]
mod tests {
    use std::{future::pending, net::SocketAddr};

    use parking_lot::Mutex;
    use tokio::{
        sync::Notify,
        task::JoinSet,
        time::{sleep, timeout},
    };

    use super::*;
    use crate::testing::metrics;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn guarded(count: usize, waiting: usize) -> Arc<Places> {
        Places::guarded(count, waiting, Domain::Edge, &metrics())
    }

    fn peer() -> PeerAddr {
        PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 40_000)))
    }

    fn enter(places: &Arc<Places>) -> Guest {
        let mut entered = None;
        places.enter(peer(), None, |guest| {
            entered = Some(guest);
            tokio::spawn(pending::<()>()).abort_handle()
        });
        entered.unwrap()
    }

    async fn is_free(places: &Places) -> bool {
        timeout(Duration::from_millis(1), places.free()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_take_no_place_and_those_that_are_known_are_let_in_first() {
        let places = guarded(1, 3);
        let (strangers, mut known) = ([enter(&places), enter(&places)], enter(&places));
        let deadline = known.deadline(PATIENCE);
        assert_eq!(deadline, Instant::now() + PATIENCE);
        assert!(is_free(&places).await && known.admit(deadline).await);
        assert!(!is_free(&places).await, "the only place is taken");
        // One that was accepted before that waits, for as long as it may.
        let mut late = enter(&places);
        let begun = Instant::now();
        assert!(!late.admit(begun + PATIENCE).await);
        assert_eq!(begun.elapsed(), PATIENCE);
        let (admitted, ()) = tokio::join!(late.admit(Instant::now() + PATIENCE), async { drop(known) });
        assert!(admitted);
        drop((late, strangers));
        assert!(is_free(&places).await);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_accepted_while_all_that_wait_wait_for_this_side() {
        let places = guarded(1, 1);
        let mut guest = enter(&places);
        guest.speaks();
        assert!(!is_free(&places).await);
        guest.falls_silent();
        assert!(is_free(&places).await);
        assert!(guest.admit(Instant::now()).await);
        drop(guest);
        assert!(is_free(&places).await);
    }

    #[tokio::test(start_paused = true)]
    async fn at_an_open_door_whoever_comes_has_a_place() {
        let places = Places::open(1);
        let place = places.free().await;
        assert!(!is_free(&places).await);
        let mut entered = None;
        places.enter(peer(), place, |guest| {
            entered = Some(guest);
            tokio::spawn(pending::<()>()).abort_handle()
        });
        places.displace();
        let mut guest = entered.unwrap();
        assert!(guest.admit(Instant::now()).await && !is_free(&places).await);
        drop(guest);
        assert!(is_free(&places).await);
    }

    /// Work that has to be polled so often, and says each time by which number it goes.
    async fn work(number: usize, rounds: usize, said: &Mutex<Vec<usize>>) {
        for round in 1..=rounds {
            said.lock().push(number);
            if round < rounds {
                yield_now().await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_far_side_that_is_silent_has_no_turn() {
        let (places, said) = (guarded(1, 3 * TURNS), Mutex::default());
        let mut silent = JoinSet::new();
        for _ in 0..2 * TURNS {
            let guest = enter(&places);
            silent.spawn(async move { guest.in_turn(pending::<()>()).await });
        }
        sleep(Duration::from_millis(1)).await;
        let (guest, begun) = (enter(&places), Instant::now());
        timeout(PATIENCE, guest.in_turn(work(7, 3, &said))).await.unwrap();
        assert_eq!((begun.elapsed(), said.lock().len()), (Duration::ZERO, 3));
    }

    #[tokio::test]
    async fn work_that_is_woken_while_it_waits_for_a_turn_goes_on() {
        let (places, news) = (guarded(1, 9), Notify::new());
        let guest = enter(&places);
        let telling = async {
            loop {
                news.notify_one();
                yield_now().await;
            }
        };
        let hearing = guest.in_turn(async {
            for _ in 0..3 {
                news.notified().await;
                sleep(Duration::from_millis(1)).await;
            }
        });
        tokio::select! {
            biased;
            heard = timeout(PATIENCE, hearing) => heard.unwrap(),
            () = telling => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_that_have_begun_end_before_all_have_begun() {
        let (places, said) = (guarded(1, 1000), Arc::new(Mutex::new(Vec::new())));
        let many = 10 * TURNS;
        let mut tasks = JoinSet::new();
        for number in 0..many {
            let (guest, said) = (enter(&places), said.clone());
            tasks.spawn(async move { guest.in_turn(work(number, 2, &said)).await });
        }
        timeout(PATIENCE, tasks.join_all()).await.unwrap();
        let said = said.lock();
        assert_eq!(said.len(), 2 * many);
        let ended = |number: usize| said.iter().rposition(|said| *said == number).unwrap();
        let begun = |number: usize| said.iter().position(|said| *said == number).unwrap();
        assert!(ended(0) < begun(4 * TURNS), "ended as number {}", ended(0));
        // The first come first, but for those whose turns come at once.
        assert!((TURNS..many).all(|number| begun(number - TURNS) < begun(number)));
    }
}
