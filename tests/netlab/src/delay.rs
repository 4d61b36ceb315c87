//! When a packet that arrives now goes on: after the delay, a little sooner or later by the jitter, never before one
//! that came earlier. The wire asks; no clock is read here.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use rand::{Rng, rngs::SmallRng};

/// The jitter is never larger than the delay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    delay: Duration,
    jitter: Duration,
}

/// The line is none of settings.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

impl FromStr for Settings {
    type Err = Malformed;

    fn from_str(line: &str) -> Result<Self, Malformed> {
        let mut numbers = line.split_whitespace().map(|word| word.parse().map(Duration::from_micros));
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(delay)), Some(Ok(jitter)), None) if jitter <= delay => Ok(Self { delay, jitter }),
            _ => Err(Malformed),
        }
    }
}

/// Delay and jitter of one direction.
///
/// The jitter wanders: a new aim between minus one and one is drawn every two jitters, and the way there is straight.
/// That is as steep as can be without a packet having to wait for the one before it, which is what a lot drawn for each
/// packet would come to as soon as they are many: a delay that is always near its longest.
#[derive(Debug)]
pub(crate) struct Delay {
    settings: Settings,
    random: SmallRng,
    /// Where the jitter was at some time, and where it will be two jitters later.
    way: Option<(Instant, f64, f64)>,
    latest: Option<Instant>,
}

impl Delay {
    /// None, until it is set.
    pub(crate) fn new(random: SmallRng) -> Self {
        Self { settings: Settings::default(), random, way: None, latest: None }
    }

    pub(crate) fn set(&mut self, settings: Settings) {
        self.settings = settings;
        self.way = None;
    }

    /// When what arrives now goes on.
    pub(crate) fn due(&mut self, now: Instant) -> Instant {
        let Settings { delay, jitter } = self.settings;
        let wander = self.wander(now);
        let offset = jitter.mul_f64(wander.abs());
        let delay = if wander < 0.0 { delay.saturating_sub(offset) } else { delay + offset };
        let due = self.latest.map_or(now + delay, |latest| latest.max(now + delay));
        self.latest = Some(due);
        due
    }

    /// So long after packets came, the wire looks for no others: to wake for each of many costs more than to forward
    /// it. The first after a pause is seen at once.
    pub(crate) fn rest(&self) -> Duration {
        (self.settings.delay / 25).clamp(Duration::from_micros(100), Duration::from_millis(1))
    }

    /// Between minus one and one.
    fn wander(&mut self, now: Instant) -> f64 {
        let length = self.settings.jitter * 2;
        if length.is_zero() {
            return 0.0;
        }
        let mut lot = || self.random.random_range(-1.0..=1.0);
        let way = match self.way {
            Some((begun, from, to)) if now < begun + length => (begun, from, to),
            Some((begun, _, to)) if now < begun + length * 2 => (begun + length, to, lot()),
            // Nothing was on the wire for so long that nothing is left of where it was.
            _ => (now, lot(), lot()),
        };
        self.way = Some(way);
        let (begun, from, to) = way;
        from + (to - from) * now.duration_since(begun).div_duration_f64(length)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn delay(line: &str) -> Delay {
        let mut delay = Delay::new(SmallRng::seed_from_u64(1));
        delay.set(line.parse().unwrap());
        delay
    }

    #[test]
    fn a_line_of_settings_has_two_numbers_the_second_no_larger() {
        let settings = Settings { delay: MILLISECOND * 25, jitter: MILLISECOND * 5 };
        assert_eq!("25000 5000\n".parse(), Ok(settings));
        for line in ["", "1", "1 2", "1 -1", "2 1 0", "1.5 1", "a b"] {
            assert_eq!(line.parse::<Settings>(), Err(Malformed), "{line}");
        }
    }

    #[test]
    fn without_jitter_the_delay_is_exact() {
        let mut delay = delay("25000 0");
        let now = Instant::now();
        for step in 0..10 {
            let now = now + MILLISECOND * step;
            assert_eq!(delay.due(now), now + MILLISECOND * 25);
        }
    }

    #[test]
    fn jitter_fills_its_range_around_the_delay_and_keeps_the_order() {
        let (mut delay, begin) = (delay("25000 5000"), Instant::now());
        let (mut latest, mut delays) = (begin, Vec::new());
        for step in 0..100_000 {
            let now = begin + MILLISECOND / 10 * step;
            let due = delay.due(now);
            assert!(due >= latest, "sooner than the packet before it, at {:?}", now - begin);
            latest = due;
            delays.push((due - now).as_secs_f64() * 1e3);
        }
        let count = f64::from(u32::try_from(delays.len()).unwrap());
        let mean = delays.iter().sum::<f64>() / count;
        let deviation = (delays.iter().map(|delay| (delay - mean).powi(2)).sum::<f64>() / count).sqrt();
        assert!((24.5..25.5).contains(&mean), "the mean of 25 ms is {mean} ms");
        assert!(delays.iter().all(|delay| (19.99..30.01).contains(delay)), "beyond 5 ms around 25 ms");
        assert!((2.0..3.0).contains(&deviation), "the deviation of 5 ms is {deviation} ms");
    }

    #[test]
    fn a_shorter_delay_lets_nothing_overtake() {
        let (mut delay, now) = (delay("25000 0"), Instant::now());
        let before = delay.due(now);
        delay.set("1000 0".parse().unwrap());
        assert_eq!(delay.due(now + MILLISECOND), before);
        assert_eq!(delay.due(now + MILLISECOND * 30), now + MILLISECOND * 31);
    }
}
