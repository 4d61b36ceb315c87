//! The state machine of the control stream: handshake, heartbeat and RTT, drain.
//!
//! ```text
//!  dialer   (edge):    AwaitWelcome --Welcome--> Established --silence--> dead
//!                           `--Reject--> Closed
//!  acceptor (gateway): AwaitHello --Hello--> Deciding --welcome()--> Established --silence--> dead
//!                                                `--reject()--> Closed
//! ```
//! The contract: feed [`Control::handle_message`], [`Control::heard`] and [`Control::handle_timeout`] with the time at
//! which things happened; after each call take all of [`Control::poll_event`], [`Control::poll_transmit`] and
//! [`Control::poll_heartbeat`], then wait no longer than [`Control::poll_timeout`]. An error means that the link is of no
//! further use.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    VERSIONS, clean_text,
    messages::{
        self, Abort, Drain, End, Gateway, Hello, Holdings, Ping, Pong, Reject, RejectCode, Update, Welcome,
        control::Kind,
    },
};

/// Shortest heartbeat period that is accepted from a gateway.
pub const MIN_HEARTBEAT: Duration = Duration::from_millis(50);

/// A link is dead after this many heartbeat periods without a byte from the other side.
pub const DEAD_AFTER_PERIODS: u32 = 2;

/// What the other side's messages mean for the owner of the link.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Acceptor: the dialer introduced itself. Answer with [`Control::welcome`] or [`Control::reject`].
    Hello(Hello),
    /// Dialer: the link is up.
    Established(Welcome),
    /// Dialer: the gateway does not want this link.
    Rejected(Reject),
    /// The other side takes no new streams from now on.
    Draining(Drain),
    /// Dialer: grants or cluster hints have changed.
    Updated(Update),
    /// A direction of a stream ended cleanly.
    End(End),
    /// A stream was cut.
    Abort(Abort),
    /// Peer links: what the other side holds.
    Holdings(Holdings),
    /// Peer links: what the other side says of itself.
    Gateway(Gateway),
}

/// Why a control stream is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No Hello or Welcome in time.
    #[error("the far side did not finish the handshake in time")]
    HandshakeTimeout,
    /// Nothing was heard for two heartbeat periods.
    #[error("nothing was heard from the far side for {} ms", silence.as_millis())]
    Silent {
        /// How long nothing was heard.
        silence: Duration,
    },
    /// A message came that is not allowed now.
    #[error("the far side sent {message} {when}")]
    Unexpected {
        /// Its kind.
        message: &'static str,
        /// The state in words.
        when: &'static str,
    },
    /// A welcome that cannot be lived with.
    #[error("the gateway's welcome is unusable: {0}")]
    BadWelcome(String),
}

/// Round-trip times of a link's heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtt {
    /// The last one measured.
    pub last: Duration,
    /// The smallest since the link is up.
    pub min: Duration,
    /// Exponentially smoothed by 1/8, as TCP does (RFC 6298).
    pub smoothed: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitWelcome,
    AwaitHello,
    Deciding,
    Established,
    Closed,
}

/// The control stream of one side of one link. See the module's text for the contract.
#[derive(Debug)]
pub struct Control {
    state: State,
    handshake_deadline: Instant,
    heartbeat: Duration,
    max_heartbeat: Duration,
    last_heard: Instant,
    next_ping: Instant,
    ping_id: u64,
    ping_in_flight: Option<(u64, Instant)>,
    answered: u64,
    rtt: Option<Rtt>,
    // Everything waiting to be sent is bounded: at most one of each.
    handshake_out: Option<Kind>,
    pong_out: Option<Pong>,
    ping_out: Option<Ping>,
    drain_out: Option<Drain>,
    update_out: Option<Update>,
    gateway_out: Option<Gateway>,
    holdings_out: Option<Holdings>,
    events: VecDeque<Event>,
}

impl Control {
    /// The side that dialled: sends `hello` and waits for the answer until `now + handshake_timeout`.
    /// A gateway may ask for any heartbeat period up to `max_heartbeat`.
    pub fn dialer(hello: Hello, now: Instant, handshake_timeout: Duration, max_heartbeat: Duration) -> Self {
        let mut control = Self::new(State::AwaitWelcome, now, handshake_timeout, max_heartbeat);
        control.handshake_out = Some(Kind::Hello(hello));
        control
    }

    /// The side that was dialled.
    pub fn acceptor(now: Instant, handshake_timeout: Duration) -> Self {
        Self::new(State::AwaitHello, now, handshake_timeout, Duration::MAX)
    }

    fn new(state: State, now: Instant, handshake_timeout: Duration, max_heartbeat: Duration) -> Self {
        Self {
            state,
            handshake_deadline: now + handshake_timeout,
            heartbeat: MIN_HEARTBEAT,
            max_heartbeat,
            last_heard: now,
            next_ping: now,
            ping_id: 0,
            ping_in_flight: None,
            answered: 0,
            rtt: None,
            handshake_out: None,
            pong_out: None,
            ping_out: None,
            drain_out: None,
            update_out: None,
            gateway_out: None,
            holdings_out: None,
            events: VecDeque::new(),
        }
    }

    /// Takes one message from the other side. At most one event comes of it.
    pub fn handle_message(&mut self, now: Instant, message: messages::Control) -> Result<(), ControlError> {
        self.heard(now);
        // A kind of the future: skipped, as the protocol promises.
        let Some(kind) = message.kind else { return Ok(()) };
        match (self.state, kind) {
            (State::AwaitHello, Kind::Hello(hello)) => {
                self.state = State::Deciding;
                self.events.push_back(Event::Hello(hello));
            }
            (State::AwaitWelcome, Kind::Welcome(welcome)) => {
                self.establish(now, Duration::from_millis(welcome.heartbeat_ms.into()), welcome.version)?;
                self.events.push_back(Event::Established(welcome));
            }
            (State::AwaitWelcome, Kind::Reject(mut reject)) => {
                // It will be shown to people.
                reject.text = clean_text(&reject.text);
                self.state = State::Closed;
                self.events.push_back(Event::Rejected(reject));
            }
            (State::Established, kind) => self.handle_established(now, kind)?,
            (State::Closed, _) => {}
            (state, kind) => {
                return Err(ControlError::Unexpected { message: name(&kind), when: when(state) });
            }
        }
        Ok(())
    }

    fn handle_established(&mut self, now: Instant, kind: Kind) -> Result<(), ControlError> {
        match kind {
            Kind::Ping(ping) => self.pong_out = Some(Pong { id: ping.id }),
            Kind::Pong(pong) => self.measure(now, pong.id),
            Kind::Drain(drain) => self.events.push_back(Event::Draining(drain)),
            Kind::Update(update) => self.events.push_back(Event::Updated(update)),
            Kind::End(end) => self.events.push_back(Event::End(end)),
            Kind::Abort(abort) => self.events.push_back(Event::Abort(abort)),
            Kind::Holdings(holdings) => self.events.push_back(Event::Holdings(holdings)),
            Kind::Gateway(gateway) => self.events.push_back(Event::Gateway(gateway)),
            kind @ (Kind::Hello(_) | Kind::Welcome(_) | Kind::Reject(_)) => {
                return Err(ControlError::Unexpected {
                    message: name(&kind),
                    when: when(State::Established),
                });
            }
        }
        Ok(())
    }

    /// Acceptor: takes the link. The heartbeat period is the welcome's.
    pub fn welcome(&mut self, now: Instant, welcome: Welcome) -> Result<(), ControlError> {
        self.establish(now, Duration::from_millis(welcome.heartbeat_ms.into()), welcome.version)?;
        self.handshake_out = Some(Kind::Welcome(welcome));
        Ok(())
    }

    /// Acceptor: declines the link.
    pub fn reject(&mut self, mut reject: Reject) {
        self.state = State::Closed;
        reject.text = clean_text(&reject.text);
        self.handshake_out = Some(Kind::Reject(reject));
    }

    /// No new streams from the other side, please. Sent once the link is up.
    pub fn drain(&mut self, mut drain: Drain) {
        drain.reason = clean_text(&drain.reason);
        self.drain_out = Some(drain);
    }

    /// Acceptor: new grants or cluster hints. Only the newest unsent one is kept.
    pub fn update(&mut self, update: Update) {
        self.update_out = Some(update);
    }

    /// Peer links: what this side says of itself. Only the newest unsent one is kept.
    pub fn gateway(&mut self, gateway: Gateway) {
        self.gateway_out = Some(gateway);
    }

    /// Peer links: what this side holds. Not before [`Control::takes_holdings`].
    pub fn holdings(&mut self, holdings: Holdings) {
        debug_assert!(self.takes_holdings(), "holdings would be lost");
        self.holdings_out = Some(holdings);
    }

    /// Whether the last holdings are on their way.
    pub fn takes_holdings(&self) -> bool {
        self.holdings_out.is_none()
    }

    /// Any byte came from the other side: it lives.
    pub fn heard(&mut self, now: Instant) {
        self.last_heard = self.last_heard.max(now);
    }

    /// What happened, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Asks the other side for a sign of life now, and not only when the next is due: the number of the ping. Only on an
    /// established link.
    pub fn ping(&mut self, now: Instant) -> u64 {
        self.ping_id += 1;
        self.ping_in_flight = Some((self.ping_id, now));
        self.ping_out = Some(Ping { id: self.ping_id });
        self.next_ping = now + self.heartbeat;
        self.ping_id
    }

    /// The number of the last ping that the other side has answered; all before it have arrived as well.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// The next message to send, but for heartbeats.
    pub fn poll_transmit(&mut self) -> Option<messages::Control> {
        let kind = if let Some(kind) = self.handshake_out.take() {
            kind
        } else if self.state != State::Established {
            return None;
        } else if let Some(drain) = self.drain_out.take() {
            Kind::Drain(drain)
        } else if let Some(update) = self.update_out.take() {
            Kind::Update(update)
        } else if let Some(gateway) = self.gateway_out.take() {
            Kind::Gateway(gateway)
        } else {
            Kind::Holdings(self.holdings_out.take()?)
        };
        Some(messages::Control { kind: Some(kind) })
    }

    /// The next heartbeat to send. It goes behind all else that is to be sent: whoever has the answer knows that this has
    /// arrived.
    pub fn poll_heartbeat(&mut self) -> Option<messages::Control> {
        let pong = self.pong_out.take().map(Kind::Pong);
        let kind = pong.or_else(|| self.ping_out.take().map(Kind::Ping))?;
        Some(messages::Control { kind: Some(kind) })
    }

    /// When [`Control::handle_timeout`] must be called at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::AwaitHello | State::AwaitWelcome => Some(self.handshake_deadline),
            State::Established => Some(self.next_ping.min(self.dead_at())),
            // The owner of the link decides under its own deadline.
            State::Deciding | State::Closed => None,
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ControlError> {
        match self.state {
            State::AwaitHello | State::AwaitWelcome if now >= self.handshake_deadline => {
                Err(ControlError::HandshakeTimeout)
            }
            State::Established if now >= self.dead_at() => {
                Err(ControlError::Silent { silence: now.saturating_duration_since(self.last_heard) })
            }
            State::Established if now >= self.next_ping => {
                self.ping(now);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Round-trip times, once a heartbeat has come back.
    pub fn rtt(&self) -> Option<Rtt> {
        self.rtt
    }

    fn establish(&mut self, now: Instant, heartbeat: Duration, version: u32) -> Result<(), ControlError> {
        if !(VERSIONS.0..=VERSIONS.1).contains(&version) {
            return Err(ControlError::BadWelcome(format!("it chose protocol version {version}")));
        }
        if heartbeat < MIN_HEARTBEAT || heartbeat > self.max_heartbeat {
            return Err(ControlError::BadWelcome(format!(
                "a heartbeat of {heartbeat:?} is outside {MIN_HEARTBEAT:?} to {:?}",
                self.max_heartbeat
            )));
        }
        self.state = State::Established;
        self.heartbeat = heartbeat;
        self.last_heard = now;
        self.next_ping = now;
        Ok(())
    }

    /// When the other side counts as dead, unless it is heard before.
    pub fn dead_at(&self) -> Instant {
        self.last_heard + self.heartbeat * DEAD_AFTER_PERIODS
    }

    fn measure(&mut self, now: Instant, id: u64) {
        // A number that was never sent is no answer.
        if id <= self.ping_id {
            self.answered = self.answered.max(id);
        }
        let Some((expected, sent)) = self.ping_in_flight else { return };
        if id != expected {
            return;
        }
        self.ping_in_flight = None;
        let last = now.saturating_duration_since(sent);
        self.rtt = Some(match self.rtt {
            None => Rtt { last, min: last, smoothed: last },
            Some(rtt) => Rtt { last, min: rtt.min.min(last), smoothed: (rtt.smoothed * 7 + last) / 8 },
        });
    }
}

/// The protocol version to speak with the sender of `hello`: the highest that both know.
///
/// # Errors
/// A ready [`Reject`] where there is none.
pub fn choose_version(hello: &Hello) -> Result<u32, Reject> {
    let (ours_min, ours_max) = VERSIONS;
    let version = hello.max_version.min(ours_max);
    if version >= ours_min && version >= hello.min_version {
        return Ok(version);
    }
    let text = format!(
        "no common protocol version: this side speaks {ours_min} to {ours_max}, the far side {} to {}; update the older one",
        hello.min_version, hello.max_version
    );
    Err(Reject::new(RejectCode::Version, text, Duration::ZERO))
}

impl Reject {
    /// A refusal of a link. The dialer shall stay away for `retry_after`; if that is zero, its own backoff counts.
    pub fn new(code: RejectCode, text: String, retry_after: Duration) -> Self {
        let retry_after_ms = u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX);
        Self { code: code.into(), text, retry_after_ms }
    }
}

fn name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Hello(_) => "Hello",
        Kind::Welcome(_) => "Welcome",
        Kind::Reject(_) => "Reject",
        Kind::Ping(_) => "Ping",
        Kind::Pong(_) => "Pong",
        Kind::Drain(_) => "Drain",
        Kind::Update(_) => "Update",
        Kind::End(_) => "End",
        Kind::Abort(_) => "Abort",
        Kind::Holdings(_) => "Holdings",
        Kind::Gateway(_) => "Gateway",
    }
}

fn when(state: State) -> &'static str {
    match state {
        State::AwaitWelcome => "before its Welcome",
        State::AwaitHello => "before its Hello",
        State::Deciding => "before it was welcomed",
        State::Established => "on an established link",
        State::Closed => "on a closed link",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEARTBEAT: Duration = Duration::from_secs(10);
    const HANDSHAKE: Duration = Duration::from_secs(5);

    fn hello() -> Hello {
        Hello { min_version: 1, max_version: 1, ..Hello::default() }
    }

    fn welcome() -> Welcome {
        Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() }
    }

    /// What a side has to say next.
    fn said(side: &mut Control) -> Option<messages::Control> {
        side.poll_transmit().or_else(|| side.poll_heartbeat())
    }

    /// Two sides and a clock.
    struct Pair {
        now: Instant,
        edge: Control,
        gateway: Control,
    }

    impl Pair {
        fn established() -> Self {
            let now = Instant::now();
            let edge = Control::dialer(hello(), now, HANDSHAKE, Duration::from_secs(60));
            let mut pair = Self { now, edge, gateway: Control::acceptor(now, HANDSHAKE) };
            pair.exchange();
            assert_eq!(pair.gateway.poll_event(), Some(Event::Hello(hello())));
            pair.gateway.welcome(now, welcome()).unwrap();
            pair.exchange();
            assert_eq!(pair.edge.poll_event(), Some(Event::Established(welcome())));
            pair
        }

        fn exchange(&mut self) {
            while let Some(message) = said(&mut self.edge) {
                self.gateway.handle_message(self.now, message).unwrap();
            }
            while let Some(message) = said(&mut self.gateway) {
                self.edge.handle_message(self.now, message).unwrap();
            }
        }
    }

    #[test]
    fn heartbeats_measure_the_round_trip() {
        let mut pair = Pair::established();
        pair.edge.handle_timeout(pair.now).unwrap();
        let ping = pair.edge.poll_heartbeat().unwrap();
        let sent = pair.now;
        pair.now += Duration::from_millis(30);
        pair.gateway.handle_message(pair.now, ping).unwrap();
        pair.exchange();
        assert_eq!(pair.edge.rtt().unwrap().last, Duration::from_millis(30));
        assert_eq!(pair.edge.poll_timeout(), Some(sent + HEARTBEAT));
    }

    #[test]
    fn silence_of_two_periods_is_death_and_not_sooner() {
        let mut pair = Pair::established();
        let start = pair.now;
        pair.gateway.handle_timeout(start + HEARTBEAT).unwrap();
        pair.gateway.handle_timeout(start + Duration::from_millis(19_999)).unwrap();
        assert_eq!(
            pair.gateway.handle_timeout(start + HEARTBEAT * 2),
            Err(ControlError::Silent { silence: HEARTBEAT * 2 })
        );
    }

    #[test]
    fn any_byte_heard_puts_death_off() {
        let mut pair = Pair::established();
        let start = pair.now;
        pair.gateway.heard(start + HEARTBEAT);
        pair.gateway.handle_timeout(start + HEARTBEAT * 2).unwrap();
        assert!(pair.gateway.handle_timeout(start + HEARTBEAT * 3).is_err());
    }

    #[test]
    fn a_handshake_has_a_deadline_on_both_sides() {
        let now = Instant::now();
        let mut gateway = Control::acceptor(now, HANDSHAKE);
        assert_eq!(gateway.poll_timeout(), Some(now + HANDSHAKE));
        assert_eq!(gateway.handle_timeout(now + HANDSHAKE), Err(ControlError::HandshakeTimeout));
        let mut edge = Control::dialer(hello(), now, HANDSHAKE, HEARTBEAT);
        assert_eq!(edge.handle_timeout(now + HANDSHAKE), Err(ControlError::HandshakeTimeout));
    }

    #[test]
    fn messages_out_of_turn_are_errors_that_say_so() {
        let now = Instant::now();
        let mut gateway = Control::acceptor(now, HANDSHAKE);
        let ping = messages::Control { kind: Some(Kind::Ping(Ping { id: 1 })) };
        let error = gateway.handle_message(now, ping).unwrap_err();
        assert_eq!(error.to_string(), "the far side sent Ping before its Hello");
        let mut pair = Pair::established();
        let again = messages::Control { kind: Some(Kind::Hello(hello())) };
        assert!(pair.gateway.handle_message(pair.now, again).is_err());
    }

    #[test]
    fn a_flood_of_pings_leaves_one_pong_waiting() {
        let mut pair = Pair::established();
        for id in 0..1000 {
            let ping = messages::Control { kind: Some(Kind::Ping(Ping { id })) };
            pair.gateway.handle_message(pair.now, ping).unwrap();
        }
        assert_eq!(said(&mut pair.gateway).unwrap().kind, Some(Kind::Pong(Pong { id: 999 })));
        assert_eq!(said(&mut pair.gateway), None);
    }

    #[test]
    fn of_what_a_gateway_says_of_itself_the_last_counts_and_holdings_come_behind_it() {
        let mut pair = Pair::established();
        let gateway = |draining| Gateway { id: "gw-a".to_owned(), draining, ..Gateway::default() };
        let holdings = Holdings { epoch: 3, ..Holdings::default() };
        assert!(pair.gateway.takes_holdings());
        pair.gateway.holdings(holdings.clone());
        assert!(!pair.gateway.takes_holdings());
        pair.gateway.gateway(gateway(false));
        pair.gateway.gateway(gateway(true));
        pair.exchange();
        assert!(pair.gateway.takes_holdings());
        assert_eq!(pair.edge.poll_event(), Some(Event::Gateway(gateway(true))));
        assert_eq!(pair.edge.poll_event(), Some(Event::Holdings(holdings)));
        assert_eq!(pair.edge.poll_event(), None);
    }

    #[test]
    fn holdings_before_the_handshake_are_out_of_turn() {
        let now = Instant::now();
        for kind in [Kind::Holdings(Holdings::default()), Kind::Gateway(Gateway::default())] {
            let name = name(&kind);
            let mut gateway = Control::acceptor(now, HANDSHAKE);
            let error = gateway.handle_message(now, messages::Control { kind: Some(kind) }).unwrap_err();
            assert_eq!(error.to_string(), format!("the far side sent {name} before its Hello"));
        }
    }

    #[test]
    fn an_answer_stands_for_all_pings_before_it_and_a_number_that_was_not_sent_for_none() {
        let mut pair = Pair::established();
        assert_eq!(pair.edge.answered(), 0);
        let (first, second) = (pair.edge.ping(pair.now), pair.edge.ping(pair.now));
        pair.exchange();
        assert!(first < second && pair.edge.answered() == second);
        let later = pair.now + HEARTBEAT;
        assert_eq!(pair.edge.poll_timeout(), Some(later), "the next one is not due sooner");
        for id in [first, second + 1] {
            let pong = messages::Control { kind: Some(Kind::Pong(Pong { id })) };
            pair.edge.handle_message(pair.now, pong).unwrap();
            assert_eq!(pair.edge.answered(), second);
        }
    }

    #[test]
    fn heartbeats_go_behind_all_else() {
        let mut pair = Pair::established();
        pair.edge.ping(pair.now);
        pair.edge.drain(Drain::default());
        assert_eq!(pair.edge.poll_transmit().unwrap().kind, Some(Kind::Drain(Drain::default())));
        assert_eq!(pair.edge.poll_transmit(), None);
        assert!(matches!(pair.edge.poll_heartbeat().unwrap().kind, Some(Kind::Ping(_))));
        assert_eq!(pair.edge.poll_heartbeat(), None);
    }

    #[test]
    fn an_absurd_heartbeat_is_refused() {
        for heartbeat_ms in [0, 1, 61_000] {
            let now = Instant::now();
            let mut edge = Control::dialer(hello(), now, HANDSHAKE, Duration::from_secs(60));
            let welcome = Welcome { heartbeat_ms, ..welcome() };
            let message = messages::Control { kind: Some(Kind::Welcome(welcome)) };
            assert!(matches!(edge.handle_message(now, message), Err(ControlError::BadWelcome(_))));
        }
    }

    #[test]
    fn versions_are_negotiated() {
        assert_eq!(choose_version(&Hello { min_version: 1, max_version: 7, ..hello() }), Ok(1));
        let reject = choose_version(&Hello { min_version: 2, max_version: 7, ..hello() }).unwrap_err();
        assert_eq!(reject.code(), RejectCode::Version);
    }

    proptest! {
        /// Whatever comes in whatever order, at whatever time: no panic, bounded queues.
        #[test]
        fn no_sequence_panics(steps in proptest::collection::vec((0..11u8, 0..30_000u64), 0..60), dialer in any::<bool>()) {
            let mut now = Instant::now();
            let mut control = if dialer {
                Control::dialer(hello(), now, HANDSHAKE, Duration::from_secs(60))
            } else {
                Control::acceptor(now, HANDSHAKE)
            };
            for (step, millis) in steps {
                now += Duration::from_millis(millis);
                let kind = match step {
                    0 => Kind::Hello(hello()),
                    1 => Kind::Welcome(welcome()),
                    2 => Kind::Ping(Ping { id: millis }),
                    3 => Kind::Pong(Pong { id: millis }),
                    4 => Kind::End(End::default()),
                    5 => Kind::Drain(Drain::default()),
                    6 => { let _ = control.handle_timeout(now); continue; }
                    7 => { let _ = control.welcome(now, welcome()); continue; }
                    8 => Kind::Holdings(Holdings::default()),
                    9 => Kind::Gateway(Gateway::default()),
                    _ => Kind::Abort(Abort::default()),
                };
                let _ = control.handle_message(now, messages::Control { kind: Some(kind) });
                let mut events = 0;
                while control.poll_event().is_some() { events += 1; }
                let mut sent = 0;
                while said(&mut control).is_some() { sent += 1; }
                prop_assert!(events <= 1 && sent <= 3);
            }
        }
    }
}
