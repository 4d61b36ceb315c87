//! The simulation over many seeds. `SEEDS=A..B` chooses which; one seed alone prints its trace.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a failing seed must be told to whoever runs the tests")]

use std::{
    env,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use tunnel_tests::simulation::{self, Report};

/// What CI runs. More by hand: see CONTRIBUTING.md.
const DEFAULT: std::ops::Range<u64> = 0..120;

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = env::var("SEEDS") else { return DEFAULT };
    let range = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    range.unwrap_or_else(|| panic!("SEEDS={text:?} is not of the form 0..200"))
}

/// Runs all seeds on all cores, in no certain order.
fn run_all(seeds: std::ops::Range<u64>) -> Vec<(u64, Report)> {
    let next = AtomicU64::new(seeds.start);
    let reports = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let report = simulation::run(seed);
                    reports.lock().unwrap().push((seed, report));
                }
            });
        }
    });
    reports.into_inner().unwrap()
}

#[test]
fn every_seed_keeps_every_promise() {
    let reports = run_all(seeds());
    let count = reports.len();
    let sum = |what: fn(&Report) -> usize| reports.iter().map(|(_, report)| what(report)).sum::<usize>();
    let (whole, failed_loudly, refused) =
        (sum(|report| report.whole), sum(|report| report.failed_loudly), sum(|report| report.refused));
    println!(
        "{count} seeds: {whole} requests whole, {failed_loudly} failed loudly, {refused} refused with a cause"
    );
    let failed: Vec<_> = reports.iter().filter(|(_, report)| !report.breaches.is_empty()).collect();
    for (seed, report) in &failed {
        let (breaches, after) = (report.breaches.join("\n"), seed + 1);
        println!(
            "\nseed {seed} broke a promise:\n{breaches}\nreplay it: \
             SEEDS={seed}..{after} cargo test -p tunnel-tests --test simulation -- --nocapture"
        );
    }
    if let [(_, report)] = &reports[..] {
        println!("{}", report.trace.join("\n"));
    }
    assert!(failed.is_empty(), "{} of {count} seeds failed", failed.len());
    // A simulation in which nothing gets through, or nothing goes wrong, proves nothing.
    assert!(count < 50 || (whole > count && failed_loudly > count && refused > count));
}

#[test]
fn a_seed_does_the_same_each_time() {
    for seed in [1, 7] {
        let (first, second) = (simulation::run(seed), simulation::run(seed));
        assert_eq!(first, second, "seed {seed}");
    }
}
