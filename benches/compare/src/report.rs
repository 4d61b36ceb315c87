//! Figures as JSON: one object for each workload, printed by `main`. Their names are what `benches/compare` reads.

use std::time::Duration;

use serde_json::{Value, json};

/// What bulk streams have received in the measured time, all together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Throughput {
    pub(crate) bytes: u64,
    pub(crate) time: Duration,
}

impl Throughput {
    #[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
    fn gbit_per_s(self) -> f64 {
        round(self.bytes as f64 * 8.0 / 1e9 / self.time.as_secs_f64(), 1e4)
    }
}

/// Times in order.
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// The smallest that so many of a thousand do not exceed, in microseconds. None: there are no times.
    fn micros(&self, per_mille: usize) -> Option<f64> {
        let rank = (self.0.len() * per_mille).div_ceil(1000).max(1);
        self.0.get(rank - 1).map(|time| round(time.as_secs_f64() * 1e6, 10.0))
    }
}

/// `total`: bytes of before and after the measured time too, which cost no less.
pub(crate) fn bulk(moved: Throughput, total: u64) -> Value {
    json!({
        "bytes": moved.bytes,
        "total_bytes": total,
        "seconds": round(moved.time.as_secs_f64(), 1e6),
        "gbit_per_s": moved.gbit_per_s(),
    })
}

pub(crate) fn ping(times: &Times) -> Value {
    json!({
        "count": times.0.len(),
        "p50_us": times.micros(500),
        "p99_us": times.micros(990),
        "p999_us": times.micros(999),
    })
}

pub(crate) fn interleaved(times: &Times, moved: Throughput, total: u64) -> Value {
    let mut figures = ping(times);
    figures["gbit_per_s"] = moved.gbit_per_s().into();
    figures["total_bytes"] = total.into();
    figures
}

pub(crate) fn first_byte(times: &Times) -> Value {
    json!({ "count": times.0.len(), "p50_us": times.micros(500), "p99_us": times.micros(990) })
}

/// Times of requests that were answered in this time.
#[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
pub(crate) fn requests(times: &Times, within: Duration, failed: usize) -> Value {
    json!({
        "per_s": round(times.0.len() as f64 / within.as_secs_f64(), 10.0),
        "p50_us": times.micros(500),
        "p99_us": times.micros(990),
        "failed": failed,
    })
}

pub(crate) fn open(streams: usize) -> Value {
    json!({ "open": streams })
}

fn round(number: f64, parts: f64) -> f64 {
    (number * parts).round() / parts
}
