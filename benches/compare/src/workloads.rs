//! The workloads, and what each of them measures. Called by `main`; that of bulk bytes is in `bulk`.
//!
//! Anything that goes wrong ends a workload, since its figures would say nothing; but requests that fail are counted.

use std::{
    io,
    ops::Range,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::{JoinError, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    blocks::Direction,
    bulk::Load,
    report::{self, Times},
    target::{ANSWERED, ASKED, ECHO, REQUEST},
    way::{Stream, Way, WayError},
};

/// What may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Bulk bytes one way.
    Bulk,
    /// 64 bytes there and back, again and again on one stream.
    Ping,
    /// From nothing to the first byte of the target's answer, one stream after the other.
    FirstByte,
    /// Short requests, each on a new stream.
    Requests,
    /// 64 bytes there and back while others carry bulk bytes.
    Interleaved,
    /// Streams that do nothing until standard input ends.
    Idle,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) warm_up: Duration,
    pub(crate) seconds: Duration,
    /// Beside these two.
    pub(crate) limit: Duration,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriveError {
    #[error(transparent)]
    Open(#[from] WayError),
    #[error("a stream broke while {doing}: {error}")]
    Broken { doing: &'static str, error: io::Error },
    #[error("{sent} bytes were sent, but the target counted {received}")]
    Count { sent: u64, received: u64 },
    #[error("what came back is not what was sent")]
    Mangled,
    #[error("a stream goes on after its end")]
    Endless,
    #[error("a stream ended before it was asked to")]
    Early,
    #[error("nothing was done in the measured time: make it longer with --seconds")]
    Nothing,
    #[error("no request was answered, and {failed} failed, the first because: {first}")]
    Requests { failed: usize, first: Box<Self> },
    #[error("not done {} s after the measured time should have ended", limit.as_secs_f64())]
    Late { limit: Duration },
    #[error("bulk bytes cannot have threads: {0}")]
    Threads(io::Error),
    #[error("a task failed: {0}")]
    Task(#[from] JoinError),
}

impl DriveError {
    pub(crate) fn broken(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Broken { doing, error }
    }
}

/// What goes to and fro.
const WORD: usize = 64;
/// Streams that are being opened at a time.
const OPENING: usize = 32;
/// How long a stream may take to end, and a request from beginning to end.
const SHORT_LIMIT: Duration = Duration::from_secs(10);

impl Workload {
    pub(crate) fn usual_streams(self) -> usize {
        match self {
            Self::Interleaved => 8,
            Self::Requests => 16,
            Self::Idle => 1000,
            Self::Bulk | Self::Ping | Self::FirstByte => 1,
        }
    }

    /// Drives it. Its figures. Idle streams are not held.
    pub(crate) async fn run(
        self,
        way: &Way,
        streams: usize,
        direction: Direction,
        timing: Timing,
    ) -> Result<Value, DriveError> {
        let work = async {
            match self {
                Self::Bulk => bulk(way, streams, direction, timing).await,
                Self::Ping => ping(way, timing).await,
                Self::FirstByte => first_byte(way, timing).await,
                Self::Requests => requests(way, streams, timing).await,
                Self::Interleaved => interleaved(way, streams, direction, timing).await,
                Self::Idle => {
                    open_idle(way, streams, timing).await?.check(timing).await?;
                    Ok(report::open(streams))
                }
            }
        };
        bounded(timing, work).await
    }
}

async fn bounded<T>(
    timing: Timing,
    work: impl Future<Output = Result<T, DriveError>>,
) -> Result<T, DriveError> {
    let late = |_| DriveError::Late { limit: timing.limit };
    timeout(timing.warm_up + timing.seconds + timing.limit, work).await.map_err(late)?
}

async fn bulk(way: &Way, streams: usize, direction: Direction, timing: Timing) -> Result<Value, DriveError> {
    let mut load = Load::start(way, streams, direction).await?;
    load.during(pause(timing.warm_up)).await?;
    load.begin();
    load.during(pause(timing.seconds)).await?;
    let (moved, total) = load.finish().await?;
    Ok(report::bulk(moved, total))
}

async fn pause(time: Duration) -> Result<(), DriveError> {
    sleep(time).await;
    Ok(())
}

async fn ping(way: &Way, timing: Timing) -> Result<Value, DriveError> {
    let mut echo = Echo::open(way).await?;
    echo.ping(timing.warm_up).await?;
    let times = echo.ping(timing.seconds).await?;
    echo.close().await?;
    Ok(report::ping(&times))
}

async fn interleaved(
    way: &Way,
    streams: usize,
    direction: Direction,
    timing: Timing,
) -> Result<Value, DriveError> {
    let mut echo = Echo::open(way).await?;
    let mut load = Load::start(way, streams, direction).await?;
    load.during(echo.ping(timing.warm_up)).await?;
    load.begin();
    let times = load.during(echo.ping(timing.seconds)).await?;
    let (moved, total) = load.finish().await?;
    echo.close().await?;
    Ok(report::interleaved(&times, moved, total))
}

async fn first_byte(way: &Way, timing: Timing) -> Result<Value, DriveError> {
    let (mut times, measured) = (Vec::new(), Instant::now() + timing.warm_up);
    while measured.elapsed() < timing.seconds {
        let begun = Instant::now();
        let mut echo = Echo::open(way).await?;
        echo.first_byte().await?;
        let took = begun.elapsed();
        // The next one must find nothing of this one under way.
        echo.close().await?;
        if begun >= measured {
            times.push(took);
        }
    }
    if times.is_empty() { Err(DriveError::Nothing) } else { Ok(report::first_byte(&Times::of(times))) }
}

async fn requests(way: &Way, workers: usize, timing: Timing) -> Result<Value, DriveError> {
    let measured = Instant::now() + timing.warm_up;
    let measured = measured..measured + timing.seconds;
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let (way, measured) = (way.clone(), measured.clone());
        running.spawn(async move { work(&way, measured).await });
    }
    let (mut times, mut failed) = (Vec::new(), Vec::new());
    while let Some(done) = running.join_next().await {
        let (answered, not_answered) = done?;
        times.extend(answered);
        failed.extend(not_answered);
    }
    let count = failed.len();
    match failed.into_iter().next() {
        Some(first) if times.is_empty() => {
            Err(DriveError::Requests { failed: count, first: Box::new(first) })
        }
        None if times.is_empty() => Err(DriveError::Nothing),
        _ => Ok(report::requests(&Times::of(times), timing.seconds, count)),
    }
}

/// Makes requests one after the other. What those took that began and ended in the measured time, and why others of that
/// time failed.
async fn work(way: &Way, measured: Range<Instant>) -> (Vec<Duration>, Vec<DriveError>) {
    let (mut times, mut failed) = (Vec::new(), Vec::new());
    loop {
        let begun = Instant::now();
        let answered = timeout(SHORT_LIMIT, request(way)).await;
        let answered = answered.unwrap_or(Err(DriveError::Late { limit: SHORT_LIMIT }));
        let ended = Instant::now();
        match answered {
            Ok(()) if begun >= measured.start && ended <= measured.end => times.push(ended - begun),
            Err(error) if ended >= measured.start => failed.push(error),
            _ => {}
        }
        if ended >= measured.end {
            return (times, failed);
        }
    }
}

async fn request(way: &Way) -> Result<(), DriveError> {
    let broken = || DriveError::broken("a request was made");
    let mut stream = way.open().await?;
    stream.write_all(&[REQUEST; ASKED]).await.map_err(broken())?;
    stream.flush().await.map_err(broken())?;
    stream.read_exact(&mut [0; ANSWERED]).await.map_err(broken())?;
    ended_by_target(stream).await
}

/// Idle streams, each of which has echoed once.
pub(crate) struct Idle(Vec<Echo>);

pub(crate) async fn open_idle(way: &Way, streams: usize, timing: Timing) -> Result<Idle, DriveError> {
    bounded(timing, async {
        let mut echoes = Vec::new();
        for stream in open_all(way, streams).await? {
            let mut echo = Echo::on(stream);
            echo.first_byte().await?;
            echoes.push(echo);
        }
        Ok(Idle(echoes))
    })
    .await
}

impl Idle {
    /// Sees whether each is still there, and closes it.
    pub(crate) async fn check(self, timing: Timing) -> Result<(), DriveError> {
        bounded(timing, async {
            for mut echo in self.0 {
                echo.first_byte().await?;
                echo.close().await?;
            }
            Ok(())
        })
        .await
    }
}

/// A stream on which the target echoes.
struct Echo {
    stream: Stream,
    /// The target knows that.
    asked: bool,
}

impl Echo {
    async fn open(way: &Way) -> Result<Self, DriveError> {
        Ok(Self::on(way.open().await?))
    }

    fn on(stream: Stream) -> Self {
        Self { stream, asked: false }
    }

    async fn first_byte(&mut self) -> Result<(), DriveError> {
        self.there_and_back(b"x", &mut [0]).await
    }

    /// Sends words there and back for this long.
    async fn ping(&mut self, time: Duration) -> Result<Times, DriveError> {
        let (mut times, begun, mut back) = (Vec::new(), Instant::now(), [0; WORD]);
        loop {
            let sent = Instant::now();
            if sent - begun >= time && !times.is_empty() {
                return Ok(Times::of(times));
            }
            let mut word = [b'.'; WORD];
            // No two are the same.
            word[..8].copy_from_slice(&(times.len() as u64).to_be_bytes());
            self.there_and_back(&word, &mut back).await?;
            times.push(sent.elapsed());
        }
    }

    async fn there_and_back(&mut self, word: &[u8], back: &mut [u8]) -> Result<(), DriveError> {
        let broken = || DriveError::broken("an echo was awaited");
        if std::mem::replace(&mut self.asked, true) {
            self.stream.write_all(word).await.map_err(broken())?;
        } else {
            // What the stream is for goes with the first word, as it would with a client that speaks at once.
            self.stream.write_all(&[&[ECHO], word].concat()).await.map_err(broken())?;
        }
        self.stream.flush().await.map_err(broken())?;
        self.stream.read_exact(back).await.map_err(broken())?;
        if back == word { Ok(()) } else { Err(DriveError::Mangled) }
    }

    /// Ends the stream, and waits for the other half's end. What kind of end it is does not matter: everything has come back.
    async fn close(mut self) -> Result<(), DriveError> {
        let closed = async {
            self.stream.shutdown().await.ok();
            self.stream.read(&mut [0]).await.unwrap_or(0)
        };
        match timeout(SHORT_LIMIT, closed).await {
            Ok(0) => Ok(()),
            _ => Err(DriveError::Endless),
        }
    }
}

/// Opens streams, several at a time.
pub(crate) async fn open_all(way: &Way, streams: usize) -> Result<Vec<Stream>, DriveError> {
    let (mut opening, mut open) = (JoinSet::new(), Vec::with_capacity(streams));
    while open.len() < streams {
        while opening.len() < OPENING && open.len() + opening.len() < streams {
            let way = way.clone();
            opening.spawn(async move { way.open().await });
        }
        if let Some(opened) = opening.join_next().await {
            open.push(opened??);
        }
    }
    Ok(open)
}

/// The target has said its last word: there must be an end behind it, and no error.
pub(crate) async fn ended_by_target(mut stream: Stream) -> Result<(), DriveError> {
    let doing = "its end was awaited";
    match timeout(SHORT_LIMIT, stream.read(&mut [0])).await {
        Ok(Ok(0)) => {}
        Ok(Ok(_)) | Err(_) => return Err(DriveError::Endless),
        Ok(Err(error)) => return Err(DriveError::Broken { doing, error }),
    }
    // It may be gone already.
    stream.shutdown().await.ok();
    Ok(())
}
