//! Which gateways there are, which of them this edge holds links to, and where each keeper shall go next. Sans-IO: time
//! comes in as an argument and all randomness from one seed. Asked by `keeper` and told by `link`, both through
//! [`SharedCluster`].
//!
//! Each keeper has a seat, and a gateway sits in at most one. Gateways are known by the hints of those that are held,
//! all of them together, so that a gateway which has lost sight of others makes no edge forget them. Hints only say
//! where links are made: no link ends because a hint has gone.
//!
//! Of the gateways that can be reached at addresses of their own, those with the highest weights are this edge's: each
//! edge ranks them in an order of its own (rendezvous hashing), so that edges spread evenly and a gateway that comes or
//! goes moves its own edges only. Where they cannot be reached, the configured addresses are tried instead, a bounded
//! number of times: a load balancer leads to a gateway that is not held yet, sooner or later.

mod hints;
mod shared;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time::Instant;
use tunnel_core::{Target, proto::messages::Gateway};

use self::hints::{Hint, weight};
pub(crate) use self::shared::SharedCluster;

/// Welcomes by gateways that are held already, in one search for another one.
const MAX_REDIALS: u32 = 8;
/// Between two dials of the configured addresses while a link is there: a random time from this range, in milliseconds.
const REDIAL_SPACING_MS: std::ops::RangeInclusive<u64> = 300..=700;
/// After a search in vain, the next begins after a random part of this, at least half.
const SEARCH_PAUSE: Duration = Duration::from_secs(240);
/// A keeper that had nothing to do begins after a random part of this, since all edges hear of a new gateway at once.
const START_SPREAD: Duration = Duration::from_secs(5);
/// A gateway that could not be reached at its own address is left alone for a random part of this, at least half. It
/// doubles with each failure.
const SET_ASIDE_MIN: Duration = Duration::from_secs(5);
const SET_ASIDE_MAX: Duration = Duration::from_secs(600);

/// What a keeper wants a link for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// It has none, or one whose gateway drains.
    Missing,
    /// Its link is to be replaced by a newer one, best to the same gateway.
    Renewal,
    /// Another gateway suits this edge better.
    Move,
}

/// What a keeper shall do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Dial one of the configured addresses.
    Configured,
    /// Dial this gateway.
    Direct { gateway: String, address: Target },
    /// Ask again then, or when something has changed.
    Wait(Instant),
    /// Nothing, until something has changed.
    Rest,
    /// The same, since the others hold all the links that there should be: one that drains can go.
    Unneeded,
}

/// Whether a keeper whose link is up shall move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Now: it shall ask for steps, and say when it is done.
    Now,
    /// Ask again then.
    At(Instant),
    /// Not unless something changes.
    Never,
}

/// How many links there are, of how many that should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) held: usize,
    pub(crate) wanted: usize,
    /// Gateways that are known, those that drain included.
    pub(crate) known: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Cluster {
    node: String,
    redundancy: usize,
    rebalance: Duration,
    seats: Vec<Seat>,
    known: BTreeMap<String, Known>,
    /// Only gateways that are known.
    set_aside: BTreeMap<String, SetAside>,
    /// The configured addresses are not dialed before, while a link is there.
    next_redial: Instant,
    /// When a link that would be better elsewhere is moved.
    next_move: Option<Instant>,
    /// The seat whose link is being moved, and the gateway that it is for.
    moving: Option<(usize, String)>,
    last_link: u64,
    rng: SmallRng,
}

#[derive(Debug, Default)]
struct Seat {
    link: Option<Held>,
    /// Its keeper is looking for a link.
    seeking: bool,
    /// Its keeper had nothing to do when it asked last.
    idle: bool,
    /// Its keeper, which had nothing to do, begins then, if it can wait.
    starts_at: Option<Instant>,
    /// The gateway that it dials now.
    dialing: Option<String>,
    /// Whether its last step was to a gateway's own address: the next is to a configured one, if it may be.
    direct_last: bool,
    redials: u32,
    /// When its next search begins.
    rests_until: Option<Instant>,
}

/// A link that is up.
#[derive(Debug)]
struct Held {
    /// Its number in this process.
    link: u64,
    /// Empty: the gateway has no usable name.
    gateway: String,
    draining: bool,
    hints: Vec<Hint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    address: Option<Target>,
    draining: bool,
    /// It came while others were known, and this edge has not yet looked for it through the configured addresses.
    fresh: bool,
}

#[derive(Clone, Copy, Debug)]
struct SetAside {
    failures: u32,
    until: Instant,
}

impl Cluster {
    /// For the edge of `node`, which holds links to `redundancy` gateways, and moves a link within `rebalance`.
    pub(crate) fn new(node: String, redundancy: usize, rebalance: Duration, seed: u64, now: Instant) -> Self {
        Self {
            node,
            redundancy,
            rebalance,
            seats: (0..redundancy).map(|_| Seat::default()).collect(),
            known: BTreeMap::new(),
            set_aside: BTreeMap::new(),
            next_redial: now,
            next_move: None,
            moving: None,
            last_link: 0,
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    pub(crate) fn tally(&self) -> Tally {
        let held = self.seats.iter().filter(|seat| seat.is_up()).count();
        Tally { held, wanted: self.wanted(), known: self.known.len() }
    }

    /// Where the keeper of this seat goes next.
    pub(crate) fn next(&mut self, seat: usize, purpose: Purpose, now: Instant) -> Step {
        self.seats[seat].dialing = None;
        if purpose == Purpose::Missing {
            if !self.is_needed(seat) {
                (self.seats[seat].seeking, self.seats[seat].idle) = (false, true);
                return if self.others(seat).any(Seat::is_up) { Step::Unneeded } else { Step::Rest };
            }
            self.seats[seat].seeking = true;
            if let Some(at) = self.starts_at(seat, now) {
                return Step::Wait(at);
            }
        }
        let direct = self.choose(seat, purpose, now);
        let redial = self.redial_at(seat, purpose, now);
        let may_redial = redial.is_some_and(|at| at <= now);
        match direct {
            Some((gateway, address)) if !(may_redial && self.seats[seat].direct_last) => {
                self.seats[seat].direct_last = true;
                self.seats[seat].dialing = Some(gateway.clone());
                Step::Direct { gateway, address }
            }
            _ if may_redial => {
                self.seats[seat].direct_last = false;
                self.next_redial = now + Duration::from_millis(self.rng.random_range(REDIAL_SPACING_MS));
                Step::Configured
            }
            _ => {
                // Whatever is first: a dial of the configured addresses, or of a gateway that was set aside.
                let aside = self.first_return(now).filter(|_| purpose != Purpose::Move);
                redial.into_iter().chain(aside).min().map_or(Step::Rest, Step::Wait)
            }
        }
    }

    /// A gateway has welcomed a link: its number, if it is this seat's now. Otherwise the edge has no use for it.
    /// `expected` is the gateway that was dialed, if it was dialed at an address of its own.
    pub(crate) fn claim(
        &mut self,
        seat: usize,
        purpose: Purpose,
        expected: Option<&str>,
        (gateway, hints): (&str, &[Gateway]),
        now: Instant,
    ) -> Option<u64> {
        let gateway = hints::name(gateway).unwrap_or_default().to_owned();
        self.seats[seat].dialing = None;
        let improves = || {
            let own = self.seats[seat].link.as_ref().map(|held| weight(&self.node, &held.gateway));
            !gateway.is_empty() && own.is_none_or(|own| weight(&self.node, &gateway) > own)
        };
        let unwanted = self.others(seat).any(|other| other.holds(&gateway));
        if unwanted || (purpose == Purpose::Move && !improves()) {
            self.seats[seat].redials += 1;
            if let Some(expected) = expected {
                // Not the same again at once.
                self.unreachable(expected, now);
            }
            return None;
        }
        self.last_link += 1;
        let link = self.last_link;
        let hints = hints::read(hints);
        self.set_aside.remove(&gateway);
        let left = self.seats[seat].link.take().filter(|left| left.draining && left.gateway != gateway);
        self.seats[seat] = Seat {
            link: Some(Held { link, gateway: gateway.clone(), draining: false, hints }),
            ..Seat::default()
        };
        self.learn();
        if let Some(known) = self.known.get_mut(&gateway) {
            known.fresh = false;
        }
        if let Some(expected) = expected.filter(|expected| **expected != gateway) {
            // Whoever is at that address, it is not the one.
            self.unreachable(expected, now);
        }
        if let Some(left) = left {
            // The others may not have heard yet that it drains.
            self.unreachable(&left.gateway, now);
        }
        Some(link)
    }

    /// The gateway could not be reached at its own address. Whether that is news.
    pub(crate) fn unreachable(&mut self, gateway: &str, now: Instant) -> bool {
        if !self.known.contains_key(gateway) {
            return false;
        }
        let failures = self.set_aside.get(gateway).map_or(0, |known| known.failures);
        let longest = SET_ASIDE_MIN.saturating_mul(1 << failures.min(16)).min(SET_ASIDE_MAX);
        let until = now + self.rng.random_range(longest / 2..=longest);
        self.set_aside.insert(gateway.to_owned(), SetAside { failures: failures + 1, until });
        failures == 0
    }

    /// A gateway has sent new hints over this link.
    pub(crate) fn updated(&mut self, link: u64, hints: &[Gateway]) {
        if let Some(held) = self.held(link) {
            held.hints = hints::read(hints);
            self.learn();
        }
    }

    /// The gateway of this link takes no new streams soon.
    pub(crate) fn draining(&mut self, link: u64) {
        if let Some(held) = self.held(link) {
            held.draining = true;
            self.learn();
        }
    }

    /// This link has ended.
    pub(crate) fn lost(&mut self, link: u64, now: Instant) {
        let Some(index) = self.seats.iter().position(|seat| seat.has(link)) else { return };
        let Some(held) = self.seats[index].link.take() else { return };
        // Others are likelier to be there.
        self.unreachable(&held.gateway, now);
        self.learn();
        if self.nothing_is_held() {
            // What was known may no longer be so: the configured addresses come first.
            self.seats.iter_mut().for_each(|seat| seat.direct_last = true);
        } else {
            // Its keeper will ask soon; until then no other takes its place.
            self.seats[index].seeking = true;
        }
    }

    /// Whether this seat's link, which is up, shall be moved. One link at a time, each at a random moment.
    pub(crate) fn turn(&mut self, seat: usize, now: Instant) -> Turn {
        if self.moving.is_some() {
            return Turn::Never;
        }
        let Some((mover, target)) = self.misplaced(now) else {
            self.next_move = None;
            return self.first_return(now).map_or(Turn::Never, Turn::At);
        };
        let at = match self.next_move {
            Some(at) => at,
            None => now + self.rng.random_range(Duration::ZERO..=self.rebalance),
        };
        self.next_move = Some(at);
        if mover != seat {
            return Turn::Never;
        }
        if now < at {
            return Turn::At(at);
        }
        self.next_move = None;
        self.seats[seat].redials = 0;
        self.seats[seat].rests_until = None;
        self.seats[seat].direct_last = false;
        self.moving = Some((seat, target));
        Turn::Now
    }

    /// The move of this seat's link is over, one way or the other.
    pub(crate) fn move_ended(&mut self, seat: usize) {
        if let Some((_, target)) = self.moving.take_if(|(mover, _)| *mover == seat) {
            self.seats[seat].dialing = None;
            if let Some(known) = self.known.get_mut(&target) {
                known.fresh = false;
            }
        }
    }

    /// Links that this edge should hold.
    fn wanted(&self) -> usize {
        let staying = self.known.values().filter(|known| !known.draining).count();
        staying.clamp(1, self.redundancy)
    }

    fn others(&self, seat: usize) -> impl Iterator<Item = &Seat> {
        self.seats.iter().enumerate().filter(move |(index, _)| *index != seat).map(|(_, other)| other)
    }

    fn held(&mut self, link: u64) -> Option<&mut Held> {
        self.seats.iter_mut().find(|seat| seat.has(link))?.link.as_mut()
    }

    fn nothing_is_held(&self) -> bool {
        self.seats.iter().all(|seat| seat.link.is_none())
    }

    /// Whether this seat needs a link, beside those that the others have or seek.
    fn is_needed(&self, seat: usize) -> bool {
        // Each link of a gateway that drains is replaced by its own keeper, which then lets it retire.
        let replaces = self.seats[seat].link.is_some();
        let counts = |other: &&Seat| other.seeking || other.is_up() || (!replaces && other.link.is_some());
        let others = self.others(seat).filter(counts).count();
        // With no link at all, one keeper finds the first, and hears where the others go.
        let first = self.nothing_is_held() && self.others(seat).any(|other| other.seeking);
        others < self.wanted() && !first
    }

    /// When a keeper that had nothing to do begins, if it is not yet time. It does not wait while no link serves.
    fn starts_at(&mut self, seat: usize, now: Instant) -> Option<Instant> {
        if std::mem::take(&mut self.seats[seat].idle) {
            let spread = START_SPREAD.min(self.rebalance);
            self.seats[seat].starts_at = Some(now + self.rng.random_range(Duration::ZERO..=spread));
        }
        let can_wait = self.others(seat).any(Seat::is_up);
        self.seats[seat].starts_at.filter(|at| can_wait && now < *at)
    }

    /// The gateway to dial at its own address, if there is one that suits.
    fn choose(&self, seat: usize, purpose: Purpose, now: Instant) -> Option<(String, Target)> {
        let own = self.seats[seat].link.as_ref().map(|held| held.gateway.as_str());
        let target = self.moving.as_ref().filter(|(mover, _)| *mover == seat).map(|(_, target)| &**target);
        let candidates = self.known.iter().filter(|(gateway, known)| {
            let suits = match purpose {
                Purpose::Missing => own != Some(gateway),
                Purpose::Renewal => own == Some(gateway),
                Purpose::Move => target == Some(gateway),
            };
            suits && known.is_reachable() && !self.is_set_aside(gateway, now) && !self.is_taken(seat, gateway)
        });
        let (gateway, known) = candidates.max_by_key(|(gateway, _)| weight(&self.node, gateway))?;
        Some((gateway.clone(), known.address.clone()?))
    }

    fn is_set_aside(&self, gateway: &str, now: Instant) -> bool {
        self.set_aside.get(gateway).is_some_and(|aside| now < aside.until)
    }

    fn is_taken(&self, seat: usize, gateway: &str) -> bool {
        self.others(seat).any(|other| other.holds(gateway) || other.dialing.as_deref() == Some(gateway))
    }

    /// When a gateway that nobody holds may be dialed again.
    fn first_return(&self, now: Instant) -> Option<Instant> {
        let free = self.set_aside.iter().filter(|(gateway, aside)| {
            let reachable = self.known.get(*gateway).is_some_and(Known::is_reachable);
            reachable && now < aside.until && !self.seats.iter().any(|seat| seat.holds(gateway))
        });
        free.map(|(_, aside)| aside.until).min()
    }

    /// When the configured addresses may be dialed for this seat; `None` if that is of no use.
    fn redial_at(&mut self, seat: usize, purpose: Purpose, now: Instant) -> Option<Instant> {
        if self.nothing_is_held() {
            return Some(now);
        }
        if purpose == Purpose::Move {
            let (_, target) = self.moving.as_ref().filter(|(mover, _)| *mover == seat)?;
            let known = self.known.get(target)?;
            let looked_for = known.fresh && !known.draining && !self.is_taken(seat, target);
            return (looked_for && self.seats[seat].redials < MAX_REDIALS).then_some(self.next_redial);
        }
        // Without another link that stays, the keeper's own backoff is all that holds it back.
        if self.others(seat).any(Seat::is_up) {
            if self.seats[seat].rests_until.is_some_and(|until| until <= now) {
                self.seats[seat].new_search();
            }
            if self.seats[seat].redials >= MAX_REDIALS {
                let pause = self.rng.random_range(SEARCH_PAUSE / 2..=SEARCH_PAUSE);
                return Some(*self.seats[seat].rests_until.get_or_insert(now + pause));
            }
        }
        Some(self.next_redial)
    }

    /// A seat whose link should rather be to another gateway, and that gateway; the worst seat first.
    fn misplaced(&self, now: Instant) -> Option<(usize, String)> {
        // First every seat gets its link.
        let settled = |seat: &Seat| !seat.seeking && seat.link.as_ref().is_none_or(|held| !held.draining);
        if !self.seats.iter().all(settled) {
            return None;
        }
        let holds = |gateway: &str| self.seats.iter().any(|seat| seat.holds(gateway));
        let within_reach = |gateway: &str, known: &Known| {
            known.fresh || (known.address.is_some() && !self.is_set_aside(gateway, now))
        };
        let possible = self.known.iter().filter(|(_, known)| !known.draining);
        let possible = possible.filter(|(gateway, known)| holds(gateway) || within_reach(gateway, known));
        let mut best: Vec<&str> = possible.map(|(gateway, _)| gateway.as_str()).collect();
        best.sort_by_key(|gateway| std::cmp::Reverse(weight(&self.node, gateway)));
        best.truncate(self.wanted());
        let target = best.iter().find(|gateway| !holds(gateway))?;
        let worse = self.seats.iter().enumerate().filter_map(|(index, seat)| {
            let gateway = &seat.link.as_ref()?.gateway;
            let worse = !gateway.is_empty() && !best.contains(&gateway.as_str());
            worse.then(|| (weight(&self.node, gateway), index))
        });
        worse.min().map(|(_, seat)| (seat, (*target).to_owned()))
    }

    /// Puts together what the gateways that are held have said. With none, what was known last stays known.
    fn learn(&mut self) {
        if self.nothing_is_held() {
            return;
        }
        let first = self.known.is_empty();
        let mut known: BTreeMap<String, Known> = BTreeMap::new();
        for hint in self.seats.iter().filter_map(|seat| seat.link.as_ref()).flat_map(Held::all_hints) {
            let before = self.known.get(&hint.gateway);
            let fresh = before.map_or(!first, |before| before.fresh);
            let entry = known.entry(hint.gateway).or_insert(Known { address: None, draining: false, fresh });
            entry.address = entry.address.take().or(hint.address);
            entry.draining |= hint.draining;
        }
        let mut news = false;
        for (gateway, now_known) in &mut known {
            let before = self.known.get(gateway);
            let back = before.is_some_and(|before| before.draining && !now_known.draining);
            now_known.fresh |= back;
            if back || before.is_none_or(|before| before.address != now_known.address) {
                self.set_aside.remove(gateway);
                news = true;
            }
        }
        self.set_aside.retain(|gateway, _| known.contains_key(gateway));
        self.known = known;
        if news {
            self.seats.iter_mut().for_each(Seat::new_search);
        }
    }
}

impl Seat {
    fn has(&self, link: u64) -> bool {
        self.link.as_ref().is_some_and(|held| held.link == link)
    }

    /// Whether it has a link to this gateway, whether that drains or not. Gateways without a name are all different.
    fn holds(&self, gateway: &str) -> bool {
        self.link.as_ref().is_some_and(|held| !held.gateway.is_empty() && held.gateway == gateway)
    }

    fn is_up(&self) -> bool {
        self.link.as_ref().is_some_and(|held| !held.draining)
    }

    fn new_search(&mut self) {
        self.redials = 0;
        self.rests_until = None;
    }
}

impl Held {
    /// What the gateway says, and that it is there itself.
    fn all_hints(&self) -> impl Iterator<Item = Hint> {
        let own = Hint { gateway: self.gateway.clone(), address: None, draining: self.draining };
        let own = (!self.gateway.is_empty()).then_some(own);
        self.hints.iter().cloned().chain(own)
    }
}

impl Known {
    /// Whether it may be dialed at an address of its own.
    fn is_reachable(&self) -> bool {
        self.address.is_some() && !self.draining
    }
}
