//! Links between two real sides: what every user of a link relies on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex},
    time::Instant,
};
use tunnel_core::{
    Aborted, Incoming, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, OpenError, OpenRequest,
    PendingStream, TunnelStream,
    proto::messages::{AbortCode, Hello, RefusalCode, Reject, RejectCode, Welcome},
};

const TIMEOUT: Duration = Duration::from_secs(5);

fn hello() -> Hello {
    Hello { min_version: 1, max_version: 1, node_claim: "edge-a".to_owned(), ..Hello::default() }
}

fn welcome() -> Welcome {
    Welcome { version: 1, heartbeat_ms: 1000, ..Welcome::default() }
}

fn request(target: &str) -> OpenRequest {
    OpenRequest { target: target.to_owned(), ..OpenRequest::default() }
}

/// A link between an edge and a gateway; the edge's owner is the test.
struct Pair {
    gateway: LinkHandle,
    gateway_link: tokio::task::JoinHandle<LinkError>,
    edge: Link,
}

async fn until_closed(mut link: Link) -> LinkError {
    loop {
        if let LinkEvent::Closed(error) = link.next().await {
            return error;
        }
    }
}

async fn pair_over(near: DuplexStream, far: DuplexStream, config: LinkConfig) -> Pair {
    let (edge, gateway) = tokio::join!(Link::connect(BufReader::new(near), hello(), config.clone()), async {
        let pending = Link::accept(BufReader::new(far), config).await.unwrap();
        assert_eq!(pending.hello().node_claim, "edge-a");
        pending.welcome(welcome()).unwrap()
    });
    let handle = gateway.handle();
    Pair { gateway: handle, gateway_link: tokio::spawn(until_closed(gateway)), edge: edge.unwrap().0 }
}

async fn pair() -> Pair {
    let (near, far) = duplex(64 * 1024);
    pair_over(near, far, LinkConfig::default()).await
}

impl Pair {
    async fn incoming(&mut self) -> Incoming {
        loop {
            if let LinkEvent::Stream(incoming) = self.edge.next().await {
                return incoming;
            }
        }
    }

    async fn pending(&mut self) -> PendingStream {
        self.incoming().await.header(Instant::now() + TIMEOUT).await.unwrap()
    }

    /// A stream as both sides see it: gateway's end, edge's end.
    async fn stream(&mut self) -> (TunnelStream, TunnelStream) {
        self.stream_for(request("edge-a:10250")).await
    }

    async fn stream_for(&mut self, request: OpenRequest) -> (TunnelStream, TunnelStream) {
        let gateway = self.gateway.clone();
        let open = tokio::spawn(async move { gateway.open(request, TIMEOUT).await });
        let pending = self.pending().await;
        assert_eq!(pending.open().target, "edge-a:10250");
        let edge = pending.accept("127.0.0.1:10250".to_owned()).await.unwrap();
        let (gateway, address) = open.await.unwrap().unwrap();
        assert_eq!(address, "127.0.0.1:10250");
        (gateway, edge)
    }
}

/// The reason that a stream's error carries.
fn aborted(error: &io::Error) -> &Aborted {
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    error.get_ref().and_then(|inner| inner.downcast_ref()).expect("a stream's error says why")
}

#[tokio::test]
async fn bytes_and_half_close_go_both_ways() {
    let mut pair = pair().await;
    let (mut gateway, mut edge) = pair.stream().await;
    let mut text = String::new();

    gateway.write_all(b"question").await.unwrap();
    gateway.shutdown().await.unwrap();
    edge.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");

    // The other direction is still open.
    text.clear();
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    gateway.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");

    drop((gateway, edge));
    assert_eq!(pair.gateway.active_streams(), 0);
    assert_eq!(pair.edge.handle().active_streams(), 0);
}

#[tokio::test]
async fn a_stream_dropped_before_its_end_is_a_reset_at_the_other_side() {
    let mut pair = pair().await;
    for drop_gateway in [true, false] {
        let (gateway, edge) = pair.stream().await;
        let (mut dropped, mut kept) = if drop_gateway { (gateway, edge) } else { (edge, gateway) };
        dropped.write_all(b"half a mess").await.unwrap();
        drop(dropped);
        let error = kept.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(aborted(&error).code, AbortCode::Cancelled);
    }
}

#[tokio::test]
async fn an_abort_brings_its_reason_even_behind_a_half_close() {
    let mut pair = pair().await;
    let (mut gateway, mut edge) = pair.stream().await;
    // yamux alone would turn this drop into a clean FIN: the far side has already finished.
    gateway.shutdown().await.unwrap();
    assert_eq!(edge.read(&mut [0; 1]).await.unwrap(), 0);
    edge.write_all(b"partial").await.unwrap();
    edge.abort(Aborted::new(AbortCode::Reset, "the kubelet went away"));
    drop(edge);
    let error = gateway.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(aborted(&error), &Aborted::new(AbortCode::Reset, "the kubelet went away"));
}

#[tokio::test]
async fn a_writer_learns_of_an_abort() {
    let mut pair = pair().await;
    let (mut gateway, edge) = pair.stream().await;
    drop(edge);
    let chunk = vec![0; 64 * 1024];
    let error = loop {
        if let Err(error) = gateway.write_all(&chunk).await {
            break error;
        }
    };
    assert_eq!(aborted(&error).code, AbortCode::Cancelled);
}

#[tokio::test]
async fn a_writer_blocked_by_a_slow_reader_learns_of_an_abort() {
    let mut pair = pair().await;
    let (mut gateway, edge) = pair.stream().await;
    let blocked = tokio::spawn(async move { gateway.write_all(&vec![0; 4 << 20]).await });
    // The window fills before the reader gives up: the writer is waiting, not writing.
    let mut edge_reader = edge;
    edge_reader.read_exact(&mut [0; 1]).await.unwrap();
    tokio::task::yield_now().await;
    drop(edge_reader);
    let error = tokio::time::timeout(TIMEOUT, blocked).await.unwrap().unwrap().unwrap_err();
    assert_eq!(aborted(&error).code, AbortCode::Cancelled);
}

#[tokio::test]
async fn a_refusal_brings_its_code_and_text() {
    let mut pair = pair().await;
    let gateway = pair.gateway.clone();
    let open = tokio::spawn(async move { gateway.open(request("edge-a:22"), TIMEOUT).await });
    pair.pending().await.refuse(RefusalCode::NotAllowed, "port 22 is not on the list").await.unwrap();
    let Err(OpenError::Refused { code, text }) = open.await.unwrap() else { panic!("was not refused") };
    assert_eq!((code, &*text), (RefusalCode::NotAllowed, "port 22 is not on the list"));
    assert_eq!(pair.gateway.active_streams(), 0);
}

#[tokio::test]
async fn an_opener_that_gives_up_is_noticed() {
    let mut pair = pair().await;
    let gateway = pair.gateway.clone();
    let open = tokio::spawn(async move { gateway.open(request("edge-a:10250"), TIMEOUT).await });
    let mut pending = pair.pending().await;
    open.abort();
    let reason = tokio::time::timeout(TIMEOUT, pending.cancelled()).await.unwrap();
    assert_eq!(reason.code, AbortCode::Cancelled);
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_never_answers_is_a_timeout() {
    let mut pair = pair().await;
    let gateway = pair.gateway.clone();
    let open = tokio::spawn(async move { gateway.open(request("edge-a:10250"), TIMEOUT).await });
    let _unanswered = pair.pending().await;
    assert!(matches!(open.await.unwrap(), Err(OpenError::TimedOut(TIMEOUT))));
    assert_eq!(pair.gateway.active_streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_link_dies_after_two_heartbeats_and_takes_its_streams_along() {
    // A wire that can be held without being cut: the half-open link.
    let (near, mut middle_near) = duplex(64 * 1024);
    let (mut middle_far, far) = duplex(64 * 1024);
    let (hold, on_hold) = tokio::sync::oneshot::channel::<()>();
    let wire = tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut middle_near, &mut middle_far) => {}
            _ = on_hold => {}
        }
        (middle_near, middle_far)
    });
    let mut pair = pair_over(near, far, LinkConfig::default()).await;
    let (mut gateway, mut edge) = pair.stream().await;
    // A few heartbeats pass: an idle link stays up.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!pair.gateway_link.is_finished());

    hold.send(()).unwrap();
    let _still_open = wire.await.unwrap();
    let held_at = Instant::now();
    let error = gateway.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(aborted(&error).code, AbortCode::LinkLost);
    assert!(held_at.elapsed() <= Duration::from_millis(2001), "{:?}", held_at.elapsed());
    let error = edge.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(aborted(&error).code, AbortCode::LinkLost);
    assert!(matches!(pair.gateway_link.await.unwrap(), LinkError::Control(_)));
}

#[tokio::test]
async fn a_cut_link_resets_its_streams_at_once() {
    let mut pair = pair().await;
    let (mut gateway, edge) = pair.stream().await;
    let Pair { edge: link, .. } = pair;
    drop(link);
    let error = gateway.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(aborted(&error).code, AbortCode::LinkLost);
    drop(edge);
}

#[tokio::test]
async fn a_closed_link_says_why_to_its_own_side_and_is_closed_at_the_other() {
    let mut pair = pair().await;
    let (mut gateway, _edge) = pair.stream().await;
    pair.gateway.close("superseded");
    let error = gateway.read(&mut [0; 1]).await.unwrap_err();
    assert!(aborted(&error).text.contains("superseded"));
    assert!(
        matches!(pair.gateway_link.await.unwrap(), LinkError::ClosedHere(reason) if reason == "superseded")
    );
    assert!(matches!(until_closed(pair.edge).await, LinkError::ClosedByPeer));
    let after = pair.gateway.open(request("edge-a:1"), TIMEOUT).await;
    assert!(matches!(after, Err(OpenError::LinkLost(_))), "{after:?}");
}

#[tokio::test]
async fn streams_above_the_maximum_are_refused_one_by_one() {
    let (near, far) = duplex(64 * 1024);
    let config = LinkConfig { max_streams: 2, ..LinkConfig::default() };
    let mut pair = pair_over(near, far, config).await;
    let first = pair.stream().await;
    let _second = pair.stream().await;
    let third = pair.gateway.open(request("edge-a:1"), TIMEOUT).await;
    assert!(matches!(third, Err(OpenError::Overloaded { max: 2, reserved: 0 })));
    drop(first);
    // The place is free once the end has left for the far side.
    let deadline = Instant::now() + TIMEOUT;
    while pair.gateway.active_streams() > 1 || pair.edge.handle().active_streams() > 1 {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    tokio::time::timeout(TIMEOUT, pair.stream()).await.unwrap();
}

#[tokio::test]
async fn reserved_streams_are_for_those_that_may_be_one() {
    let (near, far) = duplex(64 * 1024);
    // A quarter of eight, and not the three that are wanted.
    let config = LinkConfig { max_streams: 8, reserved_streams: 3, ..LinkConfig::default() };
    let mut pair = pair_over(near, far, config).await;
    let reserved = || OpenRequest { reserved: true, ..request("edge-a:10250") };
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(pair.stream().await);
    }
    streams.push(pair.stream_for(reserved()).await);
    // The reserved one has taken none of the others' places.
    streams.push(pair.stream().await);
    let text = pair.gateway.open(request("edge-a:1"), TIMEOUT).await.unwrap_err().to_string();
    assert_eq!(text, "the link carries as many streams as it may (8, 2 of them reserved)");
    streams.push(pair.stream_for(reserved()).await);
    let text = pair.gateway.open(reserved(), TIMEOUT).await.unwrap_err().to_string();
    assert_eq!(text, "the link carries as many streams as it may (8)");
    // One that may be reserved takes any other place, too.
    streams.remove(0);
    let deadline = Instant::now() + TIMEOUT;
    while pair.gateway.active_streams() > 7 || pair.edge.handle().active_streams() > 7 {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    tokio::time::timeout(TIMEOUT, pair.stream_for(reserved())).await.unwrap();
}

#[tokio::test]
async fn a_side_that_takes_no_streams_says_so() {
    let (near, far) = duplex(64 * 1024);
    let config = LinkConfig { accept_streams: false, ..LinkConfig::default() };
    let pair = pair_over(near, far, config).await;
    let refused = pair.edge.handle().open(request("gateway:1"), TIMEOUT).await;
    assert!(matches!(refused, Err(OpenError::Refused { code: RefusalCode::Unsupported, .. })), "{refused:?}");
}

#[tokio::test]
async fn a_reader_that_never_reads_stops_only_its_own_stream() {
    let mut pair = pair().await;
    let (mut stuck, _never_reads) = pair.stream().await;
    let (mut lively, mut echo) = pair.stream().await;
    let stuck = tokio::spawn(async move { stuck.write_all(&vec![1; 8 << 20]).await });
    for round in 0..200u8 {
        lively.write_all(&[round; 1000]).await.unwrap();
        let mut got = [0; 1000];
        tokio::time::timeout(TIMEOUT, echo.read_exact(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, [round; 1000]);
    }
    assert!(!stuck.is_finished());
}

#[tokio::test]
async fn a_drain_reaches_the_other_side_and_stops_new_streams_only() {
    let mut pair = pair().await;
    let (mut gateway, mut edge) = pair.stream().await;
    pair.edge.handle().drain(Duration::from_secs(30), "going down for an update");
    let deadline = Instant::now() + TIMEOUT;
    while !pair.gateway.peer_draining() {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    assert!(matches!(pair.gateway.open(request("edge-a:1"), TIMEOUT).await, Err(OpenError::Draining)));
    gateway.write_all(b"still here").await.unwrap();
    let mut got = [0; 10];
    edge.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"still here");
}

/// A link whose gateway can open so many more streams.
async fn pair_with_numbers_for(streams: u32) -> Pair {
    let (near, far) = duplex(64 * 1024);
    // An acceptor's numbers are even, and 0 is none of them.
    let streams_before = (1 << 31) - 1 - streams;
    pair_over(near, far, LinkConfig { streams_before, ..LinkConfig::default() }).await
}

#[tokio::test]
async fn a_link_without_numbers_for_more_streams_goes_on_with_those_that_run() {
    let mut pair = pair_with_numbers_for(2).await;
    let (mut gateway, mut edge) = pair.stream().await;
    assert!(pair.gateway.wears_out());
    assert!(matches!(pair.edge.next().await, LinkEvent::WearsOut));
    let last = pair.stream().await;
    assert!(!pair.gateway.peer_draining());
    for _ in 0..2 {
        let more = pair.gateway.open(request("edge-a:1"), TIMEOUT).await;
        assert!(matches!(more, Err(OpenError::Draining)), "{more:?}");
    }
    assert!(pair.gateway.peer_draining());
    let LinkEvent::Draining(drain) = pair.edge.next().await else { panic!("the edge was not told") };
    assert!(drain.reason.contains("no numbers"), "{}", drain.reason);
    assert_eq!(drain.deadline_ms, 30 * 24 * 3600 * 1000);

    gateway.write_all(b"still here").await.unwrap();
    gateway.shutdown().await.unwrap();
    let mut text = String::new();
    edge.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "still here");
    edge.shutdown().await.unwrap();
    assert_eq!(gateway.read(&mut [0; 1]).await.unwrap(), 0);
    drop((gateway, edge));
    // The last stream keeps the link.
    let handle = pair.gateway.clone();
    let mut idle = tokio::spawn(async move { handle.idle().await });
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut idle).await.is_err());
    assert!(!pair.gateway_link.is_finished());
    drop(last);
    tokio::time::timeout(TIMEOUT, idle).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_link_wears_out_while_there_are_numbers_for_a_million_streams() {
    let mut pair = pair_with_numbers_for((1 << 20) + 1).await;
    let _first = pair.stream().await;
    assert!(!pair.gateway.wears_out());
    let _second = pair.stream().await;
    assert!(pair.gateway.wears_out() && pair.edge.handle().wears_out());
}

#[tokio::test]
async fn a_gateway_may_reject_a_link_with_a_reason() {
    let (near, far) = duplex(64 * 1024);
    let config = LinkConfig::default();
    let (edge, ()) = tokio::join!(Link::connect(BufReader::new(near), hello(), config.clone()), async {
        let reject = Reject {
            code: RejectCode::Identity.into(),
            text: "the certificate names edge-b".to_owned(),
            retry_after_ms: 1000,
        };
        Link::accept(BufReader::new(far), config).await.unwrap().reject(reject).await;
    });
    let error = edge.unwrap_err();
    assert_eq!(error.to_string(), "the gateway rejected the link: the certificate names edge-b");
}

#[tokio::test(start_paused = true)]
async fn a_side_that_says_nothing_does_not_hold_the_handshake() {
    let (near, _silent) = duplex(64 * 1024);
    let error = Link::accept(BufReader::new(near), LinkConfig::default()).await.unwrap_err();
    assert_eq!(error.label(), "handshake_timeout");
    let (near, _silent) = duplex(64 * 1024);
    let error = Link::connect(BufReader::new(near), hello(), LinkConfig::default()).await.unwrap_err();
    assert!(error.to_string().contains("in time"), "{error}");
}

#[tokio::test]
async fn heartbeats_measure_the_link() {
    let pair = pair().await;
    let deadline = Instant::now() + TIMEOUT;
    while pair.gateway.rtt().is_none() {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_thousand_streams_share_a_link() {
    let mut pair = pair().await;
    let edge_handle = pair.edge.handle();
    let gateway = pair.gateway.clone();
    let echo = tokio::spawn(async move {
        let mut echoes = tokio::task::JoinSet::new();
        while echoes.len() < 1000 {
            let pending = pair.pending().await;
            echoes.spawn(async move {
                let mut stream = pending.accept(String::new()).await.unwrap();
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        }
        echoes.join_all().await;
        pair
    });
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..1000u32 {
        let gateway = gateway.clone();
        callers.spawn(async move {
            let (mut stream, _) = gateway.open(request("edge-a:1"), TIMEOUT).await.unwrap();
            let bytes = number.to_be_bytes().repeat(5000);
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.unwrap();
            assert!(back == bytes, "stream {number} came back different");
        });
    }
    callers.join_all().await;
    let _pair = echo.await.unwrap();
    assert_eq!((gateway.active_streams(), edge_handle.active_streams()), (0, 0));
}
