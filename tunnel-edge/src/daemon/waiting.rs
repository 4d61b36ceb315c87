//! The waiting room of a listener: connections of which nothing is known yet, or that have nothing to say for the moment.
//! Used by the admin listener here, and by the doors of the gateway that ask for a certificate.
//!
//! It has so many seats. When all are taken, whoever comes next is let in all the same, and the connection that has been
//! silent longest goes: of the source that has most of them, so that sources share the room, but only while it is full.
//! Many good connections may come from one address, by NAT or a load balancer.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::{sync::Notify, task::AbortHandle};

/// Whom a connection counts for: an IPv4 address, or the network of 64 bits that one host can have all addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                Self(IpAddr::V6(network.into()))
            }
            v4 @ IpAddr::V4(_) => Self(v4),
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct WaitingRoom {
    seats: usize,
    guests: Mutex<Guests>,
    /// Somebody may be let in who could not before.
    opened: Notify,
    /// How many there are.
    waiting: Gauge,
    /// How many had to go.
    displaced: Counter,
}

#[derive(Debug, Default)]
struct Guests {
    /// The last number, and the last age, that was given.
    last: u64,
    by_number: HashMap<u64, Guest>,
    /// Those that are silent, by their ages: the lowest is the oldest.
    silent: BTreeMap<Source, BTreeMap<u64, u64>>,
    /// Who has to give up a seat first is the last: how many of a source are silent, the oldest of them, and the source.
    line: BTreeSet<(usize, Reverse<u64>, Source)>,
}

#[derive(Debug)]
struct Guest {
    source: Source,
    age: u64,
    task: Option<AbortHandle>,
}

/// A connection's seat, until it is dropped. At first the connection is silent.
#[derive(Debug)]
pub struct Seat {
    room: Arc<WaitingRoom>,
    number: u64,
}

impl WaitingRoom {
    /// A room of so many seats. `waiting` counts who is in it, `displaced` who had to go.
    pub fn new(seats: usize, waiting: Gauge, displaced: Counter) -> Arc<Self> {
        let guests = Mutex::default();
        Arc::new(Self { seats: seats.max(1), guests, opened: Notify::new(), waiting, displaced })
    }

    /// Waits until there is a seat for one more, or somebody who would have to give one up. Cancel-safe. For one caller at
    /// a time, which is the one that enters.
    pub async fn open(&self) {
        while !self.is_open() {
            self.opened.notified().await;
        }
    }

    fn is_open(&self) -> bool {
        let guests = self.guests.lock();
        guests.by_number.len() < self.seats || !guests.line.is_empty()
    }

    /// Gives a connection a seat, and has `serve` begin to serve it: the task that does is aborted when the seat has to be
    /// given up. If no seat is left, somebody has to give up one.
    pub fn enter(self: &Arc<Self>, from: IpAddr, serve: impl FnOnce(Seat) -> AbortHandle) {
        let mut guests = self.guests.lock();
        if guests.by_number.len() >= self.seats {
            self.displace_one(&mut guests);
        }
        let number = guests.next();
        guests.by_number.insert(number, Guest { source: from.into(), age: number, task: None });
        guests.fall_silent(number);
        drop(guests);
        self.waiting.inc();
        let task = serve(Seat { room: self.clone(), number });
        // It may have been served already.
        if let Some(guest) = self.guests.lock().by_number.get_mut(&number) {
            guest.task = Some(task);
        }
    }

    /// Lets go of the one who would be next, as when there are no descriptors left. Whether there was one.
    pub fn displace(&self) -> bool {
        self.displace_one(&mut self.guests.lock())
    }

    fn displace_one(&self, guests: &mut Guests) -> bool {
        let Some(number) = guests.next_to_go() else { return false };
        if let Some(Guest { task: Some(task), .. }) = guests.remove(number) {
            task.abort();
        }
        self.waiting.dec();
        self.displaced.inc();
        true
    }
}

impl Guests {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn next_to_go(&self) -> Option<u64> {
        let (_, _, source) = self.line.last()?;
        self.silent.get(source)?.values().next().copied()
    }

    fn fall_silent(&mut self, number: u64) {
        if let Some(Guest { source, age, .. }) = self.by_number.get(&number) {
            let (source, age) = (*source, *age);
            self.change(source, |silent| silent.insert(age, number));
        }
    }

    fn speak(&mut self, number: u64) {
        if let Some(Guest { source, age, .. }) = self.by_number.get(&number) {
            let (source, age) = (*source, *age);
            self.change(source, |silent| silent.remove(&age));
        }
    }

    /// Changes who of a source is silent, and with it the source's place in line.
    fn change(&mut self, source: Source, change: impl FnOnce(&mut BTreeMap<u64, u64>) -> Option<u64>) {
        let mut silent = self.silent.remove(&source).unwrap_or_default();
        self.line.remove(&place_in_line(&silent, source));
        change(&mut silent);
        if !silent.is_empty() {
            self.line.insert(place_in_line(&silent, source));
            self.silent.insert(source, silent);
        }
    }

    fn remove(&mut self, number: u64) -> Option<Guest> {
        self.speak(number);
        self.by_number.remove(&number)
    }
}

fn place_in_line(silent: &BTreeMap<u64, u64>, source: Source) -> (usize, Reverse<u64>, Source) {
    (silent.len(), Reverse(silent.keys().next().copied().unwrap_or_default()), source)
}

impl Seat {
    /// The far side has said what was waited for: the connection waits for nobody but this process, and keeps its seat.
    pub fn speaks(&self) {
        self.room.guests.lock().speak(self.number);
    }

    /// It is the far side's turn again. The connection is as old as it was.
    pub fn falls_silent(&self) {
        self.room.guests.lock().fall_silent(self.number);
        self.room.opened.notify_one();
    }

    /// The connection begins anew, as if it had come just now.
    pub fn renew(&self) {
        let mut guests = self.room.guests.lock();
        guests.speak(self.number);
        let age = guests.next();
        if let Some(guest) = guests.by_number.get_mut(&self.number) {
            guest.age = age;
        }
        guests.fall_silent(self.number);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.room.guests.lock().remove(self.number).is_some() {
            self.room.waiting.dec();
        }
        self.room.opened.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use tokio::{
        task::{JoinHandle, yield_now},
        time::timeout,
    };

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    struct Room(Arc<WaitingRoom>);

    impl Room {
        fn new(seats: usize) -> Self {
            Self(WaitingRoom::new(seats, Gauge::default(), Counter::default()))
        }

        /// A guest whose task waits for ever.
        fn enter(&self, from: IpAddr) -> (Seat, JoinHandle<()>) {
            let mut guest = None;
            self.0.enter(from, |seat| {
                let task = tokio::spawn(pending());
                let handle = task.abort_handle();
                guest = Some((seat, task));
                handle
            });
            guest.unwrap()
        }

        /// How many are inside, and how many had to go.
        fn counts(&self) -> (i64, u64) {
            (self.0.waiting.get(), self.0.displaced.get())
        }
    }

    /// Which of the guests are still served.
    async fn served(guests: &[(Seat, JoinHandle<()>)]) -> Vec<usize> {
        yield_now().await;
        (0..guests.len()).filter(|place| !guests[*place].1.is_finished()).collect()
    }

    #[tokio::test]
    async fn whoever_comes_to_a_full_room_takes_the_seat_of_the_oldest() {
        let room = Room::new(3);
        let mut guests: Vec<_> = (0..3).map(|_| room.enter(address(1))).collect();
        assert_eq!((served(&guests).await, room.counts()), (vec![0, 1, 2], (3, 0)));
        guests.push(room.enter(address(1)));
        assert_eq!((served(&guests).await, room.counts()), (vec![1, 2, 3], (3, 1)));
        drop(guests);
        assert_eq!(room.counts(), (0, 1));
    }

    #[tokio::test]
    async fn the_source_that_has_most_gives_up_a_seat_and_of_even_ones_the_older() {
        let room = Room::new(4);
        let mut guests: Vec<_> = [1, 2, 2, 2].into_iter().map(|from| room.enter(address(from))).collect();
        guests.push(room.enter(address(3)));
        assert_eq!(served(&guests).await, [0, 2, 3, 4]);
        guests.push(room.enter(address(4)));
        assert_eq!(served(&guests).await, [0, 3, 4, 5]);
        // Each has one now.
        guests.push(room.enter(address(5)));
        assert_eq!(served(&guests).await, [3, 4, 5, 6]);
    }

    #[tokio::test]
    async fn no_source_is_limited_while_there_is_room() {
        let room = Room::new(100);
        let guests: Vec<_> = (0..100).map(|_| room.enter(address(1))).collect();
        assert_eq!((served(&guests).await.len(), room.counts()), (100, (100, 0)));
    }

    #[tokio::test]
    async fn who_has_spoken_keeps_the_seat_until_silent_again() {
        let room = Room::new(2);
        let mut guests = vec![room.enter(address(1)), room.enter(address(1))];
        guests[0].0.speaks();
        guests.push(room.enter(address(1)));
        assert_eq!(served(&guests).await, [0, 2]);
        guests[0].0.falls_silent();
        guests.push(room.enter(address(1)));
        assert_eq!(served(&guests).await, [2, 3], "it is as old as it was");
        // Whoever had to go changes nothing any more.
        guests[0].0.speaks();
        guests[0].0.falls_silent();
        guests[1].0.renew();
        assert_eq!((room.counts(), room.0.guests.lock().silent.len()), ((2, 2), 1));
    }

    #[tokio::test]
    async fn a_seat_that_is_renewed_is_the_newest() {
        let room = Room::new(2);
        let mut guests = vec![room.enter(address(1)), room.enter(address(1))];
        guests[0].0.renew();
        guests.push(room.enter(address(1)));
        assert_eq!(served(&guests).await, [0, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_room_is_closed_while_all_in_it_have_spoken() {
        let room = Room::new(1);
        let is_open = || timeout(Duration::from_millis(1), room.0.open());
        is_open().await.unwrap();
        let (seat, _task) = room.enter(address(1));
        is_open().await.unwrap();
        seat.speaks();
        assert!(is_open().await.is_err() && !room.0.displace());
        let (opened, ()) = tokio::join!(is_open(), async {
            yield_now().await;
            seat.falls_silent();
        });
        opened.unwrap();
        seat.speaks();
        assert!(is_open().await.is_err());
        let (opened, ()) = tokio::join!(is_open(), async {
            yield_now().await;
            drop(seat);
        });
        opened.unwrap();
        assert_eq!(room.counts(), (0, 0));
    }

    #[tokio::test]
    async fn one_is_let_go_when_it_is_asked_for() {
        let room = Room::new(9);
        let guests = [room.enter(address(1)), room.enter(address(2))];
        assert!(room.0.displace());
        assert_eq!((served(&guests).await, room.counts()), (vec![1], (1, 1)));
        assert!(room.0.displace() && !room.0.displace());
    }

    #[test]
    fn a_host_s_own_network_is_one_source_and_a_mapped_address_is_the_address() {
        let source = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(source("2001:db8:1:2::7"), source("2001:db8:1:2:ffff:ffff:ffff:ffff"));
        assert_ne!(source("2001:db8:1:2::7"), source("2001:db8:1:3::7"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_ne!(source("10.0.0.1"), source("10.0.0.2"));
    }
}
