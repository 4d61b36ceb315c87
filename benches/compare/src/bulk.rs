//! Bulk bytes on many streams at once. They are counted where they are received, while all streams run; and at the end of
//! each stream, sender and receiver must have counted the same. Used by `workloads`, which may do something else meanwhile.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    pin, select,
    sync::watch,
    task::JoinSet,
};

use crate::{
    blocks::{self, Direction, Item, Receiver},
    report::Throughput,
    target::{SINK, SOURCE},
    threads,
    way::{Stream, Way},
    workloads::{DriveError, ended_by_target, open_all},
};

/// What all streams are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measured,
    Over,
}

/// Streams that are running.
pub(crate) struct Load {
    streams: JoinSet<Result<Option<Throughput>, DriveError>>,
    phase: watch::Sender<Phase>,
    /// Bulk bytes that have come down so far, or went up on streams that have ended; and what that was when the measured
    /// time began.
    received: Arc<AtomicU64>,
    begun: (Instant, u64),
}

impl Load {
    /// Opens all streams, then starts them.
    pub(crate) async fn start(way: &Way, streams: usize, direction: Direction) -> Result<Self, DriveError> {
        let (phase, _) = watch::channel(Phase::WarmUp);
        let received = Arc::new(AtomicU64::new(0));
        let run = rand::random::<u64>();
        let mut running = JoinSet::new();
        let threads = threads::bulk().map_err(DriveError::Threads)?;
        let way = way.clone();
        for stream in threads::there(threads, async move { open_all(&way, streams).await }).await?? {
            let (phase, received) = (phase.subscribe(), received.clone());
            let work = async move {
                match direction {
                    Direction::Up => up(stream, run, &phase, &received).await.map(Some),
                    Direction::Down => down(stream, phase, &received).await.map(|()| None),
                }
            };
            running.spawn_on(work, threads);
        }
        Ok(Self { streams: running, phase, received, begun: (Instant::now(), 0) })
    }

    /// Waits for something else while all streams run.
    pub(crate) async fn during<T>(
        &mut self,
        other: impl Future<Output = Result<T, DriveError>>,
    ) -> Result<T, DriveError> {
        select! {
            // A stream that breaks first, since there is nothing to be measured any more.
            biased;
            Some(ended) = self.streams.join_next() => match ended? {
                Ok(_) => Err(DriveError::Early),
                Err(error) => Err(error),
            },
            done = other => done,
        }
    }

    /// Begins the measured time.
    pub(crate) fn begin(&mut self) {
        self.begun = (Instant::now(), self.received.load(Relaxed));
        self.phase.send_replace(Phase::Measured);
    }

    /// Ends the measured time, and then the streams. Also: all bytes that they carried, before and after it.
    pub(crate) async fn finish(mut self) -> Result<(Throughput, u64), DriveError> {
        let (begun, before) = self.begun;
        let down = Throughput { bytes: self.received.load(Relaxed) - before, time: begun.elapsed() };
        self.phase.send_replace(Phase::Over);
        let mut moved = down;
        while let Some(ended) = self.streams.join_next().await {
            // Each stream that went up says the same of all.
            moved = ended??.unwrap_or(moved);
        }
        if moved.bytes == 0 || moved.time.is_zero() {
            return Err(DriveError::Nothing);
        }
        Ok((moved, self.received.load(Relaxed)))
    }
}

async fn up(
    mut stream: Stream,
    run: u64,
    phase: &watch::Receiver<Phase>,
    all: &AtomicU64,
) -> Result<Throughput, DriveError> {
    let broken = DriveError::broken("bulk bytes went up");
    let sent = send(&mut stream, run, phase).await.map_err(broken)?;
    let mut answer = [0; 24];
    stream.read_exact(&mut answer).await.map_err(DriveError::broken("the target's count was awaited"))?;
    let [received, bytes, nanos] = [0, 8, 16]
        .map(|at| answer[at..at + 8].iter().fold(0, |number, &digit| number << 8 | u64::from(digit)));
    if received != sent {
        return Err(DriveError::Count { sent, received });
    }
    ended_by_target(stream).await?;
    all.fetch_add(received, Relaxed);
    Ok(Throughput { bytes, time: Duration::from_nanos(nanos) })
}

/// How many bulk bytes.
async fn send(stream: &mut Stream, run: u64, phase: &watch::Receiver<Phase>) -> io::Result<u64> {
    stream.write_u8(SINK).await?;
    stream.write_u64(run).await?;
    let (block, mut sent) = (blocks::bulk(), 0);
    for (now, mark) in [(Phase::WarmUp, blocks::BEGIN), (Phase::Measured, blocks::FINISH)] {
        while *phase.borrow() == now {
            stream.write_all(&block).await?;
            sent += block.len() as u64;
        }
        stream.write_u8(mark).await?;
    }
    stream.write_all(&blocks::end(sent)).await?;
    stream.flush().await?;
    Ok(sent)
}

async fn down(
    mut stream: Stream,
    mut phase: watch::Receiver<Phase>,
    received: &AtomicU64,
) -> Result<(), DriveError> {
    let broken = || DriveError::broken("bulk bytes came down");
    stream.write_u8(SOURCE).await.map_err(broken())?;
    stream.flush().await.map_err(broken())?;
    let over = async { phase.wait_for(|phase| *phase == Phase::Over).await.is_ok() };
    pin!(over);
    let (mut blocks, mut asked_to_stop) = (Receiver::new(), false);
    let count = |item| {
        if let Item::Bulk(bytes) = item {
            received.fetch_add(bytes, Relaxed);
        }
    };
    loop {
        select! {
            // The end first, or else it would wait for as long as there is something to read.
            biased;
            _ = &mut over, if !asked_to_stop => {
                asked_to_stop = true;
                stream.write_u8(0).await.map_err(broken())?;
                stream.flush().await.map_err(broken())?;
            }
            // Loses nothing when it is not the one.
            last = blocks.step(&mut stream, count) => {
                if last.map_err(broken())?.is_some() {
                    break;
                }
            }
        }
    }
    ended_by_target(stream).await
}
