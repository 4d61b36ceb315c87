//! The wire of the network lab: holds every packet of one netfilter queue back for a while. `lab.py` starts one for
//! each direction of a link that has a delay, in the network of the host that receives there.
//!
//! Why a netfilter queue, and not a pair of TUN devices: the packets stay in the kernel. Only their numbers come here,
//! and one message lets all go that are due; nothing is copied, and a packet of 64 KB, which the kernel cuts up only
//! where it must, costs no more than a small one. Two wires carry a gigabit a second, 25 ms each, in 15 % of a core,
//! and 4.5 Gbit/s at most, measured on two cores by `run --self-check`; TUN would copy every byte four times. And the
//! hosts keep ordinary Ethernet, with a rate, loss and delay that are set one by one.
//!
//! Asked on standard input, a line each time: the delay and the jitter in microseconds. Answers each with `ok`. Ends
//! with its input.

mod delay;
mod queue;

use std::{
    collections::VecDeque,
    env,
    io::{self, BufRead, Write},
    os::fd::AsFd,
    process::ExitCode,
    time::Instant,
};

use rand::{SeedableRng, rngs::SmallRng};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{delay::Delay, queue::Queue};

/// Longer than any line of settings.
const LINE: usize = 256;

fn main() -> ExitCode {
    match act() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where standard error is gone too, the exit code must do.
            let _ = writeln!(io::stderr(), "tunnel-netlab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act() -> Result<(), Error> {
    let argument = env::args().nth(1).unwrap_or_default();
    let number = argument.parse().map_err(|_| Error::Argument(argument))?;
    let mut wire = Wire {
        queue: Queue::bind(number).map_err(|error| Error::Bind(number, error))?,
        delay: Delay::new(SmallRng::from_os_rng()),
        held: VecDeque::new(),
        taken: Instant::now(),
        asked: Vec::new(),
    };
    while wire.turn()? {}
    Ok(())
}

/// Why the wire ends, other than by the end of its input.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "the argument is the number of a netfilter queue, 0 to 65535, not `{0}`: lab.py starts this program"
    )]
    Argument(String),
    #[error(
        "netfilter queue {0} cannot be had: {1}; it takes root, nfnetlink_queue in the kernel, and no other wire there"
    )]
    Bind(u16, queue::Error),
    #[error("the netfilter queue broke: {0}")]
    Queue(#[from] queue::Error),
    #[error(
        "standard input has `{0}`: a line has the delay and the jitter in microseconds, the jitter no larger"
    )]
    Settings(String),
    #[error("standard input or output: {0}")]
    Lab(#[from] io::Error),
}

struct Wire {
    queue: Queue,
    delay: Delay,
    /// When what goes, and the number of the last packet that then goes. The kernel bounds how many packets wait.
    held: VecDeque<(Instant, u32)>,
    /// When packets came last.
    taken: Instant,
    /// What has come of a line.
    asked: Vec<u8>,
}

impl Wire {
    /// Waits for something to do and does it. False when there is nothing more to come.
    fn turn(&mut self) -> Result<bool, Error> {
        let begun = Instant::now();
        let refreshed = self.taken + self.delay.rest();
        let rests = refreshed > begun;
        let due = self.held.front().map(|held| held.0);
        let rested = rests.then_some(refreshed);
        let until = due.into_iter().chain(rested).min();
        // A timeout that cannot be told would be longer than any.
        let timeout = until.and_then(|until| Timespec::try_from(until.saturating_duration_since(begun)).ok());

        let input = io::stdin();
        let watched = &mut [
            PollFd::new(&input, PollFlags::IN),
            PollFd::from_borrowed_fd(self.queue.as_fd(), PollFlags::IN),
        ];
        let count = if rests { 1 } else { 2 };
        match poll(&mut watched[..count], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::Lab(error.into())),
        }
        let asked = !watched[0].revents().is_empty();

        // Whatever the wire woke for, it does all there is, so as to wake less.
        let now = Instant::now();
        if let Some(last) = self.queue.arrived()? {
            // What came during a rest came in the middle of it, on average.
            let came = if rests { self.taken + (now - self.taken) / 2 } else { now };
            self.held.push_back((self.delay.due(came), last));
            self.taken = now;
        }
        self.let_go()?;
        if asked { self.listen() } else { Ok(true) }
    }

    fn let_go(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let mut last = None;
        while let Some((due, number)) = self.held.front().copied()
            && due <= now
        {
            last = Some(number);
            self.held.pop_front();
        }
        Ok(last.map_or(Ok(()), |last| self.queue.accept(last))?)
    }

    /// False at the end of the input.
    fn listen(&mut self) -> Result<bool, Error> {
        // All that the buffer has: what stayed there, poll would not see.
        let mut input = io::stdin().lock();
        let bytes = input.fill_buf()?;
        let count = bytes.len();
        self.asked.extend_from_slice(bytes);
        input.consume(count);
        while let Some(end) = self.asked.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.asked.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            self.delay.set(line.parse().map_err(|_| Error::Settings(line.trim().to_owned()))?);
            let mut output = io::stdout();
            output.write_all(b"ok\n")?;
            output.flush()?;
        }
        if self.asked.len() > LINE {
            return Err(Error::Settings(String::from_utf8_lossy(&self.asked).into_owned()));
        }
        Ok(count > 0)
    }
}
