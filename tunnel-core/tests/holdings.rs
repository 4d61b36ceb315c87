//! What gateways tell one another over a link: nothing of it is lost, and nobody has to keep more than some of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use tokio::{
    io::{BufReader, duplex},
    time::timeout,
};
use tunnel_core::{
    Link, LinkConfig, LinkEvent, LinkHandle,
    proto::messages::{Gateway, Hello, Holding, Holdings, Welcome},
};

const A_WHILE: Duration = Duration::from_secs(1);
/// Far more than what the windows, buffers and queues on the way hold.
const MANY: u64 = 200;

/// The side that was dialled and tells, and the side that dialled and hears.
async fn pair() -> (Link, Link) {
    let (near, far) = duplex(64 * 1024);
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let welcome = Welcome { version: 1, heartbeat_ms: 60_000, ..Welcome::default() };
    let (dialer, acceptor) =
        tokio::join!(Link::connect(BufReader::new(near), hello, LinkConfig::default()), async {
            Link::accept(BufReader::new(far), LinkConfig::default()).await.unwrap().welcome(welcome).unwrap()
        });
    (acceptor, dialer.unwrap().0)
}

fn large(part: u64) -> Holdings {
    let holding = |number: usize| Holding { node: format!("node-{number:0200}"), generation: part };
    Holdings { epoch: 1, part, more: false, holdings: (0..200).map(holding).collect() }
}

/// Tells parts until nobody takes the next one; which one that is.
async fn fill(teller: &LinkHandle) -> u64 {
    for part in 0..MANY {
        if timeout(A_WHILE, teller.tell_holdings(large(part))).await.is_err() {
            return part;
        }
    }
    panic!("all of it was taken, although nobody listens");
}

#[tokio::test(start_paused = true)]
async fn who_tells_waits_for_who_does_not_listen_and_nothing_is_lost() {
    let (teller, mut hearer) = pair().await;
    let handle = teller.handle();
    let next = fill(&handle).await;
    assert!(next < 40, "{next} parts of 40 KiB were kept");
    // What was given up was not sent: the same part is told again.
    let telling = tokio::spawn(async move {
        for part in next..MANY {
            handle.tell_holdings(large(part)).await;
        }
    });
    for part in 0..MANY {
        match timeout(A_WHILE, hearer.next()).await.unwrap() {
            LinkEvent::Holdings(holdings) => assert_eq!(holdings, large(part)),
            other => panic!("{other:?}"),
        }
    }
    telling.await.unwrap();
    assert!(timeout(A_WHILE, hearer.next()).await.is_err(), "something was told twice");
}

#[tokio::test(start_paused = true)]
async fn what_a_gateway_says_of_itself_is_not_lost_behind_holdings() {
    let (teller, mut hearer) = pair().await;
    let handle = teller.handle();
    let about = |draining| Gateway { id: "gw-a".to_owned(), draining, ..Gateway::default() };
    // As many as wait for the owner; one more and the control stream itself waits.
    for part in 0..8 {
        handle.tell_holdings(Holdings { epoch: 1, part, ..Holdings::default() }).await;
    }
    tokio::time::sleep(A_WHILE).await;
    handle.introduce(about(false));
    handle.introduce(about(true));
    tokio::time::sleep(A_WHILE).await;
    let mut parts = 0;
    let said = loop {
        match timeout(A_WHILE, hearer.next()).await.expect("it was lost") {
            LinkEvent::Holdings(_) => parts += 1,
            LinkEvent::Gateway(gateway) => break gateway,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((parts, said), (8, about(true)));
    assert!(timeout(A_WHILE, hearer.next()).await.is_err(), "the first of the two was sent as well");
}

#[tokio::test(start_paused = true)]
async fn what_was_told_before_the_end_is_heard_before_it() {
    let (teller, mut hearer) = pair().await;
    let handle = teller.handle();
    for part in 0..6 {
        handle.tell_holdings(large(part)).await;
    }
    tokio::time::sleep(A_WHILE).await;
    handle.close("test");
    for part in 0..6 {
        assert!(matches!(hearer.next().await, LinkEvent::Holdings(told) if told.part == part));
    }
    assert!(matches!(hearer.next().await, LinkEvent::Closed(_)));
    // Nobody is there to take more, and nobody fails for it.
    handle.tell_holdings(large(6)).await;
    assert!(timeout(A_WHILE, handle.tell_holdings(large(7))).await.is_err());
}
