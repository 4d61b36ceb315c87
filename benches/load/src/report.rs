//! What was measured, for people and for programs. [`FIGURES`] has every figure once: its name in both, and how it
//! follows from a run. Filled by the walk in `main`.

use std::{fmt, thread::available_parallelism, time::Duration};

use serde_json::{Map, Value, json};

use crate::{gateway::Memory, requests::Latency};

/// A distribution of times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) all: Duration,
}

impl Spread {
    /// Of these times; zero if there are none.
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        // The smallest that so many percent do not exceed.
        let percentile = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1);
            times.get(rank - 1).copied().unwrap_or_default()
        };
        Self { p50: percentile(50), p99: percentile(99), all: percentile(100) }
    }
}

/// What one run gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) edges: usize,
    pub(crate) gateways: usize,
    /// The gateways without links, as all memory here: of all of them together.
    pub(crate) empty: Memory,
    /// The same, of those that are left after one was killed.
    pub(crate) empty_left: Memory,
    /// With all links, before any request.
    pub(crate) idle: Memory,
    /// With all links, after they came back: to a new gateway, or to those that are left.
    pub(crate) after: Memory,
    /// Of one core, by all gateways together.
    pub(crate) cpu_at_rest: f64,
    /// From the start of all edges.
    pub(crate) linked: Spread,
    /// From a gateway's end, of the edges that it had.
    pub(crate) back: Spread,
    pub(crate) local: Latency,
    /// Only with several gateways.
    pub(crate) forwarded: Option<Latency>,
}

struct Figure {
    /// In JSON, with its unit.
    key: &'static str,
    /// In the table.
    text: &'static str,
    decimals: usize,
    /// None: a run of this kind has no such figure.
    of: fn(&Run) -> Option<f64>,
}

const fn figure(
    key: &'static str,
    text: &'static str,
    decimals: usize,
    of: fn(&Run) -> Option<f64>,
) -> Figure {
    Figure { key, text, decimals, of }
}

#[rustfmt::skip]
const FIGURES: [Figure; 27] = [
    figure("gateway_empty_kib", "gateway without edges, KiB", 0, |run| Some(run.per_gateway(kib(run.empty.now)))),
    figure("edge_idle_kib", "memory of an idle edge, KiB", 1, |run| Some(run.idle())),
    figure("edge_idle_peak_kib", "  at the most, while all came, KiB", 1, |run| Some(run.per_edge(run.idle.peak, run.empty.resident))),
    figure("edge_idle_after_kib", "  after all came back, KiB", 1, |run| Some(run.per_edge(run.after.resident, run.empty_left.resident))),
    figure("cpu_at_rest_percent", "CPU at rest, % of a core", 2, |run| Some(run.cpu_at_rest * 100.0)),
    figure("cpu_at_rest_each_percent", "  of it each gateway, % of a core", 2, |run| run.several(run.per_gateway(run.cpu_at_rest * 100.0))),
    figure("linked_p50_s", "first links p50, s", 2, |run| Some(run.linked.p50.as_secs_f64())),
    figure("linked_p99_s", "first links p99, s", 2, |run| Some(run.linked.p99.as_secs_f64())),
    figure("linked_all_s", "first links all, s", 2, |run| Some(run.linked.all.as_secs_f64())),
    figure("back_p50_s", "back after kill -9 p50, s", 2, |run| run.single(run.back.p50.as_secs_f64())),
    figure("back_p99_s", "back after kill -9 p99, s", 2, |run| run.single(run.back.p99.as_secs_f64())),
    figure("back_all_s", "back after kill -9 all, s", 2, |run| run.single(run.back.all.as_secs_f64())),
    figure("elsewhere_p50_s", "at others after kill -9 of one p50, s", 2, |run| run.several(run.back.p50.as_secs_f64())),
    figure("elsewhere_p99_s", "at others after kill -9 of one p99, s", 2, |run| run.several(run.back.p99.as_secs_f64())),
    figure("elsewhere_all_s", "at others after kill -9 of one all, s", 2, |run| run.several(run.back.all.as_secs_f64())),
    figure("local_p50_ms", "local routing p50, ms", 2, |run| Some(ms(run.local.routing.p50))),
    figure("local_p99_ms", "local routing p99, ms", 2, |run| Some(ms(run.local.routing.p99))),
    figure("local_max_ms", "local routing longest, ms", 2, |run| Some(ms(run.local.routing.all))),
    figure("local_whole_p50_ms", "  with TLS to the ingress p50, ms", 2, |run| Some(ms(run.local.whole.p50))),
    figure("local_whole_p99_ms", "  with TLS to the ingress p99, ms", 2, |run| Some(ms(run.local.whole.p99))),
    figure("local_whole_max_ms", "  with TLS to the ingress longest, ms", 2, |run| Some(ms(run.local.whole.all))),
    figure("forwarded_p50_ms", "forwarded routing p50, ms", 2, |run| run.forwarded.map(|way| ms(way.routing.p50))),
    figure("forwarded_p99_ms", "forwarded routing p99, ms", 2, |run| run.forwarded.map(|way| ms(way.routing.p99))),
    figure("forwarded_max_ms", "forwarded routing longest, ms", 2, |run| run.forwarded.map(|way| ms(way.routing.all))),
    figure("forwarded_whole_p50_ms", "  with TLS to the ingress p50, ms", 2, |run| run.forwarded.map(|way| ms(way.whole.p50))),
    figure("forwarded_whole_p99_ms", "  with TLS to the ingress p99, ms", 2, |run| run.forwarded.map(|way| ms(way.whole.p99))),
    figure("forwarded_whole_max_ms", "  with TLS to the ingress longest, ms", 2, |run| run.forwarded.map(|way| ms(way.whole.all))),
];

impl Run {
    fn idle(&self) -> f64 {
        self.per_edge(self.idle.now, self.empty.now)
    }

    #[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
    fn per_edge(&self, bytes: u64, empty: u64) -> f64 {
        (kib(bytes) - kib(empty)) / self.edges as f64
    }

    #[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
    fn per_gateway(&self, all: f64) -> f64 {
        all / self.gateways as f64
    }

    /// A figure that there is only with one gateway.
    fn single(&self, figure: f64) -> Option<f64> {
        (self.gateways == 1).then_some(figure)
    }

    /// A figure that there is only with several.
    fn several(&self, figure: f64) -> Option<f64> {
        (self.gateways > 1).then_some(figure)
    }
}

/// In one line, to be read while the next run is on.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "an edge {:.1} KiB; at rest {:.2} % of a core; linked in {:.1} s, back in {:.1} s; local p50 {:.2} ms, p99 {:.2} ms",
            self.idle(),
            self.cpu_at_rest * 100.0,
            self.linked.all.as_secs_f64(),
            self.back.all.as_secs_f64(),
            ms(self.local.routing.p50),
            ms(self.local.routing.p99)
        )?;
        self.forwarded.map_or(Ok(()), |Latency { routing, .. }| {
            write!(f, "; forwarded p50 {:.2} ms, p99 {:.2} ms", ms(routing.p50), ms(routing.p99))
        })
    }
}

#[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// All runs, and under which conditions they were.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) gateways: usize,
    pub(crate) heartbeat: Duration,
    pub(crate) requests: u32,
    pub(crate) rate: u32,
    pub(crate) runs: Vec<Run>,
}

impl Report {
    /// Each number of edges with its runs, in the order in which they were measured.
    fn sizes(&self) -> impl Iterator<Item = &[Run]> {
        self.runs.chunk_by(|one, next| one.edges == next.edges)
    }

    /// All that is known.
    pub(crate) fn json(&self) -> Value {
        let values = |runs: &[Run]| -> Map<String, Value> {
            let known = |figure: &Figure| Some((figure.key.to_owned(), figure.median(runs)?.into()));
            FIGURES.iter().filter_map(known).collect()
        };
        let sizes: Vec<Value> = self
            .sizes()
            .map(|runs| {
                let singles: Vec<_> = runs.iter().map(|run| values(std::slice::from_ref(run))).collect();
                json!({ "edges": runs[0].edges, "median": values(runs), "runs": singles })
            })
            .collect();
        json!({
            "cores": cores(),
            "gateways": self.gateways,
            "heartbeat_s": self.heartbeat.as_secs_f64(),
            "requests": self.requests,
            "requests_per_s": self.rate,
            "sizes": sizes,
        })
    }
}

/// A table in Markdown: a line for each figure, a column for each number of edges.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (heartbeat, runs) =
            (humantime::format_duration(self.heartbeat), self.sizes().map(<[_]>::len).max());
        writeln!(
            f,
            "Gateways: {}. Medians of {} runs; {} cores for gateways and edges together; heartbeat {heartbeat}; {} \
             requests, {} a second.\n",
            self.gateways,
            runs.unwrap_or_default(),
            cores(),
            self.requests,
            self.rate
        )?;
        let width = FIGURES.iter().map(|figure| figure.text.len()).max().unwrap_or_default();
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cells: &[String]| {
            write!(f, "| {name:width$} |")?;
            cells.iter().try_for_each(|cell| write!(f, " {cell:>9} |"))?;
            writeln!(f)
        };
        row(f, "edges", &self.sizes().map(|runs| runs[0].edges.to_string()).collect::<Vec<_>>())?;
        row(f, &"-".repeat(width), &self.sizes().map(|_| "--------:".to_owned()).collect::<Vec<_>>())?;
        for figure in &FIGURES {
            let cell = |runs| Some(format!("{:.*}", figure.decimals, figure.median(runs)?));
            // All runs are of one kind.
            if let Some(cells) = self.sizes().map(cell).collect::<Option<Vec<String>>>() {
                row(f, figure.text, &cells)?;
            }
        }
        Ok(())
    }
}

impl Figure {
    /// Of an even number, the lower of the two in the middle.
    fn median(&self, runs: &[Run]) -> Option<f64> {
        let mut values: Vec<f64> = runs.iter().filter_map(self.of).collect();
        values.sort_by(f64::total_cmp);
        values.get((values.len().max(1) - 1) / 2).copied()
    }
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}
