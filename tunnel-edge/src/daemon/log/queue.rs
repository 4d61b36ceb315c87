//! What stands between the program and standard error: a queue of lines and the one thread that writes them. Made by
//! [`super::init`].
//!
//! A reader that stalls, a pipe that nobody reads and a disk that is full must not stop or end a program that works. So
//! a line that does not fit, or cannot be written, is dropped and counted. `tracing-appender` would do, but it counts only
//! the lines that do not fit, bounds their number and not their bytes, and panics at its end if standard output is closed.

use std::{
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use tracing_subscriber::fmt::MakeWriter;

/// A buffer that has grown beyond this is given back when it has been written.
const KEPT: usize = 64 * 1024;
/// Pause before another attempt on a descriptor that somebody has set to non-blocking.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Lines that wait to be written. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write.
    filled: Condvar,
    /// All has been written.
    emptied: Condvar,
    /// Most bytes that wait.
    limit: usize,
    dropped: Counter,
    /// Cancelled when nobody writes any more.
    ended: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<u8>,
    /// The thread has lines that it has not written yet.
    writing: bool,
}

impl Queue {
    /// Starts the thread, which writes to `sink` for as long as the process runs. At most `limit` bytes wait for it.
    pub(super) fn start(sink: impl Write + Send + 'static, limit: usize) -> io::Result<Self> {
        let queue = Self(Arc::new(Shared {
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            limit,
            dropped: Counter::default(),
            ended: CancellationToken::new(),
        }));
        let (shared, ended) = (queue.0.clone(), queue.0.ended.clone().drop_guard());
        thread::Builder::new().name("log".to_owned()).spawn(move || {
            let _ended = ended;
            shared.write_for_ever(Output { sink, torn: false });
        })?;
        Ok(queue)
    }

    /// Lines that were not written.
    pub(super) fn dropped(&self) -> &Counter {
        &self.0.dropped
    }

    /// Cancelled if the thread has failed.
    pub(super) fn ended(&self) -> CancellationToken {
        self.0.ended.clone()
    }

    /// Waits until all lines have been written, at most so long.
    pub(super) fn flush(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let mut state = self.0.state.lock();
        while !state.lines.is_empty() || state.writing {
            if self.0.emptied.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Shared {
    fn push(&self, line: &[u8]) {
        let mut state = self.state.lock();
        if state.lines.len() + line.len() > self.limit {
            self.dropped.inc();
        } else {
            state.lines.extend_from_slice(line);
            self.filled.notify_one();
        }
    }

    fn write_for_ever(&self, mut output: Output<impl Write>) {
        let mut reported = 0;
        loop {
            let lines = self.next_lines();
            let mut lost = 0;
            // One by one: others may write to the same descriptor.
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                if output.write_line(line).is_err() {
                    self.dropped.inc();
                    lost += 1;
                }
            }
            let dropped = self.dropped.get();
            if lost == 0 && dropped > reported {
                warn!(
                    lines = dropped - reported,
                    "this log has lost lines, which standard error did not take"
                );
                reported = dropped;
            }
        }
    }

    /// Waits for lines. Those that it gave before are written.
    fn next_lines(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.writing = false;
        while state.lines.is_empty() {
            self.emptied.notify_all();
            self.filled.wait(&mut state);
        }
        state.writing = true;
        let room = state.lines.len().min(KEPT);
        std::mem::replace(&mut state.lines, Vec::with_capacity(room))
    }
}

/// Where lines go, and whether the last one was written in part only.
struct Output<W> {
    sink: W,
    torn: bool,
}

impl<W: Write> Output<W> {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.write(b"\n")?;
            self.torn = false;
        }
        self.write(line)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.sink.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = &rest[written..];
                    self.torn = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(BUSY_PAUSE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Takes one line at a time, and never fails.
pub(super) struct Pen<'a>(&'a Shared);

impl Write for Pen<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Pen<'a>;

    fn make_writer(&'a self) -> Pen<'a> {
        Pen(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Does with each write what it is told to: takes so many bytes, or fails.
    struct Scripted(Receiver<io::Result<usize>>, Arc<Mutex<Vec<u8>>>);

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = self.0.recv().unwrap_or(Ok(bytes.len()))?.min(bytes.len());
            self.1.lock().extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Rig {
        queue: Queue,
        script: Sender<io::Result<usize>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    fn rig(limit: usize) -> Rig {
        let (script, receiver) = channel();
        let written = Arc::default();
        let queue = Queue::start(Scripted(receiver, Arc::clone(&written)), limit).unwrap();
        Rig { queue, script, written }
    }

    impl Rig {
        fn say(&self, line: &str) {
            self.queue.make_writer().write_all(line.as_bytes()).unwrap();
        }

        /// What was written, once all is done. The script ends here.
        fn end(self) -> (String, u64) {
            drop(self.script);
            self.queue.flush(PATIENCE);
            let state = self.queue.0.state.lock();
            assert!(state.lines.is_empty() && !state.writing);
            drop(state);
            let text = String::from_utf8(self.written.lock().clone()).unwrap();
            (text, self.queue.dropped().get())
        }
    }

    #[test]
    fn lines_that_do_not_fit_are_dropped_and_counted() {
        let rig = rig(8);
        // The first line is being written and counts no more, however long that takes.
        rig.say("a\n");
        while !rig.queue.0.state.lock().writing {
            thread::yield_now();
        }
        for line in ["two\n", "four\n", "6\n", "7\n", "8\n"] {
            rig.say(line);
        }
        assert_eq!(rig.queue.dropped().get(), 2);
        assert_eq!(rig.end(), ("a\ntwo\n6\n7\n".to_owned(), 2));
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_a_torn_one_is_ended() {
        let rig = rig(100);
        let broken = || Err(io::ErrorKind::StorageFull.into());
        // "one" fails. "two" is torn, and so is what would end it. "four" is whole again, in two pieces.
        let script = [broken(), Ok(2), broken(), Ok(0), Ok(1), Ok(4), Ok(1)];
        let retried = [Err(io::ErrorKind::Interrupted.into()), Err(io::ErrorKind::WouldBlock.into())];
        for step in script.into_iter().chain(retried) {
            rig.script.send(step).unwrap();
        }
        for line in ["one\n", "two\n", "three\n", "four\n", "five\n"] {
            rig.say(line);
        }
        assert_eq!(rig.end(), ("tw\nfour\nfive\n".to_owned(), 3));
    }

    #[test]
    fn a_writer_that_stalls_is_not_waited_for_longer_than_told() {
        let rig = rig(100);
        rig.say("stuck\n");
        let begun = Instant::now();
        rig.queue.flush(Duration::from_millis(50));
        assert!(begun.elapsed() < PATIENCE);
        assert_eq!(rig.written.lock().len(), 0);
        assert!(!rig.queue.ended().is_cancelled());
        assert_eq!(rig.end(), ("stuck\n".to_owned(), 0));
    }

    #[test]
    fn a_thread_that_fails_is_noticed() {
        struct Failing;
        impl Write for Failing {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                panic!("as the test wants it")
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let queue = Queue::start(Failing, 100).unwrap();
        queue.make_writer().write_all(b"line\n").unwrap();
        let begun = Instant::now();
        while !queue.ended().is_cancelled() {
            assert!(begun.elapsed() < PATIENCE, "nobody noticed");
            thread::yield_now();
        }
    }
}
