//! What goes through the tunnel in tests, and how it is judged: a target that does as its first line says, and the
//! requests of a control plane that know what must come back. Used by the simulation and over real sockets alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::sleep,
};
use tunnel_core::{Aborted, Leg, proto::messages::AbortCode};

const PIECE: usize = 16 * 1024;
/// How long a target that reads nothing stays so. Nobody behind a full window can see that a sender has gone, neither
/// here nor on a direct TCP connection.
const STUCK: Duration = Duration::from_secs(15);
/// How long a side that will go on says nothing.
const SILENCE: Duration = Duration::from_secs(5);
/// Longer than any test: a target that hangs does so until its program is killed.
const HUNG: Duration = Duration::from_secs(24 * 3600);

/// What a request asks of the target, in one line: `ID KIND BYTES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The target sends this many bytes, then its end.
    Download,
    /// The target reads to the end, checks, and answers `whole`.
    Upload,
    /// The target sends back what comes, until the end.
    Echo,
    /// The target sends this many bytes, then resets.
    Cut,
    /// The target reads nothing for a while, then resets.
    Stuck,
    /// As an echo, but the client is silent for a while in its midst.
    Idle,
    /// As a download, but the target is silent for a while before it begins: all that time one half is closed.
    Late,
    /// The client says all that it has to say; the target hangs, and has read none of it.
    Deaf,
    /// As above, but the target has read all of it.
    Mute,
}

impl Kind {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Download, "download"),
        (Self::Upload, "upload"),
        (Self::Echo, "echo"),
        (Self::Cut, "cut"),
        (Self::Stuck, "stuck"),
        (Self::Idle, "idle"),
        (Self::Late, "late"),
        (Self::Deaf, "deaf"),
        (Self::Mute, "mute"),
    ];

    /// Whether it stays half-closed and silent, for ever.
    pub fn is_half_closed(self) -> bool {
        matches!(self, Self::Deaf | Self::Mute)
    }

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

/// The bytes of a transfer: byte `n` of stream `id`, different for every stream and never periodic within one.
pub fn byte(id: u64, n: u64) -> u8 {
    let mixed = (n ^ id.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

fn fill(id: u64, from: u64, buffer: &mut [u8]) {
    for (n, slot) in (from..).zip(buffer) {
        *slot = byte(id, n);
    }
}

/// The first byte that differs from what stream `id` must carry from `from` on.
fn difference(id: u64, from: u64, bytes: &[u8]) -> Option<u64> {
    (from..).zip(bytes).find(|(n, got)| byte(id, *n) != **got).map(|(n, _)| n)
}

/// What both ends of all streams know, to be compared: a clean end at a target counts only if the sender meant it.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    /// Bytes that a client has sent whole and ended cleanly, by stream.
    ended: BTreeMap<u64, u64>,
    /// Streams of clients to which, and from which, a reset looks like an end of file.
    without_resets: BTreeSet<u64>,
    broken: Vec<String>,
}

impl Ledger {
    fn client_ends(&self, id: u64, bytes: u64) {
        self.0.lock().unwrap().ended.insert(id, bytes);
    }

    /// The client of this stream has a connection without resets: it cannot tell an end of file from a failure, and
    /// neither can its target, should it go away.
    pub fn without_resets(&self, id: u64) {
        self.0.lock().unwrap().without_resets.insert(id);
    }

    /// A stream ended cleanly where it must not: a broken promise, or, without resets, a failure like any other.
    fn false_end(&self, id: u64, what: String) -> io::Result<()> {
        if self.0.lock().unwrap().without_resets.contains(&id) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        self.broken(what);
        Ok(())
    }

    /// A promise was broken.
    pub fn broken(&self, what: String) {
        self.0.lock().unwrap().broken.push(what);
    }

    /// Every broken promise so far.
    pub fn breaches(&self) -> Vec<String> {
        self.0.lock().unwrap().broken.clone()
    }

    fn check_upload(&self, id: u64, received: u64, different: Option<u64>) -> io::Result<()> {
        let ended = self.0.lock().unwrap().ended.get(&id).copied();
        if let Some(at) = different {
            self.broken(format!("stream {id}: byte {at} arrived changed at the target"));
        } else if ended != Some(received) {
            let what = format!(
                "the target saw a clean end after {received} bytes; the client ended after {ended:?}"
            );
            return self.false_end(id, format!("stream {id}: {what}"));
        }
        Ok(())
    }
}

/// Serves one connection at a target on `node` as its first line says. Errors are the connection's.
pub async fn serve(mut socket: impl Leg, node: &str, ledger: &Ledger) -> io::Result<()> {
    // What a test's target does not end itself must not look like an end.
    socket.arm();
    let mut socket = BufReader::with_capacity(PIECE, socket);
    let mut line = String::new();
    (&mut socket).take(200).read_line(&mut line).await?;
    let mut words = line.split_ascii_whitespace();
    let id: u64 = words.next().and_then(|word| word.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    let kind = words.next().and_then(|word| Kind::ALL.iter().find(|(_, name)| *name == word));
    let bytes: u64 = words.next().and_then(|word| word.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    socket.write_all(format!("{node}\n").as_bytes()).await?;
    match kind.map(|(kind, _)| *kind) {
        Some(kind @ (Kind::Download | Kind::Late)) => {
            if kind == Kind::Late {
                sleep(SILENCE).await;
            }
            send(&mut socket, id, 0..bytes).await?;
            socket.shutdown().await?;
            discard(&mut socket).await?;
        }
        Some(Kind::Upload) => {
            let (received, different) = receive(&mut socket, id).await?;
            ledger.check_upload(id, received, different)?;
            socket.write_all(b"whole").await?;
            socket.shutdown().await?;
        }
        Some(Kind::Echo | Kind::Idle) => {
            let mut piece = vec![0; PIECE];
            loop {
                let read = socket.read(&mut piece).await?;
                if read == 0 {
                    break;
                }
                socket.write_all(&piece[..read]).await?;
                socket.flush().await?;
            }
            socket.shutdown().await?;
        }
        Some(Kind::Cut) => {
            send(&mut socket, id, 0..bytes).await?;
            socket.get_mut().abort(&Aborted::new(AbortCode::Reset, "cut"));
            return Ok(());
        }
        Some(Kind::Stuck) => {
            sleep(STUCK).await;
            socket.get_mut().abort(&Aborted::new(AbortCode::Timeout, "stuck for long enough"));
            return Ok(());
        }
        Some(Kind::Deaf) => sleep(HUNG).await,
        Some(Kind::Mute) => {
            receive(&mut socket, id).await?;
            sleep(HUNG).await;
        }
        None => return Err(io::ErrorKind::InvalidData.into()),
    }
    socket.get_mut().finish();
    Ok(())
}

/// Sends these bytes of stream `id`.
pub async fn send(writer: &mut (impl AsyncWrite + Unpin), id: u64, bytes: Range<u64>) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut sent = bytes.start;
    while sent < bytes.end {
        let length = usize::try_from(bytes.end - sent).map_or(PIECE, |left| left.min(PIECE));
        fill(id, sent, &mut piece[..length]);
        writer.write_all(&piece[..length]).await?;
        sent += length as u64;
    }
    writer.flush().await
}

/// Reads stream `id` to its clean end: how many bytes came, and the first that differed.
pub async fn receive(reader: &mut (impl AsyncRead + Unpin), id: u64) -> io::Result<(u64, Option<u64>)> {
    let mut piece = vec![0; PIECE];
    let (mut received, mut different) = (0, None);
    loop {
        let read = reader.read(&mut piece).await?;
        if read == 0 {
            return Ok((received, different));
        }
        different = different.or_else(|| difference(id, received, &piece[..read]));
        received += read as u64;
    }
}

async fn discard(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    tokio::io::copy(reader, &mut tokio::io::sink()).await.map(drop)
}

/// A request, and what must come of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique in the test.
    pub id: u64,
    /// The node that must answer.
    pub node: String,
    /// What is asked.
    pub kind: Kind,
    /// How much of it.
    pub bytes: u64,
}

/// How a request went, where nothing was promised that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything came as it must.
    Whole,
    /// It failed, and the client could tell.
    FailedLoudly(String),
}

impl Request {
    /// Carries the request out over a connection to its target, and writes broken promises into the ledger.
    pub async fn run<S>(&self, stream: S, ledger: &Ledger) -> Outcome
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match self.exchange(stream, ledger).await {
            Ok(()) => Outcome::Whole,
            Err(error) => Outcome::FailedLoudly(error.to_string()),
        }
    }

    async fn exchange<S>(&self, stream: S, ledger: &Ledger) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = BufReader::with_capacity(PIECE, reader);
        writer.write_all(format!("{} {} {}\n", self.id, self.kind.name(), self.bytes).as_bytes()).await?;
        writer.flush().await?;
        let mut node = String::new();
        (&mut reader).take(300).read_line(&mut node).await?;
        if !node.ends_with('\n') {
            return ledger.false_end(self.id, format!("stream {}: a clean end after {node:?}", self.id));
        }
        if node.trim_end() != self.node {
            ledger.broken(format!("stream {}: asked for {}, answered by {node:?}", self.id, self.node));
            return Ok(());
        }
        match self.kind {
            Kind::Download | Kind::Late => {
                writer.shutdown().await?;
                self.judge(ledger, receive(&mut reader, self.id).await?)?;
            }
            Kind::Cut => {
                let (received, _) = receive(&mut reader, self.id).await?;
                let what = format!("was reset, but ended cleanly after {received} bytes");
                ledger.false_end(self.id, format!("stream {}: {what}", self.id))?;
            }
            Kind::Upload => {
                send(&mut writer, self.id, 0..self.bytes).await?;
                ledger.client_ends(self.id, self.bytes);
                writer.shutdown().await?;
                let mut answer = String::new();
                reader.read_to_string(&mut answer).await?;
                if answer != "whole" {
                    let what = format!("stream {}: {answer:?} instead of a whole answer", self.id);
                    ledger.false_end(self.id, what)?;
                }
            }
            Kind::Echo | Kind::Idle => {
                let sending = async {
                    let first = if self.kind == Kind::Idle { self.bytes / 2 } else { self.bytes };
                    send(&mut writer, self.id, 0..first).await?;
                    if self.kind == Kind::Idle {
                        sleep(SILENCE).await;
                        send(&mut writer, self.id, first..self.bytes).await?;
                    }
                    writer.shutdown().await
                };
                let (sent, received) = tokio::join!(sending, receive(&mut reader, self.id));
                self.judge(ledger, received?)?;
                sent?;
            }
            Kind::Stuck => {
                send(&mut writer, self.id, 0..self.bytes).await?;
            }
            Kind::Deaf | Kind::Mute => {
                send(&mut writer, self.id, 0..self.bytes).await?;
                writer.shutdown().await?;
                let (received, _) = receive(&mut reader, self.id).await?;
                let what = format!("the target hangs, but there was a clean end after {received} bytes");
                ledger.false_end(self.id, format!("stream {}: {what}", self.id))?;
            }
        }
        Ok(())
    }

    fn judge(&self, ledger: &Ledger, (received, different): (u64, Option<u64>)) -> io::Result<()> {
        if let Some(at) = different {
            ledger.broken(format!("stream {}: byte {at} came back changed", self.id));
        } else if received != self.bytes {
            let what = format!("stream {}: a clean end after {received} of {} bytes", self.id, self.bytes);
            return ledger.false_end(self.id, what);
        }
        Ok(())
    }
}
