//! Far sides that vanish without a word: a black hole where they were. In a network namespace, which the test makes.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{process::Command, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tunnel_core::{RelayEnd, Socket, Timeouts, relay};

/// Set for the process in the namespace.
const INSIDE: &str = "EDGE_TUNNEL_VANISH_INSIDE";

/// What goes on when one side of a relay vanishes, the first or the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    /// It is being sent to.
    Receives {
        first: bool,
    },
    /// It was sending.
    Sends {
        first: bool,
    },
    /// It was sending, and the other side takes nothing.
    SendsTooMuch,
    /// It has said that it will send no more, and is being sent to.
    HalfClosed,
    Rests,
}

#[test]
#[ignore = "needs root and iptables: cargo test -- --include-ignored"]
fn a_far_side_that_vanishes_is_noticed_in_30_seconds_whatever_goes_on() {
    if std::env::var_os(INSIDE).is_some() {
        command("ip", &["link", "set", "lo", "up"]);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.unwrap().block_on(all_cases());
    }
    let inside = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(inside.unwrap().success());
}

async fn all_cases() {
    let mut cases = JoinSet::new();
    for first in [true, false] {
        cases.spawn(vanish(Case::Receives { first }));
        cases.spawn(vanish(Case::Sends { first }));
    }
    for case in [Case::SendsTooMuch, Case::HalfClosed, Case::Rests] {
        cases.spawn(vanish(case));
    }
    while let Some(done) = cases.join_next().await {
        done.unwrap();
    }
}

async fn vanish(case: Case) {
    let (first, first_port, near_first) = far_side().await;
    let (second, second_port, near_second) = far_side().await;
    let relaying = tokio::spawn(async move {
        relay(near_first, near_second, Timeouts::of("the test"), std::future::pending()).await.end
    });
    let is_first = matches!(case, Case::Receives { first: true } | Case::Sends { first: true });
    let (vanishing, other) = if is_first { (first, second) } else { (second, first) };
    let (mut from_vanishing, mut to_vanishing) = vanishing.into_split();
    let (mut from_other, mut to_other) = other.into_split();
    let mut tasks = JoinSet::new();
    if matches!(case, Case::HalfClosed) {
        to_vanishing.shutdown().await.unwrap();
    }
    if matches!(case, Case::Receives { .. } | Case::HalfClosed) {
        tasks.spawn(async move { while to_other.write_all(&[7; 10_000]).await.is_ok() {} });
        tasks.spawn(async move {
            while from_vanishing.read(&mut [0; 10_000]).await.is_ok_and(|read| read > 0) {}
        });
    }
    if matches!(case, Case::Sends { .. } | Case::SendsTooMuch) {
        tasks.spawn(async move { while to_vanishing.write_all(&[7; 10_000]).await.is_ok() {} });
    }
    if matches!(case, Case::Sends { .. }) {
        tasks.spawn(
            async move { while from_other.read(&mut [0; 10_000]).await.is_ok_and(|read| read > 0) {} },
        );
    }
    sleep(Duration::from_secs(2)).await;
    assert!(!relaying.is_finished(), "{case:?}");
    let port = if is_first { first_port } else { second_port }.to_string();
    for which in ["--dport", "--sport"] {
        command("iptables", &["-w", "-A", "INPUT", "-p", "tcp", which, &port, "-j", "DROP"]);
    }
    let vanished = Instant::now();
    let end = timeout(Duration::from_secs(120), relaying).await;
    let took = vanished.elapsed();
    let end = end.unwrap_or_else(|_| panic!("{case:?}: not noticed")).unwrap();
    assert!(
        (Duration::from_secs(20)..Duration::from_secs(32)).contains(&took),
        "{case:?}: {took:?}, {end:?}"
    );
    assert_eq!(matches!(&end, RelayEnd::FirstFailed(_)), is_first, "{case:?}: {end:?}");
    assert_eq!(matches!(&end, RelayEnd::SecondFailed(_)), !is_first, "{case:?}: {end:?}");
}

/// The far side, its port, and this side.
async fn far_side() -> (TcpStream, u16, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (far.unwrap().0, address.port(), Socket::new(near.unwrap()))
}

fn command(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).status();
    assert!(done.unwrap().success(), "{program} {arguments:?}");
}
