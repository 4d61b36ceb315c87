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
    /// The gateway without links.
    pub(crate) empty: Memory,
    /// With all links, before any request.
    pub(crate) idle: Memory,
    /// With all links, after they came back to a new gateway.
    pub(crate) after: Memory,
    /// Of one core.
    pub(crate) cpu_at_rest: f64,
    /// From the start of all edges.
    pub(crate) linked: Spread,
    /// From the gateway's end.
    pub(crate) back: Spread,
    pub(crate) local: Latency,
}

struct Figure {
    /// In JSON, with its unit.
    key: &'static str,
    /// In the table.
    text: &'static str,
    decimals: usize,
    of: fn(&Run) -> f64,
}

const fn figure(key: &'static str, text: &'static str, decimals: usize, of: fn(&Run) -> f64) -> Figure {
    Figure { key, text, decimals, of }
}

#[rustfmt::skip]
const FIGURES: [Figure; 17] = [
    figure("gateway_empty_kib", "gateway without edges, KiB", 0, |run| kib(run.empty.now)),
    figure("edge_idle_kib", "memory of an idle edge, KiB", 1, |run| run.per_edge(run.idle.now)),
    figure("edge_idle_peak_kib", "  at the most, while all came, KiB", 1, |run| run.per_edge(run.idle.peak)),
    figure("edge_idle_after_kib", "  after all came back, KiB", 1, |run| run.per_edge(run.after.now)),
    figure("cpu_at_rest_percent", "CPU at rest, % of a core", 2, |run| run.cpu_at_rest * 100.0),
    figure("linked_p50_s", "first links p50, s", 2, |run| run.linked.p50.as_secs_f64()),
    figure("linked_p99_s", "first links p99, s", 2, |run| run.linked.p99.as_secs_f64()),
    figure("linked_all_s", "first links all, s", 2, |run| run.linked.all.as_secs_f64()),
    figure("back_p50_s", "back after kill -9 p50, s", 2, |run| run.back.p50.as_secs_f64()),
    figure("back_p99_s", "back after kill -9 p99, s", 2, |run| run.back.p99.as_secs_f64()),
    figure("back_all_s", "back after kill -9 all, s", 2, |run| run.back.all.as_secs_f64()),
    figure("local_p50_ms", "local routing p50, ms", 2, |run| ms(run.local.routing.p50)),
    figure("local_p99_ms", "local routing p99, ms", 2, |run| ms(run.local.routing.p99)),
    figure("local_max_ms", "local routing longest, ms", 2, |run| ms(run.local.routing.all)),
    figure("local_whole_p50_ms", "  with TLS to the ingress p50, ms", 2, |run| ms(run.local.whole.p50)),
    figure("local_whole_p99_ms", "  with TLS to the ingress p99, ms", 2, |run| ms(run.local.whole.p99)),
    figure("local_whole_max_ms", "  with TLS to the ingress longest, ms", 2, |run| ms(run.local.whole.all)),
];

impl Run {
    #[allow(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
    fn per_edge(&self, bytes: u64) -> f64 {
        (kib(bytes) - kib(self.empty.now)) / self.edges as f64
    }
}

/// In one line, to be read while the next run is on.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "an edge {:.1} KiB; at rest {:.2} % of a core; linked in {:.1} s, back in {:.1} s; local p50 {:.2} ms, p99 {:.2} ms",
            self.per_edge(self.idle.now),
            self.cpu_at_rest * 100.0,
            self.linked.all.as_secs_f64(),
            self.back.all.as_secs_f64(),
            ms(self.local.routing.p50),
            ms(self.local.routing.p99)
        )
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
        let values = |runs: &[Run], of: fn(&Figure, &[Run]) -> f64| -> Map<String, Value> {
            FIGURES.iter().map(|figure| (figure.key.to_owned(), of(figure, runs).into())).collect()
        };
        let sizes: Vec<Value> = self
            .sizes()
            .map(|runs| {
                let single = |run: &Run| values(std::slice::from_ref(run), Figure::median);
                let singles: Vec<_> = runs.iter().map(single).collect();
                json!({ "edges": runs[0].edges, "median": values(runs, Figure::median), "runs": singles })
            })
            .collect();
        json!({
            "cores": cores(),
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
            "Medians of {} runs; {} cores for gateway and edges together; heartbeat {heartbeat}; {} requests, {} a \
             second.\n",
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
            let cells: Vec<String> =
                self.sizes().map(|runs| format!("{:.*}", figure.decimals, figure.median(runs))).collect();
            row(f, figure.text, &cells)?;
        }
        Ok(())
    }
}

impl Figure {
    /// Of an even number, the lower of the two in the middle.
    fn median(&self, runs: &[Run]) -> f64 {
        let mut values: Vec<f64> = runs.iter().map(self.of).collect();
        values.sort_by(f64::total_cmp);
        values.get((values.len().max(1) - 1) / 2).copied().unwrap_or_default()
    }
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}
