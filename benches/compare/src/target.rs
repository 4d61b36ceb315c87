//! The server behind every tunnel. The first byte of a connection says what it is for:
//!
//! - `e`: what comes is sent back until its end.
//! - `r`: a request of 64 bytes with this one; the answer is 1 KiB and the end.
//! - `s`: a run's number in 8 bytes, then blocks of bulk bytes. The answer is three numbers of 8 bytes, all big-endian: bulk bytes
//!   on this connection, then those on all of the run's connections in the measured time, and its nanoseconds; and the end.
//! - `g`: blocks of bulk bytes are sent until one byte comes; then the last one, and the end.
//!
//! Nobody needs to end his half first, since Konnectivity and others end both halves then. Whatever else happens is a reset.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    blocks::{self, Item, Receiver},
    connections, threads,
};

/// First bytes.
pub(crate) const ECHO: u8 = b'e';
pub(crate) const REQUEST: u8 = b'r';
pub(crate) const SINK: u8 = b's';
pub(crate) const SOURCE: u8 = b'g';

/// Bytes of a request and of its answer.
pub(crate) const ASKED: usize = 64;
pub(crate) const ANSWERED: usize = 1024;

const ECHO_BUFFER: usize = 64 * 1024;

/// Serves connections until it is dropped, and they with it.
pub(crate) async fn serve(listener: &TcpListener) -> io::Result<()> {
    let runs = Arc::new(Runs::default());
    connections::serve(listener, |connection| answer(connection, runs.clone())).await
}

async fn answer(mut connection: TcpStream, runs: Arc<Runs>) -> io::Result<()> {
    let kind = connection.read_u8().await?;
    if !matches!(kind, SINK | SOURCE) {
        return answer_as(kind, connection, &runs).await;
    }
    let connection = connection.into_std()?;
    let moved = async move { answer_as(kind, TcpStream::from_std(connection)?, &runs).await };
    threads::there(threads::bulk()?, moved).await?
}

async fn answer_as(kind: u8, mut connection: TcpStream, runs: &Runs) -> io::Result<()> {
    let answered = match kind {
        ECHO => echo(&mut connection).await,
        REQUEST => request(&mut connection).await,
        SINK => sink(&mut connection, runs).await,
        SOURCE => source(&mut connection).await,
        _ => Err(io::ErrorKind::InvalidData.into()),
    };
    match answered {
        Ok(()) => connection.shutdown().await,
        // An end would say that this was all.
        Err(_) => connection.set_zero_linger(),
    }
}

async fn echo(connection: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; ECHO_BUFFER];
    loop {
        match connection.read(&mut buffer).await? {
            0 => return Ok(()),
            read => connection.write_all(&buffer[..read]).await?,
        }
    }
}

async fn request(connection: &mut TcpStream) -> io::Result<()> {
    connection.read_exact(&mut [0; ASKED - 1]).await?;
    connection.write_all(&[b'.'; ANSWERED]).await
}

async fn sink(connection: &mut TcpStream, runs: &Runs) -> io::Result<()> {
    let run = runs.run(connection.read_u64().await?);
    let mut blocks = Receiver::new();
    let received = loop {
        if let Some(received) = blocks.step(connection, |item| run.note(item)).await? {
            break received;
        }
    };
    let (bytes, nanos) = run.measured().ok_or(io::ErrorKind::InvalidData)?;
    let answer = [received, bytes, nanos].map(u64::to_be_bytes);
    connection.write_all(answer.as_flattened()).await
}

async fn source(connection: &mut TcpStream) -> io::Result<()> {
    let (mut from, mut to) = connection.split();
    let stop = AtomicBool::new(false);
    let listen = async {
        from.read_u8().await?;
        stop.store(true, Relaxed);
        Ok(())
    };
    let send = async {
        let (block, mut sent) = (blocks::bulk(), 0);
        while !stop.load(Relaxed) {
            to.write_all(&block).await?;
            sent += block.len() as u64;
        }
        to.write_all(&blocks::end(sent)).await
    };
    tokio::try_join!(listen, send).map(drop)
}

/// Runs of a driver that sends bulk bytes, by the number that it has given to each. One has gone once its connections have.
#[derive(Default)]
struct Runs(Mutex<HashMap<u64, Weak<Run>>>);

impl Runs {
    fn run(&self, number: u64) -> Arc<Run> {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(run) = runs.get(&number).and_then(Weak::upgrade) {
            return run;
        }
        runs.retain(|_, run| run.strong_count() > 0);
        let run = Arc::new(Run::default());
        runs.insert(number, Arc::downgrade(&run));
        run
    }
}

/// What the connections of a run have received together. The measured time is from the first word of its beginning on any
/// of them to the first word of its end: in between, all of them run.
#[derive(Default)]
struct Run {
    received: AtomicU64,
    begun: OnceLock<(Instant, u64)>,
    finished: OnceLock<(Instant, u64)>,
}

impl Run {
    fn note(&self, item: Item) {
        let now = || (Instant::now(), self.received.load(Relaxed));
        match item {
            Item::Bulk(bytes) => {
                self.received.fetch_add(bytes, Relaxed);
            }
            Item::Begin => {
                self.begun.get_or_init(now);
            }
            Item::Finish => {
                self.finished.get_or_init(now);
            }
            Item::End(_) => {}
        }
    }

    /// Bytes and nanoseconds of the measured time, once it is over.
    fn measured(&self) -> Option<(u64, u64)> {
        let ((begun, before), (finished, after)) = (self.begun.get()?, self.finished.get()?);
        let nanos = u64::try_from(finished.saturating_duration_since(*begun).as_nanos()).ok()?;
        Some((after.checked_sub(*before)?, nanos))
    }
}
